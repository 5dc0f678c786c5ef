// The threshold of one row: histogram, bracket, guarded refinement, probabilities.
#pragma once

#include "simd.h"

namespace adasplash2::ADASPLASH2_ISA {

// After this many steps every other one is a bisection: above alpha = 2, where f is not convex
// and has infinite slopes, guarded steps alone can circle.
constexpr int kFreeSteps = 4;
constexpr int kMaxSteps = kFreeSteps + 2 * 64;

template <class T>
constexpr T kInfinity = T(__builtin_inf());
template <class T>
constexpr T kNan = T(__builtin_nan(""));
template <class T>
constexpr T kEpsilon = sizeof(T) == 4 ? T(0x1p-23) : T(0x1p-52);

template <class T>
struct Power {
  T exponent;           // r
  T powers[kBins + 1];  // for histogram_bracket
  T gradient_exponent;  // 2 - alpha
};

template <class T>
ADASPLASH2_INLINE Power<T> power_of(const Alpha& alpha) {
  Power<T> power;
  power.exponent = T(alpha.exponent);
  power.gradient_exponent = T(2.0 - alpha.value);
  for (int k = 0; k <= kBins; ++k) power.powers[k] = T(alpha.powers[k]);
  return power;
}

template <AlphaKind K>
struct Kind {
  static constexpr AlphaKind value = K;
};

// Calls f with the alpha kind as a compile-time constant.
template <class F>
ADASPLASH2_INLINE void with_kind(AlphaKind kind, F f) {
  switch (kind) {
    case AlphaKind::k15:
      return f(Kind<AlphaKind::k15>{});
    case AlphaKind::k2:
      return f(Kind<AlphaKind::k2>{});
    case AlphaKind::kGeneral:
      return f(Kind<AlphaKind::kGeneral>{});
  }
}

template <class T>
ADASPLASH2_INLINE Vec<T> raise(Vec<T> x, T exponent) {  // x > 0, or NaN
  const Vec<T> y = power_of_positive<T>(x, exponent);
  return x == x ? y : x;
}

// p = [x]_+^r of x = y - tau. NaN stays NaN.
template <AlphaKind K, class T>
ADASPLASH2_INLINE Vec<T> probability(Vec<T> x, const Power<T>& power) {
  const Ints<T> out = x <= T(0);
  if constexpr (K == AlphaKind::k15) return out ? Vec<T>{} : x * x;
  if constexpr (K == AlphaKind::k2) return out ? Vec<T>{} : x;
  return out ? Vec<T>{} : raise<T>(x, power.exponent);
}

ADASPLASH2_INLINE Vec<float> vsqrt(Vec<float> x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
ADASPLASH2_INLINE Vec<double> vsqrt(Vec<double> x) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_sqrt_pd((__m256d)x);
#else
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}

// u = p^(2-alpha) on the support, 0 off it: the diagonal of dp/ds (Correia et al. 2019).
template <AlphaKind K, class T>
ADASPLASH2_INLINE Vec<T> sensitivity(Vec<T> p, const Power<T>& power) {
  if constexpr (K == AlphaKind::k15) return vsqrt(p);
  const Ints<T> out = p <= T(0);
  if constexpr (K == AlphaKind::k2) return out ? Vec<T>{} : (p == p ? broadcast(T(1)) : p);
  return out ? Vec<T>{} : raise<T>(p, power.gradient_exponent);
}

template <class T>
ADASPLASH2_INLINE void pad(T* values, int64_t n) {
  store(values + n, broadcast(-kInfinity<T>));
}

// Counts of values[i] - max per bin, of a padded list. Two sets of counters, since consecutive
// scores often share a bin and an increment waits for the one before it.
template <class T>
ADASPLASH2_INLINE void histogram(const T* values, int64_t n, T max, int* counts) {
  int sets[2][kBins] = {};
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Vec<T> bin = (load(values + i) - max + T(1)) * T(kBins);
    const Vec<T> clamped = vmin<T>(vmax<T>(bin, Vec<T>{}), broadcast(T(kBins - 1)));
    const Keys<T> bins = __builtin_convertvector(clamped, Keys<T>);
    int32_t lanes[kLanes<T>];
    __builtin_memcpy(lanes, &bins, sizeof(bins));
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes<T>; ++lane) ++sets[lane % 2][lanes[lane]];
  }
  for (int b = 0; b < kBins; ++b) counts[b] = sets[0][b] + sets[1][b];
  counts[0] -= int((kLanes<T> - n % kLanes<T>) % kLanes<T>);  // the padding
}

