// The forward loop: z = x W + b for a few steps at a time, then step by step r = h U and the update.
#pragma once

#include "layout.h"
#include "threads.h"

namespace rnn {

// What both loops read; null where there is none of it.
struct Inputs {
  const real *x, *w, *u, *bias, *rest_bias, *units, *start, *target, *recurrent_mask;
  const int32_t* lengths;
  const bool* resets;
};

struct Outputs {
  real *y, *last, *kept;
};

// The parameters as the loops read them.
struct Weights {
  real *w, *u, *bias, *rest_bias, *units;

  static std::vector<int64_t> sizes(const Sizes& s) {
    return {s.inputs * s.lanes, s.head * s.lanes, s.lanes, Cell::rest * s.units, Cell::units * s.units};
  }
  Weights() = default;
  explicit Weights(real* const* parts)
      : w(parts[0]), u(parts[1]), bias(parts[2]), rest_bias(parts[3]), units(parts[4]) {}

  void pack(const Sizes& s, const Inputs& in, int64_t block) const {
    pack_columns(s, in.w, s.inputs, s.hidden, s.first(block), block, w);
    const int64_t head = s.head_of(block);
    pack_columns(s, in.u + head * s.head * kGates * s.head, s.head, s.head, s.first(block) - head * s.head, block, u);
    pack_rows(s, in.bias, kGates, block, bias);
    pack_rows(s, in.rest_bias, Cell::rest, block, rest_bias);
    pack_rows(s, in.units, Cell::units, block, units);
  }
};

// How many steps are projected at a time: `most` numbers of z, but at least `least` rows.
inline int64_t chunk_steps(const Sizes& s, int64_t rows, int64_t most, int64_t least) {
  const int64_t steps = std::max(most / (rows * s.lanes), (least + rows - 1) / rows);
  return std::clamp<int64_t>(steps, 1, std::max<int64_t>(s.steps, 1));
}

// z = x W + b of `count` rows, one vector of units.
inline void project(const Sizes& s, const Weights& p, int64_t block, const real* x, int64_t ldx, real* z, int64_t ldz,
                    int64_t count) {
  for (int g = 0; g < kGates; g += kColumns)
    in_blocks(count, [&](int at, auto rows) {
      vec c[rows][kColumns];
      for (int m = 0; m < kColumns; m++)
        for (int r = 0; r < rows; r++) c[r][m] = load(p.bias + (block * kGates + g + m) * kLanes);
      const real* columns = p.w + (block * kGates + g) * s.inputs * kLanes;
      multiply<rows, kColumns, false>(x + at * ldx, ldx, columns, kColumns * kLanes, s.inputs, c);
      for (int r = 0; r < rows; r++)
        for (int m = 0; m < kColumns; m++) store(z + (at + r) * ldz + (block * kGates + g + m) * kLanes, c[r][m]);
    });
}

// Sequences lo to hi, all steps.
template <bool Keep>
class Forward {
 public:
  Forward(const Sizes& s, const Inputs& in, const Weights& weights, const Outputs& out, int64_t lo, int64_t hi)
      : s(s), in(in), p(weights), out(out), lo(lo), n(hi - lo) {
    chunk = chunk_steps(s, n, 32768, kRows);
    ldx = s.inputs + kPad, ldz = s.lanes + kPad, ldh = s.units + kPad;
  }

  std::vector<int64_t> sizes() const {
    return {chunk * n * ldx, chunk * n * ldz, n * ldh, n * ldh, Cell::fields * n * s.units};
  }

  void set(real* const* parts) { x = parts[0], z = parts[1], hs[0] = parts[2], hs[1] = parts[3], carry = parts[4]; }

  // `together`: the team shares every step too.
  void run(Team& team, bool together) {
    Team::Member here(team);
    here.phase(1, [&](int64_t) {
      for (int64_t r = 0; r < n; r++) {
        begin(r, in.start, hs[0]);
        if (in.lengths && in.lengths[lo + r] == 0) finish(r);
      }
    });
    for (int64_t t0 = 0; t0 < s.steps; t0 += chunk) {
      const int64_t end = std::min(t0 + chunk, s.steps);
      here.phase(end - t0, [&](int64_t t) { gather_inputs(s, in.x, lo, n, t0 + t, 1, x + t * n * ldx, ldx); });
      here.phase(s.blocks, [&](int64_t block) { project(s, p, block, x, ldx, z, ldz, (end - t0) * n); });
      in_turn(here, together, [&](Team::Member& here) { loop(here, t0, end); });
    }
    here.phase(1, [&](int64_t) {
      for (int64_t r = 0; r < n && !in.lengths; r++) finish(r);
    });
  }

