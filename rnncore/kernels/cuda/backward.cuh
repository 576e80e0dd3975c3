// The backward loop: the transposed linearised step from the last to the first, dh_{t-1} += dr_t U^T.  Blocks exchange
// dr as they exchange h in the forward loop.
#pragma once

namespace rnn {

constexpr int kGates = Cell::gates, kFields = Cell::fields, kHidden = Cell::hidden, kKept = Cell::residuals;
using Sums = Product<1, kGates * kChunks, Plan::in_registers, Plan::in_shared>;

// Null where there is none.
struct Backward {
  const Words* matrix;            // see Product::load
  const Stored* residuals;        // (T, B, residuals, H)
  const float* units;             // (units, H)
  const Element* dhs;             // (T, B, H)
  const float* dlast;             // (fields, B, H)
  const float* dothers;           // (T, B, fields - 1, H): of the carry without h
  const float* dgates;            // (T, B, emitted, H)
  const float* recurrent_mask;    // (B, H)
  const int* lengths;             // (B)
  const unsigned char* resets;    // (T, B)
  const void* stay[kFields];      // (T, B, H), bytes or float; or one float
  Stored* dz;                     // (T, B, G, H)
  Stored* drest;                  // (T, B, rest, H)
  Element* exchange;              // (T, B, heads, G, padded size): dr, where dz and drest are not that
  float* dstart;                  // (fields, B, H)
  float* dtarget;                 // (fields, B, H)
  float* dunits;                  // (units, B, H)
  long long steps, batch;
};

RNN_KERNEL(kThreads) rnn_backward(const Backward in) {
  const Here at(in.batch);
  constexpr int hidden = Plan::heads * Plan::size, others = (kFields - 1) * hidden, width = kKept * hidden;
  const long long line = in.batch * hidden;
  const int first = at.head * Plan::size;
  char* memory = shared_memory();
  Sums matrix;
  matrix.load(at, in.matrix, reinterpret_cast<Words*>(memory));
  memory += Sums::kSharedWords * sizeof(Words);
  const Partial<1> partial = {reinterpret_cast<float*>(memory)};
  memory += Partial<1>::kFloats * sizeof(float);
  const Board<kGates> board = {memory};
  board.begin(at);

  float ds[kOwn][kFields], units[kOwn][Cell::units + 1], dunits[kOwn][Cell::units + 1], mask[kOwn];
  float dtarget[kOwn][kFields];
  Stored residuals[kOwn][kKept + 1];
  Element dh[kOwn];
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
      const Stored* from = in.residuals + (t * in.batch + row) * width + column;
      RNN_UNROLL for (int m = 0; m < kKept; m++) residuals[j][m] = load(from + m * hidden);
      dh[j] = load(in.dhs + t * line + place);
      if (pair.unit % 16 == 0 && t >= kEarly) {
        RNN_UNROLL for (int m = 0; m < kKept; m++) prefetch(from - kEarly * in.batch * width + m * hidden);
        prefetch(in.dhs + (t - kEarly) * line + place);
      }
    });
  };
  each([&](int j, const Pair& pair, long long, bool there, long long place, int column) {
    RNN_UNROLL for (int f = 0; f < kFields; f++) ds[j][f] = dtarget[j][f] = 0;
    RNN_UNROLL for (int m = 0; m < Cell::units; m++)
      units[j][m] = there ? load(in.units + m * hidden + column) : 0.f, dunits[j][m] = 0;
    RNN_UNROLL for (int m = 0; m < kKept; m++) narrow(0.f, residuals[j][m]);
    narrow(0.f, dh[j]);
    mask[j] = Plan::mask && there ? load(in.recurrent_mask + place) : 1.f;
  });
  fetch_inputs(in.steps - 1);

  for (long long t = in.steps - 1;; t--) {
    const int parity = int(t & 1);
    if (t + 1 < in.steps) {  // what step t + 1 gives to the carry that it began with
      float r[1][Plan::tiles][4] = {};
      if (!kGrid) {
        const int n = int(in.steps - 2 - t);
        board.ready(n);
        matrix.sum(at, r, false, [&](int tile, int chunk) {
          return board.row(n % 2, 8 * tile + at.r)[chunk * 4 + at.q];
        });
      } else {
        matrix.sum(at, r, true, [&](int n, int chunk) {
          const long long row = at.sequence(8 * n + at.r), there = (t + 1) * in.batch + row;
          if (row >= in.batch) return Words{{0, 0, 0, 0}};
          const int gate = chunk / kChunks, k = chunk % kChunks * kChunk + at.q * 4 * kPerWord;
          if (Plan::apart)
            return load_shared_between_blocks(
                in.exchange + there * (Plan::heads * kGates * kPadded) + (at.head * kGates + gate) * kPadded + k);
          int apart = -1;
          RNN_UNROLL for (int g = 0; g < kGates; g++)
            if (g == gate) apart = Plan::rest_of(g);
          return load_shared_between_blocks(
              apart < 0 ? in.dz + there * (kGates * hidden) + gate * hidden + first + k
                        : in.drest + there * (Cell::rest * hidden) + apart * hidden + first + k);
        });
      }
      if (kShared) {
        partial.put(at, parity, r);
        sync_block();
      }
      each([&](int j, const Pair& pair, long long row, bool there, long long, int) {
        float total;
        if constexpr (kShared)
          total = partial.get(parity, pair, 0);
        else
          total = r[0][j / 4][j % 4];
        ds[j][kHidden] += total * mask[j];
        if (Plan::resets && there && in.resets[(t + 1) * in.batch + row])
          RNN_UNROLL for (int f = 0; f < kFields; f++) dtarget[j][f] += ds[j][f], ds[j][f] = 0;
      });
    }
    if (t < 0) break;
    board.arm(at, int(in.steps - 1 - t));
    each([&](int j, const Pair& pair, long long row, bool there, long long place, int column) {
      vec kept[kKept + 1], after[kFields], staid[kFields], dp[Cell::units + 1], dz[kGates], dr[Cell::rest + 1],
          before[kFields], dgates[Cell::emitted + 1];
      RNN_UNROLL for (int m = 0; m < kKept; m++) kept[m] = wide(residuals[j][m]);
      const bool ends = there && t + 1 == (Plan::lengths ? in.lengths[row] : in.steps);
      RNN_UNROLL for (int f = 0; f < kFields; f++) {
        after[f] = ds[j][f];
        if (ends) after[f] += load(in.dlast + f * line + place);
        if (Cell::states && there && f != kHidden)
          after[f] += load(in.dothers + (t * in.batch + row) * others + (f - (f > kHidden)) * hidden + column);
      }
      after[kHidden] += wide(dh[j]);
      RNN_UNROLL for (int m = 0; m < Cell::emitted; m++)
        dgates[m] = there ? load(in.dgates + (t * in.batch + row) * (Cell::emitted * hidden) + m * hidden + column) : 0.f;
      RNN_UNROLL for (int f = 0; f < kFields; f++) {
        staid[f] = 0;
        if (Plan::stay(f) && there) {
          const float share = staying(in.stay[f], f, t * line + place);
          staid[f] = share == 0 ? 0.f : share * after[f], after[f] = share == 1 ? 0.f : (1 - share) * after[f];
        }
      }
      Cell::backward(units[j], kept, after, dgates, dp, dz, dr, before);
      RNN_UNROLL for (int f = 0; f < kFields; f++) ds[j][f] = before[f] + staid[f];
      RNN_UNROLL for (int m = 0; m < Cell::units; m++) dunits[j][m] += dp[m];
      RNN_UNROLL for (int g = 0; g < kGates; g++) {
        const int apart = Plan::rest_of(g);
        const float recurrent = apart < 0 ? dz[g] : dr[apart < 0 ? 0 : apart];
        const long long lies = (t * in.batch + row) * (kGates * hidden) + g * hidden + column;
        const long long lies_apart = (t * in.batch + row) * (Cell::rest * hidden) + apart * hidden + column;
        Element entering;
        narrow(there ? recurrent : 0.f, entering);
        if (!kGrid) {
          board.write(at, int(in.steps - 1 - t), pair.row, pair.unit, g, there, entering);
        } else {
          const u32 word = as_word(entering);
          if (pair.unit % kPerWord == 0) {
            if (Plan::apart) {
              if (row < in.batch && pair.unit < kPadded)
                store_shared_between_blocks(
                    in.exchange + (t * in.batch + row) * (Plan::heads * kGates * kPadded) + (at.head * kGates + g) * kPadded + pair.unit, word);
            } else if (there) {
              store_shared_between_blocks(apart < 0 ? (void*)(in.dz + lies) : (void*)(in.drest + lies_apart), word);
            }
          }
        }
        if (there) {
          if (!kGrid || Plan::apart || apart >= 0) narrow(dz[g], in.dz[lies]);
          if ((!kGrid || Plan::apart) && apart >= 0) narrow(recurrent, in.drest[lies_apart]);
        }
      }
    });
    if (t > 0) fetch_inputs(t - 1);
    if (kAlone || (kShared && Plan::sums == 1)) sync_block();
  }
  if (kCluster) sync_cluster();  // no block ends while another may still write to it
  each([&](int j, const Pair&, long long, bool there, long long place, int column) {
    if (!there) return;
    RNN_UNROLL for (int f = 0; f < kFields; f++) {
      in.dstart[f * line + place] = ds[j][f];
      if (Plan::resets) in.dtarget[f * line + place] = dtarget[j][f];
    }
    RNN_UNROLL for (int m = 0; m < Cell::units; m++) in.dunits[m * line + place] = dunits[j][m];
  });
}

}  // namespace rnn
