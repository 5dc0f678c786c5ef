// What of a row's keys needs a closer look, from q . k of operands rounded to bfloat16, which a
// matrix unit makes at a multiple of the rate of exact ones.
//
// With |z - z'| <= e for a row's values z and those of rounded operands z', the thresholds of both
// are no further apart than that, so that a key of the support has z' > tau(z') - 2 e. What is not
// above that, with a lower bound of tau(z') for tau(z'), is left out; of what is left q . k is made
// once more, exactly. The bound on e is that of Cauchy and Schwarz, with what rounding has changed
// in fact.
#pragma once

#include "kernels.h"
#include "micro.h"

namespace adasplash2::ADASPLASH2_ISA {

// A row whose slack 2 e, in y, is larger is scanned exactly: the threshold lies less than one below
// the largest y, and most of what rounding lets through would have to be looked at again.
constexpr double kMostSlack = 1.0;

// The part of its keys that a row may be expected to keep: to look at a key again takes 15 times
// what the first look at one spares, head_dim 64, 4,096 keys.
constexpr double kMostScreened = 0.05;

template <class T>
constexpr bool kScreens =
    sizeof(T) == sizeof(float) && kPanelKeys<T> == kScreenKeys && kScreenRows % kTileRows == 0;

// Part `step` of a row as bfloat16, zeros behind its end; adds to the squares of what it has
// become and of what is lost.
template <class S>
ADASPLASH2_INLINE void round_step(const S* row, int64_t step, int64_t depth, uint16_t* rounded,
                                  Vec<float>& squares, Vec<float>& lost) {
  constexpr int L = kLanes<float>;
  for (int64_t k = 0; k < kScreenDepth; k += L) {
    const int64_t at = step * kScreenDepth + k, left = depth - at;
    Vec<float> x = {};
    if (left >= L)
      x = load_compute(row + at);
    else if (left > 0)
      x = load_partial(row + at, int(left));
    const Ints<float> bits = bits_as<Ints<float>>(x);
    const Ints<float> nearest = bits + 0x7fff + ((bits >> 16) & 1);  // ties to even
    const Vec<float> kept = bits_as<Vec<float>>(nearest & ~0xffff);
    squares += kept * kept;
    lost += (x - kept) * (x - kept);
    const HalfBits half = __builtin_convertvector(nearest >> 16, HalfBits);
    __builtin_memcpy(rounded + k, &half, sizeof(half));
  }
}

// Norms are made in float: what that loses, and what the unit takes for zero, is less than this.
ADASPLASH2_INLINE double norm_at_most(Vec<float> squares, int64_t depth) {
  return 1.001 * __builtin_sqrt(double(sum<float>(squares))) +
         2e-19 * __builtin_sqrt(double(depth));
}

// Rows of a head as the unit takes them: kScreenRows query rows, or as many keys, [step][row] of
// whole vectors; keys with the pairs of a vector as rows. Returns their largest norms.
template <bool AsKeys, class S>
ADASPLASH2_INLINE Rounded round_rows(HeadRef head, Part rows, int64_t depth, uint16_t* packed,
                                     Rounded* each) {
  constexpr int64_t kPairs = kScreenDepth / 2;
  Rounded all = {};
  for (int64_t r = 0; r < kScreenRows; ++r) {
    Vec<float> squares = {}, lost = {};
    for (int64_t step = 0; step < screen_steps(depth); ++step) {
      uint16_t rounded[kScreenDepth] = {};
      if (r < rows.count)
        round_step(row_of<const S>(head, rows.first + r), step, depth, rounded, squares, lost);
      uint16_t* const tile = packed + step * kScreenTile;
      if (AsKeys)
        for (int64_t pair = 0; pair < kPairs; ++pair)
          __builtin_memcpy(tile + (pair * kScreenRows + r) * 2, rounded + pair * 2, 4);
      else
        __builtin_memcpy(tile + r * kScreenDepth, rounded, sizeof(rounded));
    }
    const Rounded one = {norm_at_most(squares, depth), norm_at_most(lost, depth)};
    if (each) each[r] = one;
    keep_largest(all.longest, one.longest);
    keep_largest(all.lost, one.lost);
  }
  return all;
}

// 2 e of a row, in units of q . k; no number, or infinite, where there is no bound.
ADASPLASH2_INLINE double slack_of(const Rounded& query, const Rounded& keys, int64_t depth) {
  const double q = query.longest + query.lost, k = keys.longest + keys.lost;
  if (!(q * k <= 1e30)) return __builtin_huge_val();  // the unit's sums may overflow
  const double of_sums = double(depth + kScreenDepth) * (0x1p-22 * q * k + 2e-38);
  return 2.0 * (query.lost * keys.longest + q * keys.lost + of_sums);
}

}  // namespace adasplash2::ADASPLASH2_ISA
