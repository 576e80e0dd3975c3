// How the sequences of a call are shared by threads, and how these go together.  A pool has `num_threads` and `Schedule`.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "sizes.h"

namespace rnn {

// How many threads `work` multiplications and additions are worth: to wake one takes some microseconds.
template <class Pool>
int64_t threads(const Pool& pool, int64_t work) {
  constexpr int64_t kWorth = 1 << 20;
  const int64_t cores = std::max<int64_t>(1, std::thread::hardware_concurrency());
  return std::clamp<int64_t>(work / kWorth, 1, std::max<int64_t>(1, std::min(pool.num_threads(), cores)));
}

constexpr int kSpins = 1000;  // how often a thread looks before it gives way to others

// body(n, which thread) for all n below `count`, on the caller's thread, 0, and those of XLA's pool that come in time.
template <class Pool, class Body>
void parallel(Pool& pool, int64_t count, int64_t work, Body&& body) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  auto take = [shared, count, &body](int64_t thread) {  // one that comes late finds nothing and does not touch `body`
    for (int64_t n; (n = shared->next.fetch_add(1)) < count;)
      body(n, thread), shared->done.fetch_add(1, std::memory_order_release);
  };
  try {
    for (int64_t n = 1; n < std::min(count, threads(pool, work)); n++)
      pool.Schedule(std::function<void()>([take, n] { take(n); }));
  } catch (const std::bad_alloc&) {  // those that were asked may use what an exception would take away
  }
  take(0);
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < count; spins++)
    if (spins > kSpins) std::this_thread::yield();
}

// Threads that go through the same phases together, each taking what it finds of a phase: none has to come at all.
class Team {
 public:
  // One thread's way through.  All of them call `phase` with the same counts in the same order.
  class Member {
   public:
    explicit Member(Team& team) : team_(team) {}
    // body(n) for all n below `count`, after everything of the phases before is done.
    template <class Body>
    void phase(int64_t count, Body&& body) {
      if (team_.alone_) {
        for (int64_t n = 0; n < count; n++) body(n);
        return;
      }
      const int64_t before = begin_;
      begin_ += count;
      for (int64_t n = team_.next_.load(std::memory_order_relaxed); n < begin_;) {
        if (!team_.next_.compare_exchange_weak(n, n + 1, std::memory_order_relaxed)) continue;
        for (int spins = 0; team_.done_.load(std::memory_order_acquire) < before; spins++)
          if (spins > kSpins) std::this_thread::yield();
        body(n - before);
        team_.done_.fetch_add(1, std::memory_order_release);
        n = team_.next_.load(std::memory_order_relaxed);
      }
    }

   private:
    Team& team_;
    int64_t begin_ = 0;
  };

  explicit Team(bool alone) : alone_(alone) {}
  Team(Team&& other) : alone_(other.alone_) {}

 private:
  const bool alone_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

// A piece of the way that the team goes through together, or that one of it goes alone.
template <class Body>
void in_turn(Team::Member& here, bool together, Body&& body) {
  if (together) return body(here);
  here.phase(1, [&](int64_t) {
    Team one(true);
    Team::Member alone(one);
    body(alone);
  });
}

// The sequences, cut into parts, and threads for each.  Groups have parameters' gradients of their own.
struct Parts {
  int64_t rows, groups, each, team;  // sequences, groups of them, parts of a group, threads of a part
  bool together;                     // whether these share the steps too, and not only products over several of them

  // Parts do not wait for each other, but each reads the whole matrix; threads of a team share it, and wait after every
  // step.
  template <class Pool>
  Parts(const Sizes& s, int64_t groups, const Pool& pool) : rows(s.batch), groups(groups) {
    constexpr int64_t kWaiting = 1 << 17;  // multiplications and additions of a step, to a thread, that are worth it
    const int64_t count = std::max<int64_t>(1, threads(pool, s.products()) / groups), own = rows / groups;
    together = own * s.depth * s.lanes / count >= kWaiting;
    each = std::clamp<int64_t>(own / (together ? kRows : 2), 1, count);
    team = count / each;
  }
  // Working memory: one for each part, or where parts run alone for each thread, which may run many.
  template <class Pool>
  int64_t slots(const Sizes& s, const Pool& pool) const {
    return team > 1 ? count() : std::min(count(), threads(pool, s.products()));
  }
  int64_t slot(int64_t part, int64_t thread) const { return team > 1 ? part : thread; }
  std::vector<Team> teams() const {
    std::vector<Team> all;
    for (int64_t n = 0; n < count(); n++) all.emplace_back(team == 1);
    return all;
  }
  int64_t count() const { return groups * each; }
  int64_t first(int64_t part) const {
    const int64_t group = rows / groups;
    return part / each * group + group * (part % each) / each;
  }
  int64_t end(int64_t part) const { return part + 1 == count() ? rows : first(part + 1); }
};

}  // namespace rnn
