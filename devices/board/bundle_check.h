// A bundle on disk, checked before anything in it is used (the rules of bundle/manifest.py and
// bundle/store.py).

#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace netship {

struct Golden {
  std::vector<std::string> inputs, outputs, tolerances;
};

// A type of elements: numpy's name, bytes, and code and bits of a DLDataType.
struct Type {
  const char* name;
  size_t bytes;
  int code, bits;
};

struct Tensor {
  std::string name;
  const Type* type;
  std::vector<long> shape;
  size_t size;  // elements

  size_t bytes() const { return size * type->bytes; }
};

// Paths are absolute.
struct Bundle {
  bool standalone;
  std::string name, model, target, library;
  std::vector<Tensor> inputs, outputs;
  std::vector<Golden> golden;
  int threads;
  size_t files;
};

// Reads manifest.json, verifies every file's SHA-256, the golden data's sizes, the library's ELF
// machine, and that this CPU has the features it was built for. Throws Refusal.
Bundle open_bundle(const std::string& folder);

}  // namespace netship
