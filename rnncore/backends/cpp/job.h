// What one call is about: sizes, how units lie in vectors, the arrays, and how threads share the work.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace rnn {

namespace ffi = xla::ffi;

constexpr int kPad = 16;  // units of a head are padded to this many, whatever the vectors: `kept` has one layout

// How many columns a product of one vector of units takes at a time, out of all its gates.
constexpr int kGates = Cell::gates;
constexpr int kColumns = kGates % 2 == 0 ? 2 : kGates % 3 == 0 ? 3 : 1;
constexpr int kWide = 2;  // vectors of columns of a product with a transposed matrix

inline int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Sizes {
  int64_t steps, batch, inputs, hidden, heads;
  int64_t head, padded, units, blocks;   // units of a head; padded; of all heads, padded; vectors of these
  int64_t lanes;                         // padded units times gates
  int64_t x_row, x_step, y_row, y_step;  // strides of inputs and outputs, between sequences and between steps

  Sizes(int64_t steps, int64_t batch, int64_t inputs, int64_t hidden, int64_t heads, bool time_major)
      : steps(steps), batch(batch), inputs(inputs), hidden(hidden), heads(heads) {
    head = hidden / heads, padded = rounded(head, kPad), units = heads * padded;
    blocks = units / kLanes, lanes = units * kGates;
    x_row = time_major ? inputs : steps * inputs, x_step = time_major ? batch * inputs : inputs;
    y_row = time_major ? hidden : steps * hidden, y_step = time_major ? batch * hidden : hidden;
  }

  int64_t weights() const { return (inputs + head) * lanes; }
  int64_t products() const { return steps * batch * weights(); }  // multiplications and additions of a run

  // A vector of units: its head, where it begins among the caller's units, and how many are real.
  int64_t head_of(int64_t block) const { return block * kLanes / padded; }
  int64_t first(int64_t block) const { return head_of(block) * head + block * kLanes % padded; }
  int count(int64_t block) const { return int(std::clamp<int64_t>(head - block * kLanes % padded, 0, kLanes)); }
};

// ------------------------------------------------------------------------------------------ memory

// Working memory of a call, kept for the next one.
class Memory {
 public:
  Memory() {
    std::lock_guard<std::mutex> lock(mutex());
    if (!idle().empty()) block_ = std::move(idle().back()), idle().pop_back();
  }
  ~Memory() {
    constexpr size_t kMost = size_t(128) << 20;
    std::lock_guard<std::mutex> lock(mutex());
    if (block_.bytes && block_.bytes <= kMost && idle().size() < 4) idle().push_back(std::move(block_));
  }
  // `count` numbers for each size, one after the other, not set to anything.
  std::vector<real*> parts(const std::vector<int64_t>& sizes) {
    constexpr int64_t kLine = 64 / sizeof(real);
    int64_t total = 0;
    for (int64_t n : sizes) total += rounded(n, kLine) + kLine;
    if (block_.bytes < total * sizeof(real)) block_ = Block(total * sizeof(real));
    std::vector<real*> out;
    real* at = static_cast<real*>(block_.data());
    for (int64_t n : sizes) out.push_back(at), at += rounded(n, kLine) + kLine;
    return out;
  }

 private:
  struct Block {
    Block() = default;
    explicit Block(size_t wanted) : bytes(wanted), owner(::operator new(wanted + kAlign), Free{}) {}
    void* data() const { return reinterpret_cast<void*>(rounded(reinterpret_cast<uintptr_t>(owner.get()), kAlign)); }
    static constexpr size_t kAlign = 64;
    struct Free {
      void operator()(void* p) const { ::operator delete(p); }
    };
    size_t bytes = 0;
    std::unique_ptr<void, Free> owner;
  };
  static std::mutex& mutex() {
    static std::mutex* one = new std::mutex;
    return *one;
  }
  static std::vector<Block>& idle() {
    static auto* all = new std::vector<Block>;
    return *all;
  }
  Block block_;
};

// ----------------------------------------------------------------------------------------- threads

// How many threads `work` multiplications and additions are worth: to wake one takes some microseconds.
inline int64_t threads(const ffi::ThreadPool& pool, int64_t work) {
  constexpr int64_t kWorth = 1 << 20;
  const int64_t cores = std::max<int64_t>(1, std::thread::hardware_concurrency());
  return std::clamp<int64_t>(work / kWorth, 1, std::max<int64_t>(1, std::min(pool.num_threads(), cores)));
}

constexpr int kSpins = 1000;  // how often a thread looks before it gives way to others

// body(n, which thread) for all n below `count`, on the caller's thread, 0, and those of XLA's pool that come in time.
template <class Body>
void parallel(ffi::ThreadPool& pool, int64_t count, int64_t work, Body&& body) {
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
  bool steps;                        // whether these share the steps too, and not only products over several of them

  // Parts do not wait for each other, but each reads the whole matrix; threads of a team share it, and wait after every
  // step.
  Parts(const Sizes& s, int64_t groups, const ffi::ThreadPool& pool) : rows(s.batch), groups(groups) {
    constexpr int64_t kWaiting = 1 << 17;  // multiplications and additions of a step, to a thread, that are worth it
    const int64_t count = std::max<int64_t>(1, threads(pool, s.products()) / groups), own = rows / groups;
    steps = own * s.head * s.lanes / count >= kWaiting;
    each = std::clamp<int64_t>(own / (steps ? kRows : 2), 1, count);
    team = count / each;
  }
  // Working memory: one for each part, or where parts run alone for each thread, which may run many.
  int64_t slots(const Sizes& s, const ffi::ThreadPool& pool) const {
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
