// What the server reports, on standard error.

#pragma once

#include <cstdarg>
#include <cstdio>

namespace netship {

inline void say(const char* format, ...) __attribute__((format(printf, 1, 2)));
inline void say(const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::fputs("netship-serve: ", stderr);
  std::vfprintf(stderr, format, values);
  std::fputc('\n', stderr);
  va_end(values);
}

}  // namespace netship
