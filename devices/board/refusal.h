// An error that the user can correct; a program's main() prints it in one line and exits with 2.

#pragma once

#include <cstdlib>
#include <string>

namespace netship {

struct Refusal {
  std::string what;
};

// The whole number that is the value of an option.
inline int to_number(const char* option, const char* text, int least, int most) {
  char* end;
  long value = std::strtol(text, &end, 10);
  if (*text == '\0' || *end != '\0' || value < least || value > most)
    throw Refusal{std::string("--") + option + " " + text + ": give a number from " +
                  std::to_string(least) + " to " + std::to_string(most)};
  return static_cast<int>(value);
}

}  // namespace netship
