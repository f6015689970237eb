// What a client may do with files: TVM's own functions (upload, download, remove, load_module), kept
// to the client's folder, and netship.sha256, netship.have and netship.keep.

#pragma once

#include <string>

namespace netship {

// Where this process's client has its files, and where files wait for the next one.
// Both are absolute; call it before the first request is served.
void set_client_folders(const std::string& work, const std::string& kept);

}  // namespace netship
