// What the user can mend; a program's main() prints it in one line and exits with 2.

#pragma once

#include <string>

namespace netship {

struct Refusal {
  std::string what;
};

}  // namespace netship
