// netship-serve: a TVM RPC server for a board that has no Python (see usage() for its options).
//
// It implements the protocol of tvm/rpc/server.py. One client at a time has the board, with a process
// and a folder for it; others that know the key wait, and no other connection keeps them from it
// (callers.h). The main process runs no code of a client, so that no client can end it.

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <tvm/runtime/registry.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "board_info.h"
#include "callers.h"
#include "folders.h"
#include "options.h"
#include "refusal.h"
#include "rpc/rpc_endpoint.h"
#include "say.h"
#include "tracker.h"

namespace netship {
namespace {

using std::chrono::duration_cast;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr seconds kEndWithin{5};
constexpr int kSignals[] = {SIGINT, SIGTERM, SIGHUP, SIGCHLD};

int port_of(int socket) {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  getsockname(socket, reinterpret_cast<sockaddr*>(&address), &size);
  return ntohs(address.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(address).sin6_port
                                             : reinterpret_cast<sockaddr_in&>(address).sin_port);
}

int listen_on(const Options& options) {
  int end = std::max(options.port_end, options.port + 1), error = 0;
  for (int port = options.port; port < end; port++) {
    addrinfo hints{}, *found = nullptr;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_PASSIVE;
    if (int code = getaddrinfo(options.host.c_str(), std::to_string(port).c_str(), &hints, &found))
      throw Refusal{"--host " + options.host + ": " + gai_strerror(code)};
    int listener = socket(found->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), one = 1;
    if (listener >= 0) setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    bool bound = listener >= 0 && bind(listener, found->ai_addr, found->ai_addrlen) == 0 &&
                 listen(listener, SOMAXCONN) == 0;
    error = errno;
    freeaddrinfo(found);
    if (bound) return listener;
    if (listener >= 0) close(listener);
    if (error != EADDRINUSE) break;
  }
  std::string ports = std::to_string(options.port);
  if (end > options.port + 1) ports += " to " + std::to_string(end - 1);
  throw Refusal{options.host + ", port " + ports + ": " + std::strerror(error) +
                "; choose another --port, or 0"};
}

// A client's connection for TVM's endpoint; it does not wait for ever.
class Channel final : public tvm::runtime::RPCChannel {
 public:
  Channel(int socket, int idle_seconds) : socket_(socket), idle_seconds_(idle_seconds) {}

  size_t Send(const void* data, size_t size) final { return checked(send(socket_, data, size, MSG_NOSIGNAL)); }

  size_t Recv(void* data, size_t size) final {
    pollfd waiting{socket_, POLLIN, 0};
    if (poll(&waiting, 1, idle_seconds_ > 0 ? idle_seconds_ * 1000 : -1) == 0)
      throw tvm::runtime::Error("it asked for nothing for " + std::to_string(idle_seconds_) + " s");
    return checked(recv(socket_, data, size, 0));
  }

 private:
  static size_t checked(ssize_t moved) {
    // The type that the endpoint expects in its destructor.
    if (moved < 0) throw tvm::runtime::Error(std::strerror(errno));
    return static_cast<size_t>(moved);
  }

  int socket_, idle_seconds_;
};

// The text of one of TVM's messages, without the time and the line of source before it.
std::string first_line(const std::string& message) {
  size_t start = message.find(".cc:");
  if (start != std::string::npos) start = message.find(": ", start);
  start = start == std::string::npos ? 0 : start + 2;
  return message.substr(start, message.find('\n', start) - start);
}

// The process that serves the one client which has the board.
struct Session {
  pid_t process;
  Caller client;
  Clock::time_point end;
  bool expired = false;  // by the client's own -timeout, not because it hung up
};

volatile sig_atomic_t asked_to_end = 0;

class Server {
 public:
  explicit Server(const Options& options)
      : options_(options),
        folder_(options.work_dir),
        listener_(listen_on(options)),
        callers_(listener_, options_, tracker_) {
    if (!options.tracker_host.empty())
      tracker_.emplace(options.tracker_host, options.tracker_port, options.key, port_of(listener_));
    std::string host = options.host.find(':') == std::string::npos ? options.host : "[" + options.host + "]";
    std::printf("listening on %s:%d\n", host.c_str(), port_of(listener_));
    std::fflush(stdout);
  }

