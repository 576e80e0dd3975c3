// The backward loop: the transposed linearised step, dh = dr U^T, and for a few steps at a time the products of the
// gradients.
#pragma once

#include "forward.h"

namespace rnn {

// Null where there are none.
struct Cotangents {
  const stored *y, *states;
  const real* last;
};

struct Gradients {
  stored* x;
  real *w, *u, *readouts, *bias, *rest_bias, *units, *start, *target;
};

// The matrices as the backward products read them.
struct Transposes {
  real *w, *u, *units;         // w: null where the gradient of the inputs is not wanted
  real *readouts, *of_readouts;  // of a kernel of low rank, as columns and as rows
  Transposed of_w, of_u;

  static std::vector<int64_t> sizes(const Sizes& s, bool with_inputs) {
    const int64_t recurrent = s.diagonal ? s.lanes : s.heads * Transposed::size(s.depth, s.padded * kGates);
    return {with_inputs ? Transposed::size(s.inputs, s.lanes) : 0, recurrent, Cell::units * s.units,
            Readouts::size(s), s.rank * s.units};
  }
  explicit Transposes(const Sizes& s) : of_w{s.inputs, s.lanes}, of_u{s.depth, s.padded * kGates} {}
  void set(real* const* parts, bool with_inputs) {
    w = with_inputs ? parts[0] : nullptr, u = parts[1], units = parts[2], readouts = parts[3], of_readouts = parts[4];
  }

  real* head(const Sizes& s, int64_t n) const { return u + n * Transposed::size(s.depth, s.padded * kGates); }

  void pack(const Sizes& s, const Inputs& in, int64_t block) const {
    if (w) of_w.pack(in.w, s.hidden, s.first(block), s.count(block), block, w);
    pack_rows(s, in.units, Cell::units, block, units);
    if (s.rank) Readouts::pack(s, in.readouts, block, readouts), pack_rows(s, in.readouts, s.rank, block, of_readouts);
    if (s.diagonal) return pack_rows(s, in.u, kGates, block, u);
    const int64_t n = s.head_of(block);
    of_u.pack(in.u + n * s.head * kGates * s.head, s.head, s.first(block) - n * s.head, s.count(block),
              block - n * s.padded / kLanes, head(s, n));
  }
};

// Sequences lo to hi, all steps.  Where `begins` holds carries of some steps, the carries between are formed again from
// them, or the stretch is run again and what the derivative needs is kept of one stretch at a time.
class Backward {
 public:
  Backward(const Sizes& s, const Inputs& in, const Weights& weights, const Transposes& p, const stored* y,
           residual* kept, const Begins& begins, const Cotangents& given, const Gradients& out, int64_t lo, int64_t hi)
      : s(s), in(in), p(p), y(y), given(given), out(out), begins(begins), lo(lo), n(hi - lo),
        every(begins.data ? begins.every : 0), again(begins.data && begins.again),
        kept(s, kept, s.batch, 0, 0), forward(s, in, weights, {nullptr, nullptr, nullptr, begins}, lo, hi) {
    chunk = chunk_steps(s, n, 65536, 128);  // below 128 rows the sums wait for memory
    ldx = s.inputs + kPad, ldz = s.lanes + kPad, ldh = s.units + kPad;
    if (again) chunk = std::min(chunk, every);
    span = again ? every : every ? rounded(std::max(chunk, every), every) : s.steps;
  }

  std::vector<int64_t> sizes() const {
    const int64_t m = chunk * n, fields = Cell::fields * n * s.units, of_read = s.rank ? m * Readouts::row(s) : 0;
    std::vector<int64_t> all{m * ldx, again ? (every + 1) * n * ldh : m * ldh, m * ldz, Cell::rest ? m * ldz : 0,
                             fields, in.resets ? fields : 0, every ? span * n * Kept::reformed * s.units : 0,
                             every ? Kept::reformed * n * s.units : 0, staged_size<Staged>(s), of_read, of_read};
    if (again) {
      all.push_back(Residuals::size(s, every * n));
      for (int64_t size : forward.sizes()) all.push_back(size);
    }
    return all;
  }

