// From the caller's arrays to the loops' and back.
//
// Units stand in vectors, the gates of a vector side by side, and the vectors one after the other: [block][gate][lane].
// A matrix with these columns is kept as [block][gates / kColumns][row][kColumns][lane], so that a product reads it in
// order.
#pragma once

#include "sizes.h"

namespace rnn {

// `from` is (rows, gates, width), `first` where the block begins in its last axis.
inline void pack_columns(const Sizes& s, const real* from, int64_t rows, int64_t width, int64_t first, int64_t block,
                         real* to) {
  to += block * kGates * rows * kLanes;
  for (int g = 0; g < kGates; g += kColumns)
    for (int64_t k = 0; k < rows; k++)
      for (int m = 0; m < kColumns; m++, to += kLanes)
        store(to, load(from + (k * kGates + g + m) * width + first, s.count(block)));
}

// The inverse, of the sum over `parts` such arrays, each `apart` from the one before.
inline void unpack_columns(const Sizes& s, const real* from, int64_t parts, int64_t apart, int64_t rows, int64_t width,
                           int64_t first, int64_t block, real* to) {
  from += block * kGates * rows * kLanes;
  for (int g = 0; g < kGates; g += kColumns)
    for (int64_t k = 0; k < rows; k++)
      for (int m = 0; m < kColumns; m++, from += kLanes) {
        vec sum = load(from);
        for (int64_t n = 1; n < parts; n++) sum += load(from + n * apart);
        store(to + (k * kGates + g + m) * width + first, sum, s.count(block));
      }
}

// (count, H) to [block][count][lane].
inline void pack_rows(const Sizes& s, const real* from, int count, int64_t block, real* to) {
  for (int m = 0; m < count; m++)
    store(to + (block * count + m) * kLanes, load(from + m * s.hidden + s.first(block), s.count(block)));
}

inline void unpack_rows(const Sizes& s, const real* from, int64_t parts, int64_t apart, int count, int64_t block,
                        real* to) {
  for (int m = 0; m < count; m++) {
    vec sum = load(from + (block * count + m) * kLanes);
    for (int64_t n = 1; n < parts; n++) sum += load(from + n * apart + (block * count + m) * kLanes);
    store(to + m * s.hidden + s.first(block), sum, s.count(block));
  }
}

// A matrix transposed, for products with all lanes of all gates: [columns / wide][block][gate][lane][wide].
// `from` is (columns, gates, width) and its units `first` to `first` + `count` are `lanes` in `to`'s rows.
struct Transposed {
  int64_t columns, rows;
  static int64_t size(int64_t columns, int64_t rows) { return rounded(columns, kWide * kLanes) * rows; }
  int64_t panel() const { return rows * kWide * kLanes; }

  void pack(const real* from, int64_t width, int64_t first, int count, int64_t block, real* to) const {
    constexpr int kPanel = kWide * kLanes;
    to += block * kGates * kLanes * kPanel;
    for (int64_t j = 0; j < columns; j += kPanel, to += panel())
      for (int g = 0; g < kGates; g++) {
        real square[kPanel][kLanes];
        for (int m = 0; m < kPanel; m++)
          store(square[m], j + m < columns ? load(from + ((j + m) * kGates + g) * width + first, count) : all(0));
        for (int lane = 0; lane < kLanes; lane++)
          for (int m = 0; m < kPanel; m++) to[(g * kLanes + lane) * kPanel + m] = square[m][lane];
      }
  }
};

// The readouts (rank, H) of a kernel of low rank, as columns: [rank / wide][unit][wide].
struct Readouts {
  static constexpr int kPanel = kWide * kLanes;
  static int64_t size(const Sizes& s) { return panels(s.rank) * kPanel * s.units; }
  static int64_t row(const Sizes& s) { return panels(s.rank) * kPanel + kPad; }  // between rows of what is read

  static void pack(const Sizes& s, const real* from, int64_t block, real* to) {
    for (int64_t k = 0; k < panels(s.rank) * kPanel; k++)
      for (int lane = 0; lane < kLanes; lane++)
        to[(k / kPanel * s.units + block * kLanes + lane) * kPanel + k % kPanel] =
            k < s.rank && lane < s.count(block) ? from[k * s.hidden + s.first(block) + lane] : 0;
  }

