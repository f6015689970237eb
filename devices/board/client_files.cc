// The functions for files that a client can call: TVM's own (upload, download, remove, load_module),
// limited to the client's folder, which is the working folder, and netship.sha256, netship.have and
// netship.keep.

#include <fcntl.h>
#include <sys/stat.h>
#include <tvm/runtime/module.h>
#include <tvm/runtime/registry.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "folders.h"
#include "sha256.h"

namespace netship {
namespace {

using tvm::runtime::Module;
using tvm::runtime::TVMArgs;
using tvm::runtime::TVMRetValue;

constexpr size_t kKeptFiles = 4;

const std::string work_folder = ".", kept_folder = kKeptFolder;

// TVM hands the text of an exception to the client.
[[noreturn]] void refuse(const std::string& what) { throw std::runtime_error(what); }

[[noreturn]] void refuse(const std::string& what, int error) {
  refuse(what + ": " + std::strerror(error));
}

bool is_plain(const std::string& name) {
  return !name.empty() && name[0] != '.' && name.size() < 200 &&
         name.find_first_of(std::string("/\0", 2)) == std::string::npos;
}

std::string path_of(const std::string& name) {
  if (!is_plain(name)) refuse("'" + name + "' is no plain file name in the client's folder");
  return work_folder + "/" + name;
}

struct File {
  File(const std::string& path, int flags)
      : descriptor(open(path.c_str(), flags | O_CLOEXEC | O_NOFOLLOW, 0700)) {}
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() {
    if (descriptor >= 0) close(descriptor);
  }
  int descriptor;
};

std::string hash(const std::string& path) {
  File file(path, O_RDONLY);
  if (file.descriptor < 0) return "";
  return sha256_of(file.descriptor);
}

// Writes a new file, so that what is loaded or kept under that name stays as it is.
void write_file(const std::string& name, const std::string& data) {
  std::string path = path_of(name);
  unlink(path.c_str());
  File file(path, O_WRONLY | O_CREAT | O_EXCL);
  if (file.descriptor < 0) refuse(name, errno);
  for (size_t done = 0; done < data.size();) {
    ssize_t put = write(file.descriptor, data.data() + done, data.size() - done);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) {
      int error = errno;
      unlink(path.c_str());
      refuse(name + " (" + std::to_string(data.size()) + " bytes)", error);
    }
    done += static_cast<size_t>(put);
  }
}

std::string read_file(const std::string& name) {
  File file(path_of(name), O_RDONLY);
  struct stat status;
  if (file.descriptor < 0 || fstat(file.descriptor, &status)) refuse(name, errno);
  if (!S_ISREG(status.st_mode)) refuse(name + " is no file");
  std::string data(static_cast<size_t>(status.st_size), '\0');
  for (size_t done = 0; done < data.size();) {
    ssize_t got = read(file.descriptor, &data[done], data.size() - done);
    if (got <= 0) refuse(name, got ? errno : EIO);
    done += static_cast<size_t>(got);
  }
  return data;
}

// The kept files, the oldest first.
std::vector<std::string> kept_files() {
  std::vector<std::pair<std::pair<time_t, long>, std::string>> found;
  for (auto& name : names_in(kept_folder)) {
    std::string path = kept_folder + "/" + name;
    struct stat status;
    if (stat(path.c_str(), &status) == 0)
      found.push_back({{status.st_mtim.tv_sec, status.st_mtim.tv_nsec}, path});
  }
  std::sort(found.begin(), found.end());
  std::vector<std::string> paths;
  for (auto& file : found) paths.push_back(file.second);
  return paths;
}

// Makes a file the newest, so that the files used last are kept.
void touch(const std::string& path) { utimensat(AT_FDCWD, path.c_str(), nullptr, 0); }

// Keeps the client's file for later clients, and returns its hash.
std::string keep(const std::string& name) {
  std::string path = path_of(name), digest = hash(path);
  if (digest.empty()) refuse(name, errno);
  std::string kept = kept_folder + "/" + digest;
  if (link(path.c_str(), kept.c_str()) && errno != EEXIST) refuse(name, errno);
  touch(kept);
  auto files = kept_files();
  for (size_t i = 0; i + kKeptFiles < files.size(); i++) unlink(files[i].c_str());
  return digest;
}

// Gives the client the kept file with this hash, if there is one, under the name that it asks for.
bool have(const std::string& digest, const std::string& name) {
  std::string path = path_of(name), kept = kept_folder + "/" + digest;
  if (!is_plain(digest) || access(kept.c_str(), F_OK)) return false;
  if (hash(kept) != digest) {
    unlink(kept.c_str());
    return false;
  }
  touch(kept);
  unlink(path.c_str());
  return link(kept.c_str(), path.c_str()) == 0;
}

Module load(const std::string& name) {
  std::string path = path_of(name);
  if (name.size() < 3 || name.compare(name.size() - 3, 3, ".so"))
    refuse("'" + name + "' is no .so; a board has no linker, so link it before the upload");
  return Module::LoadFromFile(path);
}

// TVM's own functions accept any path on this machine and do not report failures.
void remove_file(const std::string& name) {
  if (is_plain(name)) unlink(path_of(name).c_str());
}

TVM_REGISTER_GLOBAL("tvm.rpc.server.workpath").set_body_typed(path_of);
TVM_REGISTER_GLOBAL("tvm.rpc.server.load_module").set_body_typed(load);
TVM_REGISTER_GLOBAL("tvm.rpc.server.remove").set_body_typed(remove_file);
TVM_REGISTER_GLOBAL("tvm.rpc.server.upload").set_body([](TVMArgs args, TVMRetValue*) {
  write_file(args[0], args[1]);
});
TVM_REGISTER_GLOBAL("tvm.rpc.server.download").set_body([](TVMArgs args, TVMRetValue* result) {
  std::string data = read_file(args[0]);
  *result = TVMByteArray{data.data(), data.size()};
});
TVM_REGISTER_GLOBAL("netship.sha256").set_body_typed([](std::string name) {
  std::string digest = hash(path_of(name));
  if (digest.empty()) refuse(name, errno);
  return digest;
});
TVM_REGISTER_GLOBAL("netship.keep").set_body_typed(keep);
TVM_REGISTER_GLOBAL("netship.have").set_body_typed([](std::string digest, std::string name) {
  return static_cast<int>(have(digest, name));
});

}  // namespace
}  // namespace netship
