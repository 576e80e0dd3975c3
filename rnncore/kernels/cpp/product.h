// The one product: a block of C, in registers, += rows of A times columns of B.
#pragma once

#include "vectors.h"

namespace rnn {

// Rows of a block: with two or three vectors of columns, accumulators for most of the registers that there are.
#if defined(RNN_ROWS)
constexpr int kRows = RNN_ROWS;  // fewer compile faster, under sanitizers
#elif defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif

constexpr int kSums = 8;  // side by side keep the arithmetic units busy: an addition waits for the one before it in its sum

// C[r, c] += sum_k A(r, k) B(k, c).  B(k, c) are `Columns` vectors: `Panel` of them at b + k ldb, the next ones `apart`
// further.  A(r, k) is a[r lda + k], or where it lies across a[k lda + r].
template <int Rows, int Columns, bool Across, int Panel = Columns>
RNN_INLINE void multiply(const real* a, int64_t lda, const real* b, int64_t ldb, int64_t depth,
                         vec (&c)[Rows][Columns], int64_t apart = 0) {
  const auto add = [&](int64_t k, vec(&sums)[Rows][Columns]) __attribute__((always_inline)) {
    vec w[Columns];
    for (int n = 0; n < Columns; n++) w[n] = load(b + k * ldb + n / Panel * apart + n % Panel * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r++) {
      real x = Across ? a[k * lda + r] : a[r * lda + k];
#pragma GCC unroll 4
      for (int n = 0; n < Columns; n++) sums[r][n] += x * w[n];
    }
  };
  constexpr int kParts = kSums / (Rows * Columns);
  int64_t k = 0;
  if constexpr (kParts > 1) {
    vec parts[kParts][Rows][Columns] = {};
    for (; k + kParts <= depth; k += kParts)
#pragma GCC unroll 8
      for (int part = 0; part < kParts; part++) add(k + part, parts[part]);
    for (int part = 0; part < kParts; part++)
      for (int r = 0; r < Rows; r++)
        for (int n = 0; n < Columns; n++) c[r][n] += parts[part][r][n];
  }
  for (; k < depth; k++) add(k, c);
}

template <int Rows, class Body>
RNN_INLINE void with_rows(int rows, Body&& body) {
  if constexpr (Rows > 0) {
    if (rows == Rows) return body(std::integral_constant<int, Rows>{});
    with_rows<Rows - 1>(rows, body);
  }
}

// body(first row, a constant: how many) over `count` rows in blocks of nearly equal size.
template <class Body>
RNN_INLINE void in_blocks(int count, Body&& body) {
  for (int at = 0; at < count;) {
    int left = count - at, blocks = (left + kRows - 1) / kRows, rows = (left + blocks - 1) / blocks;
    with_rows<kRows>(rows, [&](auto constant) { body(at, constant); });
    at += rows;
  }
}

}  // namespace rnn
