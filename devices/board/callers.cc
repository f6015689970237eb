#include "callers.h"

#include <netdb.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <tvm/runtime/registry.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "say.h"

namespace netship {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// tvm/rpc/base.py: RPC_MAGIC, RPC_CODE_SUCCESS and RPC_CODE_MISMATCH.
constexpr int32_t kMagic = 0xff271, kWelcome = kMagic, kMismatch = kMagic + 2;

constexpr int32_t kLongestKey = 4096;
constexpr seconds kGreetWithin{5};
// TVM's client asks at once.
constexpr int kAskWithinSeconds = 30;
constexpr size_t kMostStrangers = 32, kMostSilent = 32, kMostQueued = 64;
// So few that a stranger is heard before as many newer ones take its place.
constexpr int kAcceptedAtOnce = kMostStrangers / 2;

std::string address_text(const sockaddr_storage& address, socklen_t size) {
  char host[NI_MAXHOST], port[NI_MAXSERV];
  if (getnameinfo(reinterpret_cast<const sockaddr*>(&address), size, host, sizeof host, port, sizeof port,
                  NI_NUMERICHOST | NI_NUMERICSERV))
    return "?";
  return std::string(host) + ":" + port;
}

void prepare(int socket) {
  int one = 1, idle = 60, interval = 10, count = 3;
  setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  // A client whose machine is gone is noticed after a minute and a half.
  setsockopt(socket, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
  setsockopt(socket, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
  setsockopt(socket, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
  setsockopt(socket, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof count);
}

// Reads what has come of a greeting. False if it is not a greeting.
bool receive(Caller* caller) {
  char part[256];
  while (size_t wanted = std::min(sizeof part, caller->wanted())) {
    ssize_t got = recv(caller->socket, part, wanted, 0);
    if (got < 0) return errno == EAGAIN || errno == EINTR;
    caller->received.append(part, static_cast<size_t>(got));
    if (got == 0 || (caller->received.size() >= 4 && caller->word(0) != kMagic)) return false;
    if (caller->received.size() >= 8 && (caller->word(4) < 0 || caller->word(4) > kLongestKey)) return false;
  }
  return true;
}

// The answer to its first request.
void tell_full(const Caller& caller) {
  say("client %s: %zu clients wait already", caller.address.c_str(), kMostQueued);
  std::string words = "the board is busy, and " + std::to_string(kMostQueued) +
                      " clients wait for it already; try again later";
  try {
    (*tvm::runtime::Registry::Get("rpc.ReturnException"))(caller.socket, words);
  } catch (const std::exception&) {
    // It has hung up.
  }
  // With its request unread, closing would take the answer back.
  char ignored[4096];
  for (int part = 0; part < 16 && recv(caller.socket, ignored, sizeof ignored, 0) > 0; part++) continue;
}

}  // namespace

size_t Caller::wanted() const {
  if (received.size() < 8) return 8 - received.size();
  return 8 + static_cast<size_t>(word(4)) - received.size();
}

int32_t Caller::word(size_t at) const {
  int32_t value;
  std::memcpy(&value, received.data() + at, sizeof value);
  return value;
}

Callers::Callers(int listener, const Options& options, std::optional<Tracker>& tracker)
    : listener_(listener), options_(options), tracker_(tracker) {}

void Callers::add_to(std::vector<pollfd>* polled, Clock::time_point* until) const {
  bool accepts = Clock::now() >= accept_again_;
  if (!accepts) *until = std::min(*until, accept_again_);
  polled->push_back({accepts ? listener_ : -1, POLLIN, 0});
  for (auto& caller : callers_) {
    // A client in the queue has said what the process that serves it will read, but may hang up.
    bool queued = caller.kind == Caller::kQueued;
    polled->push_back({caller.socket, queued ? short{POLLRDHUP} : short{POLLIN | POLLRDHUP}, 0});
    if (!queued) *until = std::min(*until, caller.deadline);
  }
}

void Callers::hear(const pollfd* polled) {
  bool knocks = polled->revents != 0;
  for (auto caller = callers_.begin(); caller != callers_.end();) {
    auto next = std::next(caller);
    short events = (++polled)->revents;
    if ((events && !hear_one(&*caller, events)) || is_late(*caller)) drop(caller);
    caller = next;
  }
  if (knocks) accept_some();
  make_room(Caller::kStranger, kMostStrangers);
  make_room(Caller::kSilent, kMostSilent);
}

void Callers::accept_some() {
  for (int i = 0; i < kAcceptedAtOnce; i++) {
    sockaddr_storage address{};
    socklen_t size = sizeof address;
    int socket = accept4(listener_, reinterpret_cast<sockaddr*>(&address), &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (socket < 0) {
      // Without descriptors or memory it would be tried again and again.
      if (errno != EAGAIN && errno != ECONNABORTED && errno != EINTR)
        accept_again_ = Clock::now() + milliseconds(200);
      return;
    }
    prepare(socket);
    callers_.push_back({socket, address_text(address, size), Clock::now() + kGreetWithin});
    if (!hear_one(&callers_.back(), POLLIN)) drop(std::prev(callers_.end()));
  }
}

// False if it is to be hung up on.
bool Callers::hear_one(Caller* caller, short events) {
  if (caller->kind == Caller::kStranger) return receive(caller) && (caller->wanted() || greet(caller));
  if (events & ~POLLIN) return false;
  if (count(Caller::kQueued) >= kMostQueued) {
    tell_full(*caller);
    return false;
  }
  caller->kind = Caller::kQueued;
  return true;
}

bool Callers::greet(Caller* caller) {
  int32_t answer[] = {kMismatch, 0};
  if (!accept_greeting(caller)) {
    send(caller->socket, answer, sizeof answer[0], MSG_NOSIGNAL);
    return false;
  }
  std::string name = "server:" + options_.key;
  answer[0] = kWelcome;
  answer[1] = static_cast<int32_t>(name.size());
  std::string welcome(reinterpret_cast<char*>(answer), sizeof answer);
  welcome += name;
  caller->kind = Caller::kSilent;
  caller->deadline = Clock::now() + seconds(ask_within());
  // So few bytes fit into the buffer of a new connection, or it is broken.
  return send(caller->socket, welcome.data(), welcome.size(), MSG_NOSIGNAL) ==
         static_cast<ssize_t>(welcome.size());
}

// "client:KEY -timeout=SECONDS"
bool Callers::accept_greeting(Caller* caller) {
  std::istringstream words(caller->received.substr(8));
  std::string word;
  words >> word;
  bool offered = !tracker_ || !tracker_->match_key().empty();
  if (!offered || word != "client:" + (tracker_ ? tracker_->match_key() : options_.key)) return false;
  while (words >> word)
    if (word.rfind("-timeout=", 0) == 0) caller->timeout = std::atof(word.c_str() + 9);
  if (tracker_) tracker_->set_free(false);
  return true;
}

bool Callers::is_late(const Caller& caller) const {
  if (caller.kind == Caller::kQueued || Clock::now() < caller.deadline) return false;
  if (caller.kind == Caller::kSilent)
    say("client %s: it asked for nothing for %d s", caller.address.c_str(), ask_within());
  return true;
}

int Callers::ask_within() const {
  return options_.idle_timeout > 0 ? std::min(options_.idle_timeout, kAskWithinSeconds) : kAskWithinSeconds;
}

// The oldest go.
void Callers::make_room(Caller::Kind kind, size_t most) {
  size_t present = count(kind);
  for (auto caller = callers_.begin(); present > most; present--) {
    caller = std::find_if(caller, callers_.end(), [kind](auto& one) { return one.kind == kind; });
    drop(caller++);
  }
}

size_t Callers::count(Caller::Kind kind) const {
  return std::count_if(callers_.begin(), callers_.end(), [kind](auto& one) { return one.kind == kind; });
}

void Callers::drop(Place caller) {
  close(caller->socket);
  callers_.erase(caller);
}

std::optional<Caller> Callers::take_queued() {
  auto queued = [](auto& one) { return one.kind == Caller::kQueued; };
  auto caller = std::find_if(callers_.begin(), callers_.end(), queued);
  if (caller == callers_.end()) return std::nullopt;
  Caller taken = *caller;
  callers_.erase(caller);
  return taken;
}

bool Callers::any_with_key() const { return count(Caller::kStranger) < callers_.size(); }

void Callers::close_all() const {
  for (auto& caller : callers_) close(caller.socket);
}

}  // namespace netship
