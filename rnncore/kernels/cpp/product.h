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

// C[r, c] += sum_k A(r, k) B(k, c).  B(k, c) are `Columns` vectors at b + k ldb.
// A(r, k) is a[r lda + k], or where it lies across a[k lda + r].
template <int Rows, int Columns, bool Across>
RNN_INLINE void multiply(const real* a, int64_t lda, const real* b, int64_t ldb, int64_t depth,
                         vec (&c)[Rows][Columns]) {
  for (int64_t k = 0; k < depth; k++, b += ldb) {
    vec w[Columns];
    for (int n = 0; n < Columns; n++) w[n] = load(b + n * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r++) {
      real x = Across ? a[k * lda + r] : a[r * lda + k];
#pragma GCC unroll 4
      for (int n = 0; n < Columns; n++) c[r][n] += x * w[n];
    }
  }
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
