// Vectors of one register, and the functions of them that a cell's update may apply.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace rnn {

using real = RNN_REAL;
struct bfloat16 {
  uint16_t bits;
};
#if defined(__FLT16_MAX__)
using float16 = _Float16;
#endif
// What arrays over time hold, and what is kept for the derivative: all arithmetic is on `real`.
using stored = RNN_STORED;
using residual = RNN_RESIDUAL;
using integer = std::conditional_t<sizeof(real) == 4, int32_t, int64_t>;

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / sizeof(real);

typedef real vec __attribute__((vector_size(kBytes)));
typedef integer mask __attribute__((vector_size(kBytes)));  // 0 or -1 in every lane
typedef std::make_unsigned_t<integer> bits __attribute__((vector_size(kBytes)));
typedef real unaligned __attribute__((vector_size(kBytes), aligned(sizeof(real))));

#define RNN_INLINE inline __attribute__((always_inline))

RNN_INLINE vec all(real x) { return vec{} + x; }
RNN_INLINE mask none() { return mask{}; }
RNN_INLINE vec load(const real* p) { return *reinterpret_cast<const unaligned*>(p); }
RNN_INLINE void store(real* p, vec v) { *reinterpret_cast<unaligned*>(p) = v; }

// Numbers of other types are converted, to the nearest even where they have fewer digits.
typedef float floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t words __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint16_t shorts __attribute__((vector_size(kLanes * sizeof(uint16_t))));

template <class T>
RNN_INLINE vec load(const T* p) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    shorts half;
    std::memcpy(&half, p, sizeof half);
    const words wide = __builtin_convertvector(half, words) << 16;
    return __builtin_convertvector((floats)wide, vec);
  } else {
    vec v;
    for (int n = 0; n < kLanes; n++) v[n] = real(p[n]);
    return v;
  }
}
template <class T>
RNN_INLINE void store(T* p, vec v) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const floats narrow = __builtin_convertvector(v, floats);
    const words wide = (words)narrow;
    const words nearest = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    const shorts half = __builtin_convertvector(narrow != narrow ? (wide >> 16) | 0x40 : nearest, shorts);
    std::memcpy(p, &half, sizeof half);
  } else {
    for (int n = 0; n < kLanes; n++) p[n] = T(v[n]);
  }
}

// The first `count` lanes; loaded, the others are 0.
template <class T>
RNN_INLINE vec load(const T* p, int count) {
  if (count >= kLanes) return load(p);
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}
template <class T>
RNN_INLINE void store(T* p, vec v, int count) {
  if (count >= kLanes) return store(p, v);
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, count * sizeof(T));
}

// Booleans, the first `count`; the others are false.
RNN_INLINE mask load(const bool* p, int count) {
  mask m = {};
  for (int n = 0; n < kLanes && n < count; n++) m[n] = p[n] ? -1 : 0;
  return m;
}

RNN_INLINE vec select(mask m, vec yes, vec no) { return m ? yes : no; }
RNN_INLINE mask select(mask m, mask yes, mask no) { return (m & yes) | (~m & no); }
RNN_INLINE vec numbers(mask m) { return m ? all(1) : all(0); }
RNN_INLINE vec absolute(vec x) { return x < 0 ? -x : x + 0; }
RNN_INLINE vec larger(vec a, vec b) { return ((a > b) | (a != a)) ? a : b; }  // NaN stays
RNN_INLINE vec smaller(vec a, vec b) { return ((a < b) | (a != a)) ? a : b; }
RNN_INLINE vec signum(vec x) { return x > 0 ? all(1) : (x < 0 ? all(-1) : x); }

template <int N>
RNN_INLINE vec power(vec x) {
  if constexpr (N < 0)
    return 1 / power<-N>(x);
  else if constexpr (N == 0)
    return all(1);
  else if constexpr (N == 1)
    return x;
  else
    return N % 2 ? x * power<N / 2>(x * x) : power<N / 2>(x * x);
}

