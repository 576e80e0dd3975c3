// The backward loop: the transposed linearised step, dh = dr U^T, and for a few steps at a time the products of the gradients.
#pragma once

#include "forward.h"

namespace rnn {

struct Cotangents {
  const real *y, *last;
};

struct Gradients {
  real *x, *w, *u, *bias, *rest_bias, *units, *start, *target;
};

// The matrices as the backward products read them.
struct Transposes {
  real *w, *u, *units;  // w: null where the gradient of the inputs is not wanted
  Transposed of_w, of_u;

  static std::vector<int64_t> sizes(const Sizes& s, bool with_inputs) {
    return {with_inputs ? Transposed::size(s.inputs, s.lanes) : 0, s.heads * Transposed::size(s.head, s.padded * kGates), Cell::units * s.units};
  }
  explicit Transposes(const Sizes& s) : of_w{s.inputs, s.lanes}, of_u{s.head, s.padded * kGates} {}
  void set(real* const* parts, bool with_inputs) { w = with_inputs ? parts[0] : nullptr, u = parts[1], units = parts[2]; }

  real* head(const Sizes& s, int64_t n) const { return u + n * Transposed::size(s.head, s.padded * kGates); }

  void pack(const Sizes& s, const Inputs& in, int64_t block) const {
    if (w) of_w.pack(in.w, s.hidden, s.first(block), s.count(block), block, w);
    const int64_t n = s.head_of(block);
    of_u.pack(in.u + n * s.head * kGates * s.head, s.head, s.first(block) - n * s.head, s.count(block),
              block - n * s.padded / kLanes, head(s, n));
    pack_rows(s, in.units, Cell::units, block, units);
  }
};

// What each part of the batch sums, in the layout of `Weights`.
struct Sums {
  real *w, *u, *bias, *rest_bias, *units;

  static std::vector<int64_t> sizes(const Sizes& s) { return Weights::sizes(s); }
  Sums() = default;
  Sums(const Sizes& s, real* all, int64_t at) {
    real** parts[] = {&w, &u, &bias, &rest_bias, &units};
    int n = 0;
    for (int64_t size : sizes(s)) *parts[n++] = all + at, at += rounded(size, kPad);
  }
};

// Sequences lo to hi, all steps.
class Backward {
 public:
  Backward(const Sizes& s, const Inputs& in, const Transposes& p, const real* y, const real* kept, const Cotangents& given,
           const Gradients& out, int64_t lo, int64_t hi)
      : s(s), in(in), p(p), y(y), kept(kept), given(given), out(out), lo(lo), n(hi - lo) {
    chunk = chunk_steps(s, n, 65536, 128);  // below 128 rows the sums wait for memory
    ldx = s.inputs + kPad, ldz = s.lanes + kPad, ldh = s.units + kPad;
  }

  std::vector<int64_t> sizes() const {
    const int64_t m = chunk * n, fields = Cell::fields * n * s.units;
    return {m * ldx, m * ldh, m * ldz, Cell::rest ? m * ldz : 0, fields, in.resets ? fields : 0};
  }

  void run(real* const* parts, const Sums& totals) {
    x = parts[0], h = parts[1], dz = parts[2], dr = Cell::rest ? parts[3] : dz, ds = parts[4], dtarget = parts[5], sums = totals;
    std::fill_n(ds, Cell::fields * n * s.units, real(0));
    if (in.resets) std::fill_n(dtarget, Cell::fields * n * s.units, real(0));
    for (int64_t end = s.steps; end > 0;) {
      const int64_t count = std::min(chunk, end), t0 = end - count;
      gather_inputs(s, in.x, lo, n, t0, count, x, ldx);
      gather_hidden(t0, count);
      for (int64_t t = end - 1; t >= t0; t--) {
        for (int64_t block = 0; block < s.blocks; block++) step(t, block, (t - t0) * n);
        recur((t - t0) * n);
        if (in.resets)
          for (int64_t r = 0; r < n; r++)
            if (in.resets[t * s.batch + lo + r]) cut(r);
      }
      weights(x, ldx, dz, s.inputs, count * n, sums.w, false);
      weights(h, ldh, dr, s.head, count * n, sums.u, true);
      if (out.x) inputs(t0, count);
      end = t0;
    }
    for (int f = 0; f < Cell::fields; f++)
      for (int64_t r = 0; r < n; r++) {
        if (in.lengths && in.lengths[lo + r] == 0) add_last(f, r);
        const int64_t row = (f * s.batch + lo + r) * s.hidden;
        collect(s, field(ds, f, r), out.start + row);
        if (in.resets) collect(s, field(dtarget, f, r), out.target + row);
      }
  }

