// The threshold of one row: histogram, bracket, guarded refinement, probabilities.
//
// A row's values are its scores z = (alpha-1) s for alpha 1.5 and 2, where the factor is a power
// of two and loses nothing, and its scores s for every other alpha.
#pragma once

#include "power.h"

namespace adasplash2::ADASPLASH2_ISA {

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

// What a score is multiplied by to give a row's value.
template <AlphaKind K>
ADASPLASH2_INLINE double value_factor(const Alpha& alpha) {
  return K == AlphaKind::kGeneral ? 1.0 : alpha.value - 1.0;
}

// y = z - max z of a row's values.
template <AlphaKind K, class T>
ADASPLASH2_INLINE Vec<T> shifted(Vec<T> values, T max, const Power<T>& power) {
  if constexpr (K == AlphaKind::kGeneral) return (values - max) * power.factor;
  return values - max;
}

// What values have above their threshold, 0 below it, for alpha 1.5 and 2. NaN stays NaN.
template <class T>
ADASPLASH2_INLINE Vec<T> above(Vec<T> values, const Threshold<T>& threshold) {
  const Vec<T> x = ((values - threshold.max) - threshold.tau) - threshold.rest;
  return x <= T(0) ? Vec<T>{} : x;
}

// p of a row's values. NaN stays NaN.
template <AlphaKind K, class T>
ADASPLASH2_INLINE Vec<T> probability(Vec<T> values, const Threshold<T>& threshold,
                                     const Power<T>& power) {
  if constexpr (K == AlphaKind::kGeneral) return power_probability<T>(values, threshold, power);
  const Vec<T> x = above<T>(values, threshold);
  return K == AlphaKind::k15 ? x * x : x;
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

// Whether u grows without bound as p falls, and may leave T's range.
template <AlphaKind K, class T>
ADASPLASH2_INLINE bool is_steep(const Power<T>& power) {
  return K == AlphaKind::kGeneral && power.gradient_exponent < T(0);
}

// ds = slope u (dp - delta), the gradient of q . k, of p and its u, which is not read where steep:
// it may leave the range where ds does not, so that its root comes in twice. Infinite all the same,
// times zero it is zero, and what is made of numbers is no more than the largest that T holds, so
// that zeros of q and k stay zeros.
template <class T>
ADASPLASH2_INLINE Vec<T> steep_product(Vec<T> p, Vec<T> factor, T slope, const Power<T>& power) {
  const Vec<T> root = raise<T>(p, power.gradient_exponent / 2);
  return factor * root * slope * root;
}
template <class T>
ADASPLASH2_INLINE Vec<T> bounded_by_largest(Vec<T> x) {
  const T largest = FloatFormat<T>::kLargest;
  return vmax<T>(vmin<T>(x, broadcast(largest)), broadcast(-largest));
}
template <AlphaKind K, class T>
ADASPLASH2_INLINE Vec<T> score_gradient(Vec<T> p, Vec<T> u, Vec<T> from_delta, T slope,
                                        const Power<T>& power) {
  if (is_steep<K>(power)) {
    const Vec<T> ds = steep_product<T>(p, from_delta, slope, power);
    const Vec<T> bounded = bounded_by_largest<T>(ds);
    const Ints<T> are_numbers = (p == p) & (from_delta - from_delta == T(0));
    return p == T(0) ? p : (are_numbers ? (ds == ds ? bounded : Vec<T>{}) : ds);
  }
  return u == T(0) ? u : u * from_delta * slope;  // off the support nothing is felt
}

// The ds of a steep row whose least p may have all of delta: then dp - delta of that entry is lost
// in the rounding of delta, and the u that it is multiplied by may be 10^50. With dp relative to
// that entry's, e, it is ds = slope (u e - w sum u e), w = u / sum u, in which nothing cancels that
// is not close in fact. False, and nothing is changed, where that sum leaves the range.
template <AlphaKind K, class T>
ADASPLASH2_INLINE bool steep_gradients(T* p, const T* dp, int64_t width, T least, T mass, T slope,
                                       const Power<T>& power) {
  int64_t at = 0;
  while (p[at] != least)
    if (++at == width) return false;
  const Vec<T> reference = broadcast(dp[at]);
  const auto product_at = [&](int64_t j) {
    const Vec<T> one = load(p + j), e = load(dp + j) - reference;
    const Ints<T> counts = (one > T(0)) & (e != T(0));  // also where u is infinite
    return counts ? steep_product<T>(one, e, slope, power) : Vec<T>{};
  };
  Sum<T> products;
  for (int64_t j = 0; j < width; j += kLanes<T>) products.add_any(product_at(j));
  const T sum = products.total();
  if (!(magnitude(sum) <= FloatFormat<T>::kLargest)) return false;
  for (int64_t j = 0; j < width; j += kLanes<T>) {
    const Vec<T> one = load(p + j), share = sensitivity<K>(one / least, power) / mass;
    const Vec<T> ds = bounded_by_largest<T>(product_at(j) - share * sum);
    store(p + j, one > T(0) ? ds : Vec<T>{});
  }
  return true;
}

// Probabilities p[0..width) of a row (zeros behind them to the end of a vector) become the ds of
// score_gradient; returns delta = sum u dp / sum u.
template <AlphaKind K, class T>
ADASPLASH2_INLINE T score_gradients(T* p, const T* dp, int64_t width, T slope,
                                    const Power<T>& power) {
  // Only ratios of the u count in delta: relative to the largest, of the least p, none overflows.
  const bool steep = is_steep<K>(power);
  T least_p = T(1);
  if (steep) {
    Vec<T> least = broadcast(T(1));
    for (int64_t j = 0; j < width; j += kLanes<T>) {
      const Vec<T> one = load(p + j);
      least = one > T(0) ? vmin<T>(one, least) : least;
    }
    least_p = smallest<T>(least);
  }
  const auto sums = sums_of<T, 2>(width, [&](int64_t j) {
    const Vec<T> one = load(p + j);
    const Vec<T> u = sensitivity<K>(steep ? one / least_p : one, power);
    if (!steep) store(p + j, u);
    return Terms<T, 2>{u, u == T(0) ? u : u * load(dp + j)};
  });
  const T mass = sums.of[0], delta = mass == T(0) ? T(0) : sums.of[1] / mass;
  if (steep && mass > T(0) && steep_gradients<K>(p, dp, width, least_p, mass, slope, power))
    return delta;
  for (int64_t j = 0; j < width; j += kLanes<T>) {
    const Vec<T> kept = load(p + j);  // p where steep, else u
    store(p + j, score_gradient<K>(kept, kept, load(dp + j) - delta, slope, power));
  }
  return delta;
}

// The ds of a row's values, into x, and p to where dp is, for the alphas of which what a value has
// above the threshold says both p and u: `values_at(j)` has the values of a vector, and may read x
// there.
template <AlphaKind K, class T, class ValuesAt>
ADASPLASH2_INLINE void differentiate_values(ValuesAt values_at, T* x, T* dp, int64_t width,
                                            const Threshold<T>& threshold, T slope,
                                            const Power<T>& power) {
  static_assert(K != AlphaKind::kGeneral);
  const auto probability_of = [](Vec<T> e) { return K == AlphaKind::k15 ? e * e : e; };
  const auto sensitivity_of = [&](Vec<T> e) {
    if constexpr (K == AlphaKind::k15) return e * e == T(0) ? Vec<T>{} : e;  // it may round to 0
    return sensitivity<K>(e, power);
  };
  const auto sums = sums_of<T, 2>(width, [&](int64_t j) {
    const Vec<T> e = above<T>(values_at(j), threshold);
    store(x + j, e);
    const Vec<T> u = sensitivity_of(e);
    return Terms<T, 2>{u, u == T(0) ? u : u * load(dp + j)};
  });
  const T mass = sums.of[0], delta = mass == T(0) ? T(0) : sums.of[1] / mass;
  for (int64_t j = 0; j < width; j += kLanes<T>) {
    const Vec<T> e = load(x + j), p = probability_of(e), u = sensitivity_of(e);
    store(x + j, score_gradient<K>(p, u, load(dp + j) - delta, slope, power));
    store(dp + j, p);
  }
}

template <class T>
ADASPLASH2_INLINE void pad(T* values, int64_t n) {
  store(values + n, broadcast(-kInfinity<T>));
}

// Counts of z - max z per bin, of a padded list. A byte a bin, all in one vector: an increment in
// memory would wait for the one before it, since consecutive scores often share a bin.
template <AlphaKind K, class T>
ADASPLASH2_INLINE void histogram(const T* values, int64_t n, T max, const Power<T>& power,
                                 int* counts) {
  typedef uint8_t Bytes __attribute__((vector_size(kBins)));
  typedef uint8_t LaneBytes __attribute__((vector_size(kLanes<T>)));
  constexpr int64_t kChunk = 240;  // whole vectors, and a byte can count them
  static_assert(kBins == 16 && kChunk % kLanes<T> == 0);
  const Bytes numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int b = 0; b < kBins; ++b) counts[b] = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = begin + kChunk < n ? begin + kChunk : n;
    uint8_t bins[kChunk];
    for (int64_t i = begin; i < end; i += kLanes<T>) {
      const Vec<T> bin = (shifted<K>(load(values + i), max, power) + T(1)) * T(kBins);
      const Vec<T> clamped = vmin<T>(vmax<T>(bin, Vec<T>{}), broadcast(T(kBins - 1)));
      const LaneBytes bytes =
          __builtin_convertvector(__builtin_convertvector(clamped, Keys<T>), LaneBytes);
      __builtin_memcpy(bins + (i - begin), &bytes, sizeof(bytes));
    }
    Bytes sums = {};
    for (int64_t i = 0; i < end - begin; i += kLanes<T>)
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes<T>; ++lane)
        sums -= Bytes(numbers == Bytes{} + bins[i + lane]);
    for (int b = 0; b < kBins; ++b) counts[b] += sums[b];
  }
  counts[0] -= int((kLanes<T> - n % kLanes<T>) % kLanes<T>);  // the padding
}

