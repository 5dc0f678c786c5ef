// Where a score is made: which keys a row may see, what becomes of q . k, and the derivative of
// that. Nothing else knows of masks, scales, windows or biases.
#pragma once

#include "types.h"
#if defined(ADASPLASH2_ISA)
#include "solve.h"
#endif

namespace adasplash2 {

// Keys [begin, end).
struct KeyRange {
  int64_t begin, end;

  ADASPLASH2_INLINE int64_t size() const { return end - begin; }
  ADASPLASH2_INLINE bool overlaps(KeyRange other) const {
    return begin < other.end && other.begin < end;
  }
  ADASPLASH2_INLINE bool contains(KeyRange other) const {
    return begin <= other.begin && other.end <= end;
  }
  // In units of `size` keys, those that hold a key of the range.
  ADASPLASH2_INLINE KeyRange in_units_of(int64_t size) const {
    return {begin / size, end > begin ? (end + size - 1) / size : begin / size};
  }
};

// s = scale * (q . k) over the keys that a row may see: what is the same for every instruction set.
struct Score {
  double scale;
  bool is_causal;
  int64_t length_k;

  ADASPLASH2_INLINE KeyRange visible(int64_t row) const {
    return {0, is_causal && row + 1 < length_k ? row + 1 : length_k};
  }
  // Of rows [first, first + rows): the range outside which none of them sees a key, and the one
  // inside which each sees every key (where end <= begin there is none). Neither end of `visible`
  // falls from one row to the next, so that the first and the last row tell.
  ADASPLASH2_INLINE KeyRange seen_by_any(int64_t first, int64_t rows) const {
    return {visible(first).begin, visible(first + rows - 1).end};
  }
  ADASPLASH2_INLINE KeyRange seen_by_all(int64_t first, int64_t rows) const {
    return {visible(first + rows - 1).begin, visible(first).end};
  }
};

}  // namespace adasplash2

#if defined(ADASPLASH2_ISA)
namespace adasplash2::ADASPLASH2_ISA {

// The scores of kLanes keys at once, as a row's values (see solve.h), and their derivative.
template <AlphaKind K, class T>
struct Scores {
  const Score score;
  const T value_of_one;  // of q . k = 1

  ADASPLASH2_INLINE Scores(const Score& s, const Alpha& alpha)
      : score(s), value_of_one(T(value_factor<K>(alpha) * s.scale)) {}

  ADASPLASH2_INLINE Vec<T> values(Vec<T> dots) const { return dots * value_of_one; }

  // ds / d(q . k): one number as long as s is linear.
  ADASPLASH2_INLINE T slope() const { return T(score.scale); }

  // Whether `row` may see the keys first_key, first_key + 1, ...
  ADASPLASH2_INLINE Ints<T> allowed(int64_t row, int64_t first_key) const {
    const KeyRange seen = score.visible(row);
    const Ints<T> lane = __builtin_convertvector(iota<T>(), Ints<T>);
    return (lane >= Ints<T>{} + lane_of(seen.begin - first_key)) &
           (lane < Ints<T>{} + lane_of(seen.end - first_key));
  }
  // The values of the keys first_key, first_key + 1, ...; -inf where `row` may not see them.
  ADASPLASH2_INLINE Vec<T> values(Vec<T> dots, int64_t row, int64_t first_key) const {
    return allowed(row, first_key) ? values(dots) : broadcast(-kInfinity<T>);
  }

 private:
  ADASPLASH2_INLINE static int lane_of(int64_t offset) {
    return offset < 0 ? 0 : (offset > kLanes<T> ? kLanes<T> : int(offset));
  }
};

}  // namespace adasplash2::ADASPLASH2_ISA
#endif