  void set(real* const* parts, const Weights& totals) {
    x = parts[0], entering = parts[1], dz = parts[2], dr = Cell::rest ? parts[3] : dz, ds = parts[4],
    dtarget = parts[5], olds = parts[6], reforming = parts[7], sums = totals;
    staged = reinterpret_cast<Staged*>(parts[8]), read = parts[9], dread = parts[10];
    if (again) {
      kept.data = reinterpret_cast<residual*>(parts[11]);
      forward.set(parts + 12);
      forward.enter_in(entering, every + 1);
    }
  }

  // `together`: the team shares every step too.
  void run(Team& team, bool together) {
    Team::Member here(team);
    here.phase(1, [&](int64_t) {
      std::fill_n(ds, Cell::fields * n * s.units, real(0));
      if (in.resets) std::fill_n(dtarget, Cell::fields * n * s.units, real(0));
    });
    for (int64_t last = s.steps, first; last > 0; last = first) {
      first = (last - 1) / span * span;
      if (again) {
        kept = Residuals(s, kept.data, n, first, lo);
        forward.keep_in(kept);
        forward.again(here, together, first, last);
      }
      if (Kept::reformed && every) here.phase(n, [&](int64_t r) { reform(r, first, last); });
      stretch = first;
      for (int64_t end = last, t0; end > first; end = t0) {
        t0 = std::max(end - chunk, first);
        h = again ? entering + (t0 - first) * n * ldh : entering;
        gradients(here, together, t0, end);
      }
    }
    here.phase(1, [&](int64_t) {
      for (int f = 0; f < Cell::fields; f++)
        for (int64_t r = 0; r < n; r++) {
          if (in.lengths && in.lengths[lo + r] == 0) add_last(f, r);
          const int64_t row = (f * s.batch + lo + r) * s.hidden;
          collect(s, field(ds, f, r), out.start + row);
          if (in.resets) collect(s, field(dtarget, f, r), out.target + row);
        }
    });
  }

 private:
  const Sizes& s;
  const Inputs& in;
  const Transposes& p;
  const stored* y;
  const Cotangents& given;
  const Gradients& out;
  const Begins begins;
  const int64_t lo, n, every;
  const bool again;
  Residuals kept;
  Forward<true> forward;
  int64_t chunk, span, ldx, ldz, ldh, stretch = 0;  // span: steps of a stretch, which begins with one of `begins`
  real *olds, *reforming;  // the old carry of the steps of a stretch, (step, sequence, field), and of one step
  real *x, *entering, *h, *dz, *dr, *ds, *dtarget;  // x, h, dz, dr: (step, sequence) by row; ds: of the carry after
  real *read, *dread;  // what a kernel of low rank reads of h, as h
  Weights sums;  // of its part of the batch; readouts: by row

  // A vector of units in a step: what its transpose reads and what it gives.
  struct Lanes {
    vec residuals[Cell::residuals + 1], after[Cell::fields], stays[Cell::fields], gates[Cell::emitted + 1],
        dp[Cell::units + 1], z[kGates], rest[Cell::rest + 1], before[Cell::fields];
  };
  using Staged = rnn::Staged<Lanes, Cell::Transposing>;
  Staged* staged;  // of each vector of units

  // What sequences add to the sums of a vector of units.
  struct Added {
    vec u[kGates] = {}, bias[kGates] = {}, rest_bias[Cell::rest + 1] = {}, units[Cell::units + 1] = {};
  };

  real* field(real* of, int f, int64_t r) const { return of + (f * n + r) * s.units; }