  ~Server() {
    if (session_) {
      kill(session_->process, SIGKILL);
      waitpid(session_->process, nullptr, 0);
    }
  }

  // `mask` is the signal mask while it waits.
  void run(const sigset_t* mask) {
    while (!asked_to_end) {
      wait_for_something(mask);
      reap();
      watch_session();
      if (!session_) serve_next();
    }
  }

 private:
  void wait_for_something(const sigset_t* mask) {
    std::vector<pollfd> polled;
    Clock::time_point until = Clock::now() + std::chrono::hours(1);
    polled.push_back({options_.end_with_stdin ? STDIN_FILENO : -1, POLLIN, 0});
    polled.push_back({tracker_ ? tracker_->descriptor() : -1, tracker_ ? tracker_->events() : short{0}, 0});
    if (tracker_) until = std::min(until, tracker_->next_step());
    bool hung_up = session_ && session_->end < Clock::time_point::max() && !session_->expired;
    polled.push_back({session_ && !hung_up ? session_->client.socket : -1, POLLRDHUP, 0});
    if (session_) until = std::min(until, session_->end);
    size_t callers = polled.size();
    callers_.add_to(&polled, &until);
    auto left = std::max(milliseconds(0), duration_cast<milliseconds>(until - Clock::now()) + milliseconds(1));
    timespec timeout{static_cast<time_t>(left.count() / 1000), static_cast<long>(left.count() % 1000) * 1000000};
    if (ppoll(polled.data(), polled.size(), &timeout, mask) <= 0)
      for (auto& one : polled) one.revents = 0;
    if (polled[0].revents) {
      char ignored[4096];
      if (read(STDIN_FILENO, ignored, sizeof ignored) <= 0) asked_to_end = 1;
    }
    if (tracker_) tracker_->step(polled[1].revents);
    if (polled[2].revents && session_) session_->end = std::min(session_->end, Clock::now() + kEndWithin);
    callers_.hear(&polled[callers]);
  }

  void serve_next() {
    auto queued = callers_.take_queued();
    if (!queued) {
      if (tracker_ && !callers_.any_with_key()) tracker_->set_free(true);
      return;
    }
    const Caller& client = *queued;
    pid_t parent = getpid(), process = -1;
    if (folder_.make_client() && (process = fork()) == 0) serve(client, parent);
    if (process < 0) {
      say("client %s: %s", client.address.c_str(), std::strerror(errno));
      close(client.socket);
      folder_.remove_client();
      return;
    }
    auto end = client.timeout > 0 && client.timeout < 1e6
                   ? Clock::now() + milliseconds(static_cast<long>(client.timeout * 1000))
                   : Clock::time_point::max();
    session_ = Session{process, client, end};
  }

  // The child: nothing here may return.
  [[noreturn]] void serve(const Caller& client, pid_t parent) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(1);
    for (int number : kSignals) signal(number, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);
    close(listener_);
    if (tracker_ && tracker_->descriptor() >= 0) close(tracker_->descriptor());
    callers_.close_all();
    int nothing = open("/dev/null", O_RDONLY | O_CLOEXEC);
    dup2(nothing, STDIN_FILENO);
    // Callers read the port from standard output, and nothing else.
    dup2(STDERR_FILENO, STDOUT_FILENO);
    fcntl(client.socket, F_SETFL, fcntl(client.socket, F_GETFL) & ~O_NONBLOCK);
    try {
      folder_.enter_client();
      auto channel = std::make_unique<Channel>(client.socket, options_.idle_timeout);
      std::string name = "server:" + options_.key;
      tvm::runtime::RPCEndpoint::Create(std::move(channel), name, "")->ServerLoop();
    } catch (const std::exception& error) {
      say("client %s: %s", client.address.c_str(), first_line(error.what()).c_str());
      _exit(1);
    }
    // Do not wait for the threads of TVM's pool.
    _exit(0);
  }