template <real (*F)(real)>
RNN_INLINE vec each(vec x) {
  for (int n = 0; n < kLanes; n++) x[n] = F(x[n]);
  return x;
}
template <real (*F)(real, real)>
RNN_INLINE vec each(vec x, vec y) {
  for (int n = 0; n < kLanes; n++) x[n] = F(x[n], y[n]);
  return x;
}

RNN_INLINE vec within(vec x, real low, real high) {  // NaN stays
#if defined(__AVX512F__)
  if constexpr (sizeof(real) == 4)  // of a NaN and a number these give the second
    return (vec)_mm512_min_ps((__m512)all(high), _mm512_max_ps((__m512)all(low), (__m512)x));
#elif defined(__AVX2__)
  if constexpr (sizeof(real) == 4)
    return (vec)_mm256_min_ps((__m256)all(high), _mm256_max_ps((__m256)all(low), (__m256)x));
#endif
  x = x < low ? all(low) : x;
  return x > high ? all(high) : x;
}

// Numbers of a table of one register, at the lowest bits of every lane.
#if defined(__AVX512F__)
constexpr int kTable = 16;
RNN_INLINE vec look_up(const void* table, vec at) {
  return (vec)_mm512_permutexvar_ps((__m512i)at, _mm512_load_ps(table));
}
#elif defined(__AVX2__)
constexpr int kTable = 8;
RNN_INLINE vec look_up(const void* table, vec at) {
  return (vec)_mm256_permutevar8x32_ps(_mm256_load_ps(static_cast<const float*>(table)), (__m256i)at);
}
#else
constexpr int kTable = 1;
RNN_INLINE vec look_up(const void* table, vec) {
  float first;
  std::memcpy(&first, table, sizeof first);
  return all(first);
}
#endif

