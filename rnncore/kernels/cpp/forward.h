// The forward loop: z = x W + b for a few steps at a time, then step by step r = h U and the update.
#pragma once

#include "stages.h"
#include "threads.h"

namespace rnn {

// What both loops read; null where there is none of it.
struct Inputs {
  const stored* x;
  const real *w, *u, *readouts, *bias, *rest_bias, *units, *start, *target, *recurrent_mask;
  const int32_t* lengths;
  const bool* resets;
  Zoneout zoneout;
};

// The carry before every step that `every` divides, (T / every, B, fields, padded H): all fields, for stretches that are
// run `again` from there, or those in `Kept::reformed`.
struct Begins {
  real* data;
  int64_t every;
  bool again;

  static int64_t fields(bool again) { return again ? Cell::fields : Kept::reformed; }
  int64_t fields() const { return data ? fields(again) : 0; }
  int field(int64_t k) const { return again ? int(k) : Kept::reformed_fields[k]; }
  real* at(const Sizes& s, int64_t t, int64_t row, int64_t k) const {
    return data + ((t / every * s.batch + row) * fields() + k) * s.units;
  }
};

// Null where nobody wants it.
struct Outputs {
  stored *y, *states;
  real* last;
  Begins begins;
};

// The parameters as the loops read them.
struct Weights {
  real *w, *u, *readouts, *bias, *rest_bias, *units;

  static std::vector<int64_t> sizes(const Sizes& s) {
    return {s.inputs * s.lanes, s.depth * s.lanes, Readouts::size(s), s.lanes, Cell::rest * s.units, Cell::units * s.units};
  }
  Weights() = default;
  explicit Weights(real* const* parts)
      : w(parts[0]), u(parts[1]), readouts(parts[2]), bias(parts[3]), rest_bias(parts[4]), units(parts[5]) {}
  // One after the other in `all`, each from a multiple of kPad numbers on.
  static int64_t size(const Sizes& s) {
    int64_t all = 0;
    for (int64_t n : sizes(s)) all += rounded(n, kPad);
    return all;
  }
  Weights(const Sizes& s, real* all) {
    real** part[] = {&w, &u, &readouts, &bias, &rest_bias, &units};
    for (int n = 0; n < 6; n++) *part[n] = all, all += rounded(sizes(s)[n], kPad);
  }