  void watch_session() {
    if (session_ && Clock::now() >= session_->end) {
      session_->expired = session_->client.timeout > 0;
      kill(session_->process, SIGKILL);
      session_->end = Clock::time_point::max();
    }
  }

  void reap() {
    int status;
    if (!session_ || waitpid(session_->process, &status, WNOHANG) != session_->process) return;
    const Caller& client = session_->client;
    if (session_->expired)
      tell_expired(client);
    else if (WIFSIGNALED(status))
      say("client %s: its process ended by SIG%s", client.address.c_str(), sigabbrev(WTERMSIG(status)));
    close(client.socket);
    session_.reset();
    folder_.remove_client();
  }

  // The same words as TVM's own server, as its runners look for them.
  void tell_expired(const Caller& client) {
    say("client %s: its %g s are over", client.address.c_str(), client.timeout);
    std::ostringstream words;
    words << "RPCSessionTimeoutError: Your " << client.timeout
          << "s session has expired, try to increase the \"session_timeout\" value.";
    try {
      (*tvm::runtime::Registry::Get("rpc.ReturnException"))(client.socket, words.str());
    } catch (const std::exception&) {
      // It has ended too.
    }
  }

  static const char* sigabbrev(int number) {
    static const std::pair<int, const char*> kNames[] = {
        {SIGILL, "ILL"}, {SIGSEGV, "SEGV"}, {SIGBUS, "BUS"}, {SIGFPE, "FPE"}, {SIGABRT, "ABRT"},
        {SIGKILL, "KILL"}, {SIGTERM, "TERM"}, {SIGINT, "INT"}, {SIGSYS, "SYS"}, {SIGTRAP, "TRAP"}};
    static char text[16];
    for (auto& [known, name] : kNames)
      if (known == number) return name;
    std::snprintf(text, sizeof text, "NAL %d", number);
    return text;
  }

  const Options options_;
  WorkFolder folder_;
  int listener_;
  std::optional<Tracker> tracker_;
  Callers callers_;
  std::optional<Session> session_;
};

void on_signal(int number) {
  if (number != SIGCHLD) asked_to_end = 1;
}

int serve(int count, char** words) {
  try {
    Options options = parse_options(count, words);
    // TVM reads it when it starts its thread pool, in each client's process.
    if (options.threads > 0) setenv("TVM_NUM_THREADS", std::to_string(options.threads).c_str(), 1);
    rlimit no_core{0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    // Signals are delivered only while the server waits, so that none is missed.
    sigset_t blocked, while_waiting;
    sigemptyset(&blocked);
    for (int number : kSignals) {
      struct sigaction action {};
      sigaction(number, nullptr, &action);
      // It is ignored under nohup.
      if (number == SIGHUP && action.sa_handler == SIG_IGN) continue;
      action.sa_handler = on_signal;
      sigaction(number, &action, nullptr);
      sigaddset(&blocked, number);
    }
    // With these ignored write() fails instead: on a full disk, which the client is told, or when a client hung up.
    for (int number : {SIGPIPE, SIGXFSZ}) signal(number, SIG_IGN);
    sigprocmask(SIG_BLOCK, &blocked, &while_waiting);
    for (int number : kSignals) sigdelset(&while_waiting, number);
    Server(options).run(&while_waiting);
    return 0;
  } catch (const Refusal& refusal) {
    std::fprintf(stderr, "error: %s\n", refusal.what.c_str());
    return 2;
  }
}

TVM_REGISTER_GLOBAL("netship.board").set_body_typed([] { return board_json("."); });

}  // namespace
}  // namespace netship

int main(int count, char** words) { return netship::serve(count, words); }
