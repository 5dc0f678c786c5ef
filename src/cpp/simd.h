// Vectors of the instruction set this unit is compiled for: GCC/Clang vector types carry the
// arithmetic, and the few operations they lack (comparison to a bit mask, compression) have
// one intrinsic version per instruction set and one portable version.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "types.h"

namespace adasplash2::ADASPLASH2_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t ints __attribute__((vector_size(kVectorBytes)));
  typedef int32_t keys __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t ints __attribute__((vector_size(kVectorBytes)));
  typedef int32_t keys __attribute__((vector_size(kVectorBytes / 2)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
using Ints = typename VectorOf<T>::ints;  // lanes as wide as T
template <class T>
using Keys = typename VectorOf<T>::keys;  // as many lanes, 32 bits each
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class To, class From>
ADASPLASH2_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
ADASPLASH2_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}
template <class T>
ADASPLASH2_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class T>
ADASPLASH2_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
template <class T>
ADASPLASH2_INLINE Vec<T> vmax(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}
template <class T>
ADASPLASH2_INLINE Vec<T> vmin(Vec<T> a, Vec<T> b) {
  return a < b ? a : b;
}

// Lane i takes what is in lane (i + by) % kLanes.
template <class T>
ADASPLASH2_INLINE Vec<T> lanes_from(Vec<T> v, int by) {
#if defined(__clang__)
  Vec<T> moved;
  for (int i = 0; i < kLanes<T>; ++i) moved[i] = v[(i + by) % kLanes<T>];
  return moved;
#else
  using Number = decltype(Ints<T>{}[0] + 0);
  static constexpr Number numbers[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                         11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                         22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
  Ints<T> from;
  __builtin_memcpy(&from, numbers + by, sizeof(from));
  return __builtin_shuffle(v, from);
#endif
}

// Reductions in a fixed order: the upper half onto the lower, until one lane is left. In registers:
// lists are short, and a reduction by way of memory took longer than the passes over them.
template <class T>
ADASPLASH2_INLINE T sum(Vec<T> v) {
#pragma GCC unroll 4
  for (int width = kLanes<T> / 2; width > 0; width /= 2) v += lanes_from<T>(v, width);
  return v[0];
}
template <class T>
ADASPLASH2_INLINE T largest(Vec<T> v) {
#pragma GCC unroll 4
  for (int width = kLanes<T> / 2; width > 0; width /= 2) v = vmax<T>(v, lanes_from<T>(v, width));
  return v[0];
}
template <class T>
ADASPLASH2_INLINE T smallest(Vec<T> v) {
  return -largest<T>(-v);
}

// Lane-wise sums with Kahan's compensation: rows of thousands of equal terms, added one after
// another, would drift by more than the threshold's own round-off.
template <class T>
struct Sum {
  Vec<T> value = {}, lost = {};
  ADASPLASH2_INLINE void add(Vec<T> x) {
    const Vec<T> y = x - lost, next = value + y;
    lost = (next - value) - y;
    value = next;
  }
  // Where terms or sums may be infinite: there nothing is lost, and inf - inf must not make NaN
  // of what plain addition makes inf.
  ADASPLASH2_INLINE void add_any(Vec<T> x) {
    add(x);
    lost = lost == lost ? lost : Vec<T>{};
  }
  ADASPLASH2_INLINE T total() const { return sum<T>(value); }
};

// Sums of N terms at a time over n numbers: `at(i)` has those of a vector from number i on. Eight
// vectors, of the last ones four, are added before the sum takes them: it has to wait for itself.
template <class T, int N>
struct Terms {
  Vec<T> of[N];
};
template <class T, int N>
struct Totals {
  T of[N];
};
template <class T, int N, class At>
ADASPLASH2_INLINE Totals<T, N> sums_of(int64_t n, At at) {
  constexpr int64_t L = kLanes<T>;
  Sum<T> sums[N];
  int64_t i = 0;
  const auto four = [&] {
    const Terms<T, N> a = at(i), b = at(i + L), c = at(i + 2 * L), d = at(i + 3 * L);
    Terms<T, N> all;
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) all.of[k] = (a.of[k] + b.of[k]) + (c.of[k] + d.of[k]);
    i += 4 * L;
    return all;
  };
  while (i + 7 * L < n) {
    const Terms<T, N> a = four(), b = four();
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) sums[k].add_any(a.of[k] + b.of[k]);
  }
  if (i + 3 * L < n) {
    const Terms<T, N> a = four();
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) sums[k].add_any(a.of[k]);
  }
  for (; i < n; i += L) {
    const Terms<T, N> a = at(i);
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) sums[k].add_any(a.of[k]);
  }
  Totals<T, N> totals;
  for (int k = 0; k < N; ++k) totals.of[k] = sums[k].total();
  return totals;
}

