// The functions for files that a client can call: TVM's own (upload, download, remove, load_module),
// limited to the client's folder, and netship.sha256, netship.have and netship.keep.

#pragma once

#include <string>

namespace netship {

// Sets the folder of this process's client and the folder of kept files, both absolute paths.
// Call it before the first request is served.
void set_client_folders(const std::string& work, const std::string& kept);

}  // namespace netship
