// A whole run, forward and backward, on the threads of a pool.
#pragma once

#include "backward.h"
#include "memory.h"

namespace rnn {

inline void append(std::vector<int64_t>& to, const std::vector<int64_t>& more) {
  to.insert(to.end(), more.begin(), more.end());
}

// Of all parts, whose sizes differ by one sequence, the most that each piece of working memory holds.
template <class Work>
std::vector<int64_t> largest(const std::vector<Work>& work) {
  std::vector<int64_t> most = work[0].sizes();
  for (const Work& one : work) {
    const auto sizes = one.sizes();
    for (size_t n = 0; n < most.size(); n++) most[n] = std::max(most[n], sizes[n]);
  }
  return most;
}

// Bytes of the arrays over time that a run writes, its backward one included.
struct Written {
  size_t y, kept, dx;
  Written(const Sizes& s, bool keep) {
    const size_t line = s.steps * s.batch;
    y = line * s.hidden * sizeof(stored), kept = keep ? line * s.units * Kept::count * sizeof(residual) : 0,
    dx = keep ? line * s.inputs * sizeof(stored) : 0;
  }
  size_t all() const { return y + kept + dx; }
};

template <bool Keep, class Pool>
void run_forward(Pool& pool, const Sizes& s, const Inputs& in, const Outputs& out, residual* kept) {
  const Written bytes(s, Keep);
  expect_writing(out.y, bytes.y, bytes.all());
  if (Keep) expect_writing(kept, bytes.kept, bytes.all());
  const Parts split(s, 1, pool);
  const int64_t count = split.count();
  Weights weights;
  std::vector<Forward<Keep>> work;
  work.reserve(count);
  for (int64_t n = 0; n < count; n++) work.emplace_back(s, in, weights, out, split.first(n), split.end(n));
  auto sizes = Weights::sizes(s);
  const size_t shared = sizes.size();
  const auto own = largest(work);
  for (int64_t n = 0; n < split.slots(s, pool); n++) append(sizes, own);
  Memory memory;
  auto parts = memory.parts(sizes);
  weights = Weights(parts.data());
  parallel(pool, s.blocks, 8 * s.weights(), [&](int64_t block, int64_t) { weights.pack(s, in, block); });
  std::vector<Team> teams = split.teams();
  parallel(pool, count * split.team, s.products(), [&](int64_t n, int64_t thread) {
    const int64_t part = n % count;
    Forward<Keep> mine = work[part];
    mine.set(&parts[shared + split.slot(part, thread) * own.size()]);
    if (Keep) mine.keep_in(Residuals(s, kept, s.batch, 0, 0));
    mine.run(teams[part], split.together);
  });
}

template <class Pool>
void run_backward(Pool& pool, int64_t groups, const Sizes& s, const Inputs& in, const stored* y,
                         residual* kept, const Begins& begins, const Cotangents& given, const Gradients& out) {
  const bool again = begins.data && begins.again;
  const Written bytes(s, !again);
  if (out.x) expect_writing(out.x, bytes.dx, bytes.all());
  const Parts split(s, groups, pool);
  const int64_t count = split.count();
  const int64_t apart = Weights::size(s);  // between the sums of one part and the next
  Transposes p(s);
  Weights weights;
  std::vector<Backward> work;
  work.reserve(count);
  for (int64_t n = 0; n < count; n++) work.emplace_back(s, in, weights, p, y, kept, begins, given, out, split.first(n), split.end(n));
  auto sizes = Transposes::sizes(s, out.x);
  const size_t shared_transposes = sizes.size();
  sizes.push_back(count * apart);
  if (again) append(sizes, Weights::sizes(s));
  const size_t shared = sizes.size();
  const auto own = largest(work);
  for (int64_t n = 0; n < split.slots(s, pool); n++) append(sizes, own);
  Memory memory;
  auto parts = memory.parts(sizes);
  real* const sums = parts[shared_transposes];
  p.set(parts.data(), out.x);
  if (again) weights = Weights(parts.data() + shared_transposes + 1);
  parallel(pool, s.blocks, 8 * s.weights(), [&](int64_t block, int64_t) {
    p.pack(s, in, block);
    if (again) weights.pack(s, in, block);
  });
  parallel(pool, count, 8 * count * s.weights(),
           [&](int64_t n, int64_t) { std::fill_n(sums + n * apart, apart, real(0)); });
  std::vector<Team> teams = split.teams();
  parallel(pool, count * split.team, s.products(), [&](int64_t n, int64_t thread) {
    const int64_t part = n % count;
    Backward mine = work[part];
    mine.set(&parts[shared + split.slot(part, thread) * own.size()], Weights(s, sums + part * apart));
    mine.run(teams[part], split.together);
  });
  parallel(pool, groups * s.blocks, 8 * count * s.weights(), [&](int64_t n, int64_t) {
    const int64_t group = n / s.blocks, block = n % s.blocks, head = s.head_of(block);
    const Weights first(s, sums + group * split.each * apart);
    const auto rows = [&](const real* from, int64_t count, real* to) {
      unpack_rows(s, from, split.each, apart, int(count), block, to + group * count * s.hidden);
    };
    const int64_t of_head = (group * s.heads + head) * s.depth * kGates * s.head;
    unpack_columns(s, first.w, split.each, apart, s.inputs, s.hidden, s.first(block), block,
                   out.w + group * s.inputs * kGates * s.hidden);
    if (s.diagonal)
      rows(first.u, kGates, out.u);
    else
      unpack_columns(s, first.u, split.each, apart, s.depth, s.head, s.first(block) - head * s.head, block,
                     out.u + of_head);
    rows(first.readouts, s.rank, out.readouts), rows(first.bias, kGates, out.bias);
    rows(first.rest_bias, Cell::rest, out.rest_bias), rows(first.units, Cell::units, out.units);
  });
}

}  // namespace rnn
