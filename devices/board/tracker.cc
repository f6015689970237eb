#include "tracker.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace netship {
namespace {

using std::chrono::milliseconds;

// tvm/rpc/base.py: RPC_TRACKER_MAGIC and TrackerCode.
constexpr int32_t kMagic = 0x2f271;
constexpr int kPut = 3, kUpdateInfo = 5, kGetPending = 7;

constexpr milliseconds kFirstPause{250}, kLongestPause{5000}, kAnswerWithin{10000};
// As TVM's own server does: ask every two seconds, and make a new key when the client to which the
// tracker gave this board has not come for more than six.
constexpr milliseconds kPing{2000};
constexpr int kMostUnclaimed = 3;
constexpr size_t kLongestAnswer = 1 << 16;

std::string random_key(const std::string& key) {
  uint64_t number = 0;
  while (getrandom(&number, sizeof number, 0) != sizeof number) continue;
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(number));
  return key + ":" + text;
}

}  // namespace

Tracker::Tracker(std::string host, std::string tracker_port, std::string key, int port)
    : host_(std::move(host)),
      tracker_port_(std::move(tracker_port)),
      key_(std::move(key)),
      port_(port),
      pause_(kFirstPause) {}

short Tracker::events() const { return state_ == kConnecting ? POLLOUT : POLLIN; }

void Tracker::set_free(bool free) {
  if (free == free_) return;
  free_ = free;
  match_key_.clear();
  if (free && state_ == kRegistered) offer();
}

void Tracker::step(short events) {
  bool late = Clock::now() >= deadline_;
  if (state_ == kApart) {
    if (late) connect();
  } else if (state_ == kConnecting) {
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(socket_, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
      retry(std::strerror(error));
    } else if (events) {
      state_ = kGreeting;
      deadline_ = Clock::now() + kAnswerWithin;
      send_bytes(&kMagic, sizeof kMagic);
    } else if (late) {
      retry("no connection in time");
    }
  } else if (events) {
    receive();
  } else if (late && (state_ == kGreeting || !questions_.empty())) {
    retry("no answer in time");
  } else if (late && free_) {
    ask(kPending, "[" + std::to_string(kGetPending) + "]");
  } else if (late) {
    deadline_ = Clock::now() + kPing;
  }
}

void Tracker::connect() {
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  if (int error = getaddrinfo(host_.c_str(), tracker_port_.c_str(), &hints, &found))
    return retry(gai_strerror(error));
  socket_ = socket(found->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  int error = socket_ < 0 || ::connect(socket_, found->ai_addr, found->ai_addrlen) ? errno : 0;
  freeaddrinfo(found);
  if (error && error != EINPROGRESS) return retry(std::strerror(error));
  state_ = kConnecting;
  deadline_ = Clock::now() + kAnswerWithin;
}

void Tracker::retry(const char* why) {
  if (!complained_)
    std::fprintf(stderr, "netship-serve: tracker %s:%s: %s; trying again and again\n",
                 host_.c_str(), tracker_port_.c_str(), why);
  complained_ = true;
  if (socket_ >= 0) close(socket_);
  socket_ = -1;
  state_ = kApart;
  match_key_.clear();
  received_.clear();
  questions_.clear();
  deadline_ = Clock::now() + pause_;
  pause_ = std::min(2 * pause_, kLongestPause);
}

void Tracker::send_bytes(const void* data, size_t bytes) {
  // A few hundred bytes on an idle connection fit into its buffer, or the connection is broken.
  if (send(socket_, data, bytes, MSG_NOSIGNAL) != static_cast<ssize_t>(bytes))
    retry(std::strerror(errno));
}

void Tracker::ask(Question question, const std::string& message) {
  int32_t size = static_cast<int32_t>(message.size());
  std::string framed(reinterpret_cast<const char*>(&size), sizeof size);
  questions_.push_back(question);
  deadline_ = Clock::now() + kAnswerWithin;
  framed += message;
  send_bytes(framed.data(), framed.size());
}

void Tracker::receive() {
  char part[4096];
  ssize_t got = recv(socket_, part, sizeof part, 0);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (got <= 0) return retry(got ? std::strerror(errno) : "it hung up");
  received_.append(part, static_cast<size_t>(got));
  for (;;) {
    int32_t word;
    if (received_.size() < sizeof word) return;
    std::memcpy(&word, received_.data(), sizeof word);
    if (state_ == kGreeting) {
      if (word != kMagic) return retry("what listens there is no TVM tracker");
      received_.erase(0, sizeof word);
      state_ = kRegistered;
      ask(kInfo, "[" + std::to_string(kUpdateInfo) + ", {\"key\": \"server:" + key_ +
                     "\", \"addr\": [null, " + std::to_string(port_) + "]}]");
    } else {
      if (word < 0 || static_cast<size_t>(word) > kLongestAnswer) return retry("garbage");
      size_t end = sizeof word + static_cast<size_t>(word);
      if (received_.size() < end) return;
      std::string answer = received_.substr(sizeof word, end - sizeof word);
      received_.erase(0, end);
      hear(answer);
    }
    if (state_ == kApart) return;
  }
}

void Tracker::hear(const std::string& answer) {
  if (questions_.empty()) return retry("an answer to no question");
  Question question = questions_.front();
  questions_.pop_front();
  deadline_ = Clock::now() + kPing;
  if (question != kPending && answer != "0") return retry("it refused this board");
  if (question == kInfo) {
    complained_ = false;
    pause_ = kFirstPause;
    if (free_ && match_key_.empty()) offer();
  } else if (question == kPending && free_) {
    bool claimed = answer.find('"' + match_key_ + '"') == std::string::npos;
    unclaimed_ = claimed ? unclaimed_ + 1 : 0;
    if (unclaimed_ > kMostUnclaimed) offer();
  }
}

void Tracker::offer() {
  unclaimed_ = 0;
  match_key_ = random_key(key_);
  ask(kOffer, "[" + std::to_string(kPut) + ", \"" + key_ + "\", [" + std::to_string(port_) +
                  ", \"" + match_key_ + "\"], null]");
}

}  // namespace netship