  // A chunk of steps, and what it adds to the sums.
  void gradients(Team::Member& here, bool together, int64_t t0, int64_t end) {
    const int64_t rows = (end - t0) * n;
    here.phase(end - t0, [&](int64_t t) {
      gather_inputs(s, in.x, lo, n, t0 + t, x + t * n * ldx, ldx);
      if (!again) gather_hidden(t0 + t, h + t * n * ldh);
    });
    in_turn(here, together, [&](Team::Member& here) { loop(here, t0, end); });
    // One after the other: x and h of a chunk do not fit into the cache together.
    here.phase(s.blocks, [&](int64_t block) { weights(block, x, ldx, dz, s.inputs, rows, sums.w); });
    if (s.rank) {
      here.phase(panels(s.rank), [&](int64_t panel) { Readouts::read(s, p.readouts, panel, h, ldh, read, rows); });
      here.phase(s.blocks, [&](int64_t block) {
        weights(block, read, Readouts::row(s), dr, s.rank, rows, sums.u), readouts(block, rows);
      });
    } else if (!s.diagonal) {
      here.phase(s.blocks, [&](int64_t block) {
        weights(block, h + s.head_of(block) * s.padded, ldh, dr, s.head, rows, sums.u);
      });
    }
    if (out.x) here.phase(panels(s.inputs), [&](int64_t panel) { inputs(panel, t0, rows); });
  }

  template <class C = Cell>
  void loop(Team::Member& here, int64_t t0, int64_t end) {
    for (int64_t t = end - 1; t >= t0; t--) {
      const int64_t at = (t - t0) * n, each = panels(s.depth);
      if constexpr (C::reduces)
        here.phase(s.heads, [&](int64_t head) {
          for (int64_t r = 0; r < n; r++) in_stages<C>(t, head, at, r);
        });
      else
        here.phase(s.blocks, [&](int64_t block) { step<C>(t, block, at); });
      if (!s.diagonal) here.phase(s.heads * each, [&](int64_t item) { recur(item / each, item % each, at); });
      if (s.rank) here.phase(s.blocks, [&](int64_t block) { write(block, at); });
      if (in.resets)
        here.phase(1, [&](int64_t) {
          for (int64_t r = 0; r < n; r++)
            if (in.resets[t * s.batch + lo + r]) cut(r);
        });
    }
  }

  void add_last(int f, int64_t r) {
    if (!given.last) return;
    for (int64_t block = 0; block < s.blocks; block++) {
      real* to = field(ds, f, r) + block * kLanes;
      store(to, load(to) + load(given.last + (f * s.batch + lo + r) * s.hidden + s.first(block), s.count(block)));
    }
  }

  // A reset: what went into the carry goes to its target.
  void cut(int64_t r) {
    for (int f = 0; f < Cell::fields; f++)
      for (int64_t block = 0; block < s.blocks; block++) {
        real *from = field(ds, f, r) + block * kLanes, *to = field(dtarget, f, r) + block * kLanes;
        store(to, load(to) + load(from)), store(from, all(0));
      }
  }

  bool resets(int64_t t, int64_t row) const { return in.resets && in.resets[t * s.batch + row]; }

  // The old h of a step.
  struct Previous {
    const stored* y;
    const real* given;  // where y is null
    vec at(const Sizes& s, int64_t block) const {
      return y ? load(y + s.first(block), s.count(block)) : load(given + s.first(block), s.count(block));
    }
  };
  Previous previous(int64_t t, int64_t row) const {
    const int64_t carried = (Cell::hidden * s.batch + row) * s.hidden;
    if (resets(t, row)) return {nullptr, in.target + carried};
    return {t ? y + row * s.y_row + (t - 1) * s.y_step : nullptr, in.start + carried};
  }

  // What entered the recurrent product of a step.
  void gather_hidden(int64_t t, real* to) const {
    for (int64_t r = 0; r < n; r++, to += ldh) {
      const Previous before = previous(t, lo + r);
      for (int64_t block = 0; block < s.blocks; block++)
        store(to + block * kLanes, masked(s, in.recurrent_mask, lo + r, block, before.at(s, block)));
    }
  }

  real* old(int64_t t, int64_t r) const { return olds + ((t - stretch) * n + r) * Kept::reformed * s.units; }

