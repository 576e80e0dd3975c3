// The recurrent product of a step: sums over k of a matrix that stays where it is, and of what comes in.
//
// A warp has groups of 16 rows by a range of k, in the fragments of the matrix unit; the second operand is 8 sequences
// by 64 bytes of k at a time, a chunk: lane 4 b + q reads 16 bytes of sequence b, whose four words are k for two
// instructions.  As long as the matrix is laid out alike, the order of k does not matter.
#pragma once

namespace rnn {

constexpr int kPerWord = 4 / sizeof(Element), kChunk = 16 * kPerWord;  // numbers in a word, in a chunk
constexpr int kWarps = Plan::groups * Plan::split, kThreads = 32 * kWarps, kRows = 8 * Plan::tiles;
constexpr int kChunks = (Plan::size + kChunk - 1) / kChunk, kPadded = kChunks * kChunk;  // of the units of a head
constexpr bool kAlone = Plan::blocks == 1, kCluster = Plan::cluster, kGrid = !kAlone && !kCluster;
constexpr int kEarly = 8;  // steps from when an input is brought into the L2 cache to its use
constexpr u32 kNothing = ~0u;  // what a word holds that has not been written yet

struct Here {
  int thread, warp, lane, r, q, group, part;  // r, q: the row and the column of the lane in a fragment
  int block, tile, head;
  long long batch;
  RNN_DEVICE Here(long long batch) : batch(batch) {
    thread = thread_number(), warp = thread / 32, lane = thread % 32, r = lane / 4, q = lane % 4;
    group = warp / Plan::split, part = warp % Plan::split;
    const int tiles = int((batch + kRows - 1) / kRows), number = block_number();
    block = number % Plan::blocks, tile = number / Plan::blocks % tiles, head = number / Plan::blocks / tiles;
  }
  RNN_DEVICE long long sequence(int row) const { return (long long)tile * kRows + row; }
};

RNN_DEVICE bool unwritten(const Words& w) {
  return w.v[0] == kNothing || w.v[1] == kNothing || w.v[2] == kNothing || w.v[3] == kNothing;
}

RNN_DEVICE void multiply_words(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if RNN_PRODUCT == 0
  multiply(d, a, b0, b1, Element{});
#elif RNN_PRODUCT == 1
  const u32 rounded[4] = {to_tf32(float_of(a[0])), to_tf32(float_of(a[1])), to_tf32(float_of(a[2])),
                          to_tf32(float_of(a[3]))};
  multiply_tf32(d, rounded, to_tf32(float_of(b0)), to_tf32(float_of(b1)));
#elif RNN_PRODUCT == 2  // each number as a sum of two: what is left out is below 2^-22 of the product
  const u32 b[2] = {b0, b1};
  u32 high[6], low[6];
  RNN_UNROLL for (int i = 0; i < 6; i++) {
    const float x = float_of(i < 4 ? a[i] : b[i - 4]);
    high[i] = to_tf32(x), low[i] = to_tf32(x - float_of(high[i]));
  }
  const u32 ah[4] = {high[0], high[1], high[2], high[3]}, al[4] = {low[0], low[1], low[2], low[3]};
  multiply_tf32(d, al, high[4], high[5]);
  multiply_tf32(d, ah, low[4], low[5]);
  multiply_tf32(d, ah, high[4], high[5]);
#else  // no matrix unit: the same layout, by shuffles
  const int lane = thread_number() % 32, r = lane / 4, q = lane % 4;
  RNN_UNROLL for (int k = 0; k < 8; k++) {
    const float top = from_lane(float_of(k < 4 ? a[0] : a[2]), r * 4 + k % 4);
    const float bottom = from_lane(float_of(k < 4 ? a[1] : a[3]), r * 4 + k % 4);
    const float left = from_lane(float_of(k < 4 ? b0 : b1), 8 * q + k % 4);
    const float right = from_lane(float_of(k < 4 ? b0 : b1), 8 * q + 4 + k % 4);
    d[0] += top * left, d[1] += top * right, d[2] += bottom * left, d[3] += bottom * right;
  }
#endif
}

// `Sets` matrices of 16 rows a group, over `Chunks` chunks of k: the first of a warp's chunks lie in registers, the next
// in shared memory, and what is left is read again at every step.
template <int Sets, int Chunks, int InRegisters, int InShared>
struct Product {
  static constexpr int kEach = (Chunks + Plan::split - 1) / Plan::split;  // chunks of a warp
  static constexpr int kAhead = Plan::ahead;  // fetched at a time
  static constexpr int kBatches = (kEach + kAhead - 1) / kAhead;
  static constexpr int kSharedWords = kWarps * InShared * Sets * 2 * 32;

