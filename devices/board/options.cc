#include "options.h"

#include <getopt.h>
#include <tvm/runtime/c_runtime_api.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>

#include "board_info.h"
#include "refusal.h"

namespace netship {
namespace {

void usage() {
  std::puts(
      "usage: netship-serve [options]\n"
      "\n"
      "A TVM RPC server that needs no Python. Prints 'listening on HOST:PORT' when it is ready.\n"
      "\n"
      "  --host ADDRESS         where to listen (127.0.0.1); RPC has no encryption, so reach another\n"
      "                         machine's by an SSH tunnel\n"
      "  --port N               (9090); 0 takes any that is free\n"
      "  --port-end N           try the ports below N in turn\n"
      "  --key KEY              what a client has to give; with a tracker, what it asks for\n"
      "  --key-file FILE        the same, from a file's first line\n"
      "  --key-stdin            the same, from the first line of standard input\n"
      "  --tracker HOST:PORT    register at a TVM tracker, again whenever that restarts\n"
      "  --work-dir DIR         where clients' files go ($TMPDIR or /tmp); must allow execution\n"
      "  --idle-timeout S       hang up on a client that asks for nothing for S seconds (600); 0: never\n"
      "  --threads N            for inference (all cores)\n"
      "  --end-with-stdin       end when standard input does\n"
      "  --version\n"
      "\n"
      "Whoever has the key can run any program as the user that this runs as.");
}

// Reads unbuffered, as what follows the line is not for this program.
std::string line_of_stdin() {
  std::string line;
  for (char c; read(STDIN_FILENO, &c, 1) == 1;) {
    if (c == '\n') return line;
    line += c;
  }
  throw Refusal{"--key-stdin: standard input has no line"};
}

std::string line_of_file(const char* path) {
  std::ifstream file(path);
  std::string line;
  if (!std::getline(file, line)) throw Refusal{std::string(path) + ": no key in it"};
  return line;
}

// The key is a word in TVM's greeting and a string in the tracker's JSON.
void check_key(const std::string& key) {
  bool plain = key.size() <= 256 && std::all_of(key.begin(), key.end(), [](char c) {
                 return c > ' ' && c < 0x7f && c != '"' && c != '\\';
               });
  if (!plain) throw Refusal{"the key: give at most 256 letters, digits and signs, without space, \" and \\"};
}

}  // namespace

Options parse_options(int count, char** words) {
  static const option kOptions[] = {
      {"host", required_argument, nullptr, 'h'},        {"port", required_argument, nullptr, 'p'},
      {"port-end", required_argument, nullptr, 'e'},    {"key", required_argument, nullptr, 'k'},
      {"key-file", required_argument, nullptr, 'f'},    {"key-stdin", no_argument, nullptr, 's'},
      {"tracker", required_argument, nullptr, 't'},     {"work-dir", required_argument, nullptr, 'w'},
      {"idle-timeout", required_argument, nullptr, 'i'}, {"threads", required_argument, nullptr, 'n'},
      {"end-with-stdin", no_argument, nullptr, 'z'},    {"version", no_argument, nullptr, 'v'},
      {"help", no_argument, nullptr, '?'},              {nullptr, 0, nullptr, 0}};
  Options options;
  opterr = 0;
  for (int index = 0, letter; (letter = getopt_long(count, words, "", kOptions, &index)) != -1;) {
    switch (letter) {
      case 'h': options.host = optarg; break;
      case 'p': options.port = to_number("port", optarg, 0, 65535); break;
      case 'e': options.port_end = to_number("port-end", optarg, 1, 65536); break;
      case 'k': options.key = optarg; break;
      case 'f': options.key = line_of_file(optarg); break;
      case 's': options.key = line_of_stdin(); break;
      case 'w': options.work_dir = optarg; break;
      case 'i': options.idle_timeout = to_number("idle-timeout", optarg, 0, INT_MAX / 1000); break;
      case 'n': options.threads = to_number("threads", optarg, 1, 1024); break;
      case 'z': options.end_with_stdin = true; break;
      case 'v': std::printf("netship-serve %s (TVM %s, %s)\n", kVersion, TVM_VERSION, kMachine); std::exit(0);
      case 't': {
        std::string address = optarg;
        size_t colon = address.rfind(':');
        if (colon == std::string::npos || colon == 0)
          throw Refusal{"--tracker " + address + ": give HOST:PORT"};
        options.tracker_host = address.substr(0, colon);
        options.tracker_port = address.substr(colon + 1);
        to_number("tracker", options.tracker_port.c_str(), 1, 65535);
        break;
      }
      default:
        if (optopt == 0 && std::strcmp(words[optind - 1], "--help") == 0) {
          usage();
          std::exit(0);
        }
        throw Refusal{std::string(words[optind - 1]) + ": unknown, or without its value; see --help"};
    }
  }
  if (optind < count) throw Refusal{std::string(words[optind]) + ": no option; see --help"};
  if (options.work_dir.empty()) options.work_dir = std::getenv("TMPDIR") ? std::getenv("TMPDIR") : "/tmp";
  check_key(options.key);
  if (!options.tracker_host.empty() && options.key.empty())
    throw Refusal{"--tracker: needs a --key, which clients ask the tracker for"};
  return options;
}

}  // namespace netship
