// The command line of netship-serve.

#pragma once

#include <string>

namespace netship {

struct Options {
  std::string host = "127.0.0.1", key, tracker_host, tracker_port, work_dir;
  int port = 9090, port_end = -1;      // the ports below port_end are tried; -1: port alone
  int idle_timeout = 600;              // seconds; 0: none
  int threads = 0;                     // 0: as many as TVM takes by itself
  bool end_with_stdin = false;
};

// Ends the program for --help and --version. Throws Refusal.
Options parse_options(int count, char** words);

}  // namespace netship