// Counted lane by lane: a mask that becomes a number takes three instructions more.
template <class T>
struct Count {
  Ints<T> less = {};
  ADASPLASH2_INLINE void add(Ints<T> these) { less += these; }  // -1 where true
  // Rounded where T does not hold it, above 2^24 of float.
  ADASPLASH2_INLINE T rounded() const { return -sum<T>(__builtin_convertvector(less, Vec<T>)); }
  ADASPLASH2_INLINE int64_t total() const {
    int64_t n = 0;
    for (int lane = 0; lane < kLanes<T>; ++lane) n -= less[lane];
    return n;
  }
};

// Sums over x = value - max - t > 0 and, where asked, the scores nearest to t on both sides.
template <class T>
struct Pass {
  Moments<T> moments;
  T above, below;  // smallest x > 0, largest x <= 0; where not asked 0, which no step is between
};

template <AlphaKind K, bool kNearest, class T>
ADASPLASH2_INLINE Pass<T> moments_at(const T* values, int64_t n, T max, T t) {
  constexpr bool kSquares = K == AlphaKind::k15;
  Count<T> count;
  Vec<T> above = broadcast(T(2)), below = broadcast(-T(2));
  const auto sums = sums_of<T, kSquares ? 2 : 1>(n, [&](int64_t i) {
    const Vec<T> x = (load(values + i) - max) - t;
    const Ints<T> in = x > T(0);
    const Vec<T> kept = in ? x : Vec<T>{};
    count.add(in);
    if (kNearest) {
      above = vmin<T>(above, in ? x : above);
      below = vmax<T>(below, in ? below : x);
    }
    if constexpr (kSquares)
      return Terms<T, 2>{kept, kept * kept};
    else
      return Terms<T, 1>{kept};
  });
  return {{count.rounded(), sums.of[0], kSquares ? sums.of[kSquares] : T(0)},
          kNearest ? smallest<T>(above) : T(0),
          kNearest ? largest<T>(below) : T(0)};
}

