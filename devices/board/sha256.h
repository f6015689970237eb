// SHA-256 (FIPS 180-4).

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace netship {

class Sha256 {
 public:
  void add(const void* data, size_t bytes);

  // The hash in lower-case hexadecimal; the object cannot be used again.
  std::string hex();

 private:
  void add_block(const unsigned char* block);

  // Section 5.3.3: the first 32 bits of the fractional parts of the square roots of the first 8 primes.
  uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                        0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  unsigned char pending_[64];
  uint64_t bytes_ = 0;
};

// The hash of an open file, from its beginning; throws std::system_error where it cannot be read.
std::string sha256_of(int file);

}  // namespace netship
