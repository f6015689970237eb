// The state of the board according to Linux, read at each call.

#pragma once

#include <set>
#include <string>

namespace netship {

// The version of the programs for boards.
constexpr const char* kVersion = "0.1.0";

// As `uname -m` names the architecture of this program (a 32-bit one may run on a 64-bit kernel).
extern const char* const kMachine;

// The features of the CPU, as /proc/cpuinfo names them.
std::set<std::string> cpu_features();

// The CPU's name, for messages.
std::string cpu_model();

// Whether this program runs under QEMU on a machine of another architecture.
bool is_emulated();

// One line for a person: "Cortex-A72, aarch64, Raspberry Pi 4 Model B Rev 1.4, glibc 2.36".
std::string board_text();

// Empty, or negative, where the system does not tell.
struct Condition {
  std::string governor;
  long frequency_khz;
  double temperature_c;
  long throttled;  // bits as of `vcgencmd get_throttled`: 0 is well
};
Condition condition();

// One line for a person: "governor ondemand, 1500 MHz, 48.2 °C, not throttled".
std::string to_text(const Condition& condition);

// A JSON object with all of that, and memory, disk and versions.
std::string board_json(const std::string& folder);

// The same for a program that runs once: what lasts, and the condition before and after, which an emulated board has not.
std::string board_json(const Condition& before, const Condition& after);

// `text` as one line of plain ASCII, whatever a foreign file has in it.
std::string printable(std::string text);

}  // namespace netship
