// Thresholds and probabilities of every alpha but 1.5 and 2, where p is a general power.
//
// With a = alpha-1, r = 1/a and S a score of the support whose probability is P,
//     p_j = [P^a + a (s_j - S)]_+^r.
// Scores enter as differences alone, which are nearly exact and do not overflow, and P^a is kept
// where its digits matter:
//   alpha < 2: S is the largest score. P^a near 1 is kept as P^a - 1, so that nothing is lost as
//     alpha -> 1, where p tends to softmax: p = exp(r log1p(P^a - 1 + a (s - S))).
//   alpha > 2: S is the lowest score of the support. There the slope of p is infinite, and P^a may
//     underflow while P, which is kept too, is an ordinary number.
// Threshold: max = S; tau = P^a, or P^a - 1 (below zero); rest = P.
#pragma once

#include "simd.h"

namespace adasplash2::ADASPLASH2_ISA {

// After this many steps every other one is a bisection, or a step to the next score.
constexpr int kFreeSteps = 4;
constexpr int kMaxSteps = kFreeSteps + 2 * 64;

template <class T>
constexpr T kInfinity = T(__builtin_inf());
template <class T>
constexpr T kNan = T(__builtin_nan(""));
template <class T>
constexpr T kEpsilon = sizeof(T) == 4 ? T(0x1p-23) : T(0x1p-52);

// Residuals below this may be round-off: steps that no longer shrink end there.
template <class T>
constexpr T kNoise = T(256) * kEpsilon<T>;

template <class T>
ADASPLASH2_INLINE T magnitude(T x) {
  return x < T(0) ? -x : x;
}

template <class T>
struct Power {
  T factor;             // alpha - 1
  T exponent;           // r
  T powers[kBins + 1];  // for histogram_bracket, rounded down: the bracket's lower end is a bound
  T gradient_exponent;  // 2 - alpha
};

template <class T>
ADASPLASH2_INLINE Power<T> power_of(const Alpha& alpha) {
  const double largest = double(FloatFormat<T>::kLargest);
  Power<T> power;
  // Past the largest float p does not change: whatever is not tied with the maximum has none.
  power.factor = T(alpha.value - 1.0 < largest ? alpha.value - 1.0 : largest);
  power.exponent = T(alpha.exponent);
  power.gradient_exponent = T(alpha.value < largest ? 2.0 - alpha.value : -largest);
  for (int k = 0; k <= kBins; ++k) power.powers[k] = T(alpha.powers[k]) * (T(1) - kEpsilon<T>);
  return power;
}

template <class T>
ADASPLASH2_INLINE Vec<T> raise(Vec<T> x, Vec<T> rest, T exponent) {  // x > 0, or NaN
  const Vec<T> y = power_of_positive<T>(x, rest, exponent);
  return x == x ? y : x;
}
template <class T>
ADASPLASH2_INLINE Vec<T> raise(Vec<T> x, T exponent) {
  return raise<T>(x, Vec<T>{}, exponent);
}
template <class T>
ADASPLASH2_INLINE T raise_one(T x, T exponent) {
  return raise<T>(broadcast(x), exponent)[0];
}

template <class T>
ADASPLASH2_INLINE T base_of(const Threshold<T>& threshold) {
  return threshold.tau < T(0) ? T(1) : T(0);
}

// x = base + offset + a (s - S) and p = x^r, 0 where x <= 0.
template <class T>
struct Raised {
  Vec<T> x, p;
};

template <class T>
ADASPLASH2_INLINE Raised<T> raised(Vec<T> scores, T anchor, T base, T offset,
                                   const Power<T>& power) {
  const Vec<T> w = (scores - anchor) * power.factor + offset;
  const Vec<T> x = base + w, rest = (base - x) + w;  // what the sum loses where w is small
  return {x, x <= T(0) ? Vec<T>{} : raise<T>(x, rest, power.exponent)};
}

// NaN stays NaN.
template <class T>
ADASPLASH2_INLINE Vec<T> power_probability(Vec<T> scores, const Threshold<T>& threshold,
                                           const Power<T>& power) {
  const Vec<T> p = raised<T>(scores, threshold.max, base_of(threshold), threshold.tau, power).p;
  return power.factor > T(1) ? (scores == threshold.max ? broadcast(threshold.rest) : p) : p;
}

// Newton's step for F^a = 1 in -P^a, where F = sum p and `slope` = sum x^(r-1): exact where all
// scores tie.
template <class T>
ADASPLASH2_INLINE T norm_step(double mass, double slope, const Power<T>& power) {
  return T(-mass * __builtin_expm1(-double(power.factor) * __builtin_log(mass)) / slope);
}

// alpha < 2. F^a, F = sum p, is the r-norm of the x: convex in P^a, a line where scores tie, and
// nearly log F as alpha -> 1. Newton on it, from a P^a that is too large, comes down and never
// passes the root. `lo` is a lower bound of the threshold of y = z - max z.
template <class T>
ADASPLASH2_INLINE Threshold<T> refine_gentle(const T* scores, int64_t n, T max, T lo,
                                             const Power<T>& power, int32_t* steps) {
  T base = T(1), offset = -(lo + T(1)), last = kInfinity<T>;
  for (*steps = 0; *steps < kMaxSteps;) {
    if (base == T(1) && offset < T(-0.5)) {
      base = T(0);
      offset += T(1);
    }
    // Below zero also where it vanishes: that tells that the base is 1.
    if (base == T(1) && offset > -FloatFormat<T>::kSmallest) offset = -FloatFormat<T>::kSmallest;
    Sum<T> total, slope;
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const Raised<T> at = raised<T>(load(scores + i), max, base, offset, power);
      total.add(at.p);
      slope.add(at.p > T(0) ? at.p / at.x : Vec<T>{});
    }
    ++*steps;
    const double mass = double(total.total());
    const T step = norm_step(mass, double(slope.total()), power);
    const T excess = magnitude(T(mass - 1.0)), size = magnitude(step);
    offset -= step;
    const bool is_noise = excess < kNoise<T> && size >= last / 2;
    if (excess <= T(8) * kEpsilon<T> || size <= kEpsilon<T> * magnitude(offset) || is_noise) break;
    last = size;
  }
  return {max, offset, T(0)};
}