 private:
  const Sizes& s;
  const Inputs& in;
  const Transposes& p;
  const real *y, *kept;
  const Cotangents& given;
  const Gradients& out;
  const int64_t lo, n;
  int64_t chunk, ldx, ldz, ldh;
  real *x, *h, *dz, *dr, *ds, *dtarget;  // x, h, dz, dr: (step, sequence) by row; ds: of the carry after the step
  Sums sums;

  real* field(real* of, int f, int64_t r) const { return of + (f * n + r) * s.units; }

  void add_last(int f, int64_t r) {
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

  // What entered the recurrent product of each step.
  void gather_hidden(int64_t t0, int64_t count) {
    for (int64_t t = t0; t < t0 + count; t++)
      for (int64_t r = 0; r < n; r++) {
        const int64_t row = lo + r, carried = (Cell::hidden * s.batch + row) * s.hidden;
        const real* from = t ? y + row * s.y_row + (t - 1) * s.y_step : in.start + carried;
        if (in.resets && in.resets[t * s.batch + row]) from = in.target + carried;
        for (int64_t block = 0; block < s.blocks; block++)
          store(h + ((t - t0) * n + r) * ldh + block * kLanes,
                masked(s, in.recurrent_mask, row, block, load(from + s.first(block), s.count(block))));
      }
  }

  // The transposed update of one vector of units: dz, dr, and into ds what it gives the old carry.
  void step(int64_t t, int64_t block, int64_t at) {
    const int count = s.count(block);
    mask there;
    for (int lane = 0; lane < kLanes; lane++) there[lane] = lane < count ? -1 : 0;
    vec units[Cell::units + 1], bias[kGates] = {}, rest_bias[Cell::rest + 1] = {}, dunits[Cell::units + 1] = {};
    for (int m = 0; m < Cell::units; m++) units[m] = load(p.units + (block * Cell::units + m) * kLanes);
    for (int64_t r = 0; r < n; r++) {
      vec residuals[Cell::residuals + 1], after[Cell::fields], dp[Cell::units + 1], z[kGates], rest[Cell::rest + 1], before[Cell::fields];
      const real* from = kept + (t * s.batch + lo + r) * Cell::residuals * s.units + block * kLanes;
      for (int m = 0; m < Cell::residuals; m++) residuals[m] = load(from + m * s.units);
      const bool ends = t + 1 == (in.lengths ? in.lengths[lo + r] : s.steps);
      for (int f = 0; f < Cell::fields; f++) {
        after[f] = load(field(ds, f, r) + block * kLanes);
        if (ends) after[f] += load(given.last + (f * s.batch + lo + r) * s.hidden + s.first(block), count);
      }
      after[Cell::hidden] += load(given.y + (lo + r) * s.y_row + t * s.y_step + s.first(block), count);
      Cell::backward(units, residuals, after, dp, z, rest, before);
      for (int f = 0; f < Cell::fields; f++) store(field(ds, f, r) + block * kLanes, before[f]);
      real* to = dz + (at + r) * ldz + block * kGates * kLanes;
      for (int g = 0; g < kGates; g++) {
        const vec value = select(there, z[g], all(0));
        store(to + g * kLanes, value), bias[g] += value;
        if constexpr (Cell::rest > 0) {
          const int m = Cell::rest_of[g];
          const vec recurrent = m < 0 ? value : select(there, rest[m], all(0));
          store(dr + (at + r) * ldz + (block * kGates + g) * kLanes, recurrent);
          if (m >= 0) rest_bias[m] += recurrent;
        }
      }
      for (int m = 0; m < Cell::units; m++) dunits[m] += dp[m];
    }
    add(sums.bias, kGates, block, bias), add(sums.rest_bias, Cell::rest, block, rest_bias), add(sums.units, Cell::units, block, dunits);
  }

  static void add(real* to, int count, int64_t block, const vec* values) {
    for (int m = 0; m < count; m++) store(to + (block * count + m) * kLanes, load(to + (block * count + m) * kLanes) + values[m]);
  }

  // dh += dr U^T
  void recur(int64_t at) {
    for (int64_t head = 0; head < s.heads; head++)
      for (int64_t j = 0; j < s.padded; j += kWide * kLanes) {
        const real* panel = p.head(s, head) + j / (kWide * kLanes) * p.of_u.panel();
        in_blocks(n, [&](int first, auto rows) {
          vec c[rows][kWide] = {};
          const real* from = dr + (at + first) * ldz + head * s.padded * kGates;
          multiply<rows, kWide, false>(from, ldz, panel, kWide * kLanes, s.padded * kGates, c);
          for (int r = 0; r < rows; r++)
            for (int m = 0; m < kWide && j + m * kLanes < s.padded; m++) {
              const int64_t unit = head * s.padded + j + m * kLanes;
              real* to = field(ds, Cell::hidden, first + r) + unit;
              store(to, load(to) + masked(s, in.recurrent_mask, lo + first + r, unit / kLanes, c[r][m]));
            }
        });
      }
  }

  // dM += rows^T columns, over a chunk
  void weights(const real* rows, int64_t ld, const real* columns, int64_t width, int64_t depth, real* total, bool of_heads) {
    for (int64_t block = 0; block < s.blocks; block++)
      for (int g = 0; g < kGates; g += kColumns) {
        real* sum = total + (block * kGates + g) * width * kLanes;
        in_blocks(int(width), [&](int first, auto count) {
          vec c[count][kColumns];
          real* to = sum + first * kColumns * kLanes;
          for (int r = 0; r < count; r++)
            for (int m = 0; m < kColumns; m++) c[r][m] = load(to + (r * kColumns + m) * kLanes);
          multiply<count, kColumns, true>(rows + (of_heads ? s.head_of(block) * s.padded : 0) + first, ld, columns + (block * kGates + g) * kLanes, ldz, depth, c);
          for (int r = 0; r < count; r++)
            for (int m = 0; m < kColumns; m++) store(to + (r * kColumns + m) * kLanes, c[r][m]);
        });
      }
  }

  // dx = dz W^T, over a chunk
  void inputs(int64_t t0, int64_t count) {
    for (int64_t j = 0; j < s.inputs; j += kWide * kLanes) {
      const real* panel = p.w + j / (kWide * kLanes) * p.of_w.panel();
      in_blocks(int(count * n), [&](int first, auto rows) {
        vec c[rows][kWide] = {};
        multiply<rows, kWide, false>(dz + first * ldz, ldz, panel, kWide * kLanes, s.lanes, c);
        for (int r = 0; r < rows; r++) {
          real* to = out.x + (lo + (first + r) % n) * s.x_row + (t0 + (first + r) / n) * s.x_step + j;
          for (int m = 0; m < kWide; m++)
            if (const int64_t left = s.inputs - j - m * kLanes; left > 0) store(to + m * kLanes, c[r][m], int(std::min<int64_t>(left, kLanes)));
        }
      });
    }
  }
};

}  // namespace rnn