  u32 held[InRegisters > 0 ? InRegisters : 1][Sets][2][4];
  const Words *shared, *streamed;

  // `from` is [head][block][warp][chunk][set][2][lane].
  RNN_DEVICE void load(const Here& at, const Words* from, Words* memory) {
    from += ((long long)(at.head * Plan::blocks + at.block) * kWarps + at.warp) * kEach * Sets * 2 * 32 + at.lane;
    RNN_UNROLL for (int c = 0; c < InRegisters; c++)
      RNN_UNROLL for (int s = 0; s < Sets; s++)
        RNN_UNROLL for (int m = 0; m < 2; m++) {
          const Words w = rnn::load(from + ((c * Sets + s) * 2 + m) * 32);
          RNN_UNROLL for (int i = 0; i < 4; i++) held[c][s][m][i] = w.v[i];
        }
    from += InRegisters * Sets * 2 * 32;
    Words* own = memory + at.warp * InShared * Sets * 2 * 32 + at.lane;
    for (int i = 0; i < InShared * Sets * 2; i++) own[i * 32] = rnn::load(from + i * 32);  // read by the same lane only
    shared = own, streamed = from + InShared * Sets * 2 * 32;
  }

  // `fetch(tile, chunk)` gives a lane's words of a chunk; where `waits`, again until they have been written.
  template <class Fetch>
  RNN_DEVICE void sum(const Here& at, float (&to)[Sets][Plan::tiles][4], bool waits, const Fetch& fetch) const {
    Words now[kAhead][Plan::tiles], next[kAhead][Plan::tiles];
    get<0>(at, now, fetch);
    sum_from<0>(at, to, waits, fetch, now, next);
  }

 private:
  template <int Batch, class Fetch>
  RNN_DEVICE void get(const Here& at, Words (&x)[kAhead][Plan::tiles], const Fetch& fetch) const {
    RNN_UNROLL for (int c = 0; c < kAhead; c++)
      RNN_UNROLL for (int n = 0; n < Plan::tiles; n++) {
        const int chunk = at.part * kEach + Batch * kAhead + c;
        const bool there = Batch * kAhead + c < kEach && (kEach * Plan::split == Chunks || chunk < Chunks);
        x[c][n] = there ? fetch(n, chunk) : Words{{0, 0, 0, 0}};
      }
  }

