// Folders, on 32-bit systems too (std::filesystem there stops at entries of large file systems).

#pragma once

#include <string>
#include <vector>

namespace netship {

// The names in a folder, without those that begin with a dot; empty where it cannot be read.
std::vector<std::string> names_in(const std::string& folder);

// Removes it with all that is in it, following no link; says on stderr what stays.
void remove_tree(const std::string& path);

}  // namespace netship
