#include "folders.h"

#include <dirent.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "refusal.h"

namespace netship {
namespace {

int remove_one(const char* path, const struct stat*, int kind, FTW*) {
  int failed = kind == FTW_DP || kind == FTW_DNR ? rmdir(path) : unlink(path);
  if (failed && errno != ENOENT) std::fprintf(stderr, "netship-serve: %s: %s\n", path, std::strerror(errno));
  return 0;
}

constexpr const char* kPrefix = "netship-serve-";

[[noreturn]] void refuse(const std::string& parent, int error) {
  throw Refusal{parent + ": " + std::strerror(error) + "; choose another --work-dir"};
}

void remove_abandoned(const std::string& parent) {
  for (auto& name : names_in(parent)) {
    if (name.rfind(kPrefix, 0) != 0) continue;
    std::string path = parent + "/" + name;
    int lock = open((path + "/lock").c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (lock < 0) continue;
    if (flock(lock, LOCK_EX | LOCK_NB) == 0) remove_tree(path);
    close(lock);
  }
}

}  // namespace

std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> names;
  if (DIR* stream = opendir(folder.c_str())) {
    while (const dirent* entry = readdir(stream))
      if (entry->d_name[0] != '.') names.push_back(entry->d_name);
    closedir(stream);
  }
  return names;
}

void remove_tree(const std::string& path) {
  constexpr int kDescriptors = 16;
  nftw(path.c_str(), remove_one, kDescriptors, FTW_DEPTH | FTW_PHYS);
}

WorkFolder::WorkFolder(const std::string& given) {
  char parent[PATH_MAX];
  if (realpath(given.c_str(), parent) == nullptr) refuse(given, errno);
  remove_abandoned(parent);
  path_ = std::string(parent) + "/" + kPrefix + "XXXXXX";
  if (mkdtemp(path_.data()) == nullptr) refuse(given, errno);
  lock_ = open((path_ + "/lock").c_str(), O_RDONLY | O_CREAT | O_CLOEXEC, 0600);
  if (lock_ < 0 || flock(lock_, LOCK_EX | LOCK_NB) || mkdir(kept().c_str(), 0700)) {
    int error = errno;
    remove_tree(path_);
    refuse(given, error);
  }
}

WorkFolder::~WorkFolder() {
  remove_tree(path_);
  close(lock_);
}

}  // namespace netship
