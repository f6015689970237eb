// The board's side of TVM's tracker protocol (tvm/rpc/tracker.py, tvm/rpc/base.py): a registration
// that outlives restarts of the tracker, as a state machine that never waits.

#pragma once

#include <chrono>
#include <deque>
#include <string>

namespace netship {

using Clock = std::chrono::steady_clock;

class Tracker {
 public:
  // `port` is where clients reach this board; the tracker sees the address itself.
  Tracker(std::string host, std::string tracker_port, std::string key, int port);

  // The board is free, or has a client.
  void set_free(bool free);

  // The key that the next client has to give; empty while the board is not offered.
  const std::string& match_key() const { return match_key_; }

  // The descriptor for poll; -1 while there is no connection.
  int descriptor() const { return socket_; }
  short events() const;
  Clock::time_point next_step() const { return deadline_; }

  // Call it when poll reports `events`, or when `next_step` has passed.
  void step(short events);

 private:
  enum State { kApart, kConnecting, kGreeting, kRegistered };
  enum Question { kInfo, kOffer, kPending };

  void connect();
  void retry(const char* why);
  void ask(Question question, const std::string& message);
  void send_bytes(const void* data, size_t bytes);
  void receive();
  void hear(const std::string& answer);
  void offer();

  const std::string host_, tracker_port_, key_;
  const int port_;
  State state_ = kApart;
  int socket_ = -1;
  Clock::time_point deadline_ = Clock::now();
  std::chrono::milliseconds pause_;
  bool free_ = true, complained_ = false;
  std::string match_key_, received_;
  std::deque<Question> questions_;
  int unclaimed_ = 0;
};

}  // namespace netship
