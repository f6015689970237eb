// What netship-verify does for netship's meter: marks an inference, and gives its parallel launches to a preloaded library.

#pragma once

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "refusal.h"

namespace netship {

// Hints that do nothing on any CPU; the meter's QEMU plugin counts what lies between them: an inference.
inline void begin_metered() {
#ifdef __aarch64__
  __asm__ volatile("hint #0x60" ::: "memory");
#endif
}

inline void end_metered() {
#ifdef __aarch64__
  __asm__ volatile("hint #0x61" ::: "memory");
#endif
}

// Runs parallel tasks in the meter's own way (meter/serial.c); null outside of it.
inline void* meters_launch() { return dlsym(RTLD_DEFAULT, "netship_parallel_launch"); }

// A bundle's library calls TVM's launch through a pointer.
inline void give_launch_to_meter(const std::string& path) {
  void* meters = meters_launch();
  if (meters == nullptr) return;
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  auto place = library ? static_cast<void**>(dlsym(library, "__TVMBackendParallelLaunch")) : nullptr;
  if (place != nullptr) *place = meters;
}

// A standalone library calls a launch of its own, which nothing outside can name: the meter reads its address in the
// file, and says it in NETSHIP_METER_LAUNCH. A jump takes the place of its first instructions.
inline void give_own_launch_to_meter(const std::string& path, const void* function) {
#ifdef __aarch64__
  void* meters = meters_launch();
  const char* offset = std::getenv("NETSHIP_METER_LAUNCH");
  if (meters == nullptr || offset == nullptr) return;
  Dl_info library;
  if (!dladdr(function, &library)) throw Refusal{path + ": was not loaded from a file"};
  const uint32_t jump[] = {0x58000050 /* ldr x16, after */, 0xd61f0200 /* br x16 */};
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  auto at = static_cast<char*>(library.dli_fbase) + std::strtoull(offset, nullptr, 16);
  auto first = reinterpret_cast<uintptr_t>(at) / page * page;
  size_t bytes = reinterpret_cast<uintptr_t>(at) + sizeof jump + sizeof meters - first;
  if (mprotect(reinterpret_cast<void*>(first), bytes, PROT_READ | PROT_WRITE | PROT_EXEC))
    throw Refusal{path + ": its code cannot be changed"};
  std::memcpy(at, jump, sizeof jump);
  std::memcpy(at + sizeof jump, &meters, sizeof meters);
  __builtin___clear_cache(at, at + sizeof jump + sizeof meters);
#else
  (void)path, (void)function;
#endif
}

}  // namespace netship