  // The next batch comes in while this one is multiplied.  A recursion, so that all indices of registers are constants.
  template <int Batch, class Fetch>
  RNN_DEVICE void sum_from(const Here& at, float (&to)[Sets][Plan::tiles][4], bool waits, const Fetch& fetch,
                           Words (&now)[kAhead][Plan::tiles], Words (&next)[kAhead][Plan::tiles]) const {
    if constexpr (Batch + 1 < kBatches) get<Batch + 1>(at, next, fetch);
    if (waits) {
      for (int tries = 0;; tries++) {
        bool again = false;
        RNN_UNROLL for (int c = 0; c < kAhead; c++)
          RNN_UNROLL for (int n = 0; n < Plan::tiles; n++) again |= unwritten(now[c][n]);
        if (!any_in_warp(again)) break;
        if (tries == 1 << 27) give_up();  // about a minute: a block that this one waits for has been lost
        get<Batch>(at, now, fetch);
      }
    }
    RNN_UNROLL for (int c = 0; c < kAhead; c++) {
      const int i = Batch * kAhead + c;
      if (i < kEach && (kEach * Plan::split == Chunks || at.part * kEach + i < Chunks)) {
        RNN_UNROLL for (int m = 0; m < 2; m++)
          RNN_UNROLL for (int s = 0; s < Sets; s++) {
            u32 a[4];
            if (i < InRegisters) {
              RNN_UNROLL for (int n = 0; n < 4; n++) a[n] = held[i < InRegisters ? i : 0][s][m][n];
            } else {
              const bool here = i < InRegisters + InShared;
              const Words* from = here ? shared + ((i - InRegisters) * Sets * 2 + s * 2 + m) * 32
                                       : streamed + ((i - InRegisters - InShared) * Sets * 2 + s * 2 + m) * 32;
              const Words w = here ? *from : rnn::load(from);
              RNN_UNROLL for (int n = 0; n < 4; n++) a[n] = w.v[n];
            }
            RNN_UNROLL for (int n = 0; n < Plan::tiles; n++)
              multiply_words(to[s][n], a, now[c][n].v[2 * m], now[c][n].v[2 * m + 1]);
          }
      }
    }
    if constexpr (Batch + 1 < kBatches) sum_from<Batch + 1>(at, to, waits, fetch, next, now);
  }
};

// The (unit, sequence) pairs that a thread updates: where one warp has all of k, those of its own fragments; else the
// warps' sums go through shared memory, and the pairs lie over all threads, units first.
constexpr bool kShared = Plan::split > 1;
constexpr int kPairs = 128 * Plan::tiles * Plan::groups;  // of a block
constexpr int kOwn = kShared ? (kPairs + kThreads - 1) / kThreads : 4 * Plan::tiles;
constexpr int kNeighbour = kShared ? 1 : 4;  // lanes from a unit to the next

struct Pair {
  int unit, row, group, tile, place;  // unit of the head, row of the block; place among a tile's sums
  bool mine;                          // warps have it as one
  RNN_DEVICE Pair(const Here& at, int j) {
    int in_group, in_tile;
    if constexpr (kShared) {
      const int e = at.thread + j * kThreads, line = e % 128 / 16;
      mine = e < kPairs, group = e / (128 * Plan::tiles), tile = e / 128 % Plan::tiles;
      in_group = e % 16, in_tile = 2 * (line % 4) + line / 4, place = spot(line, in_group);
    } else {
      mine = true, group = at.group, tile = j / 4, place = j % 4;
      in_group = at.r + 8 * (j % 4 / 2), in_tile = 2 * at.q + j % 2;
    }
    unit = (at.block * Plan::groups + group) * 16 + in_group, row = 8 * tile + in_tile;
  }
  // Lines of 16 units, so ordered that fragments are written, and lines read, without bank conflicts.
  static RNN_DEVICE int spot(int line, int unit) { return line * 16 + (unit ^ 8 * (line / 2 % 2)); }
};

// How much of the old carry stays; 0 or 1 where `stay` is made of bytes.
RNN_DEVICE float staying(const void* stay, int field, long long at) {
  return Plan::stay(field) == 1 ? float(static_cast<const unsigned char*>(stay)[at] != 0)
                                : load(static_cast<const float*>(stay) + (Plan::stay(field) == 3 ? 0 : at));
}

// Sums of the warps that share k, in shared memory.
template <int Sets>
struct Partial {
  static constexpr int kFloats = kShared ? Plan::sums * kWarps * Sets * Plan::tiles * 128 : 0;
  float* memory;

