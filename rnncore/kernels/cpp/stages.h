// Updates that take means over the units of a head: one vector of units after the other, stage by stage.
#pragma once

#include "layout.h"

namespace rnn {

// What stands between stages for one vector of units; of a cell without stages nothing does.
template <class Lanes, class Stages>
struct Staged : Lanes {
  vec held[Stages::held + 1];
};

// How many numbers the vectors of all units take.
template <class Staged>
int64_t staged_size(const Sizes& s) {
  return Cell::reduces ? s.blocks * int64_t(sizeof(Staged) / sizeof(real)) : 0;
}

RNN_INLINE mask first_lanes(int count) {
  mask m;
  for (int lane = 0; lane < kLanes; lane++) m[lane] = lane < count ? -1 : 0;
  return m;
}

RNN_INLINE real total(vec v) {
  real sum = 0;
  for (int lane = 0; lane < kLanes; lane++) sum += v[lane];
  return sum;
}

// body(a constant: the stage, block, which lanes are units, the means that are known, sums of those that it takes).
template <class Stages, int Stage = 0, class Body>
RNN_INLINE void stages(const Sizes& s, int64_t head, Body&& body, vec* means) {
  vec sums[Stages::means + 1];
  constexpr int kLast = Stage + 1 == Stages::stages, kNext = kLast ? Stage : Stage + 1;
  for (int m = Stages::known[Stage]; m < Stages::known[kNext]; m++) sums[m] = all(0);
  const int64_t each = s.diagonal ? s.blocks : s.padded / kLanes;
  for (int64_t block = head * each; block < (head + 1) * each; block++)
    body(std::integral_constant<int, Stage>{}, block, first_lanes(s.count(block)), means, sums);
  for (int m = Stages::known[Stage]; m < Stages::known[kNext]; m++) means[m] = all(total(sums[m]) / real(s.head));
  if constexpr (!kLast) stages<Stages, Stage + 1>(s, head, body, means);
}
template <class Stages, class Body>
RNN_INLINE void stages(const Sizes& s, int64_t head, Body&& body) {
  vec means[Stages::means + 1];
  stages<Stages, 0>(s, head, body, means);
}

}  // namespace rnn
