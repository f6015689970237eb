#include "folders.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "refusal.h"
#include "say.h"

namespace netship {
namespace {

constexpr const char *kPrefix = "netship-serve-", *kClient = "client", *kKept = "kept", *kLock = "lock";

[[noreturn]] void refuse(const std::string& parent, int error) {
  throw Refusal{parent + ": " + std::strerror(error) + "; choose another --work-dir"};
}

std::vector<std::string> read_names(DIR* stream) {
  std::vector<std::string> names;
  while (const dirent* entry = readdir(stream)) names.push_back(entry->d_name);
  return names;
}

// A folder that is no link; -1 with errno.
int open_folder(int parent, const char* name) {
  return openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

// Whether it belongs to this user, and nobody else can write to it.
bool is_own(int descriptor) {
  struct stat status;
  return fstat(descriptor, &status) == 0 && status.st_uid == geteuid() && (status.st_mode & 022) == 0;
}

void remove_content(int folder);

// Removes a file, a link, or a folder and all that is in it; reports what cannot be removed.
void remove_in(int parent, const char* name) {
  if (unlinkat(parent, name, 0) == 0 || errno == ENOENT) return;
  int inner = open_folder(parent, name);
  if (inner >= 0) {
    remove_content(inner);
    close(inner);
  }
  if (unlinkat(parent, name, AT_REMOVEDIR) && errno != ENOENT) say("%s: %s", name, std::strerror(errno));
}

void remove_content(int folder) {
  int again = open_folder(folder, ".");
  DIR* stream = again < 0 ? nullptr : fdopendir(again);
  if (stream == nullptr) {
    if (again >= 0) close(again);
    return;
  }
  auto names = read_names(stream);
  closedir(stream);
  for (auto& name : names)
    if (name != "." && name != "..") remove_in(folder, name.c_str());
}

void remove_folder(int parent, const std::string& name, int folder) {
  remove_content(folder);
  if (unlinkat(parent, name.c_str(), AT_REMOVEDIR) && errno != ENOENT)
    say("%s: %s", name.c_str(), std::strerror(errno));
}

void remove_abandoned(int parent, const std::vector<std::string>& names) {
  for (auto& name : names) {
    if (name.rfind(kPrefix, 0) != 0) continue;
    int folder = open_folder(parent, name.c_str());
    if (folder < 0) continue;
    int lock = is_own(folder) ? openat(folder, kLock, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK) : -1;
    if (lock >= 0 && flock(lock, LOCK_EX | LOCK_NB) == 0) remove_folder(parent, name, folder);
    if (lock >= 0) close(lock);
    close(folder);
  }
}

}  // namespace

std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> names;
  if (DIR* stream = opendir(folder.c_str())) {
    for (auto& name : read_names(stream))
      if (name[0] != '.') names.push_back(name);
    closedir(stream);
  }
  return names;
}

WorkFolder::WorkFolder(const std::string& given) {
  parent_ = open(given.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (parent_ < 0) refuse(given, errno);
  remove_abandoned(parent_, names_in(given));
  std::string path = given + "/" + kPrefix + "XXXXXX";
  if (mkdtemp(path.data()) == nullptr) refuse(given, errno);
  name_ = path.substr(given.size() + 1);
  folder_ = open_folder(parent_, name_.c_str());
  if (folder_ < 0) refuse(given, errno);
  if (!is_own(folder_)) refuse(given, EPERM);
  lock_ = openat(folder_, kLock, O_RDONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (lock_ < 0 || flock(lock_, LOCK_EX | LOCK_NB) || mkdirat(folder_, kKept, 0700)) {
    int error = errno;
    remove_folder(parent_, name_, folder_);
    refuse(given, error);
  }
}

WorkFolder::~WorkFolder() {
  remove_folder(parent_, name_, folder_);
  for (int descriptor : {lock_, folder_, parent_}) close(descriptor);
}

bool WorkFolder::make_client() const { return mkdirat(folder_, kClient, 0700) == 0; }

void WorkFolder::enter_client() const {
  int client = open_folder(folder_, kClient);
  if (client < 0 || fchdir(client)) throw std::runtime_error(std::strerror(errno));
  close(client);
}

void WorkFolder::remove_client() const { remove_in(folder_, kClient); }

}  // namespace netship
