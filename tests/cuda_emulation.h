// rnncore/kernels/cuda/device.cuh for the CPU: a thread for every thread of the grid, warps and blocks that meet at
// barriers, and the matrix unit's instructions by its documented layout of fragments.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define RNN_DEVICE inline
#define RNN_KERNEL(threads) extern "C" void
#define RNN_CONSTANT constexpr
#define RNN_UNROLL

namespace rnn {

using u16 = uint16_t;
using u32 = uint32_t;
struct alignas(16) Words {
  u32 v[4];
};
struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};

namespace grid {

struct Barrier {
  pthread_barrier_t it;
  explicit Barrier(unsigned count) { pthread_barrier_init(&it, nullptr, count); }
  ~Barrier() { pthread_barrier_destroy(&it); }
  void wait() { pthread_barrier_wait(&it); }
};
// What the lanes of a warp tell each other: two places in turn, so that one meeting an operation is enough.
struct Warp {
  Barrier met{32};
  u32 told[2][32][6];
};
struct Block {
  Barrier met;
  std::vector<std::unique_ptr<Warp>> warps;
  std::unique_ptr<char, void (*)(void*)> memory;
  Block(int threads, int bytes)
      : met(threads), memory(static_cast<char*>(aligned_alloc(128, (bytes + 255) / 128 * 128)), free) {
    for (int n = 0; n < threads / 32; n++) warps.push_back(std::make_unique<Warp>());
    std::memset(memory.get(), 0x7f, bytes);  // shared memory begins with anything
  }
};
struct Self {
  const std::vector<std::unique_ptr<Block>>* all;
  Block* block;
  int thread, number, turn;
  Warp& warp() const { return *block->warps[thread / 32]; }
  int lane() const { return thread % 32; }
};
inline thread_local Self self;

// All lanes say up to six words and hear what the others say.
template <int N>
const u32 (*tell(const u32 (&words)[N]))[6] {
  Warp& warp = self.warp();
  u32(*to)[6] = warp.told[self.turn++ % 2];
  std::copy(words, words + N, to[self.lane()]);
  warp.met.wait();
  return to;
}

inline int cluster;
inline std::vector<std::unique_ptr<Barrier>> clusters;

inline void launch(int blocks, int threads, int shared, int in_cluster, const std::function<void()>& kernel) {
  cluster = in_cluster;
  clusters.clear();
  for (int n = 0; n < blocks / cluster; n++) clusters.push_back(std::make_unique<Barrier>(cluster * threads));
  std::vector<std::unique_ptr<Block>> all;
  std::vector<std::thread> running;
  for (int b = 0; b < blocks; b++) all.push_back(std::make_unique<Block>(threads, shared));
  for (int b = 0; b < blocks; b++)
    for (int t = 0; t < threads; t++)
      running.emplace_back([&, b, t] {
        self = {&all, all[b].get(), t, b, 0};
        kernel();
      });
  for (auto& thread : running) thread.join();
}

}  // namespace grid

inline int thread_number() { return grid::self.thread; }
inline int block_number() { return grid::self.number; }
inline char* shared_memory() { return grid::self.block->memory.get(); }
inline void sync_block() {
#ifndef RNN_WITHOUT_BARRIERS
  grid::self.block->met.wait();
#endif
}
inline void give_up() { std::abort(); }

