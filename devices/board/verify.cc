// netship-verify: checks a bundle on the board itself, without a host, a network or Python.

#include <dlfcn.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <sys/resource.h>
#include <tvm/runtime/module.h>
#include <tvm/runtime/ndarray.h>
#include <tvm/runtime/packed_func.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "board_info.h"
#include "bundle_check.h"
#include "compare.h"
#include "json.h"
#include "metered.h"
#include "refusal.h"

namespace netship {
namespace {

using Clock = std::chrono::steady_clock;
using tvm::runtime::NDArray;
using tvm::runtime::PackedFunc;

constexpr int kPassed = 0, kFailed = 1, kRefused = 2;
constexpr size_t kLongestLine = 1000;
// Warm-up ends when the last few times are within 3 % of each other, or after so many inferences.
constexpr size_t kWarm = 5, kMostWarm = 50;
constexpr double kWarmSpread = 0.03, kWarmSeconds = 10;
// Enough inferences for a 99th percentile of a quick network, a minute for a slow one.
constexpr size_t kFewest = 5, kMost = 200;
constexpr double kTimingSeconds = 60;

struct Options {
  std::string bundle;
  int repeat = -1, threads = 0;
  bool json = false;
};

// A line for a person, unless JSON is wanted.
void tell(const Options& options, const char* format, ...) __attribute__((format(printf, 2, 3)));
void tell(const Options& options, const char* format, ...) {
  if (options.json) return;
  va_list values;
  va_start(values, format);
  std::vprintf(format, values);
  va_end(values);
  std::fflush(stdout);
}

void usage() {
  std::puts(
      "usage: verify [--repeat N] [--threads N] [--json] [BUNDLE]\n"
      "\n"
      "Checks a bundle on this machine: every file's SHA-256, the CPU, the answers to its golden inputs,\n"
      "and how long an inference takes. BUNDLE is the folder with manifest.json; without one, the\n"
      "folder 'bundle' beside this program.\n"
      "\n"
      "  --repeat N     inferences to time (as many as a minute has, 200 at most); 0: none\n"
      "  --threads N    for inference (what the bundle was built for)\n"
      "  --json         one JSON object in place of the text, as that of netship check\n"
      "\n"
      "Exit code: 0 right answers, 1 wrong ones, 2 the bundle or this machine does not fit.");
}

std::string beside_this_program() {
  char path[4096];
  ssize_t size = readlink("/proc/self/exe", path, sizeof path);
  std::string program(path, size > 0 ? static_cast<size_t>(size) : 0);
  return program.substr(0, program.rfind('/') + 1) + "bundle";
}

Options parse(int count, char** words) {
  static const option kOptions[] = {{"repeat", required_argument, nullptr, 'r'},
                                    {"threads", required_argument, nullptr, 't'},
                                    {"json", no_argument, nullptr, 'j'},
                                    {"help", no_argument, nullptr, 'h'},
                                    {"version", no_argument, nullptr, 'v'},
                                    {nullptr, 0, nullptr, 0}};
  Options options;
  opterr = 0;
  for (int letter; (letter = getopt_long(count, words, "h", kOptions, nullptr)) != -1;) {
    switch (letter) {
      case 'r': options.repeat = to_number("repeat", optarg, 0, 1000000); break;
      case 't': options.threads = to_number("threads", optarg, 1, 1024); break;
      case 'j': options.json = true; break;
      case 'h': usage(); std::exit(kPassed);
      case 'v': std::printf("netship-verify %s (TVM %s, %s)\n", kVersion, TVM_VERSION, kMachine); std::exit(kPassed);
      default: throw Refusal{std::string(words[optind - 1]) + ": unknown, or without its value; see --help"};
    }
  }
  if (count - optind > 1) throw Refusal{std::string(words[optind + 1]) + ": one bundle at a time"};
  options.bundle = optind < count ? words[optind] : beside_this_program();
  return options;
}

// A loaded network, which runs one inference and returns every output.
struct Network {
  std::function<void(const std::vector<Bytes>&)> set_inputs;
  std::function<void()> run;
  std::function<std::vector<Bytes>()> outputs;
};

bool is(const NDArray& array, const Tensor& tensor) {
  auto type = array.DataType();
  std::vector<long> shape(array.Shape().begin(), array.Shape().end());
  return shape == tensor.shape && type.code() == tensor.type->code && type.bits() == tensor.type->bits &&
         type.lanes() == 1;
}

Network load_graph(const Bundle& bundle) {
  auto library = tvm::runtime::Module::LoadFromFile(bundle.library);
  give_launch_to_meter(bundle.library);
  const DLDevice cpu{kDLCPU, 0};
  PackedFunc create = library.GetFunction("default");
  if (create == nullptr) throw Refusal{bundle.library + ": holds no network; build the bundle again"};
  tvm::runtime::Module executor = create(cpu);
  PackedFunc input = executor.GetFunction("get_input"), run = executor.GetFunction("run"),
             output = executor.GetFunction("get_output");
  std::vector<NDArray> tensors;
  for (const Tensor& port : bundle.inputs) {
    int index = executor.GetFunction("get_input_index")(port.name);
    if (index < 0 || !is(input(port.name), port))
      throw Refusal{bundle.library + ": its inputs are not the manifest's; build the bundle again"};
    tensors.push_back(input(port.name));
  }
  auto read = [=] {
    std::vector<Bytes> all;
    for (size_t index = 0; index < bundle.outputs.size(); index++) {
      NDArray found = output(static_cast<int>(index));
      if (!is(found, bundle.outputs[index]))
        throw Refusal{bundle.library + ": its outputs are not the manifest's; build the bundle again"};
      Bytes values(bundle.outputs[index].bytes());
      found.CopyToBytes(values.data(), values.size());
      all.push_back(std::move(values));
    }
    return all;
  };
  // The library stays loaded as long as its functions.
  return {[=](const std::vector<Bytes>& values) mutable {
            for (size_t k = 0; k < tensors.size(); k++) tensors[k].CopyFromBytes(values[k].data(), values[k].size());
          },
          [=, keep = library, executor_too = executor] { run(); }, read};
}

// The functions of the header that a standalone library comes with.
template <typename Function>
Function* look_up(void* library, const Bundle& bundle, const char* name) {
  std::string symbol = bundle.name + "_" + name;
  void* found = dlsym(library, symbol.c_str());
  if (found == nullptr) throw Refusal{bundle.library + ": has no function " + symbol + "; build the bundle again"};
  return reinterpret_cast<Function*>(found);
}

// MAX_INPUTS and MAX_OUTPUTS of compile/frontend/limits.py.
constexpr size_t kMostPorts = 64;

template <size_t>
using Pointer = void*;

template <size_t... I>
int call_with(void* run, void* instance, const std::vector<void*>& ports, std::index_sequence<I...>) {
  auto function = reinterpret_cast<int (*)(void*, Pointer<I>...)>(run);
  return function(instance, ports[I]...);
}

// One inference by a function that takes a pointer for each of the inputs and outputs, N at most.
template <size_t N = 2 * kMostPorts>
int call_run(void* run, void* instance, const std::vector<void*>& ports) {
  if constexpr (N > 2)
    if (ports.size() < N) return call_run<N - 1>(run, instance, ports);
  return call_with(run, instance, ports, std::make_index_sequence<N>());
}

Network load_standalone(const Bundle& bundle, int threads) {
  for (auto [count, what] : {std::pair{bundle.inputs.size(), " inputs"}, std::pair{bundle.outputs.size(), " outputs"}})
    if (count > kMostPorts)
      throw Refusal{"manifest.json: a standalone library has at most " + std::to_string(kMostPorts) + what +
                    "; build the bundle again"};
  void* library = dlopen(bundle.library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw Refusal{std::string(dlerror()) + "; build the bundle again"};
  auto create = look_up<void*(int)>(library, bundle, "create");
  auto last_error = look_up<int()>(library, bundle, "last_error");
  auto error_text = look_up<const char*(int)>(library, bundle, "error_text");
  auto run = reinterpret_cast<void*>(look_up<void()>(library, bundle, "run"));
  give_own_launch_to_meter(bundle.library, run);
  auto refuse_with = [=](int code) {
    const char* text = error_text(code);
    throw Refusal{bundle.library + ": error " + std::to_string(code) + " (" + (text ? text : "it has no text") + ")"};
  };
  void* instance = create(threads);
  if (instance == nullptr) refuse_with(last_error());
  auto inputs = std::make_shared<std::vector<Bytes>>();
  for (const Tensor& tensor : bundle.inputs) inputs->emplace_back(tensor.bytes());
  // Floats that the library does not write stay NaN, which is never a right answer.
  auto outputs = std::make_shared<std::vector<Bytes>>();
  for (const Tensor& tensor : bundle.outputs) outputs->emplace_back(tensor.bytes(), 0xff);
  std::vector<void*> ports;
  for (auto* side : {inputs.get(), outputs.get()})
    for (Bytes& values : *side) ports.push_back(values.data());
  auto infer = [=] {
    if (int code = call_run(run, instance, ports)) refuse_with(code);
  };
  auto set = [=](const std::vector<Bytes>& values) {
    for (size_t k = 0; k < values.size(); k++) std::copy(values[k].begin(), values[k].end(), (*inputs)[k].begin());
  };
  return {set, infer, [=] { return *outputs; }};
}

Bytes read_bytes(const std::string& path, size_t size) {
  Bytes bytes(size);
  std::ifstream file(path, std::ios::binary);
  file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(size));
  if (!file) throw Refusal{path + ": cannot be read; copy the bundle again"};
  return bytes;
}

Bytes read_input(const std::string& path, const Tensor& tensor) {
  Bytes bytes = read_bytes(path, tensor.bytes());
  for (size_t i = 0; i < tensor.size; i++)
    if (!std::isfinite(number(*tensor.type, bytes, i)))
      throw Refusal{path + ": has NaN or infinity; build the bundle again"};
  return bytes;
}

std::vector<float> read_tolerances(const std::string& path, size_t size) {
  Bytes bytes = read_bytes(path, sizeof(float) * size);
  std::vector<float> values(size);
  std::memcpy(values.data(), bytes.data(), bytes.size());
  for (float value : values) {
    if (!std::isfinite(value)) throw Refusal{path + ": has NaN or infinity; build the bundle again"};
    if (value < 0) throw Refusal{path + ": has a negative tolerance; build the bundle again"};
  }
  return values;
}

// The error of each golden input.
std::vector<Error> check_golden(const Bundle& bundle, const Network& network, const Options& options) {
  std::vector<Error> errors;
  for (size_t index = 0; index < bundle.golden.size(); index++) {
    const Golden& golden = bundle.golden[index];
    std::vector<Bytes> inputs;
    for (size_t k = 0; k < bundle.inputs.size(); k++) inputs.push_back(read_input(golden.inputs[k], bundle.inputs[k]));
    network.set_inputs(inputs);
    begin_metered();
    network.run();
    end_metered();
    auto outputs = network.outputs();
    Error error;
    for (size_t k = 0; k < outputs.size(); k++) {
      const Tensor& tensor = bundle.outputs[k];
      auto expected = read_bytes(golden.outputs[k], tensor.bytes());
      auto near = read_tolerances(golden.tolerances[k], tensor.size);
      error.include(compare(tensor, outputs[k], expected, near));
    }
    tell(options, "golden %zu   max-abs error %.2g, %.2g of an element's tolerance\n", index, error.absolute, error.excess);
    errors.push_back(error);
  }
  return errors;
}

double seconds_of(const Network& network) {
  auto start = Clock::now();
  network.run();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

size_t warm_up(const Network& network) {
  std::vector<double> last;
  double total = 0;
  size_t count = 0;
  for (; count < kMostWarm && total < kWarmSeconds; count++) {
    last.push_back(seconds_of(network));
    total += last.back();
    if (last.size() > kWarm) last.erase(last.begin());
    auto [low, high] = std::minmax_element(last.begin(), last.end());
    if (last.size() == kWarm && *high - *low <= kWarmSpread * *low) break;
  }
  return count;
}

std::vector<double> measure(const Network& network, int repeat) {
  std::vector<double> times;
  double total = 0;
  while (repeat >= 0 ? times.size() < static_cast<size_t>(repeat)
                     : times.size() < kFewest || (times.size() < kMost && total < kTimingSeconds)) {
    times.push_back(seconds_of(network));
    total += times.back();
  }
  std::sort(times.begin(), times.end());
  return times;
}

// The smallest time that this percentage of all times does not exceed.
double percentile(const std::vector<double>& sorted, double percent) {
  auto rank = static_cast<size_t>(std::ceil(percent / 100 * static_cast<double>(sorted.size())));
  return sorted[std::max<size_t>(rank, 1) - 1];
}

// The times in milliseconds as JSON; null where none were taken.
std::string time_it(const Network& network, const Options& options, int threads) {
  if (options.repeat == 0) return "null";
  size_t warm = warm_up(network);
  auto times = measure(network, options.repeat);
  tell(options, "latency    median %.2f ms, p90 %.2f ms, p99 %.2f ms: %s, %zu inferences after %zu, %d thread%s\n",
       1e3 * percentile(times, 50), 1e3 * percentile(times, 90), 1e3 * percentile(times, 99),
       is_emulated() ? "emulated, which says nothing of a board" : "measured on this board", times.size(), warm, threads,
       threads == 1 ? "" : "s");
  Object latency;
  for (auto [name, percent] : {std::pair{"median", 50}, {"p90", 90}, {"p99", 99}, {"minimum", 0}})
    latency.add_number(name, 1e3 * percentile(times, percent));
  // As `check`, which gives no times of an emulated board.
  return is_emulated() ? "null" : latency.text();
}

// The handler of the signals that compiled code of the bundle causes.
void on_fault(int number) {
  static const char kIll[] =
      "error: the bundle's code needs an instruction that this CPU does not have; build for this board's CPU\n";
  static const char kOther[] =
      "error: the bundle's code crashed; build it again, and report the model if it stays so\n";
  ssize_t ignored = number == SIGILL ? write(STDERR_FILENO, kIll, sizeof kIll - 1)
                                     : write(STDERR_FILENO, kOther, sizeof kOther - 1);
  static_cast<void>(ignored);
  _exit(kRefused);
}

int verify(const Options& options) {
  Bundle bundle = open_bundle(options.bundle);
  int threads = options.threads > 0 ? options.threads : bundle.threads;
  std::string threads_text = std::to_string(threads);
  Condition before = condition();
  tell(options, "bundle     %s for %s: %zu files match their SHA-256\n", printable(bundle.model).c_str(),
       printable(bundle.target).c_str(), bundle.files);
  tell(options, "board      %s\n", printable(board_text()).c_str());
  tell(options, "before     %s\n", to_text(before).c_str());
  // TVM reads it when it starts its thread pool.
  setenv("TVM_NUM_THREADS", threads_text.c_str(), 1);
  for (int number : {SIGILL, SIGSEGV, SIGBUS, SIGFPE}) signal(number, on_fault);
  Network network = bundle.standalone ? load_standalone(bundle, threads) : load_graph(bundle);
  std::vector<Error> errors = check_golden(bundle, network, options);
  Error worst;
  for (const Error& error : errors) worst.include(error);
  std::string latency = time_it(network, options, threads);
  Condition after = condition();
  tell(options, "after      %s\n", to_text(after).c_str());
  bool passed = worst.excess <= 1;
  tell(options, "%s       max-abs error %.2g, %.2g of an element's tolerance\n", passed ? "PASS" : "FAIL", worst.absolute,
       worst.excess);
  if (!options.json) return passed ? kPassed : kFailed;

  std::string results;
  for (size_t index = 0; index < errors.size(); index++) {
    Object result;
    result.add_text("name", "golden " + std::to_string(index));
    result.add_number("max_abs_error", errors[index].absolute);
    result.add_number("of_tolerance", errors[index].excess);
    results += (index ? ", " : "") + result.text();
  }
  Object answer;
  answer.add_text("bundle", options.bundle);
  answer.add_text("model", bundle.model);
  answer.add_text("target", bundle.target);
  answer.add_text("compared", "golden inputs");
  answer.add_number("images", static_cast<double>(errors.size()));
  answer.add_number("max_abs_error", worst.absolute);
  answer.add_number("of_tolerance", worst.excess);
  answer.add_number("threads", threads);
  answer.add("latency_ms", latency);
  answer.add_text("origin", is_emulated() ? "emulated" : "measured");
  answer.add("board", board_json(before, after));
  answer.add("passed", passed ? "true" : "false");
  answer.add("results", "[" + results + "]");
  std::puts(answer.text().c_str());
  return passed ? kPassed : kFailed;
}

int refuse(const std::string& what) {
  std::fflush(stdout);
  std::fprintf(stderr, "error: %s\n", printable(what).substr(0, kLongestLine).c_str());
  return kRefused;
}

}  // namespace
}  // namespace netship

int main(int count, char** words) {
  using namespace netship;
  int code;
  rlimit no_core{0, 0};
  setrlimit(RLIMIT_CORE, &no_core);
  try {
    code = verify(parse(count, words));
  } catch (const Refusal& refusal) {
    code = refuse(refusal.what);
  } catch (const std::bad_alloc&) {
    code = refuse("no memory for it; end other programs, then try again");
  } catch (const std::exception& error) {
    code = refuse(error.what());
  }
  std::fflush(stdout);
  // Do not wait for the threads of TVM's pool.
  _exit(code);
}
