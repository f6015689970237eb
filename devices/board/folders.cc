#include "folders.h"

#include <dirent.h>
#include <ftw.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

namespace netship {
namespace {

int remove_one(const char* path, const struct stat*, int kind, FTW*) {
  int failed = kind == FTW_DP || kind == FTW_DNR ? rmdir(path) : unlink(path);
  if (failed && errno != ENOENT) std::fprintf(stderr, "netship-serve: %s: %s\n", path, std::strerror(errno));
  return 0;
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

}  // namespace netship