  // The carry's fields in `Kept::reformed` of a sequence before each step from first to last.
  void reform(int64_t r, int64_t first, int64_t last) const {
    real *carry = reforming + r * Kept::reformed * s.units, *to = olds + r * Kept::reformed * s.units;
    for (int k = 0; k < Kept::reformed; k++)
      std::copy_n(begins.at(s, first, lo + r, begins.again ? Kept::reformed_fields[k] : k), s.units,
                  carry + k * s.units);
    for (int64_t t = first; t < last; t++, to += n * Kept::reformed * s.units) {
      if (resets(t, lo + r))
        for (int k = 0; k < Kept::reformed; k++)
          spread(s, in.target + (Kept::reformed_fields[k] * s.batch + lo + r) * s.hidden, carry + k * s.units);
      const Previous before = previous(t, lo + r);
      for (int64_t block = 0; block < s.blocks; block++) {
        vec units[Cell::units + 1], residuals[Cell::residuals + 1], old[Cell::fields], fresh[Kept::reformed + 1];
        for (int m = 0; m < Cell::units; m++) units[m] = load(p.units + (block * Cell::units + m) * kLanes);
        const residual* from = kept.at(t, lo + r, block);
        for (int m = 0; m < Cell::residuals; m++)
          if (Kept::at[m] >= 0) residuals[m] = load(from + Kept::at[m] * s.units);
        if (Kept::reform_sees_h) old[Cell::hidden] = before.at(s, block);
        for (int k = 0; k < Kept::reformed; k++) {
          const int64_t at = k * s.units + block * kLanes;
          old[Kept::reformed_fields[k]] = load(carry + at);
          store(to + at, old[Kept::reformed_fields[k]]);
        }
        Kept::reform(units, residuals, old, fresh);
        for (int k = 0; k < Kept::reformed; k++) {
          const int f = Kept::reformed_fields[k];
          if (in.zoneout.any) in.zoneout.part(s, f, t, lo + r, block, old[f], fresh[k]), fresh[k] += old[f];
          store(carry + k * s.units + block * kLanes, fresh[k]);
        }
      }
    }
  }

  // The transposed update of one vector of units: dz, dr, and into ds what it gives the old carry.
  template <class C>
  void step(int64_t t, int64_t block, int64_t at) {
    const mask there = first_lanes(s.count(block));
    vec units[Cell::units + 1], u[kGates];
    parameters(block, units, u);
    Added added;
    for (int64_t r = 0; r < n; r++) {
      Lanes v;
      begin_step(t, block, r, v);
      C::backward(units, v.residuals, v.after, v.gates, v.dp, v.z, v.rest, v.before);
      end_step(block, at, r, there, u, v, added);
    }
    add(block, added);
  }

  // That of all units of a head in one sequence.
  template <class C>
  void in_stages(int64_t t, int64_t head, int64_t at, int64_t r) {
    using Stages = typename C::Transposing;
    stages<Stages>(s, head, [&](auto stage, int64_t block, mask there, const vec* means, vec* totals) {
      auto& v = staged[block];
      if constexpr (stage == 0) begin_step(t, block, r, v);
      vec units[Cell::units + 1], u[kGates];
      parameters(block, units, u);
      Stages::template at<stage>(units, v.residuals, v.after, v.gates, v.dp, v.z, v.rest, v.before, v.held, means,
                                 there, totals);
      if constexpr (stage + 1 == Stages::stages) {
        Added added;
        end_step(block, at, r, there, u, v, added);
        add(block, added);
      }
    });
  }

  RNN_INLINE void parameters(int64_t block, vec* units, vec* u) const {
    for (int m = 0; m < Cell::units; m++) units[m] = load(p.units + (block * Cell::units + m) * kLanes);
    if (s.diagonal)
      for (int g = 0; g < kGates; g++) u[g] = load(p.u + (block * kGates + g) * kLanes);
  }