// Sums over x = value - max - t > 0, and the scores nearest to t on both sides.
template <class T>
struct Pass {
  Moments<T> moments;
  T above, below;  // smallest x > 0, largest x <= 0
};

template <AlphaKind K, class T>
ADASPLASH2_INLINE Pass<T> moments_at(const T* values, int64_t n, T max, T t,
                                     const Power<T>& power) {
  Sum<T> s0, s1, s2;
  Vec<T> above = broadcast(T(2)), below = broadcast(-T(2));
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Vec<T> x = (load(values + i) - max) - t;
    const Ints<T> in = x > T(0);
    const Vec<T> kept = in ? x : Vec<T>{};
    if constexpr (K == AlphaKind::kGeneral) {
      const Vec<T> p = in ? raise<T>(x, power.exponent) : Vec<T>{};
      const Vec<T> slope = in ? p / x : Vec<T>{};
      s2.add(p);
      s1.add(slope);
      s0.add(in ? slope / x : Vec<T>{});
    } else {
      s0.add(in ? broadcast(T(1)) : Vec<T>{});
      s1.add(kept);
      if (K == AlphaKind::k15) s2.add(kept * kept);
      above = vmin<T>(above, in ? x : above);
      below = vmax<T>(below, in ? below : x);
    }
  }
  return {{s0.total(), s1.total(), s2.total()}, smallest<T>(above), largest<T>(below)};
}

template <class T>
ADASPLASH2_INLINE T magnitude(T x) {
  return x < T(0) ? -x : x;
}

// x = z - threshold.
template <class T>
ADASPLASH2_INLINE Vec<T> above(Vec<T> z, const Threshold<T>& threshold) {
  return ((z - threshold.max) - threshold.tau) - threshold.rest;
}

// Threshold of a padded list that holds every score above bracket.lo.
// Newton on the exact segment (alpha 1.5, 2) or Halley, inside a bracket that each pass
// tightens; a step out of it becomes a bisection.
template <AlphaKind K, class T>
ADASPLASH2_INLINE Threshold<T> refine(const T* values, int64_t n, T max, Bracket<T> bracket,
                                      const Power<T>& power, int32_t* steps) {
  T t = bracket.start;
  int step = 0;
  while (step < kMaxSteps) {
    const Pass<T> pass = moments_at<K>(values, n, max, t, power);
    ++step;
    const T f = excess<K>(pass.moments);
    (f >= T(0) ? bracket.lo : bracket.hi) = t;
    T d = refinement_step<K>(pass.moments, power.exponent);
    const bool small = magnitude(d) <= T(2) * kEpsilon<T> * magnitude(t);
    bool done;
    if (K == AlphaKind::kGeneral) {
      // Either f is zero to its round-off, or t can move no closer and f says so too: above
      // alpha = 2 the slope is infinite at a score, and a short step alone proves nothing.
      const T roundoff = kEpsilon<T> * (T(4) + power.exponent);
      const bool still = magnitude(d) <= kEpsilon<T> / 4 * magnitude(t);
      done = magnitude(f) <= roundoff ||
             (still && magnitude(f) <= roundoff + T(4) * kEpsilon<T> * power.exponent *
                                                      pass.moments.s1 * magnitude(t));
    } else {
      // No score lies between t and t + d: the support is right and the step was exact.
      done = d < pass.above && d >= pass.below;
    }
    const bool bisect = !done && step > kFreeSteps && step % 2 == 0;
    if (bisect || !(t + d >= bracket.lo && t + d <= bracket.hi)) {
      d = (bracket.lo + bracket.hi) / 2 - t;
      done = false;
    }
    const T next = t + d;
    // Where the bracket is as narrow as T allows, its middle is its end.
    done |= next == t || (small && (next == bracket.lo || next == bracket.hi));
    *steps = step;
    if (done) return {max, t, d};
    t = next;
  }
  return {max, t, T(0)};
}

// What remains of a row once its scores are thresholded.
enum class RowState { kSolved, kEmpty, kPoisoned };

// Raises the lower bound of a list by its histogram, and drops what fell below it. The list
// has room for one more vector. `lo` bounds the threshold of z, not of z - max.
template <class T>
struct Tightened {
  RowState state;
  int64_t count;
  T max, lo;
  Bracket<T> bracket;
};