  // What `count` rows of h give, a panel of it.
  static void read(const Sizes& s, const real* columns, int64_t panel, const real* h, int64_t ldh, real* to,
                   int64_t count) {
    in_blocks(int(count), [&](int at, auto rows) {
      vec c[rows][kWide] = {};
      multiply<rows, kWide, false>(h + at * ldh, ldh, columns + panel * s.units * kPanel, kPanel, s.hidden, c);
      for (int r = 0; r < rows; r++)
        for (int m = 0; m < kWide; m++) store(to + (at + r) * row(s) + panel * kPanel + m * kLanes, c[r][m]);
    });
  }
};

// One sequence's units, (H,), to the padded ones, and back.
inline void spread(const Sizes& s, const real* from, real* to) {
  for (int64_t block = 0; block < s.blocks; block++)
    store(to + block * kLanes, load(from + s.first(block), s.count(block)));
}
inline void collect(const Sizes& s, const real* from, real* to) {
  for (int64_t block = 0; block < s.blocks; block++)
    store(to + s.first(block), load(from + block * kLanes), s.count(block));
}

inline vec masked(const Sizes& s, const real* recurrent_mask, int64_t row, int64_t block, vec h) {
  return recurrent_mask ? h * load(recurrent_mask + row * s.hidden + s.first(block), s.count(block)) : h;
}

// The inputs of a step, sequence by row.
inline void gather_inputs(const Sizes& s, const stored* x, int64_t lo, int64_t n, int64_t t, real* to, int64_t ld) {
  for (int64_t r = 0; r < n; r++) {
    const stored* from = x + (lo + r) * s.x_row + t * s.x_step;
    real* row = to + r * ld;
    if constexpr (std::is_same_v<stored, real>)
      std::memcpy(row, from, s.inputs * sizeof(real));
    else
      for (int64_t k = 0; k < s.inputs; k += kLanes) {
        const int count = int(std::min<int64_t>(s.inputs - k, kLanes));
        store(row + k, load(from + k, count), count);
      }
  }
}

// What is kept of a step for the derivative: of all steps and sequences, or of some.  The old h is not, it is an output,
// nor are the carry's fields in `Kept::reformed`, which are formed again from what is.
struct Residuals {
  residual* data;
  int64_t step, first_step, first_row, units;

  static int64_t size(const Sizes& s, int64_t rows) { return rows * Kept::count * s.units; }
  Residuals(const Sizes& s, residual* data, int64_t rows, int64_t first_step, int64_t first_row)
      : data(data), step(size(s, rows)), first_step(first_step), first_row(first_row), units(s.units) {}
  // Where the first one of a vector of units is; the next are `units` further each.
  residual* at(int64_t t, int64_t row, int64_t block) const {
    return data + (t - first_step) * step + (row - first_row) * Kept::count * units + block * kLanes;
  }
  // Asks for those of a vector of units in another step, which no prefetcher of the CPU foresees.
  template <bool Write>
  void fetch(const residual* at, int64_t steps) const {
    for (int m = 0; m < Kept::count; m++) __builtin_prefetch(at + steps * step + m * units, Write);
  }
};

// What of the old carry stays, for each field: nothing, a share, booleans, or shares of their own (both (T, B, H)).
struct Zoneout {
  enum Kind { kNone, kShare, kChosen, kShares };
  bool any = false;
  Kind kinds[Cell::fields] = {};
  real share[Cell::fields] = {};
  const bool* chosen[Cell::fields] = {};
  const real* shares[Cell::fields] = {};

  // `old` becomes what stays of it, `fresh` what it gives to the sum of both.
  __attribute__((noinline)) void part(const Sizes& s, int f, int64_t t, int64_t row, int64_t block, vec& old,
                                      vec& fresh) const {
    const int64_t at = (t * s.batch + row) * s.hidden + s.first(block);
    if (kinds[f] == kNone) {
      old = all(0);
    } else if (kinds[f] == kChosen) {
      const mask stays = load(chosen[f] + at, s.count(block));
      old = select(stays, old, all(0)), fresh = select(stays, all(0), fresh);
    } else {
      const vec stays = kinds[f] == kShare ? all(share[f]) : load(shares[f] + at, s.count(block));
      old *= stays, fresh *= 1 - stays;
    }
  }
};

}  // namespace rnn
