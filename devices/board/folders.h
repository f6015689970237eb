// Folders, on 32-bit systems too (std::filesystem there stops at entries of large file systems).

#pragma once

#include <string>
#include <vector>

namespace netship {

// The names in a folder, without those that begin with a dot; empty where it cannot be read.
std::vector<std::string> names_in(const std::string& folder);

// A server's folder in `parent`, locked while the server runs. Folders of this user's servers that were
// killed are removed. Others may be able to write to `parent`: everything is done through descriptors of
// folders that belong to this user, so that no link or other folder can take the place of one meanwhile.
// Throws Refusal.
class WorkFolder {
 public:
  explicit WorkFolder(const std::string& parent);
  WorkFolder(const WorkFolder&) = delete;
  WorkFolder& operator=(const WorkFolder&) = delete;
  ~WorkFolder();

  // The folder of the one client. `make_client` is false, with errno, where it cannot be made; `enter_client`
  // changes to it, in the client's process, and throws std::runtime_error.
  bool make_client() const;
  void enter_client() const;
  void remove_client() const;

 private:
  std::string name_;
  int parent_ = -1, folder_ = -1, lock_ = -1;
};

// The folder of kept files, from the client's folder.
constexpr const char* kKeptFolder = "../kept";

}  // namespace netship