// --- storage dtypes -------------------------------------------------------------------------

// A float16's bits as float: exponent and mantissa moved up, the exponent bias mended by a
// multiplication (which also normalises subnormals), infinities and NaN mended by a maximum.
template <class I, class F>
ADASPLASH2_INLINE F float16_bits_to_float(I bits) {
  const I magnitude = (bits & 0x7fff) << 13;
  const F value = bits_as<F>(magnitude) * 0x1p112f;
  const I special = magnitude >= (0x7c00 << 13) ? I{} + 0x7f800000 : I{};
  return bits_as<F>(bits_as<I>(value) | special | ((bits & 0x8000) << 16));
}

ADASPLASH2_INLINE float to_compute(float x) { return x; }
ADASPLASH2_INLINE double to_compute(double x) { return x; }
ADASPLASH2_INLINE float to_compute(Bfloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
ADASPLASH2_INLINE float to_compute(Float16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;
  const float value = bits_as<float>(magnitude) * 0x1p112f;
  return bits_as<float>(bits_as<uint32_t>(value) | special | (x.bits & 0x8000u) << 16);
}

// Rounded to nearest, ties to even.
ADASPLASH2_INLINE void from_compute(float x, float* p) { *p = x; }
ADASPLASH2_INLINE void from_compute(double x, double* p) { *p = x; }
ADASPLASH2_INLINE void from_compute(float x, Bfloat16* p) {
  const uint32_t bits = bits_as<uint32_t>(x);
  p->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
ADASPLASH2_INLINE void from_compute(float x, Float16* p) {
  const uint32_t bits = bits_as<uint32_t>(x), sign = bits >> 16 & 0x8000;
  const float magnitude = bits_as<float>(bits & 0x7fffffffu);
  uint32_t half;
  if (!(magnitude < 65520.0f)) {
    half = x != x ? 0x7e00 : 0x7c00;
  } else if (magnitude < 0x1p-14f) {  // subnormal: the addition rounds at the right bit
    half = bits_as<uint32_t>(magnitude + 0.5f) - 0x3f000000u;
  } else {
    const uint32_t m = bits & 0x7fffffffu;
    half = (m - (112u << 23) + 0xfff + (m >> 13 & 1)) >> 13;
  }
  p->bits = uint16_t(sign | half);
}

ADASPLASH2_INLINE Vec<float> load_compute(const float* p) { return load(p); }
ADASPLASH2_INLINE Vec<double> load_compute(const double* p) { return load(p); }
typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
ADASPLASH2_INLINE Ints<float> load_bits(const void* p) {
  HalfBits half;
  __builtin_memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, Ints<float>);
}
ADASPLASH2_INLINE Vec<float> load_compute(const Bfloat16* p) {
  return bits_as<Vec<float>>(load_bits(p) << 16);
}
ADASPLASH2_INLINE Vec<float> load_compute(const Float16* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  return float16_bits_to_float<Ints<float>, Vec<float>>(load_bits(p));
#endif
}

// The first n < kLanes elements, zeros behind them.
template <class S>
ADASPLASH2_INLINE auto load_partial(const S* p, int n) {
  S buffer[kLanes<decltype(to_compute(S{}))>] = {};
  __builtin_memcpy(buffer, p, size_t(n) * sizeof(S));
  return load_compute(buffer);
}

template <class S, class T>
ADASPLASH2_INLINE void store_storage(S* p, const T* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) from_compute(values[i], p + i);
}

template <class S>
using ComputeOf = decltype(to_compute(S{}));

// --- masks and compression ------------------------------------------------------------------

// Bit i is set where !(a[i] <= b[i]): greater, or unordered, so that a NaN is seen.
ADASPLASH2_INLINE unsigned not_below(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLE_UQ);
#elif defined(__AVX2__)
  return unsigned(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLE_UQ)));
#elif defined(__SSE2__)
  return unsigned(_mm_movemask_ps(_mm_cmpnle_ps((__m128)a, (__m128)b)));
#else
  const Ints<float> mask = ~(a <= b) & Ints<float>{1, 2, 4, 8};
  return unsigned(mask[0] | mask[1] | mask[2] | mask[3]);