// 2^(j / kTable): the bits, less those that j adds to the exponent, and what rounding takes of it.
struct Powers {
  int32_t bits[kTable];
  alignas(kBytes) float lost[kTable];
};
constexpr Powers powers() {
  constexpr int32_t bits[] = {0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532,
                              0x3f75fed7, 0x3f75583f, 0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c,
                              0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
  constexpr float lost[] = {0,           4.6285e-08f,  -1.1992e-08f, 4.7298e-08f, 3.1934e-08f, 3.6211e-08f,
                            -3.0991e-08f, -7.4752e-09f, 1.7114e-08f,  -3.0477e-08f, 5.2333e-09f, 6.1076e-09f,
                            -1.4720e-08f, -5.2588e-09f, -6.1283e-09f, 5.1406e-09f};
  Powers some{};
  for (int j = 0; j < kTable; j++) some.bits[j] = bits[j * 16 / kTable], some.lost[j] = lost[j * 16 / kTable];
  return some;
}
alignas(kBytes) constexpr Powers kPowers = powers();

// e^x = 2^(n / kTable) e^f with n whole and |f| <= ln(2) / (2 kTable): the scale is 2^(n / kTable - Less) and the rest
// e^f - 1, by Taylor's series within 3e-8 of it.
struct Reduced {
  vec scale, rest;
};
template <int Less>
RNN_INLINE Reduced reduced_exp(vec x) {
  constexpr real kShift = 12582912;  // 1.5 * 2^23: adding it rounds to an integer, which the lowest bits then are
  const vec shifted = x * real(1.4426950408889634 * kTable) + kShift, n = shifted - kShift;
  // ln 2 in two parts, of which the first times n is exact
  const vec f = (x - n * real(0.693359375 / kTable)) - n * real(-2.1219444005469058e-4 / kTable);
  vec p = all(real(1.0 / 24));
  if constexpr (kTable == 1) {
    p = all(real(1.0 / 5040));
    p = p * f + real(1.0 / 720);
    p = p * f + real(1.0 / 120);
    p = p * f + real(1.0 / 24);
  }
  p = p * f + real(1.0 / 6);
  p = p * f + real(0.5);
  constexpr integer kOne = integer(1) << 23;  // of the exponent
  // Unsigned, for the product may leave the range of integers, and its lowest bits are what counts.
  using Unsigned = std::make_unsigned_t<integer>;
  const bits power = (bits)look_up(kPowers.bits, shifted) + (bits)shifted * Unsigned(kOne / kTable) - Unsigned(Less * kOne);
  return {(vec)power, (p * f) * f + (f + look_up(kPowers.lost, shifted))};
}

// e^x; 0 where it is below 3e-38.
RNN_INLINE vec exponential(vec x) {
  if constexpr (sizeof(real) == 8) return each<std::exp>(x);
  Reduced e = reduced_exp<1>(within(x, -86.6, 89));
  vec y = real(2) * (e.scale * e.rest + e.scale);
  return x < real(-86.6) ? all(0) : y;
}
// e^x - 1, exact to a few units in the last place at small x too.
RNN_INLINE vec exponential_less_one(vec x) {
  if constexpr (sizeof(real) == 8) return each<std::expm1>(x);
  Reduced e = reduced_exp<1>(within(x, -30, 89));
  return real(2) * (e.scale * e.rest + (e.scale - real(0.5)));
}
// ln x for x from the smallest normal number on, x = 2^n y with y between the roots of 1/2 and 2: ln y is 2 artanh s for
// s = (y - 1) / (y + 1), |s| < 0.172, by its series within 1e-8 of it.
RNN_INLINE vec natural_logarithm(vec x) {
  // Halfway between the roots in the bits of a number lies 0x3f3504f3, the root of 1/2.
  const mask all_bits = (mask)x, n = (all_bits - 0x3f3504f3) >> 23;
  const vec y = (vec)(all_bits - (n << 23)), s = (y - 1) / (y + 1), square = s * s;
  vec p = all(real(1.0 / 9));
  p = p * square + real(1.0 / 7);
  p = p * square + real(1.0 / 5);
  p = p * square + real(1.0 / 3);
  const vec power = __builtin_convertvector(n, vec);
  return power * real(0.693145751953125) + (2 * s + (2 * s * square * p + power * real(1.4286068203094173e-06)));
}
RNN_INLINE vec logarithm(vec x) {
  if constexpr (sizeof(real) == 8) return each<std::log>(x);
  const mask small = x < real(1.17549435e-38);
  vec y = natural_logarithm(small ? x * real(33554432) : x) - (small ? all(real(17.328679513998633)) : all(0));
  y = x == all(real(HUGE_VAL)) ? x : y;
  y = x == 0 ? all(-real(HUGE_VAL)) : y;
  return x >= 0 ? y : all(real(NAN));
}
// ln (1 + x), to a few units in the last place at small x too: what 1 + x loses by rounding is put right.
RNN_INLINE vec logarithm_of_one_more(vec x) {
  if constexpr (sizeof(real) == 8) return each<std::log1p>(x);
  const vec y = x + 1, lost = x - (y - 1);
  const vec found = natural_logarithm(y) + lost / y;
  const mask simple = (y > 0) & (x < real(1e30));
  return simple ? (y == 1 ? x : found) : logarithm(y);
}
RNN_INLINE vec logistic(vec x) {
  if constexpr (sizeof(real) == 8) return 1 / (1 + each<std::exp>(-x));
  Reduced e = reduced_exp<0>(within(-x, -88, 88));
  return 1 / (e.scale * e.rest + (e.scale + 1));
}
RNN_INLINE vec hyperbolic_tangent(vec x) {
  if constexpr (sizeof(real) == 8) return each<std::tanh>(x);
  Reduced e = reduced_exp<0>(within(2 * x, -30, 30));
  vec y = e.scale * e.rest + (e.scale - 1);
  return y / (y + 2);
}

}  // namespace rnn
