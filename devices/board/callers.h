// The clients that have connected and do not have the board. They are strangers until they give the key;
// then they are answered at once, and queue for the board as soon as they ask for something. Each of the
// three kinds has its own places: strangers, and clients that ask for nothing, make room for newer ones.

#pragma once

#include <poll.h>

#include <list>
#include <optional>
#include <string>
#include <vector>

#include "options.h"
#include "tracker.h"

namespace netship {

struct Caller {
  enum Kind { kStranger, kSilent, kQueued };

  int socket;
  std::string address;
  Clock::time_point deadline;  // until when it may stay a stranger, or silent
  Kind kind = kStranger;
  std::string received;  // of its greeting
  double timeout = 0;    // seconds that it gives its whole session; 0: no limit

  // Bytes of the greeting (magic, size of the key, key) that are still to come.
  size_t wanted() const;
  int32_t word(size_t at) const;
};

class Callers {
 public:
  Callers(int listener, const Options& options, std::optional<Tracker>& tracker);

  // Adds what is to be polled, and when `hear` has to be called at the latest.
  void add_to(std::vector<pollfd>* polled, Clock::time_point* until) const;

  // `polled`: what `add_to` added, after the poll.
  void hear(const pollfd* polled);

  // The client that has asked for something and waits longest.
  std::optional<Caller> take_queued();

  bool any_with_key() const;

  // In a forked process: leaves them to the server.
  void close_all() const;

 private:
  using Place = std::list<Caller>::iterator;

  void accept_some();
  bool hear_one(Caller* caller, short events);
  bool greet(Caller* caller);
  bool accept_greeting(Caller* caller);
  bool is_late(const Caller& caller) const;
  void make_room(Caller::Kind kind, size_t most);
  size_t count(Caller::Kind kind) const;
  void drop(Place caller);
  int ask_within() const;

  int listener_;
  const Options& options_;
  std::optional<Tracker>& tracker_;
  std::list<Caller> callers_;  // the oldest first
  Clock::time_point accept_again_{};
};

}  // namespace netship
