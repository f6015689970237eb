#include "bundle_check.h"

#include <elf.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>
#include <system_error>

#include "board_info.h"
#include "picojson.h"
#include "refusal.h"
#include "sha256.h"

namespace netship {
namespace {

using picojson::value;

constexpr int kFormatVersion = 4;
constexpr size_t kLargestManifest = 4 << 20, kLargestTensor = size_t{1} << 29, kMostDimensions = 8;
constexpr int kDeepest = 32;
constexpr long kLargestDimension = 1 << 24;
constexpr int kMostThreads = 1024;
const std::string kAgain = "; copy or build the bundle again";

struct Machine {
  const char* name;
  unsigned char bits;
  uint16_t code;
};
constexpr Machine kMachines[] = {{"x86_64", ELFCLASS64, EM_X86_64},
                                 {"aarch64", ELFCLASS64, EM_AARCH64},
                                 {"arm", ELFCLASS32, EM_ARM}};

// Codes as in dlpack.h: signed integer, unsigned integer, float; TVM's bool has one bit.
constexpr Type kTypes[] = {{"float32", 4, 2, 32}, {"int64", 8, 0, 64}, {"int32", 4, 0, 32},
                           {"int8", 1, 0, 8},     {"uint8", 1, 1, 8},  {"bool", 1, 1, 1}};

class File {
 public:
  explicit File(const std::string& path) : descriptor_(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW)) {
    struct stat status;
    if (descriptor_ < 0 || fstat(descriptor_, &status))
      throw Refusal{path + ": " + (errno == ELOOP ? "a link is not part of a bundle" : std::strerror(errno)) + kAgain};
    if (!S_ISREG(status.st_mode)) throw Refusal{path + ": is no file" + kAgain};
    size_ = static_cast<size_t>(status.st_size);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() { close(descriptor_); }

  int descriptor() const { return descriptor_; }
  size_t size() const { return size_; }

  std::string start(size_t most) const {
    std::string text(std::min(most, size_), '\0');
    size_t done = 0;
    for (ssize_t got; done < text.size(); done += static_cast<size_t>(got))
      if ((got = pread(descriptor_, &text[done], text.size() - done, static_cast<off_t>(done))) <= 0) break;
    text.resize(done);
    return text;
  }

 private:
  int descriptor_;
  size_t size_;
};

[[noreturn]] void invalid(const std::string& where, const std::string& what) {
  throw Refusal{"manifest.json: " + where + (where.empty() ? "" : ": ") + what + "; build the bundle again"};
}

// The parser calls itself for each bracket, so a manifest of nothing but brackets must not exhaust the stack.
bool is_deep(const std::string& text) {
  int depth = 0;
  bool quoted = false;
  for (size_t i = 0; i < text.size(); i++) {
    char c = text[i];
    if (quoted && c == '\\') i++;
    else if (c == '"') quoted = !quoted;
    else if (!quoted && (c == '[' || c == '{') && ++depth > kDeepest) return true;
    else if (!quoted && (c == ']' || c == '}')) depth--;
  }
  return false;
}

// A value and its path in the manifest, which messages name.
class Node {
 public:
  Node(const value& json, std::string where) : json_(json), where_(std::move(where)) {}

  Node operator[](const std::string& name) const {
    if (!json_.is<picojson::object>()) invalid(where_, "is no object");
    auto& members = json_.get<picojson::object>();
    auto found = members.find(name);
    std::string where = where_.empty() ? name : where_ + "." + name;
    if (found == members.end()) invalid(where, "missing");
    return {found->second, where};
  }
  std::vector<Node> list() const {
    if (!json_.is<picojson::array>()) invalid(where_, "is no list");
    std::vector<Node> nodes;
    for (auto& one : json_.get<picojson::array>())
      nodes.push_back({one, where_ + "[" + std::to_string(nodes.size()) + "]"});
    return nodes;
  }
  std::map<std::string, std::string> texts() const {
    if (!json_.is<picojson::object>()) invalid(where_, "is no object");
    std::map<std::string, std::string> found;
    for (auto& [name, one] : json_.get<picojson::object>()) found[name] = Node(one, where_ + "." + name).text();
    return found;
  }
  std::string text() const {
    if (!json_.is<std::string>()) invalid(where_, "is no text");
    return json_.get<std::string>();
  }
  long number(long least, long most) const {
    double found = json_.is<double>() ? json_.get<double>() : std::nan("");
    if (!(found >= static_cast<double>(least) && found <= static_cast<double>(most)) || found != std::floor(found))
      invalid(where_, "is no whole number from " + std::to_string(least) + " to " + std::to_string(most));
    return static_cast<long>(found);
  }
  const std::string& where() const { return where_; }

