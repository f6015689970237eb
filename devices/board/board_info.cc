#include "board_info.h"
#include "json.h"

#include <gnu/libc-version.h>
#include <sys/auxv.h>
#include <sys/statvfs.h>
#include <tvm/runtime/c_runtime_api.h>
#include <tvm/runtime/threading_backend.h>
#include <unistd.h>

#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>
#include <utility>

namespace netship {

#if defined __aarch64__
const char* const kMachine = "aarch64";
#elif defined __arm__
const char* const kMachine = "arm";
#elif defined __x86_64__
const char* const kMachine = "x86_64";
#endif

namespace {

// The index of a name is its bit of AT_HWCAP or AT_HWCAP2 (arch/arm64/include/uapi/asm/hwcap.h and
// arch/arm/include/uapi/asm/hwcap.h); the names are those of /proc/cpuinfo. The bits are right for the
// program, while /proc/cpuinfo lists 64-bit names to a 32-bit program too.
#if defined __aarch64__
constexpr const char* kHwcap =
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc "
    "dcpop sha3 sm3 sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg";
constexpr const char* kHwcap2 =
    "dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm "
    "svebf16 i8mm bf16";
#elif defined __arm__
constexpr const char* kHwcap =
    "swp half thumb 26bit fastmult fpa vfp edsp java iwmmxt crunch thumbee neon vfpv3 vfpv3d16 tls "
    "vfpv4 idiva idivt vfpd32 lpae evtstrm fphp asimdhp asimddp asimdfhm asimdbf16 i8mm";
constexpr const char* kHwcap2 = "aes pmull sha1 sha2 crc32 sb ssbs";
#endif

std::string trimmed(std::string text) {
  auto is_space = [](char c) { return std::isspace(static_cast<unsigned char>(c)) || c == '\0'; };
  while (!text.empty() && is_space(text.back())) text.pop_back();
  size_t start = 0;
  while (start < text.size() && is_space(text[start])) start++;
  return text.substr(start);
}

std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return trimmed({std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()});
}

// The value of the first line `name : value` of a file; empty where there is none.
std::string field(const char* path, const std::string& name) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    size_t colon = line.find(':');
    if (colon != std::string::npos && trimmed(line.substr(0, colon)) == name)
      return trimmed(line.substr(colon + 1));
  }
  return "";
}

void add_words(std::istream&& words, unsigned long bits, bool all, std::set<std::string>* found) {
  for (std::string word; words >> word; bits >>= 1)
    if (all || bits & 1) found->insert(word);
}

long number(const std::string& text, int base, long otherwise) {
  char* end;
  long value = std::strtol(text.c_str(), &end, base);
  return end == text.c_str() ? otherwise : value;
}

std::string cpu_part() {
#if defined __aarch64__
  // The kernel and QEMU let programs read this register where this bit is set.
  if (getauxval(AT_HWCAP) & HWCAP_CPUID) {
    unsigned long midr;
    __asm__("mrs %0, midr_el1" : "=r"(midr));
    char text[16];
    std::snprintf(text, sizeof text, "0x%03lx", midr >> 4 & 0xfff);
    return text;
  }
#endif
  return field("/proc/cpuinfo", "CPU part");
}

long throttled() {
  // The firmware's driver of Raspberry Pi OS has it in a file, so no program need run.
  std::string text = read_text("/sys/devices/platform/soc/soc:firmware/get_throttled");
  if (text.empty()) {
    if (FILE* answer = popen("vcgencmd get_throttled 2>/dev/null", "re")) {
      char line[64];
      if (std::fgets(line, sizeof line, answer)) text = line;
      pclose(answer);
    }
    size_t equals = text.find('=');
    if (equals == std::string::npos) return -1;
    return number(text.substr(equals + 1), 0, -1);
  }
  return number(text, 16, -1);
}

double temperature() {
  std::string text = read_text("/sys/class/thermal/thermal_zone0/temp");
  return text.empty() ? -1000 : static_cast<double>(number(text, 10, -1000000)) / 1000;
}

// "MemTotal: 948304 kB"
long memory_kb(const char* name) { return number(field("/proc/meminfo", name), 10, 0); }

// What does not change while a program runs.
void add_lasting(Object& board) {
  board.add_text("server", kVersion);
  board.add_text("tvm", TVM_VERSION);
  board.add_text("machine", kMachine);
  board.add("emulated", is_emulated() ? "true" : "false");
  board.add_text("board", read_text("/proc/device-tree/model"));
  board.add_text("cpu_part", cpu_part());
  board.add_text("cpu_model", cpu_model());
  std::string features;
  for (auto& name : cpu_features()) features += (features.empty() ? "" : ", ") + quoted(name);
  board.add("features", "[" + features + "]");
  board.add_number("cores", static_cast<double>(sysconf(_SC_NPROCESSORS_ONLN)));
  board.add_number("threads", tvm::runtime::threading::MaxConcurrency());
  board.add_text("glibc", gnu_get_libc_version());
}

