// The forward loop: every block keeps its rows of the matrix for all steps, and blocks that share a head wait for each
// other's h, nothing else: h of every step has its own place in memory, filled beforehand with words that no number has.
#pragma once

namespace rnn {

constexpr int kGates = Cell::gates, kFields = Cell::fields, kHidden = Cell::hidden;
using Sums = Product<kGates, kChunks, Plan::in_registers, Plan::in_shared>;

// Null where there is none.  `start_x` and `target_x` are h as it enters the product, the recurrent mask applied.
struct Forward {
  const Element* z;             // (T, B, G, H)
  const Words* matrix;          // see Product::load
  const float* rest_bias;       // (rest, H)
  const float* units;           // (units, H)
  const float* start;           // (fields, B, H)
  const float* start_x;         // (B, H)
  const float* target;          // (fields, B, H)
  const float* target_x;        // (B, H)
  const float* recurrent_mask;  // (B, H)
  const int* lengths;           // (B)
  const unsigned char* resets;  // (T, B)
  const void* stay[kFields];    // (T, B, H), bytes or float; or one float
  Element* hs;                  // (T, B, H)
  Element* exchange;            // (T, B, heads, padded size): what enters the product of each step, where hs is not that
  Stored* residuals;            // (T, B, residuals, H), see Cell::keep
  float* others;                // (T, B, fields - 1, H): the carry without h
  float* gates;                 // (T, B, emitted, H)
  float* last;                  // (fields, B, H)
  long long steps, batch;
};

RNN_DEVICE float kept(float share, float old, float updated, int field) {
  if (Plan::stay(field) == 1) return share != 0 ? old : updated;
  return share * old + (1 - share) * updated;
}

RNN_KERNEL(kThreads) rnn_forward(const Forward in) {
  const Here at(in.batch);
  constexpr int hidden = Plan::heads * Plan::size, others = (kFields - 1) * hidden;
  const long long line = in.batch * hidden;
  const int first = at.head * Plan::size;
  char* memory = shared_memory();
  Sums matrix;
  matrix.load(at, in.matrix, reinterpret_cast<Words*>(memory));
  memory += Sums::kSharedWords * sizeof(Words);
  const Partial<kGates> partial = {reinterpret_cast<float*>(memory)};
  memory += Partial<kGates>::kFloats * sizeof(float);
  const Board<1> board = {memory};
  board.begin(at);

  float carry[kOwn][kFields], constant[kOwn][Cell::units + Cell::rest + 1];
  float residuals[kOwn][Cell::residuals + 1], gates[kOwn][Cell::emitted + 1];
  Element z[kOwn][kGates];
  bool back[kOwn];
  auto each = [&](auto&& body) {
    RNN_UNROLL for (int j = 0; j < kOwn; j++) {
      const Pair pair(at, j);
      const long long row = at.sequence(pair.row);
      const int column = first + pair.unit;
      if (pair.mine) body(j, pair, row, pair.unit < Plan::size && row < in.batch, row * hidden + column, column);
    }
  };
  auto fetch_inputs = [&](long long t) {
    each([&](int j, const Pair& pair, long long row, bool there, long long place, int column) {
      if (!there) return;
      const Element* from = in.z + (t * in.batch + row) * (kGates * hidden) + column;
      RNN_UNROLL for (int g = 0; g < kGates; g++) z[j][g] = load(from + g * hidden);
      if (pair.unit % 16 == 0 && t + kEarly < in.steps)
        RNN_UNROLL for (int g = 0; g < kGates; g++) prefetch(from + kEarly * in.batch * (kGates * hidden) + g * hidden);
      if (Plan::resets) back[j] = in.resets[t * in.batch + row];
    });
  };
  // Nobody waits for these.
  auto put_out = [&](long long t) {
    each([&](int j, const Pair& pair, long long row, bool there, long long place, int column) {
      if (!there) return;
      if (kAlone) narrow(carry[j][kHidden], in.hs[t * line + place]);
      if (Plan::keeps)
        RNN_UNROLL for (int m = 0; m < Cell::residuals; m++)
          narrow(residuals[j][m], in.residuals[(t * in.batch + row) * (Cell::residuals * hidden) + m * hidden + column]);
      if (Cell::states) {
        RNN_UNROLL for (int f = 0; f < kFields; f++)
          if (f != kHidden) in.others[(t * in.batch + row) * others + (f - (f > kHidden)) * hidden + column] = carry[j][f];
        RNN_UNROLL for (int m = 0; m < Cell::emitted; m++)
          in.gates[(t * in.batch + row) * (Cell::emitted * hidden) + m * hidden + column] = gates[j][m];
      }
      if (t + 1 == (Plan::lengths ? in.lengths[row] : in.steps))
        RNN_UNROLL for (int f = 0; f < kFields; f++) in.last[f * line + place] = carry[j][f];
    });
  };
  each([&](int j, const Pair& pair, long long row, bool there, long long place, int column) {
    RNN_UNROLL for (int f = 0; f < kFields; f++) carry[j][f] = there ? load(in.start + f * line + place) : 0.f;
    RNN_UNROLL for (int g = 0; g < kGates; g++) narrow(0.f, z[j][g]);
    back[j] = false;
    RNN_UNROLL for (int m = 0; m < Cell::units; m++)
      constant[j][m] = there ? load(in.units + m * hidden + column) : 0.f;
    RNN_UNROLL for (int m = 0; m < Cell::rest; m++)
      constant[j][Cell::units + m] = there ? load(in.rest_bias + m * hidden + column) : 0.f;
    constant[j][Cell::units + Cell::rest] = Plan::mask && there ? load(in.recurrent_mask + place) : 1.f;
    if (Plan::lengths && there && in.lengths[row] == 0)
      RNN_UNROLL for (int f = 0; f < kFields; f++) in.last[f * line + place] = carry[j][f];
  });
  fetch_inputs(0);

  for (long long t = 0; t < in.steps; t++) {
    const int parity = int(t & 1);
    float r[kGates][Plan::tiles][4] = {};
    if (t == 0) {
      matrix.sum(at, r, false, [&](int n, int chunk) {
        const long long row = at.sequence(8 * n + at.r);
        const int k = chunk * kChunk + at.q * 4 * kPerWord;
        if (row >= in.batch) return Words{{0, 0, 0, 0}};
        const float* from = Plan::resets && in.resets[row] ? in.target_x : in.start_x;
        return rounded(from + row * hidden + first + k, Plan::size - k);
      });
    } else if (!kGrid) {
      board.ready(int(t) - 1);
      matrix.sum(at, r, false, [&](int n, int chunk) { return board.row(1 - parity, 8 * n + at.r)[chunk * 4 + at.q]; });
    } else {
      const Element* from = Plan::apart ? in.exchange + t * in.batch * (Plan::heads * kPadded) + at.head * kPadded
                                        : in.hs + (t - 1) * line + first;
      const long long pitch = Plan::apart ? Plan::heads * kPadded : hidden;
      matrix.sum(at, r, true, [&](int n, int chunk) {
        const long long row = at.sequence(8 * n + at.r);
        if (row >= in.batch) return Words{{0, 0, 0, 0}};
        return load_shared_between_blocks(from + row * pitch + chunk * kChunk + at.q * 4 * kPerWord);
      });
    }
    if (kAlone && t > 0) put_out(t - 1);  // while the product is under way
    if (t + 1 < in.steps) board.arm(at, int(t));
    if (kShared) {
      partial.put(at, parity, r);
      sync_block();
    }
    each([&](int j, const Pair& pair, long long row, bool there, long long place, int column) {
      vec zs[kGates], rest[Cell::rest + 1], old[kFields], s[kFields];
      RNN_UNROLL for (int g = 0; g < kGates; g++) {
        float total;
        if constexpr (kShared)
          total = partial.get(parity, pair, g);
        else
          total = r[g][j / 4][j % 4];
        zs[g] = wide(z[j][g]);
        if (Plan::rest_of(g) < 0)
          zs[g] += total;
        else
          rest[Plan::rest_of(g)] = total + constant[j][Cell::units + Plan::rest_of(g)];
      }
      if (Plan::resets && back[j])
        RNN_UNROLL for (int f = 0; f < kFields; f++) carry[j][f] = load(in.target + f * line + place);
      RNN_UNROLL for (int f = 0; f < kFields; f++) old[f] = carry[j][f];
      if constexpr (Plan::keeps)
        Cell::keep(constant[j], zs, rest, old, s, gates[j], residuals[j]);
      else
        Cell::forward(constant[j], zs, rest, old, s, gates[j]);
      RNN_UNROLL for (int f = 0; f < kFields; f++)
        if (Plan::stay(f) && there) s[f] = kept(staying(in.stay[f], f, t * line + place), old[f], s[f], f);
      RNN_UNROLL for (int f = 0; f < kFields; f++) carry[j][f] = s[f];
      Element h;
      narrow(s[kHidden], h);
      if (!kGrid || Plan::apart) {
        float x = there ? s[kHidden] * constant[j][Cell::units + Cell::rest] : 0.f;
        if (Plan::resets && there && t + 1 < in.steps && in.resets[(t + 1) * in.batch + row])
          x = load(in.target_x + place);
        Element entering;
        narrow(x, entering);
        if (!kGrid) {
          if (t + 1 < in.steps) board.write(at, int(t), pair.row, pair.unit, 0, there, entering);
        } else {
          const u32 word = as_word(entering);
          if (t + 1 < in.steps && row < in.batch && pair.unit < kPadded && pair.unit % kPerWord == 0)
            store_shared_between_blocks(
                in.exchange + ((t + 1) * in.batch + row) * (Plan::heads * kPadded) + at.head * kPadded + pair.unit, word);
        }
        if (there && !kAlone) in.hs[t * line + place] = h;
      } else {
        const u32 word = as_word(h);
        if (there && pair.unit % kPerWord == 0) store_shared_between_blocks(in.hs + t * line + place, word);
      }
    });
    if (kAlone || (kShared && Plan::sums == 1)) sync_block();
    if (!kAlone) put_out(t);
    if (t + 1 < in.steps) fetch_inputs(t + 1);
  }
  if (kAlone) put_out(in.steps - 1);
  if (kCluster) sync_cluster();  // no block ends while another may still write to it
}

}  // namespace rnn