  // What the transposed update of a vector of units reads.
  RNN_INLINE void begin_step(int64_t t, int64_t block, int64_t r, Lanes& v) const {
    const int count = s.count(block);
    const residual* from = kept.at(t, lo + r, block);
    for (int m = 0; m < Cell::residuals; m++)
      if (Kept::at[m] >= 0) v.residuals[m] = load(from + Kept::at[m] * s.units);
    kept.fetch<false>(from, -1);
    if (Kept::h_at >= 0) v.residuals[Kept::h_at] = previous(t, lo + r).at(s, block);
    for (int k = 0; k < Kept::reformed; k++)
      v.residuals[Kept::reformed_at[k]] = load(old(t, r) + k * s.units + block * kLanes);
    const bool ends = t + 1 == (in.lengths ? in.lengths[lo + r] : s.steps);
    for (int f = 0; f < Cell::fields; f++) {
      v.after[f] = load(field(ds, f, r) + block * kLanes);
      if (ends && given.last)
        v.after[f] += load(given.last + (f * s.batch + lo + r) * s.hidden + s.first(block), count);
    }
    if (given.y) {
      const stored* dy = given.y + (lo + r) * s.y_row + t * s.y_step + s.first(block);
      v.after[Cell::hidden] += load(dy, count);
      __builtin_prefetch(dy - s.y_step);
    }
    if constexpr (Cell::states) states(t, lo + r, block, v.after, v.gates);
    if (in.zoneout.any) stay(t, lo + r, block, v.after, v.stays);
  }

  // What it gives goes to where it is wanted.
  RNN_INLINE void end_step(int64_t block, int64_t at, int64_t r, mask there, const vec* u, Lanes& v, Added& added) const {
    if (in.zoneout.any)
      for (int f = 0; f < Cell::fields; f++) v.before[f] += v.stays[f];
    if (s.diagonal) {
      vec dh = all(0);
      for (int g = 0; g < kGates; g++) {
        const vec recurrent = Cell::rest_of[g] < 0 ? v.z[g] : v.rest[std::max(Cell::rest_of[g], 0)];
        dh += recurrent * u[g];
        added.u[g] += select(there, recurrent * load(h + (at + r) * ldh + block * kLanes), all(0));
      }
      v.before[Cell::hidden] += masked(s, in.recurrent_mask, lo + r, block, dh);
    }
    for (int f = 0; f < Cell::fields; f++) store(field(ds, f, r) + block * kLanes, v.before[f]);
    real* to = dz + (at + r) * ldz + block * kGates * kLanes;
    for (int g = 0; g < kGates; g++) {
      const vec value = select(there, v.z[g], all(0));
      store(to + g * kLanes, value), added.bias[g] += value;
      if constexpr (Cell::rest > 0) {
        const int m = Cell::rest_of[g];
        const vec recurrent = m < 0 ? value : select(there, v.rest[m], all(0));
        store(dr + (at + r) * ldz + (block * kGates + g) * kLanes, recurrent);
        if (m >= 0) added.rest_bias[m] += recurrent;
      }
    }
    for (int m = 0; m < Cell::units; m++) added.units[m] += v.dp[m];
  }

  void add(int64_t block, const Added& added) const {
    add(sums.bias, kGates, block, added.bias), add(sums.rest_bias, Cell::rest, block, added.rest_bias),
        add(sums.units, Cell::units, block, added.units);
    if (s.diagonal) add(sums.u, kGates, block, added.u);
  }

  // The cotangents of a step's states: of the other fields added to `after`, of the gates.
  void states(int64_t t, int64_t row, int64_t block, vec* after, vec* gates) const {
    const int64_t apart = s.steps * s.batch * s.hidden;
    const stored* from = given.states ? given.states + (t * s.batch + row) * s.hidden + s.first(block) : nullptr;
    const auto next = [&] {
      const vec one = from ? load(from, s.count(block)) : all(0);
      if (from) from += apart;
      return one;
    };
    for (int f = 0; f < Cell::fields; f++)
      if (f != Cell::hidden) after[f] += next();
    for (int m = 0; m < Cell::emitted; m++) gates[m] = next();
  }

  __attribute__((noinline)) void stay(int64_t t, int64_t row, int64_t block, vec* after, vec* stays) const {
    for (int f = 0; f < Cell::fields; f++) {
      stays[f] = after[f];
      in.zoneout.part(s, f, t, row, block, stays[f], after[f]);
    }
  }

  static void add(real* to, int count, int64_t block, const vec* values) {
    for (int m = 0; m < count; m++)
      store(to + (block * count + m) * kLanes, load(to + (block * count + m) * kLanes) + values[m]);
  }

