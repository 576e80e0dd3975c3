// Sizes of a call, and how units lie in vectors.
#pragma once

#include "product.h"

namespace rnn {

constexpr int kPad = 16;  // units of a head are padded to this many, whatever the vectors: `kept` has one layout

// How many columns a product of one vector of units takes at a time, out of all its gates.
constexpr int kGates = Cell::gates;
constexpr int kColumns = kGates % 2 == 0 ? 2 : kGates % 3 == 0 ? 3 : 1;
constexpr int kWide = 2;  // vectors of columns of a product with a transposed matrix

inline int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// How many panels of a matrix there are for so many columns, kWide vectors each.
inline int64_t panels(int64_t columns) { return (columns + kWide * kLanes - 1) / (kWide * kLanes); }

struct Sizes {
  int64_t steps, batch, inputs, hidden, heads;
  int64_t rank;                          // of a recurrent kernel of low rank, whose product reads first; 0 of others
  int64_t head, padded, units, blocks;   // units of a head; padded; of all heads, padded; vectors of these
  int64_t lanes;                         // padded units times gates
  bool diagonal;                         // whether every unit sees itself alone
  int64_t depth;                         // how many numbers a recurrent product adds up
  int64_t x_row, x_step, y_row, y_step;  // strides of inputs and outputs, between sequences and between steps

  Sizes(int64_t steps, int64_t batch, int64_t inputs, int64_t hidden, int64_t heads, int64_t rank,
        bool diagonal, bool time_major)
      : steps(steps), batch(batch), inputs(inputs), hidden(hidden), heads(heads), rank(rank), diagonal(diagonal) {
    head = hidden / heads, padded = rounded(head, kPad), units = heads * padded;
    blocks = units / kLanes, lanes = units * kGates, depth = diagonal ? 1 : rank ? rank : head;
    x_row = time_major ? inputs : steps * inputs, x_step = time_major ? batch * inputs : inputs;
    y_row = time_major ? hidden : steps * hidden, y_step = time_major ? batch * hidden : hidden;
  }

  int64_t weights() const { return (inputs + depth) * lanes + rank * units; }
  int64_t products() const { return steps * batch * weights(); }  // multiplications and additions of a run

  // A vector of units: its head, where it begins among the caller's units, and how many are real.
  int64_t head_of(int64_t block) const { return block * kLanes / padded; }
  int64_t first(int64_t block) const { return head_of(block) * head + block * kLanes % padded; }
  int count(int64_t block) const { return int(std::clamp<int64_t>(head - block * kLanes % padded, 0, kLanes)); }
};

}  // namespace rnn