#endif
}
ADASPLASH2_INLINE unsigned not_below(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_NLE_UQ);
#elif defined(__AVX2__)
  return unsigned(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_NLE_UQ)));
#elif defined(__SSE2__)
  return unsigned(_mm_movemask_pd(_mm_cmpnle_pd((__m128d)a, (__m128d)b)));
#else
  const Ints<double> mask = ~(a <= b) & Ints<double>{1, 2};
  return unsigned(mask[0] | mask[1]);
#endif
}

// 0, 1, 2, ... as keys.
template <class T>
ADASPLASH2_INLINE Keys<T> iota() {
  Keys<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = i;
  return v;
}

// Writes the marked lanes of v (and of keys) from out on and returns how many; may write a
// whole vector, so both ends need that much room.
template <class T>
ADASPLASH2_INLINE int compress(Vec<T> v, Keys<T> keys, unsigned mask, T* out, int32_t* out_keys) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps(__mmask16(mask), (__m512)v));
    _mm512_storeu_si512(out_keys, _mm512_maskz_compress_epi32(__mmask16(mask), (__m512i)keys));
  } else {
    _mm512_storeu_pd(out, _mm512_maskz_compress_pd(__mmask8(mask), (__m512d)v));
    _mm256_storeu_si256((__m256i*)out_keys,
                        _mm256_maskz_compress_epi32(__mmask8(mask), (__m256i)keys));
  }
  return __builtin_popcount(mask);
#else
  T lanes[kLanes<T>];
  int32_t key_lanes[kLanes<T>];
  store(lanes, v);
  __builtin_memcpy(key_lanes, &keys, sizeof(keys));
  int n = 0;
  for (; mask; mask &= mask - 1, ++n) {
    const int lane = __builtin_ctz(mask);
    out[n] = lanes[lane];
    out_keys[n] = key_lanes[lane];
  }
  return n;
#endif
}
template <class T>
ADASPLASH2_INLINE int compress(Vec<T> v, unsigned mask, T* out) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps(__mmask16(mask), (__m512)v));
  else
    _mm512_storeu_pd(out, _mm512_maskz_compress_pd(__mmask8(mask), (__m512d)v));
  return __builtin_popcount(mask);
#else
  T lanes[kLanes<T>];
  store(lanes, v);
  int n = 0;
  for (; mask; mask &= mask - 1, ++n) out[n] = lanes[__builtin_ctz(mask)];
  return n;
#endif
}

// --- powers ---------------------------------------------------------------------------------

template <class T>
struct FloatFormat;
template <>
struct FloatFormat<float> {
  static constexpr int kMantissaBits = 23, kBias = 127, kLogTerms = 5, kExpTerms = 9;
  using Bits = int32_t;
  static constexpr Bits kMantissaMask = 0x7fffff, kUpperBits = ~0xfff;
  static constexpr float kRound = 0x1.8p23f, kSmallest = 0x1p-126f, kLargest = 0x1.fffffep127f;
  static constexpr float kLift = 0x1p24f;
};
template <>
struct FloatFormat<double> {
  static constexpr int kMantissaBits = 52, kBias = 1023, kLogTerms = 12, kExpTerms = 15;
  using Bits = int64_t;
  static constexpr Bits kMantissaMask = 0xfffffffffffff, kUpperBits = ~0x7ffffff;
  static constexpr double kRound = 0x1.8p52, kSmallest = 0x1p-1022;
  static constexpr double kLargest = 0x1.fffffffffffffp1023, kLift = 0x1p53;
};

// x = 2^exponent * 2^fraction with |fraction| <= 1/2, for positive numbers. Apart, the two are
// exact and nearly exact; their sum would lose the fraction's last bits.
template <class T>
struct Logarithm {
  Vec<T> exponent, fraction;
};

// m in [sqrt(1/2), sqrt(2)), log m = 2 atanh((m-1)/(m+1)).
template <class T>
ADASPLASH2_INLINE Logarithm<T> log2(Vec<T> x) {
  using F = FloatFormat<T>;
  const Ints<T> subnormal = x < F::kSmallest;
  const Ints<T> bits = bits_as<Ints<T>>(subnormal ? x * F::kLift : x);
  const Ints<T> one = bits_as<Ints<T>>(broadcast(T(1)));
  Vec<T> m = bits_as<Vec<T>>((bits & F::kMantissaMask) | one);
  const Ints<T> bias = F::kBias + (subnormal & (F::kMantissaBits + 1));
  Vec<T> exponent = __builtin_convertvector((bits >> F::kMantissaBits) - bias, Vec<T>);
  const Ints<T> high = m > T(1.4142135623730951);
  m = high ? m * T(0.5) : m;
  exponent = high ? exponent + T(1) : exponent;
  const Vec<T> s = (m - T(1)) / (m + T(1)), s2 = s * s;
  Vec<T> series = broadcast(T(1) / T(2 * F::kLogTerms - 1));
#pragma GCC unroll 16
  for (int k = F::kLogTerms - 2; k >= 0; --k) series = series * s2 + T(1) / T(2 * k + 1);
  return {exponent, series * s * T(2.8853900817779268)};  // 2 / ln 2
}