 private:
  const Sizes& s;
  const Inputs& in;
  const Weights& p;
  const Outputs& out;
  const int64_t lo, n;
  int64_t chunk, ldx, ldz, ldh;
  real *x, *z, *hs[2], *carry;  // hs: what enters the recurrent product of even and odd steps, row by row

  real* field(int f, int64_t r) const { return carry + (f * n + r) * s.units; }

  // The carry of a sequence becomes the given one.
  void begin(int64_t r, const real* from, real* h) {
    for (int f = 0; f < Cell::fields; f++) spread(s, from + (f * s.batch + lo + r) * s.hidden, field(f, r));
    for (int64_t block = 0; block < s.blocks; block++)
      store(h + r * ldh + block * kLanes,
            masked(s, in.recurrent_mask, lo + r, block, load(field(Cell::hidden, r) + block * kLanes)));
  }

  void loop(Team::Member& here, int64_t t0, int64_t end) {
    for (int64_t t = t0; t < end; t++) {
      real *h = hs[t % 2], *next = hs[(t + 1) % 2];
      if (in.resets)
        here.phase(1, [&](int64_t) {
          for (int64_t r = 0; r < n; r++)
            if (in.resets[t * s.batch + lo + r]) begin(r, in.target, h);
        });
      here.phase(s.blocks, [&](int64_t block) {
        in_blocks(n, [&](int at, auto rows) { step<rows>(t, block, at, z + ((t - t0) * n + at) * ldz, h, next); });
      });
      if (in.lengths)
        here.phase(1, [&](int64_t) {
          for (int64_t r = 0; r < n; r++)
            if (in.lengths[lo + r] == t + 1) finish(r);
        });
    }
  }

  void finish(int64_t r) {
    for (int f = 0; f < Cell::fields; f++) collect(s, field(f, r), out.last + (f * s.batch + lo + r) * s.hidden);
  }

  template <int Rows>
  void step(int64_t t, int64_t block, int64_t at, const real* z, const real* h, real* next) {
    vec sums[Rows][kGates];  // z + r of the gates that see no more, r of the others
    const real* zs = z + block * kGates * kLanes;
    for (int g = 0; g < kGates; g += kColumns) {
      vec c[Rows][kColumns];
      for (int m = 0; m < kColumns; m++) {
        const int rest = Cell::rest_of[g + m];
        for (int r = 0; r < Rows; r++)
          c[r][m] =
              load(rest < 0 ? zs + r * ldz + (g + m) * kLanes : p.rest_bias + (block * Cell::rest + rest) * kLanes);
      }
      const real* columns = p.u + (block * kGates + g) * s.head * kLanes;
      multiply<Rows, kColumns, false>(h + at * ldh + s.head_of(block) * s.padded, ldh, columns, kColumns * kLanes,
                                      s.head, c);
      for (int r = 0; r < Rows; r++)
        for (int m = 0; m < kColumns; m++) sums[r][g + m] = c[r][m];
    }
    vec units[Cell::units + 1];
    for (int m = 0; m < Cell::units; m++) units[m] = load(p.units + (block * Cell::units + m) * kLanes);
    const int count = s.count(block);
    for (int r = 0; r < Rows; r++) {
      vec folded[kGates], rest[Cell::rest + 1], old[Cell::fields], fresh[Cell::fields], kept[Cell::residuals + 1];
      for (int g = 0; g < kGates; g++) {
        folded[g] = sums[r][g];
        if (Cell::rest_of[g] >= 0) rest[Cell::rest_of[g]] = sums[r][g], folded[g] = load(zs + r * ldz + g * kLanes);
      }
      for (int f = 0; f < Cell::fields; f++) old[f] = load(field(f, at + r) + block * kLanes);
      if constexpr (Keep) {
        Cell::keep(units, folded, rest, old, fresh, kept);
        real* to = out.kept + (t * s.batch + lo + at + r) * Cell::residuals * s.units + block * kLanes;
        for (int m = 0; m < Cell::residuals; m++) store(to + m * s.units, kept[m]);
      } else {
        Cell::forward(units, folded, rest, old, fresh);
      }
      for (int f = 0; f < Cell::fields; f++) store(field(f, at + r) + block * kLanes, fresh[f]);
      const vec y = fresh[Cell::hidden];
      store(out.y + (lo + at + r) * s.y_row + t * s.y_step + s.first(block), y, count);
      store(next + (at + r) * ldh + block * kLanes, masked(s, in.recurrent_mask, lo + at + r, block, y));
    }
  }
};

}  // namespace rnn