void add_condition(Object& board, const Condition& now) {
  board.add_text("governor", now.governor);
  board.add_number("frequency_khz", static_cast<double>(now.frequency_khz), now.frequency_khz >= 0);
  board.add_number("temperature_c", now.temperature_c, now.temperature_c > -274);
  board.add_number("throttled", static_cast<double>(now.throttled), now.throttled >= 0);
}

}  // namespace

std::set<std::string> cpu_features() {
  std::set<std::string> found;
#if defined __x86_64__
  add_words(std::istringstream(field("/proc/cpuinfo", "flags")), 0, true, &found);
#else
  add_words(std::istringstream(kHwcap), getauxval(AT_HWCAP), false, &found);
  add_words(std::istringstream(kHwcap2), getauxval(AT_HWCAP2), false, &found);
#endif
  return found;
}

bool is_emulated() {
#if defined __x86_64__
  return false;
#else
  // QEMU 7.2 shows a program /proc of the machine it runs on; later ones hide that CPU, but not this.
  return read_text("/proc/sys/kernel/arch") == "x86_64" || !field("/proc/cpuinfo", "vendor_id").empty();
#endif
}

std::string cpu_model() {
#if defined __x86_64__
  return field("/proc/cpuinfo", "model name");
#else
  // Arm's part numbers of MIDR_EL1, implementer 0x41.
  constexpr std::pair<const char*, const char*> kParts[] = {
      {"0xc07", "Cortex-A7"},  {"0xd03", "Cortex-A53"}, {"0xd04", "Cortex-A35"},
      {"0xd05", "Cortex-A55"}, {"0xd07", "Cortex-A57"}, {"0xd08", "Cortex-A72"},
      {"0xd0b", "Cortex-A76"}, {"0xd0c", "Neoverse-N1"}};
  std::string part = cpu_part();
  for (auto& [number, name] : kParts)
    if (part == number) return name;
  return part.empty() ? "" : "ARM part " + part;
#endif
}

Condition condition() {
  const std::string cpufreq = "/sys/devices/system/cpu/cpu0/cpufreq/";
  return {read_text(cpufreq + "scaling_governor"),
          number(read_text(cpufreq + "scaling_cur_freq"), 10, -1), temperature(), throttled()};
}

std::string board_text() {
  std::string cpu = cpu_model(), board = read_text("/proc/device-tree/model");
  return (cpu.empty() ? "unknown CPU" : cpu) + ", " + kMachine + (board.empty() ? "" : ", " + board) +
         (is_emulated() ? ", emulated" : "") + ", glibc " + gnu_get_libc_version();
}

std::string printable(std::string text) {
  for (char& c : text)
    if (c < ' ' || c > '~') c = c == '\n' || c == '\t' ? ' ' : '?';
  return text;
}

std::string to_text(const Condition& now) {
  char text[160];
  std::string line = now.governor.empty() ? "governor unknown" : "governor " + now.governor;
  if (now.frequency_khz >= 0) line += ", " + std::to_string(now.frequency_khz / 1000) + " MHz";
  if (now.temperature_c > -274) {
    std::snprintf(text, sizeof text, ", %.1f \u00b0C", now.temperature_c);
    line += text;
  }
  if (now.throttled < 0) return line + ", throttling unknown";
  if (now.throttled == 0) return line + ", not throttled";
  // Bits 0 to 3 are the state now, 16 to 19 what has happened since the start.
  std::snprintf(text, sizeof text, ", throttled %s (0x%lx)",
                now.throttled & 0xf ? "now" : "earlier", now.throttled);
  return line + text;
}

std::string board_json(const std::string& folder) {
  struct statvfs disk {};
  bool disk_known = statvfs(folder.c_str(), &disk) == 0;
  Object board;
  add_lasting(board);
  add_condition(board, condition());
  board.add_number("memory_kb", static_cast<double>(memory_kb("MemTotal")));
  board.add_number("memory_available_kb", static_cast<double>(memory_kb("MemAvailable")));
  board.add_number("disk_free_bytes",
                   static_cast<double>(disk.f_bavail) * static_cast<double>(disk.f_frsize),
                   disk_known);
  return board.text();
}

std::string board_json(const Condition& before, const Condition& after) {
  Object board;
  add_lasting(board);
  for (auto [name, state] : {std::pair{"before", &before}, std::pair{"after", &after}}) {
    Object condition;
    add_condition(condition, *state);
    board.add(name, is_emulated() ? "null" : condition.text());
  }
  return board.text();
}

}  // namespace netship