template <AlphaKind K, class T>
__attribute__((noinline)) static Tightened<T> tighten(T* values, int32_t* keys, int64_t count,
                                                      const Power<T>& power) {
  pad(values, count);
  Vec<T> top = broadcast(-kInfinity<T>), bad = {};
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> v = load(values + i);
    top = vmax<T>(v, top);
    bad += v == v ? Vec<T>{} : v;
  }
  Tightened<T> result = {RowState::kPoisoned, count, largest<T>(top), 0, {}};
  if (!(sum<T>(bad) == T(0)) || result.max == kInfinity<T>) return result;
  result.state = RowState::kEmpty;
  if (count == 0) return result;

  int counts[kBins];
  histogram(values, count, result.max, counts);
  result.state = RowState::kSolved;
  result.bracket = histogram_bracket<K>(counts, power.powers);
  // Rounding in max + lo must not lift the bound above the true threshold.
  const T scale = magnitude(result.max) + T(1);
  result.lo = (result.max + result.bracket.lo) - T(2) * kEpsilon<T> * scale;

  int64_t kept = 0;
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> v = load(values + i);
    const unsigned mask = not_below(v, broadcast(result.lo));
    if (keys) {
      Keys<T> k;
      __builtin_memcpy(&k, keys + i, sizeof(k));
      kept += compress<T>(v, k, mask, values + kept, keys + kept);
    } else {
      kept += compress<T>(v, mask, values + kept);
    }
  }
  result.count = kept;
  pad(values, kept);
  return result;
}

// Turns a tightened list into probabilities (normalised, zeros dropped) in place and returns
// their number.
template <AlphaKind K, class T>
ADASPLASH2_INLINE int64_t solve_list(T* values, int32_t* keys, const Tightened<T>& row,
                                     const Power<T>& power, Threshold<T>* threshold,
                                     int32_t* steps) {
  *threshold = refine<K>(values, row.count, row.max, row.bracket, power, steps);
  Sum<T> total;
  int64_t kept = 0;
  for (int64_t i = 0; i < row.count; i += kLanes<T>) {
    const Vec<T> p = probability<K>(above<T>(load(values + i), *threshold), power);
    total.add(p);
    Keys<T> k;
    __builtin_memcpy(&k, keys + i, sizeof(k));
    kept += compress<T>(p, k, not_below(p, Vec<T>{}), values + kept, keys + kept);
  }
  const T scale = T(1) / total.total();
  for (int64_t i = 0; i < kept; i += kLanes<T>) store(values + i, load(values + i) * scale);
  return kept;
}

// A whole row: values[0..n) (room for one more vector) -> threshold and the factor that makes
// the probabilities sum to one. `candidates` has room for n and one more vector.
template <class T>
struct DenseRow {
  RowState state;
  Threshold<T> threshold;
  T scale;
  int64_t support;
  int32_t steps;
};

template <AlphaKind K, class T>
__attribute__((noinline)) static DenseRow<T> solve_dense(T* values, int64_t n, T* candidates,
                                                         const Power<T>& power) {
  pad(values, n);
  Vec<T> top = broadcast(-kInfinity<T>), bad = {};
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Vec<T> v = load(values + i);
    top = vmax<T>(v, top);
    bad += v == v ? Vec<T>{} : v;
  }
  const T max = largest<T>(top);
  if (!(sum<T>(bad) == T(0)) || max == kInfinity<T>)
    return {RowState::kPoisoned, {kNan<T>, kNan<T>, kNan<T>}, kNan<T>, 0, 0};
  if (max == -kInfinity<T>) return {RowState::kEmpty, {max, kInfinity<T>, T(0)}, T(0), 0, 0};

  const T reach = (max - T(1)) - T(2) * kEpsilon<T> * (magnitude(max) + T(1));
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Vec<T> v = load(values + i);
    const unsigned mask = not_below(v, broadcast(reach));
    if (mask) count += compress<T>(v, mask, candidates + count);
  }
  const Tightened<T> row = tighten<K, T>(candidates, nullptr, count, power);
  DenseRow<T> result = {RowState::kSolved, {}, 0, 0, 0};
  result.threshold = refine<K>(candidates, row.count, max, row.bracket, power, &result.steps);
  Sum<T> total;
  for (int64_t i = 0; i < row.count; i += kLanes<T>) {
    const Vec<T> p = probability<K>(above<T>(load(candidates + i), result.threshold), power);
    total.add(p);
    result.support += __builtin_popcount(not_below(p, Vec<T>{}));
  }
  result.scale = T(1) / total.total();
  return result;
}

}  // namespace adasplash2::ADASPLASH2_ISA
