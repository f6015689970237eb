// A bundle on disk, checked before anything in it is used (the rules of bundle/manifest.py and
// bundle/store.py).

#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace netship {

struct Golden {
  std::string input;
  std::vector<std::string> outputs, tolerances;
};

// Paths are absolute; sizes are numbers of float32 values.
struct Bundle {
  bool standalone;
  std::string name, model, target, library, input_name;
  std::vector<long> input_shape;
  size_t input_size;
  std::vector<size_t> output_sizes;
  std::vector<Golden> golden;
  int threads;
  size_t files;
};

// Reads manifest.json, verifies every file's SHA-256, the golden data's sizes, the library's ELF
// machine, and that this CPU has the features it was built for. Throws Refusal.
Bundle open_bundle(const std::string& folder);

}  // namespace netship