template <class T>
ADASPLASH2_INLINE Vec<T> round_to_whole(Vec<T> x) {
  return (x + FloatFormat<T>::kRound) - FloatFormat<T>::kRound;
}

// (x + rest)^r of positive numbers, `rest` below the round-off of x; the error is that of log(x)
// times |r|. 0 below the normal range, inf above.
template <class T>
ADASPLASH2_INLINE Vec<T> power_of_positive(Vec<T> x, Vec<T> rest_of_x, T r) {
  using F = FloatFormat<T>;
  Logarithm<T> log = log2<T>(x);
  log.fraction += rest_of_x / x * T(1.4426950408889634);  // 1 / ln 2
  // The upper half of r's bits times a whole exponent is exact.
  const T r_high = bits_as<T>(bits_as<typename F::Bits>(r) & F::kUpperBits);
  const Vec<T> large = r_high * log.exponent;
  const Vec<T> small = (r - r_high) * log.exponent + r * log.fraction;
  const Ints<T> under = large + small<T(1 - F::kBias), over = large + small> T(F::kBias);
  const Vec<T> whole = (under | over) ? Vec<T>{} : round_to_whole<T>(large);
  const Vec<T> rest = (under | over) ? Vec<T>{} : (large - whole) + small;
  const Vec<T> rounded = round_to_whole<T>(rest);
  const Vec<T> f = (rest - rounded) * T(0.69314718055994531);
  Vec<T> series = broadcast(T(1));
#pragma GCC unroll 16
  for (int k = F::kExpTerms; k >= 1; --k) series = series * f * (T(1) / T(k)) + T(1);
  const Ints<T> exponent = __builtin_convertvector(whole + rounded, Ints<T>) + F::kBias;
  const Vec<T> y = series * bits_as<Vec<T>>(exponent << F::kMantissaBits);
  return under ? Vec<T>{} : (over ? broadcast(T(__builtin_inf())) : y);
}

// tanh and its derivative, both to a few round-offs of themselves. With e = exp(2 |x|) - 1 they are
// e / (e + 2) and (1 + tanh) 2 / (e + 2), in which nothing cancels.
template <class T>
struct Tanh {
  Vec<T> value, derivative;
};

template <class T>
ADASPLASH2_INLINE Tanh<T> tanh_of(Vec<T> x) {
  using F = FloatFormat<T>;
  const Vec<T> size = x < T(0) ? -x : x;
  const Vec<T> y = vmin<T>(size + size, broadcast(T(64)));  // where tanh is 1; so becomes NaN
  const Vec<T> n = round_to_whole<T>(y * T(1.4426950408889634));
  // n times the upper part of ln 2 is exact.
  constexpr T high = sizeof(T) == 4 ? T(0x1.62e4p-1) : T(0x1.62e42fefap-1);
  constexpr T low = sizeof(T) == 4 ? T(0x1.7f7d1cf79abcap-20) : T(0x1.cf79abc9e3b3ap-40);
  const Vec<T> f = (y - n * high) - n * low;
  Vec<T> series = broadcast(T(1));
#pragma GCC unroll 16
  for (int k = F::kExpTerms; k >= 2; --k) series = series * f * (T(1) / T(k)) + T(1);
  const Ints<T> exponent = __builtin_convertvector(n, Ints<T>) + F::kBias;
  const Vec<T> power = bits_as<Vec<T>>(exponent << F::kMantissaBits);
  const Vec<T> e = series * f * power + (power - T(1));
  const Vec<T> value = e / (e + T(2)), derivative = (T(1) + value) * (T(2) / (e + T(2)));
  const Ints<T> is_number = x == x;
  return {is_number ? (x < T(0) ? -value : value) : x, is_number ? derivative : x};
}

}  // namespace adasplash2::ADASPLASH2_ISA