 private:
  const value& json_;
  std::string where_;
};

value parse(const std::string& path) {
  File file(path);
  if (file.size() > kLargestManifest) invalid(std::to_string(file.size()) + " bytes", "too large");
  std::string text = file.start(kLargestManifest);
  if (is_deep(text)) invalid("brackets", "too deep");
  value root;
  std::string error;
  auto end = text.cbegin();
  try {
    end = picojson::parse(root, text.cbegin(), text.cend(), &error);
  } catch (const std::overflow_error&) {
    error = "a number is too large";
  }
  if (error.empty() && text.find_first_not_of(" \t\r\n", static_cast<size_t>(end - text.cbegin())) != std::string::npos)
    error = "more follows it";
  if (!error.empty()) throw Refusal{"manifest.json: not JSON (" + error + "); build the bundle again"};
  return root;
}

Tensor tensor_of(const Node& node) {
  Tensor tensor{node["name"].text(), nullptr, {}, 1};
  std::string type = node["dtype"].text();
  for (auto& known : kTypes)
    if (type == known.name) tensor.type = &known;
  if (tensor.type == nullptr) invalid(node.where() + ".dtype", "is no type of a tensor");
  auto dimensions = node["shape"].list();
  if (dimensions.size() > kMostDimensions) invalid(node.where() + ".shape", "too long");
  for (auto& dimension : dimensions) {
    tensor.shape.push_back(dimension.number(1, kLargestDimension));
    tensor.size *= static_cast<size_t>(tensor.shape.back());
    if (tensor.bytes() > kLargestTensor) invalid(node.where() + ".shape", "too large");
  }
  return tensor;
}

// The absolute path of a file of the bundle; neither a parent folder nor a link may lead out of it.
std::string inside(const std::string& folder, const std::string& relative) {
  char found[PATH_MAX];
  std::string path = folder + "/" + relative;
  if (relative.empty() || relative[0] == '/' || relative.find('\\') != std::string::npos ||
      relative.find('\0') != std::string::npos || ("/" + relative + "/").find("/../") != std::string::npos)
    throw Refusal{"manifest.json: '" + relative + "' is no plain path inside the bundle; build the bundle again"};
  if (realpath(path.c_str(), found) == nullptr) throw Refusal{path + ": " + std::strerror(errno) + kAgain};
  if (std::string(found).rfind(folder + "/", 0) != 0) throw Refusal{path + ": leads out of the bundle" + kAgain};
  return path;
}

void check_hashes(const std::string& folder, const std::map<std::string, std::string>& files) {
  for (auto& [relative, expected] : files) {
    std::string path = inside(folder, relative), found;
    try {
      found = sha256_of(File(path).descriptor());
    } catch (const std::system_error& error) {
      throw Refusal{path + ": " + error.what() + kAgain};
    }
    if (found != expected) throw Refusal{path + ": its SHA-256 is not the manifest's" + kAgain};
  }
}

void check_machine(const std::string& library, const std::string& expected, const std::string& target) {
  std::string header = File(library).start(sizeof(Elf32_Ehdr));
  uint16_t code = 0;
  std::string found = "no ELF file";
  if (header.size() == sizeof(Elf32_Ehdr) && std::memcmp(header.data(), ELFMAG, SELFMAG) == 0) {
    std::memcpy(&code, header.data() + offsetof(Elf32_Ehdr, e_machine), sizeof code);
    found = "for ELF machine " + std::to_string(code);
    for (auto& machine : kMachines)
      if (machine.code == code && header[EI_CLASS] == machine.bits && header[EI_DATA] == ELFDATA2LSB)
        found = std::string("for ") + machine.name;
  }
  if (found != "for " + expected)
    throw Refusal{library + ": is " + found + ", the manifest says " + expected + kAgain};
  if (expected != kMachine)
    throw Refusal{library + ": is for " + expected + " (target " + target + "), this program runs on " + kMachine +
                  "; build for this board's CPU, or take the kit for " + expected};
}

void check_features(const Node& target) {
  auto present = cpu_features();
  std::string missing;
  for (auto& feature : target["features"].list())
    if (!present.count(feature.text())) missing += (missing.empty() ? "" : ", ") + feature.text();
  if (!missing.empty())
    throw Refusal{"target " + target["name"].text() + ": this CPU (" + board_text() + ") has no " + missing +
                  "; build for this board's CPU"};
}

const std::string& named(const std::map<std::string, std::string>& files, const std::string& relative,
                         const std::string& where) {
  if (!files.count(relative)) invalid(where, "has no hash");
  return relative;
}

void check_size(const std::string& path, size_t bytes) {
  size_t actual = File(path).size();
  if (actual != bytes)
    throw Refusal{path + ": " + std::to_string(actual) + " bytes, but the manifest's shape takes " +
                  std::to_string(bytes) + kAgain};
}

// The paths of a list of files with one for each tensor, of its size; tolerances are float32.
std::vector<std::string> one_a_tensor(const std::vector<Tensor>& tensors, const char* what, const std::string& folder,
                                      const std::map<std::string, std::string>& files, const Node& list,
                                      bool tolerances) {
  std::vector<std::string> paths;
  for (auto& file : list.list()) paths.push_back(inside(folder, named(files, file.text(), file.where())));
  if (paths.size() != tensors.size()) invalid(list.where(), std::string("has not one file an ") + what);
  for (size_t index = 0; index < paths.size(); index++) {
    const Tensor& tensor = tensors[index];
    check_size(paths[index], tolerances ? sizeof(float) * tensor.size : tensor.bytes());
  }
  return paths;
}

}  // namespace

Bundle open_bundle(const std::string& given) {
  char folder[PATH_MAX];
  if (realpath(given.c_str(), folder) == nullptr)
    throw Refusal{given + ": " + std::strerror(errno) + "; give the folder of a bundle"};
  std::string manifest = std::string(folder) + "/manifest.json";
  if (access(manifest.c_str(), F_OK))
    throw Refusal{given + ": not a bundle (it has no manifest.json); give the folder of one, unpacked"};
  const value json = parse(manifest);
  const Node root(json, "");
  if (root["format_version"].number(1, 1000) != kFormatVersion)
    invalid("format_version", "this program reads " + std::to_string(kFormatVersion));
  std::string format = root["format"].text();
  if (format != "bundle" && format != "standalone") invalid("format", "is neither bundle nor standalone");
  auto files = root["files"].texts();
  check_hashes(folder, files);

  Bundle bundle{};
  bundle.standalone = format == "standalone";
  bundle.name = root["name"].text();
  bundle.model = root["model"]["name"].text();
  bundle.target = root["target"]["name"].text();
  bundle.library = inside(folder, named(files, root["library"].text(), "library"));
  bundle.threads = static_cast<int>(root["threads"].number(1, kMostThreads));
  bundle.files = files.size();
  for (auto& input : root["inputs"].list()) bundle.inputs.push_back(tensor_of(input));
  if (bundle.inputs.empty()) invalid("inputs", "is empty");
  for (auto& output : root["outputs"].list()) bundle.outputs.push_back(tensor_of(output));
  if (bundle.outputs.empty()) invalid("outputs", "is empty");
  for (auto& pair : root["golden"].list()) {
    bundle.golden.push_back({one_a_tensor(bundle.inputs, "input", folder, files, pair["inputs"], false),
                             one_a_tensor(bundle.outputs, "output", folder, files, pair["outputs"], false),
                             one_a_tensor(bundle.outputs, "output", folder, files, pair["tolerances"], true)});
  }
  if (bundle.golden.empty()) invalid("golden", "is empty");
  check_machine(bundle.library, root["target"]["machine"].text(), bundle.target);
  check_features(root["target"]);
  return bundle;
}

}  // namespace netship
