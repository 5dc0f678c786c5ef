// Lower bounds of a row's threshold, which its scores prove as they come. In units of scores, see
// score.cuh.
//
// A row's bound is the threshold of scores kept so far, or less: f of a subset lies below f of the
// row, and so does its root. certain_rise() on the list from the present bound stays below the
// root.
#pragma once

#include "common.cuh"

namespace adasplash2 {

// Bounds stay this much below what is proven, in windows and relative to the score: above the
// rounding of f and of z near the root.
constexpr float kBoundSlack = 2e-6f;

// The bound that the largest score proves alone.
__device__ __forceinline__ float under(float seen, float inv_c) {
  return seen - (1.f + kBoundSlack) * inv_c - kBoundSlack * fabsf(seen);
}

// What a score above a bound adds to sum u and sum p there.
__device__ __forceinline__ void add_above(float x, float r, float& s1, float& s2) {
  const bool above = x > 0.f;
  const float inside = above ? x : 0.f;  // NaN, too, is no score above
  if constexpr (kAlpha == AlphaKind::kGeneral) {
    const float u = above ? power(inside, r - 1.f) : 0.f;
    s1 += u;
    s2 = fmaf(u, inside, s2);
  } else if constexpr (kAlpha == AlphaKind::k15) {
    s1 += inside;
    s2 = fmaf(inside, inside, s2);
  } else {
    s1 += above ? 1.f : 0.f;
    s2 += inside;
  }
}

// The bound raised by what those sums, over `lanes` lanes that stand `apart`, prove.
template <int lanes, int apart = 1>
__device__ __forceinline__ float raised(float bound, float s1, float s2, float inv_c, float r) {
  const float sum_u = sum_over<lanes, apart>(s1), f = sum_over<lanes, apart>(s2) - 1.f;
  if (!(f > 0.f)) return bound;  // never where nothing is kept
  const float rise = (certain_rise(f, sum_u, r) - kBoundSlack) * inv_c;
  return fmaxf(bound, bound + rise - kBoundSlack * fabsf(bound));
}

}  // namespace adasplash2