// Threshold of a padded list that holds every score above bracket.lo.
// Newton on the exact segment (alpha 1.5, 2), inside a bracket that each pass tightens; a step out
// of it becomes a bisection. Whether the first step may be the last takes a third of its pass: it
// is asked only where that is likely.
template <AlphaKind K, class T>
ADASPLASH2_INLINE Threshold<T> refine(const T* values, int64_t n, T max, Bracket<T> bracket,
                                      bool first_may_be_last, int32_t* steps) {
  T t = bracket.start;
  int step = 0;
  while (step < kMaxSteps) {
    const Pass<T> pass = first_may_be_last || step > 0 ? moments_at<K, true>(values, n, max, t)
                                                       : moments_at<K, false>(values, n, max, t);
    ++step;
    const T f = excess<K>(pass.moments);
    (f >= T(0) ? bracket.lo : bracket.hi) = t;
    T d = refinement_step<K>(pass.moments, T(0));
    const bool small = magnitude(d) <= T(2) * kEpsilon<T> * magnitude(t);
    // No score lies between t and t + d: the support is right and the step was exact, as far as
    // rounding lets a long one be.
    bool done = d < pass.above && d >= pass.below && magnitude(d) <= T(1) / T(kBins);
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

// Values of a row that may be above its threshold, in any order, with room for one more vector.
// They may come from one scan or, one behind another, from scans of several ranges of keys: the
// threshold of some of a row's values is at most that of all, so that what a scan drops by the
// bound of its own range cannot be in the row's support. `keys` may be null.
template <class T>
struct Candidates {
  T* values;
  int32_t* keys;
  int64_t count;
};

// Raises the lower bound of candidates by their histogram, and drops what fell below it, in place.
// `lo` bounds the threshold of the values, `bracket` that of y.
template <class T>
struct Tightened {
  RowState state;
  int64_t count;
  T max, lo;
  Bracket<T> bracket;
};

// max + y in units of the values, less what rounding might have lifted it by.
template <AlphaKind K, class T>
ADASPLASH2_INLINE T below_max(T max, T y, const Power<T>& power) {
  if constexpr (K == AlphaKind::kGeneral) {
    // y is off by round-offs of 1, and those of sums of powers move it by up to alpha-1 as many.
    const T margin = T(4) * kEpsilon<T> * (magnitude(max) + power.exponent + T(1));
    return (max + y * power.exponent) - margin;
  } else {
    return (max + y) - T(2) * kEpsilon<T> * (magnitude(max) + T(1));
  }
}

// The largest of n padded values; infinite where one is no number.
template <class T>
ADASPLASH2_INLINE T max_or_poison(const T* values, int64_t n) {
  Vec<T> top = broadcast(-kInfinity<T>);
  unsigned unordered = 0;
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Vec<T> v = load(values + i);
    top = vmax<T>(v, top);
    unordered |= not_below(v, v);
  }
  return unordered ? kInfinity<T> : largest<T>(top);
}

// Drops what is not above `lo`, in place, and pads what is left; returns how much that is.
template <class T>
ADASPLASH2_INLINE int64_t keep_above(Candidates<T> row, T lo) {
  int64_t kept = 0;
  for (int64_t i = 0; i < row.count; i += kLanes<T>) {
    const Vec<T> v = load(row.values + i);
    const unsigned above = not_below(v, broadcast(lo));
    if (row.keys) {
      Keys<T> k;
      __builtin_memcpy(&k, row.keys + i, sizeof(k));
      kept += compress<T>(v, k, above, row.values + kept, row.keys + kept);
    } else {
      kept += compress<T>(v, above, row.values + kept);
    }
  }
  pad(row.values, kept);
  return kept;
}

template <AlphaKind K, class T>
__attribute__((noinline)) static Tightened<T> tighten(Candidates<T> row, const Power<T>& power) {
  pad(row.values, row.count);
  Tightened<T> result = {
      RowState::kPoisoned, row.count, max_or_poison(row.values, row.count), 0, {}};
  if (result.max == kInfinity<T>) return result;
  result.state = RowState::kEmpty;
  if (row.count == 0) return result;

  int counts[kBins];
  histogram<K>(row.values, row.count, result.max, power, counts);
  result.state = RowState::kSolved;
  result.bracket = histogram_bracket<K>(counts, power.powers);
  // It is rounded as numbers near one are: the right step must not seem to leave it.
  result.bracket.lo -= T(2) * kEpsilon<T>;
  result.bracket.hi += T(2) * kEpsilon<T>;
  result.lo = below_max<K>(result.max, result.bracket.lo, power);
  result.count = keep_above(row, result.lo);
  return result;
}

// The same during a scan, which needs a good bound and no more, from the one that there is, -inf at
// first; other alphas have no cheaper one than the histogram's. For alpha 1.5 the threshold is
// where the norm of what is above it, sqrt(sum x^2), is one; for 2, where the sum is. Both are
// convex, so that a tangent meets one before they do: each of Newton's steps leads from a bound to
// a better one. Sums are rounded once a vector, for which the margin has room.
template <class T>
struct RaisedBound {
  RowState state;
  int64_t count;
  T lo;
};
template <AlphaKind K, class T>
__attribute__((noinline)) static RaisedBound<T> raise_bound(Candidates<T> row, T lo,
                                                            const Power<T>& power) {
  if constexpr (K == AlphaKind::kGeneral) {
    const Tightened<T> tightened = tighten<K, T>(row, power);
    const bool is_raised = tightened.state == RowState::kSolved;
    return {tightened.state, tightened.count, is_raised ? tightened.lo : lo};
  } else {
    const T margin = T(row.count + 16) * kEpsilon<T>;
    pad(row.values, row.count);
    const T max = max_or_poison(row.values, row.count);
    if (max == kInfinity<T>) return {RowState::kPoisoned, row.count, lo};
    if (row.count == 0) return {RowState::kEmpty, 0, lo};
    T y = lo > max - T(1) ? lo - max : T(-1), step;
    do {
      Vec<T> first = {}, second = {}, number = {};
      for (int64_t i = 0; i < row.count; i += kLanes<T>) {
        const Vec<T> x = vmax<T>((load(row.values + i) - max) - y, Vec<T>{});
        first += x;
        second += x * x;
        if (K == AlphaKind::k2) number += x > T(0) ? broadcast(T(1)) : Vec<T>{};
      }
      const T s1 = sum<T>(first), s2 = sum<T>(second);
      step = K == AlphaKind::k2 ? (s1 - T(1)) / sum<T>(number) : (s2 - square_root(s2)) / s1;
      step -= margin;
      if (step > T(0)) y += step;
    } while (step > T(1) / T(kBins));
    lo = below_max<K>(max, y, power);
    return {RowState::kSolved, keep_above(row, lo), lo};
  }
}

template <AlphaKind K, class T>
ADASPLASH2_INLINE Threshold<T> threshold_of(const T* values, const Tightened<T>& row,
                                            const Power<T>& power, int32_t* steps) {
  if constexpr (K == AlphaKind::kGeneral)
    return power.factor < T(1)
               ? refine_gentle(values, row.count, row.max, row.bracket.lo, power, steps)
               : refine_steep(values, row.count, row.max, row.lo, row.bracket.start, power, steps);
  else
    return refine<K>(values, row.count, row.max, row.bracket, true, steps);
}

// tau, the threshold of z, of a row's values.
template <AlphaKind K, class T>
ADASPLASH2_INLINE T tau_of(const Threshold<T>& threshold, const Alpha& alpha) {
  if constexpr (K == AlphaKind::kGeneral)
    return T(double(threshold.max) * (alpha.value - 1.0) - double(base_of(threshold)) -
             double(threshold.tau));
  return threshold.max + (threshold.tau + threshold.rest);
}

// A row that was solved as a list: probabilities (normalised, zeros dropped) and keys of its
// `support` are where its candidates were.
template <class T>
struct SolvedList {
  RowState state;
  Threshold<T> threshold;
  int64_t support;
  int64_t examined;  // candidates that the threshold was found on
  int32_t steps;
};

// Turns tightened values into probabilities in place and returns their number.
template <AlphaKind K, class T>
ADASPLASH2_INLINE int64_t to_probabilities(Candidates<T> row, const Threshold<T>& threshold,
                                           const Power<T>& power) {
  Sum<T> total;
  int64_t kept = 0;
  for (int64_t i = 0; i < row.count; i += kLanes<T>) {
    const Vec<T> p = probability<K>(load(row.values + i), threshold, power);
    total.add(p);
    Keys<T> k;
    __builtin_memcpy(&k, row.keys + i, sizeof(k));
    kept += compress<T>(p, k, not_below(p, Vec<T>{}), row.values + kept, row.keys + kept);
  }
  const T norm = T(1) / total.total();
  for (int64_t i = 0; i < kept; i += kLanes<T>) store(row.values + i, load(row.values + i) * norm);
  return kept;
}

template <AlphaKind K, class T>
ADASPLASH2_INLINE SolvedList<T> solve_list(Candidates<T> row, const Power<T>& power) {
  const Tightened<T> tightened = tighten<K, T>(row, power);
  SolvedList<T> result = {tightened.state, {tightened.max, kInfinity<T>, T(0)}, 0, 0, 0};
  if (tightened.state == RowState::kPoisoned) return result;
  result.examined = row.count = tightened.count;
  if (tightened.state == RowState::kEmpty) return result;
  result.threshold = threshold_of<K>(row.values, tightened, power, &result.steps);
  result.support = to_probabilities<K>(row, result.threshold, power);
  return result;
}

// A whole row: its values, values[0..n) with room for one more vector, become p / norm; zeros
// behind them to the end of a vector. `candidates` has room for n and one more vector.
template <class T>
struct DenseRow {
  RowState state;
  Threshold<T> threshold;
  T norm;  // makes the probabilities sum to one
  int64_t support;
  int32_t steps;
};

// A first guess of the threshold of y of n values, given their mean and variance. If all are in the
// support it is exact, but for rounding. Else, for alpha 1.5, what it would be if they were
// Gaussian: `deviations` above the mean, where n variance E[(x - deviations)+^2] = 1 for a normal
// x, to 0.1.
template <AlphaKind K, class T>
ADASPLASH2_INLINE T guess_of(T n, T mean, T variance) {
  if (K == AlphaKind::k2) return mean - T(1) / n;
  const T below = T(1) / n - variance;
  if (below > T(0)) return mean - square_root(below);
  const T log = T(__builtin_logf(float(n * variance)));
  const T deviations = (T(0.70) - T(0.04) * log) * log - T(0.48);
  return mean + deviations * square_root(variance);
}

// What one pass tells of n padded values: the least, the mean and the variance of whole vectors,
// since what is left over tells nothing new, and of no use where one is infinite; and the largest,
// infinite where one is no number.
template <class T>
struct Summary {
  T least, most, mean, variance;
};
template <class T>
ADASPLASH2_INLINE Summary<T> summary_of(const T* values, int64_t n) {
  const int64_t whole = n / kLanes<T> * kLanes<T>;
  const T origin = values[0];  // near the others, so that squares lose nothing to it
  Vec<T> least = broadcast(kInfinity<T>), most = broadcast(-kInfinity<T>);
  unsigned unordered = 0;
  const auto sums = sums_of<T, 2>(whole, [&](int64_t i) {
    const Vec<T> v = load(values + i), y = v - origin;
    least = vmin<T>(v, least);
    most = vmax<T>(v, most);
    unordered |= not_below(v, v);
    return Terms<T, 2>{y, y * y};
  });
  if (whole < n) {
    const Vec<T> v = load(values + whole);
    most = vmax<T>(v, most);
    unordered |= not_below(v, v);
  }
  const T count = T(whole > 0 ? whole : 1), mean = sums.of[0] / count;
  return {smallest<T>(least), unordered ? kInfinity<T> : largest<T>(most), origin + mean,
          sums.of[1] / count - mean * mean};
}

// The threshold of a row from its values, of which any may be too small for the support. Where no
// whole vector holds one that is, it is found from them as they are, else from a copy of the others
// in `candidates`, which has room for all. Where they are many, passes over them are done sooner
// than their bins are counted.
constexpr int64_t kManyValues = 64;
template <AlphaKind K, class T>
ADASPLASH2_INLINE Threshold<T> threshold_of_values(const T* values, int64_t n, Summary<T> row,
                                                   T* candidates, const Power<T>& power,
                                                   int32_t* steps) {
  const T reach = below_max<K>(row.most, -T(1), power);
  if (K == AlphaKind::kGeneral || !(row.least >= reach)) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const Vec<T> v = load(values + i);
      const unsigned above = not_below(v, broadcast(reach));
      if (above) count += compress<T>(v, above, candidates + count);
    }
    if (K == AlphaKind::kGeneral || count <= kManyValues) {
      const Tightened<T> tightened = tighten<K, T>({candidates, nullptr, count}, power);
      return threshold_of<K>(candidates, tightened, power, steps);
    }
    pad(candidates, count);
    values = candidates;
    n = count;
    row = summary_of(values, n);
  }
  const T variance = row.variance > T(0) ? row.variance : T(0);
  const T guess = guess_of<K>(T(n), row.mean - row.most, variance);
  const T margin = T(2) * kEpsilon<T>, lo = T(-1) - margin;
  return refine<K>(values, n, row.most, {lo, margin, guess > T(-1) && guess < T(0) ? guess : T(-1)},
                   T(n) * variance < T(1), steps);
}