// What a score t says, all in units of s: G = sum (a (s - t))^r over the scores above it.
template <class T>
struct Edge {
  T sum, slope;    // G, and sum of x^(r-1)
  T above, below;  // the nearest scores; infinite where there is none
  bool is_score;
};

template <class T>
ADASPLASH2_INLINE Edge<T> edge_at(const T* scores, int64_t n, T t, const Power<T>& power) {
  Sum<T> total, slopes;
  Vec<T> above = broadcast(kInfinity<T>), below = broadcast(-kInfinity<T>), equal = {};
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Vec<T> s = load(scores + i);
    const Raised<T> at = raised<T>(s, t, T(0), T(0), power);
    total.add(at.p);
    slopes.add_any(at.p > T(0) ? at.p / at.x : Vec<T>{});
    above = vmin<T>(above, s > t ? s : above);
    below = vmax<T>(below, s < t ? s : below);
    equal = s == t ? broadcast(T(1)) : equal;
  }
  return {total.total(), slopes.total(), smallest<T>(above), largest<T>(below),
          largest<T>(equal) > T(0)};
}

// alpha > 2. First the lowest score of the support: the lowest one above which the scores do not
// reach a sum of 1 with their threshold at it. `lo` is below all scores of the list, `start` a
// first guess of the threshold of y = z - max z.
template <class T>
ADASPLASH2_INLINE T lowest_of_support(const T* scores, int64_t n, T max, T lo, T start,
                                      const Power<T>& power, int32_t* steps) {
  // Of the scores from `first` to `last` it is not known yet whether they are in the support.
  T lowest = max, first = lo, last = max, t = max + start * power.exponent;
  if (!(t > lo && t < max)) t = max;
  for (*steps = 0; *steps < kMaxSteps;) {
    const Edge<T> edge = edge_at(scores, n, t, power);
    ++*steps;
    const bool below_root = edge.sum >= T(1);
    if (below_root) {
      first = edge.above;
    } else {
      lowest = edge.is_score ? t : edge.above;
      last = edge.below;
    }
    if (below_root ? first == lowest : !(last > lo)) break;
    if (below_root) lo = t;
    t += norm_step(double(edge.sum), double(edge.slope), power) * power.exponent;
    if (!(t >= first && t <= last)) t = below_root ? first : last;
    if (*steps > kFreeSteps && *steps % 2 == 0) t = first + (last - first) / 2;
  }
  return lowest;
}

// Then its probability P. F = sum p is convex in P (each p is a norm of P and a constant) and
// concave in P^a: Newton's step in either stops on the other side of the root. The next P lies
// between the two, nearer to the one in which the larger part of F is a line.
template <class T>
ADASPLASH2_INLINE Threshold<T> refine_steep(const T* scores, int64_t n, T max, T lo, T start,
                                            const Power<T>& power, int32_t* steps) {
  const T lowest = lowest_of_support(scores, n, max, lo, start, power, steps);
  T p = T(0), last = kInfinity<T>;
  for (int step = 0; step < kMaxSteps; ++step) {
    const T x = p > T(0) ? raise_one(p, power.factor) : T(0);
    Sum<T> total, slope, ties;
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const Vec<T> s = load(scores + i);
      const Raised<T> at = raised<T>(s, lowest, T(0), x, power);
      const Ints<T> in = s > lowest;
      total.add(in ? at.p : Vec<T>{});
      slope.add(in & (at.p > T(0)) ? at.p * (x / at.x) : Vec<T>{});  // a P dp/d(P)
      ties.add(s == lowest ? broadcast(T(1)) : Vec<T>{});
    }
    ++*steps;
    const double tied = double(ties.total()) * double(p), others = double(slope.total());
    const double excess = (double(total.total()) - 1.0) + tied;
    double next = -excess / double(ties.total());  // from zero, where F is a line in P
    if (p > T(0)) {
      const double share = tied / (tied + others), by = excess / (tied + others);
      const double in_p = __builtin_log1p(-by);
      const double in_power =
          by * power.factor < 1.0 ? __builtin_log1p(-by * power.factor) * power.exponent : in_p;
      next = double(p) * __builtin_exp(share * in_p + (1.0 - share) * in_power);
    }
    const T size = magnitude(T(next) - p), residual = magnitude(T(excess));
    p = T(next) > FloatFormat<T>::kSmallest ? T(next) : FloatFormat<T>::kSmallest;
    if (residual <= T(2) * kEpsilon<T> || size <= kEpsilon<T> * p ||
        (residual < kNoise<T> && size >= last / 2))
      break;
    last = size;
  }
  return {lowest, raise_one(p, power.factor), p};
}

}  // namespace adasplash2::ADASPLASH2_ISA
