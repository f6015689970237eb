// Folders, on 32-bit systems too (std::filesystem there stops at entries of large file systems).

#pragma once

#include <string>
#include <vector>

namespace netship {

// The names in a folder, without those that begin with a dot; empty where it cannot be read.
std::vector<std::string> names_in(const std::string& folder);

// Removes it with all that is in it, following no link; says on stderr what stays.
void remove_tree(const std::string& path);

// A server's folder in `parent`, locked for as long as the server lives; what one that was killed left
// there is removed. Throws Refusal.
class WorkFolder {
 public:
  explicit WorkFolder(const std::string& parent);
  WorkFolder(const WorkFolder&) = delete;
  WorkFolder& operator=(const WorkFolder&) = delete;
  ~WorkFolder();

  std::string kept() const { return path_ + "/kept"; }
  std::string client() const { return path_ + "/client"; }

 private:
  std::string path_;
  int lock_ = -1;
};

}  // namespace netship
