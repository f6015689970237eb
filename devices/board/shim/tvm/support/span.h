// The engine's wheel lacks this header, which tvm/runtime/metadata.h includes. Nothing here uses its
// types, so these declarations are enough for the compiler.

#pragma once

namespace tvm {
namespace support {

template <typename T, typename Shown>
struct Span {
  Span(T* first, T* last) : first(first), last(last) {}
  T* first;
  T* last;
};

}  // namespace support
}  // namespace tvm