template <AlphaKind K, class T>
__attribute__((noinline)) static DenseRow<T> solve_dense(T* values, int64_t n, T* candidates,
                                                         const Power<T>& power) {
  pad(values, n);
  const bool few = K == AlphaKind::kGeneral || n <= kManyValues;
  const Summary<T> row =
      few ? Summary<T>{-kInfinity<T>, max_or_poison(values, n), T(0), T(0)} : summary_of(values, n);
  const T max = row.most;
  if (max == kInfinity<T>) {
    for (int64_t i = 0; i < n; i += kLanes<T>) store(values + i, broadcast(kNan<T>));
    return {RowState::kPoisoned, {kNan<T>, kNan<T>, kNan<T>}, kNan<T>, 0, 0};
  }
  if (max == -kInfinity<T>) {
    for (int64_t i = 0; i < n; i += kLanes<T>) store(values + i, Vec<T>{});
    return {RowState::kEmpty, {max, kInfinity<T>, T(0)}, T(0), 0, 0};
  }
  DenseRow<T> result = {RowState::kSolved, {}, 0, 0, 0};
  result.threshold = threshold_of_values<K>(values, n, row, candidates, power, &result.steps);
  Count<T> support;
  const auto sums = sums_of<T, 1>(n, [&](int64_t i) {
    const Vec<T> p = probability<K>(load(values + i), result.threshold, power);
    store(values + i, p);
    support.add(p > T(0));
    return Terms<T, 1>{p};
  });
  result.support = support.total();
  result.norm = T(1) / sums.of[0];
  return result;
}

}  // namespace adasplash2::ADASPLASH2_ISA