  void pack(const Sizes& s, const Inputs& in, int64_t block) const {
    pack_columns(s, in.w, s.inputs, s.hidden, s.first(block), block, w);
    if (s.diagonal) {
      pack_rows(s, in.u, kGates, block, u);
    } else {
      const int64_t head = s.head_of(block);
      pack_columns(s, in.u + head * s.head * kGates * s.head, s.depth, s.head, s.first(block) - head * s.head, block, u);
    }
    if (s.rank) Readouts::pack(s, in.readouts, block, readouts);
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

// Sequences lo to hi.
template <bool Keep>
class Forward {
 public:
  Forward(const Sizes& s, const Inputs& in, const Weights& weights, const Outputs& out, int64_t lo, int64_t hi)
      : s(s), in(in), p(weights), out(out), kept(s, nullptr, s.batch, 0, 0), lo(lo), n(hi - lo) {
    chunk = chunk_steps(s, n, 32768, kRows);
    ldx = s.inputs + kPad, ldz = s.lanes + kPad, ldh = s.units + kPad;
  }

  std::vector<int64_t> sizes() const {
    return {chunk * n * ldx, chunk * n * ldz, 2 * n * ldh, Cell::fields * n * s.units, Cell::reduces ? n * ldz : 0,
            staged_size<Staged>(s), s.rank ? n * Readouts::row(s) : 0};
  }

  void set(real* const* parts) {
    x = parts[0], z = parts[1], h = parts[2], carry = parts[3], sums = parts[4];
    staged = reinterpret_cast<Staged*>(parts[5]), read = parts[6];
  }

  // Where what the derivative needs goes.
  void keep_in(const Residuals& rows) { kept = rows; }

  // What enters the recurrent product of all steps of a stretch, one step more than it has, is wanted here.
  void enter_in(real* rows, int64_t steps) { h = rows, h_steps = steps; }

  // All steps, and the last carry.  `together`: the team shares every step too.
  void run(Team& team, bool together) {
    Team::Member here(team);
    here.phase(1, [&](int64_t) {
      for (int64_t r = 0; r < n; r++) {
        begin(r, in.start, h);
        if (in.lengths && in.lengths[lo + r] == 0) finish(r);
      }
    });
    beginning = out.begins.data;
    steps(here, together, 0, s.steps);
    here.phase(1, [&](int64_t) {
      for (int64_t r = 0; r < n && !in.lengths; r++) finish(r);
    });
  }

  // A stretch that begins with one of `begins`.
  void again(Team::Member& here, bool together, int64_t first, int64_t end) {
    here.phase(1, [&](int64_t) {
      for (int64_t r = 0; r < n; r++) {
        for (int f = 0; f < Cell::fields; f++)
          std::copy_n(out.begins.at(s, first, lo + r, f), s.units, field(f, r));
        enter(r, h);
      }
    });
    h_first = first;
    steps(here, together, first, end);
  }

 private:
  const Sizes& s;
  const Inputs& in;
  const Weights& p;
  const Outputs out;
  Residuals kept;
  const int64_t lo, n;
  int64_t chunk, ldx, ldz, ldh, h_first = 0, h_steps = 2;
  bool beginning = false;  // whether `begins` is written, and not read
  real *x, *z, *h, *carry;  // h: what enters the recurrent product of the last steps, row by row
  real *sums, *read;        // the sums of a step that is taken in stages; what a kernel of low rank reads of h

  // A vector of units in a step: what it reads and what it gives.
  struct Lanes {
    vec folded[kGates], rest[Cell::rest + 1], old[Cell::fields], fresh[Cell::fields], gates[Cell::emitted + 1],
        values[Cell::residuals + 1];
  };
  using Staged = rnn::Staged<Lanes, std::conditional_t<Keep, Cell::Keeping, Cell::Updating>>;
  Staged* staged;  // of each vector of units

  real* field(int f, int64_t r) const { return carry + (f * n + r) * s.units; }
  real* entering(int64_t t) const { return h + (t - h_first) % h_steps * n * ldh; }

  // The carry of a sequence becomes the given one.
  void begin(int64_t r, const real* from, real* to) {
    for (int f = 0; f < Cell::fields; f++) spread(s, from + (f * s.batch + lo + r) * s.hidden, field(f, r));
    enter(r, to);
  }
  void enter(int64_t r, real* to) {
    for (int64_t block = 0; block < s.blocks; block++)
      store(to + r * ldh + block * kLanes,
            masked(s, in.recurrent_mask, lo + r, block, load(field(Cell::hidden, r) + block * kLanes)));
  }

  void steps(Team::Member& here, bool together, int64_t first, int64_t last) {
    for (int64_t t0 = first; t0 < last; t0 += chunk) {
      const int64_t end = std::min(t0 + chunk, last);
      here.phase(end - t0, [&](int64_t t) { gather_inputs(s, in.x, lo, n, t0 + t, x + t * n * ldx, ldx); });
      here.phase(s.blocks, [&](int64_t block) { project(s, p, block, x, ldx, z, ldz, (end - t0) * n); });
      in_turn(here, together, [&](Team::Member& here) { loop(here, t0, end); });
    }
  }

  template <class C = Cell>
  void loop(Team::Member& here, int64_t t0, int64_t end) {
    for (int64_t t = t0; t < end; t++) {
      real *now = entering(t), *next = entering(t + 1);
      if (beginning && t % out.begins.every == 0)
        here.phase(1, [&](int64_t) {
          for (int64_t r = 0; r < n; r++)
            for (int64_t k = 0; k < out.begins.fields(); k++)
              std::copy_n(field(out.begins.field(k), r), s.units, out.begins.at(s, t, lo + r, k));
        });
      if (in.resets)
        here.phase(1, [&](int64_t) {
          for (int64_t r = 0; r < n; r++)
            if (in.resets[t * s.batch + lo + r]) begin(r, in.target, now);
        });
      if (s.rank)
        here.phase(panels(s.rank), [&](int64_t panel) { Readouts::read(s, p.readouts, panel, now, ldh, read, n); });
      here.phase(s.blocks, [&](int64_t block) {
        if (n < kRows && t % 2) block = s.blocks - 1 - block;  // what the cache still holds comes first
        in_blocks(n, [&](int at, auto rows) { step<rows>(t, block, at, z + ((t - t0) * n + at) * ldz, now, next); });
      });
      // One thread for all units of a head: in the same order whatever the threads.
      if constexpr (C::reduces)
        here.phase(s.heads, [&](int64_t head) {
          for (int64_t r = 0; r < n; r++) in_stages<C>(t, head, r, z + ((t - t0) * n + r) * ldz, next);
        });
      if (in.lengths && out.last)
        here.phase(1, [&](int64_t) {
          for (int64_t r = 0; r < n; r++)
            if (in.lengths[lo + r] == t + 1) finish(r);
        });
    }
  }

  void finish(int64_t r) {
    for (int f = 0; f < Cell::fields; f++) collect(s, field(f, r), out.last + (f * s.batch + lo + r) * s.hidden);
  }

  // c += what enters the product, of `Rows` rows from `at` on, times the columns of gates g to g + Columns.
  template <int Rows, int Columns>
  RNN_INLINE void multiply_recurrent(int64_t block, int g, const real* now, int64_t at, vec (&c)[Rows][Columns]) const {
    const real* h = now + at * ldh;
    if (s.diagonal) {
      for (int m = 0; m < Columns; m++) {
        const vec u = load(p.u + (block * kGates + g + m) * kLanes);
        for (int r = 0; r < Rows; r++) c[r][m] += load(h + r * ldh + block * kLanes) * u;
      }
      return;
    }
    const real* columns = p.u + (block * kGates + g) * s.depth * kLanes;
    const int64_t row = s.rank ? Readouts::row(s) : ldh;
    const real* from = s.rank ? read + at * row : h + s.head_of(block) * s.padded;
    multiply<Rows, Columns, false, kColumns>(from, row, columns, kColumns * kLanes, s.depth, c,
                                             kColumns * kLanes * s.depth);
  }

  template <int Rows>
  void step(int64_t t, int64_t block, int64_t at, const real* z, const real* now, real* next) {
    vec sums[Rows][kGates];  // z + r of the gates that see no more, r of the others
    const real* zs = z + block * kGates * kLanes;
    constexpr int kAtOnce = Rows * kGates <= kRows * kColumns ? kGates : kColumns;  // as many as fit into registers
    for (int g = 0; g < kGates; g += kAtOnce) {
      vec c[Rows][kAtOnce];
      for (int m = 0; m < kAtOnce; m++) {
        const int rest = Cell::rest_of[g + m];
        for (int r = 0; r < Rows; r++)
          c[r][m] =
              load(rest < 0 ? zs + r * ldz + (g + m) * kLanes : p.rest_bias + (block * Cell::rest + rest) * kLanes);
      }
      multiply_recurrent<Rows>(block, g, now, at, c);
      for (int r = 0; r < Rows; r++)
        for (int m = 0; m < kAtOnce; m++) sums[r][g + m] = c[r][m];
    }
    if constexpr (Cell::reduces) {
      for (int r = 0; r < Rows; r++)
        for (int g = 0; g < kGates; g++) store(this->sums + (at + r) * ldz + (block * kGates + g) * kLanes, sums[r][g]);
    } else {
      update<Cell, Rows>(t, block, at, z, sums, next);
    }
  }

  template <class C, int Rows>
  RNN_INLINE void update(int64_t t, int64_t block, int64_t at, const real* z, const vec (&sums)[Rows][kGates],
                         real* next) {
    vec units[Cell::units + 1];
    for (int m = 0; m < Cell::units; m++) units[m] = load(p.units + (block * Cell::units + m) * kLanes);
    for (int r = 0; r < Rows; r++) {
      Lanes v;
      begin_step(block, at + r, z + r * ldz, sums[r], v);
      if constexpr (Keep)
        C::keep(units, v.folded, v.rest, v.old, v.fresh, v.gates, v.values);
      else
        C::forward(units, v.folded, v.rest, v.old, v.fresh, v.gates);
      end_step(t, block, at + r, v, next);
    }
  }

  // The update of all units of a head in one sequence.
  template <class C>
  void in_stages(int64_t t, int64_t head, int64_t r, const real* z, real* next) {
    using Stages = std::conditional_t<Keep, typename C::Keeping, typename C::Updating>;
    stages<Stages>(s, head, [&](auto stage, int64_t block, mask there, const vec* means, vec* totals) {
      auto& v = staged[block];
      if constexpr (stage == 0) {
        vec own[kGates];
        for (int g = 0; g < kGates; g++) own[g] = load(sums + r * ldz + (block * kGates + g) * kLanes);
        begin_step(block, r, z, own, v);
      }
      vec units[Cell::units + 1];
      for (int m = 0; m < Cell::units; m++) units[m] = load(p.units + (block * Cell::units + m) * kLanes);
      if constexpr (Keep)
        Stages::template at<stage>(units, v.folded, v.rest, v.old, v.fresh, v.gates, v.values, v.held, means, there,
                                   totals);
      else
        Stages::template at<stage>(units, v.folded, v.rest, v.old, v.fresh, v.gates, v.held, means, there, totals);
      if constexpr (stage + 1 == Stages::stages) end_step(t, block, r, v, next);
    });
  }

  // What the update of a vector of units reads; `z` of all units of the sequence, `sums` with its recurrent products.
  RNN_INLINE void begin_step(int64_t block, int64_t r, const real* z, const vec* sums, Lanes& v) const {
    for (int g = 0; g < kGates; g++) {
      v.folded[g] = sums[g];
      if (Cell::rest_of[g] >= 0) v.rest[Cell::rest_of[g]] = sums[g], v.folded[g] = load(z + (block * kGates + g) * kLanes);
    }
    for (int f = 0; f < Cell::fields; f++) v.old[f] = load(field(f, r) + block * kLanes);
  }

  // What it gives goes to where it is kept.
  RNN_INLINE void end_step(int64_t t, int64_t block, int64_t r, Lanes& v, real* next) const {
    const int64_t row = lo + r;
    const int count = s.count(block);
    if constexpr (Keep) {
      residual* to = kept.at(t, row, block);
      kept.fetch<true>(to, 1);
      for (int m = 0; m < Cell::residuals; m++)
        if (Kept::at[m] >= 0) store(to + Kept::at[m] * s.units, v.values[m]);
    }
    if (in.zoneout.any) stay(t, row, block, v.old, v.fresh);
    for (int f = 0; f < Cell::fields; f++) store(field(f, r) + block * kLanes, v.fresh[f]);
    const vec y = v.fresh[Cell::hidden];
    if (out.y) store(out.y + row * s.y_row + t * s.y_step + s.first(block), y, count);
    if constexpr (Cell::states)
      if (out.states) {
        stored* to = out.states + (t * s.batch + row) * s.hidden + s.first(block);
        const int64_t apart = s.steps * s.batch * s.hidden;
        for (int f = 0; f < Cell::fields; f++)
          if (f != Cell::hidden) store(to, v.fresh[f], count), to += apart;
        for (int m = 0; m < Cell::emitted; m++, to += apart) store(to, v.gates[m], count);
      }
    store(next + r * ldh + block * kLanes, masked(s, in.recurrent_mask, row, block, y));
  }

  __attribute__((noinline)) void stay(int64_t t, int64_t row, int64_t block, vec* old, vec* fresh) const {
    for (int f = 0; f < Cell::fields; f++) {
      in.zoneout.part(s, f, t, row, block, old[f], fresh[f]);
      fresh[f] += old[f];
    }
  }
};

}  // namespace rnn
