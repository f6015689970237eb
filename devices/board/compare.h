// An answer against the reference's.

#pragma once

#include <dlpack/dlpack.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bundle_check.h"

namespace netship {

using Bytes = std::vector<unsigned char>;

template <typename Element>
double element(const Bytes& bytes, size_t index) {
  Element value;
  std::memcpy(&value, bytes.data() + index * sizeof value, sizeof value);
  return static_cast<double>(value);
}

// One element as a number; 64 bits beyond 2^53 are rounded, on both sides of a comparison alike.
inline double number(const Type& type, const Bytes& bytes, size_t index) {
  if (type.code == kDLFloat) return element<float>(bytes, index);
  if (type.bytes == 8) return element<int64_t>(bytes, index);
  if (type.bytes == 4) return element<int32_t>(bytes, index);
  return type.code == kDLInt ? element<int8_t>(bytes, index) : element<uint8_t>(bytes, index);
}

// The largest error, and the largest of an element in units of its tolerance.
struct Error {
  double absolute = 0, excess = 0;

  void include(const Error& other) {
    absolute = std::max(absolute, other.absolute);
    excess = std::max(excess, other.excess);
  }
};

// As compare() of bundle/accuracy.py: a value that is infinite or NaN on one side only is an infinite error.
inline Error compare(const Tensor& tensor, const Bytes& found, const Bytes& expected, const std::vector<float>& tolerances) {
  Error worst;
  for (size_t i = 0; i < tensor.size; i++) {
    double ours = number(*tensor.type, found, i), theirs = number(*tensor.type, expected, i);
    if (ours == theirs || (std::isnan(ours) && std::isnan(theirs))) continue;
    if (!std::isfinite(ours) || !std::isfinite(theirs)) return {INFINITY, INFINITY};
    double error = std::fabs(ours - theirs);
    worst.include({error, error / static_cast<double>(tolerances[i])});
  }
  return worst;
}

}  // namespace netship
