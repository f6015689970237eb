// The engine's wheel lacks this header, which tvm/runtime/metadata.h wants; nothing here uses what
// it describes, so the few words that the compiler needs suffice.

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