  RNN_DEVICE float* of(int parity, int warp, int set, int tile) const {
    return memory + (((parity % Plan::sums * kWarps + warp) * Sets + set) * Plan::tiles + tile) * 128;
  }
  RNN_DEVICE void put(const Here& at, int parity, const float (&sums)[Sets][Plan::tiles][4]) const {
    RNN_UNROLL for (int s = 0; s < Sets; s++)
      RNN_UNROLL for (int n = 0; n < Plan::tiles; n++)
        RNN_UNROLL for (int i = 0; i < 4; i++)
          of(parity, at.warp, s, n)[Pair::spot(at.q + 4 * (i % 2), at.r + 8 * (i / 2))] = sums[s][n][i];
  }
  RNN_DEVICE float get(int parity, const Pair& pair, int set) const {
    float total = 0;
    RNN_UNROLL for (int w = 0; w < Plan::split; w++)
      total += of(parity, pair.group * Plan::split + w, set, pair.tile)[pair.place];
    return total;
  }
};

// A word of the second operand: this thread's number and, for 16 bits, the neighbouring unit's.
RNN_DEVICE u32 as_word(float x) {
  narrow(x, x);
  return bits_of(x);
}
template <class T>
RNN_DEVICE u32 as_word(T x) {
  const u32 above = from_lane_above(x.bits, kNeighbour);
  return x.bits | above << 16;
}

// Numbers of sequence `row` that a lane multiplies in a chunk, from a row of float32.
RNN_DEVICE Words rounded(const float* from, int count) {
  Words w;
  RNN_UNROLL for (int i = 0; i < 4; i++) {
    u32 word = 0;
    RNN_UNROLL for (int j = 0; j < kPerWord; j++) {
      Element x;
      narrow(i * kPerWord + j < count ? load(from + i * kPerWord + j) : 0.f, x);
      u32 number = 0;
      if constexpr (sizeof(Element) == 4)
        number = bits_of(wide(x));
      else
        number = *reinterpret_cast<const u16*>(&x);
      word |= number << (16 * j);
    }
    w.v[i] = word;
  }
  return w;
}

// The second operand in shared memory, of a block that has a whole head or of each block of a cluster: rows 64 bytes
// apart from multiples of 128, so that the eight rows of a fragment lie in different banks; two steps in turn.
template <int Sets>
struct Board {
  static constexpr int kBytes = Sets * kPadded * int(sizeof(Element));
  static constexpr int kPitch = (kBytes + 127) / 128 * 128 + 64;
  static constexpr int kSize = kGrid ? 0 : 128 + 2 * kRows * kPitch;
  char* memory;

  RNN_DEVICE char* of(int parity, int row) const { return memory + 128 + (parity * kRows + row) * kPitch; }
  RNN_DEVICE const Words* row(int parity, int row) const { return reinterpret_cast<const Words*>(of(parity, row)); }
  RNN_DEVICE Signal* signal(int parity) const { return reinterpret_cast<Signal*>(memory) + parity; }

  RNN_DEVICE void begin(const Here& at) const {
    if (kAlone) {  // sequences and units that there are not stay 0
      for (int i = at.thread; i < kSize / 4; i += kThreads) reinterpret_cast<u32*>(memory)[i] = 0;
      sync_block();
    }
    if (kCluster) {
      if (at.thread == 0) start(signal(0)), start(signal(1));
      sync_cluster();
    }
  }
  // What step `n` writes, counted from 0, goes to parity n % 2.
  RNN_DEVICE void arm(const Here& at, int n) const {
    if (kCluster && at.thread == 0) expect(signal(n % 2), kRows * kBytes);
  }
  RNN_DEVICE void ready(int n) const {
    if (kCluster) wait(signal(n % 2), n / 2 % 2);
  }
  // A pair's number of one set; all lanes of a warp call it, and in a cluster all pairs count.
  RNN_DEVICE void write(const Here& at, int n, int row, int unit, int set, bool there, Element x) const {
    if (kAlone) {
      if (there) reinterpret_cast<Element*>(of(n % 2, row))[set * kPadded + unit] = x;
    } else {
      constexpr int kPacket = 4 * kPerWord;  // units in 16 bytes, whose lanes share the blocks among them
      const u32 word = as_word(x);
      const int place = unit % kPacket, base = at.lane - place * kNeighbour;
      Words packet;
      RNN_UNROLL for (int i = 0; i < 4; i++) packet.v[i] = from_lane(word, base + i * kPerWord * kNeighbour);
      const char* to = of(n % 2, row) + (set * kPadded + unit - place) * sizeof(Element);
      RNN_UNROLL for (int block = 0; block < Plan::blocks; block += kPacket)
        if (block + place < Plan::blocks) send(packet, to, signal(n % 2), block + place);
    }
  }
};

}  // namespace rnn