inline u32 bits_of(float x) {
  u32 y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float float_of(u32 x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline u32 from_lane_above(u32 value, int lanes) {
  const int lane = grid::self.lane(), from = lane + lanes < 32 ? lane + lanes : lane;
  return grid::tell<1>({value})[from][0];
}
inline u32 from_lane(u32 value, int lane) { return grid::tell<1>({value})[lane][0]; }
inline float from_lane(float value, int lane) { return float_of(grid::tell<1>({bits_of(value)})[lane][0]); }
inline bool any_in_warp(bool value) {
  const auto told = grid::tell<1>({value});
  bool any = false;
#ifndef RNN_WITHOUT_WAITING
  for (int n = 0; n < 32; n++) any |= told[n][0];
#endif
  if (any) sched_yield();
  return any;
}

inline float wide(float x) { return x; }
inline float wide(bf16 x) { return float_of(u32(x.bits) << 16); }
inline float wide(f16 x) {
  _Float16 y;
  std::memcpy(&y, &x, 2);
  return y;
}
inline void narrow(float x, float& to) { to = x == x ? x : float_of(0x7fffffff); }
inline void narrow(float x, bf16& to) {
  const u32 b = bits_of(x);
  to.bits = x == x ? (b + 0x7fff + (b >> 16 & 1)) >> 16 : 0x7fff;
}
inline void narrow(float x, f16& to) {
  const _Float16 y = x;
  std::memcpy(&to, &y, 2);
  if (x != x) to.bits = 0x7fff;
}

template <class T>
T load(const T* p) {
  return *p;
}
inline void prefetch(const void*) {}
inline Words load_shared_between_blocks(const void* p) {
  Words w;
  for (int n = 0; n < 4; n++) w.v[n] = __atomic_load_n(static_cast<const u32*>(p) + n, __ATOMIC_RELAXED);
  return w;
}
inline void store_shared_between_blocks(void* p, u32 value) {
  __atomic_store_n(static_cast<u32*>(p), value, __ATOMIC_RELAXED);
}

// Signals count bytes under one lock; a phase ends when as many have come as were expected.
struct Signal {
  int phase, bytes;  // expected less those that came
};
namespace grid {
inline std::mutex lock;
inline std::condition_variable changed;
inline void count(Signal* signal, int bytes, bool expected) {
  signal->bytes += bytes;
  signal->phase |= expected ? 2 : 0;  // its one arrival
  if (signal->phase & 2 && signal->bytes == 0) signal->phase = (signal->phase & 1) ^ 1, changed.notify_all();
}
}  // namespace grid
inline void start(Signal* signal) { *signal = {0, 0}; }
inline void expect(Signal* signal, int bytes) {
  std::lock_guard<std::mutex> hold(grid::lock);
  grid::count(signal, bytes, true);
}
inline void wait(const Signal* signal, int phase) {
  std::unique_lock<std::mutex> hold(grid::lock);
  grid::changed.wait(hold, [&] { return (signal->phase & 1) != phase; });
}
template <class T>
T* in_block(T* here, int block) {
  const grid::Self& self = grid::self;
  const int size = grid::cluster, first = self.number / size * size;
  return reinterpret_cast<T*>((*self.all)[first + block]->memory.get() + (reinterpret_cast<const char*>(here) - self.block->memory.get()));
}
inline void send(const Words& w, const void* to, const Signal* signal, int block) {
  std::lock_guard<std::mutex> hold(grid::lock);
  std::memcpy(const_cast<void*>(static_cast<const void*>(in_block(static_cast<const char*>(to), block))), &w, sizeof w);
  grid::count(const_cast<Signal*>(in_block(signal, block)), -int(sizeof w), false);
}
inline void sync_cluster() { grid::clusters[grid::self.number / grid::cluster]->wait(); }

inline float fast_tanh(float x) { return std::tanh(x); }
inline float fast_exp(float x) { return std::exp(x); }
inline float fast_divide(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

// Fragments of `K` columns of k, `Each` of them in a word: row r of a (r + 8 in its odd words) and column r of b in lane
// 4 r + q.
template <int K, int Each, class Number>
void multiply_fragments(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, Number&& number) {
  const auto told = grid::tell<6>({a[0], a[1], a[2], a[3], b0, b1});
  const int r = grid::self.lane() / 4, q = grid::self.lane() % 4;
  for (int i = 0; i < 4; i++) {
    const int row = r, odd = i / 2, column = 2 * q + i % 2;
    float sum = 0;
    for (int k = 0; k < K; k++) {
      const int half = k / (4 * Each), lane = k % (4 * Each) / Each, j = k % Each;
      sum += number(told[4 * row + lane][2 * half + odd], j) * number(told[4 * column + lane][4 + half], j);
    }
    d[i] += sum;
  }
}
inline void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, bf16) {
  multiply_fragments<16, 2>(d, a, b0, b1, [](u32 word, int j) { return wide(bf16{u16(word >> 16 * j)}); });
}
inline void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, f16) {
  multiply_fragments<16, 2>(d, a, b0, b1, [](u32 word, int j) { return wide(f16{u16(word >> 16 * j)}); });
}
inline void multiply(float (&)[4], const u32 (&)[4], u32, u32, float) { std::abort(); }
inline u32 to_tf32(float x) { return (bits_of(x) + 0x1000) & ~0x1fffu; }
inline void multiply_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  multiply_fragments<8, 1>(d, a, b0, b1, [](u32 word, int) { return float_of(word & ~0x1fffu); });
}

}  // namespace rnn
