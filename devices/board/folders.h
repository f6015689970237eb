// Folders, on 32-bit systems too (std::filesystem there stops at entries of large file systems).

#pragma once

#include <string>
#include <vector>

namespace netship {

// The names in a folder, without those that begin with a dot; empty where it cannot be read.
std::vector<std::string> names_in(const std::string& folder);

// Removes a folder and all that is in it without following links; reports on stderr what cannot be removed.
void remove_tree(const std::string& path);

// A server's folder in `parent`, locked while the server runs. Folders of servers that were killed are
// removed. Throws Refusal.
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