  // dh += dr U^T, one panel of a head; of a kernel of low rank it is the cotangent of what it reads
  void recur(int64_t head, int64_t panel, int64_t at) {
    const int64_t j = panel * kWide * kLanes;
    in_blocks(n, [&](int first, auto rows) {
      vec c[rows][kWide] = {};
      const real* from = dr + (at + first) * ldz + head * s.padded * kGates;
      multiply<rows, kWide, false>(from, ldz, p.head(s, head) + panel * p.of_u.panel(), kWide * kLanes,
                                   s.padded * kGates, c);
      if (s.rank) {
        for (int r = 0; r < rows; r++)
          for (int m = 0; m < kWide; m++)
            store(dread + (at + first + r) * Readouts::row(s) + j + m * kLanes, c[r][m]);
        return;
      }
      for (int r = 0; r < rows; r++)
        for (int m = 0; m < kWide && j + m * kLanes < s.padded; m++) {
          const int64_t unit = head * s.padded + j + m * kLanes;
          real* to = field(ds, Cell::hidden, first + r) + unit;
          store(to, load(to) + masked(s, in.recurrent_mask, lo + first + r, unit / kLanes, c[r][m]));
        }
    });
  }

  // dh += the cotangent of what is read, times the readouts
  void write(int64_t block, int64_t at) {
    const int64_t row = Readouts::row(s);
    in_blocks(n, [&](int first, auto rows) {
      vec c[rows][1] = {};
      multiply<rows, 1, false>(dread + (at + first) * row, row, p.of_readouts + block * s.rank * kLanes, kLanes, s.rank, c);
      for (int r = 0; r < rows; r++) {
        real* to = field(ds, Cell::hidden, first + r) + block * kLanes;
        store(to, load(to) + masked(s, in.recurrent_mask, lo + first + r, block, c[r][0]));
      }
    });
  }

  // The gradient of the readouts, over a chunk.
  void readouts(int64_t block, int64_t depth) {
    in_blocks(int(s.rank), [&](int first, auto count) {
      vec c[count][1] = {};
      multiply<count, 1, true>(dread + first, Readouts::row(s), h + block * kLanes, ldh, depth, c);
      real* to = sums.readouts + (block * s.rank + first) * kLanes;
      for (int r = 0; r < count; r++, to += kLanes) store(to, load(to) + c[r][0]);
    });
  }

  // dM += rows^T columns, over a chunk
  void weights(int64_t block, const real* rows, int64_t ld, const real* columns, int64_t width, int64_t depth,
               real* total) {
    for (int g = 0; g < kGates; g += kColumns) {
      real* sum = total + (block * kGates + g) * width * kLanes;
      in_blocks(int(width), [&](int first, auto count) {
        vec c[count][kColumns] = {};  // not the total: one term after the other would vanish in a long sum
        real* to = sum + first * kColumns * kLanes;
        for (int r = 0; r < count * kColumns; r++)
          __builtin_prefetch(to + r * kLanes, 1);  // for when the product is done
        multiply<count, kColumns, true>(rows + first, ld, columns + (block * kGates + g) * kLanes, ldz, depth, c);
        for (int r = 0; r < count; r++)
          for (int m = 0; m < kColumns; m++, to += kLanes) store(to, load(to) + c[r][m]);
      });
    }
  }

  // dx = dz W^T, over a chunk, one panel
  void inputs(int64_t panel, int64_t t0, int64_t rows_of_chunk) {
    const int64_t j = panel * kWide * kLanes;
    in_blocks(int(rows_of_chunk), [&](int first, auto rows) {
      vec c[rows][kWide] = {};
      multiply<rows, kWide, false>(dz + first * ldz, ldz, p.w + panel * p.of_w.panel(), kWide * kLanes, s.lanes, c);
      for (int r = 0; r < rows; r++) {
        stored* to = out.x + (lo + (first + r) % n) * s.x_row + (t0 + (first + r) / n) * s.x_step + j;
        for (int m = 0; m < kWide; m++)
          if (const int64_t left = s.inputs - j - m * kLanes; left > 0)
            store(to + m * kLanes, c[r][m], int(std::min<int64_t>(left, kLanes)));
      }
    });
  }
};

}  // namespace rnn
