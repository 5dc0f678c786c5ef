// Where a score is made: which keys a row may see, what becomes of q . k, and the derivative of
// that. What reads masks, windows, caps, slopes and scales is here; others ask whether there are
// any (is_masked and the like), hand over what was given (module.cpp), or store gradients of it.
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
  ADASPLASH2_INLINE KeyRange intersection(KeyRange other) const {
    const int64_t first = begin > other.begin ? begin : other.begin;
    const int64_t last = end < other.end ? end : other.end;
    return {first, last > first ? last : first};
  }
  // In units of `size` keys, those that hold a key of the range.
  ADASPLASH2_INLINE KeyRange in_units_of(int64_t size) const {
    return {begin / size, end > begin ? (end + size - 1) / size : begin / size};
  }
};

// A tensor beside query, key and value, of (batch, heads_q, length_q, length_k) or the first of
// these; a stride is 0 where one entry holds for all. Null where there is none.
struct Operand {
  const void* data;
  Dtype dtype;
  int64_t stride_batch, stride_head, stride_row, stride_key;  // in elements

  ADASPLASH2_INLINE const void* at(int64_t batch, int64_t head) const {
    const int64_t offset = batch * stride_batch + head * stride_head;
    return static_cast<const char*>(data) + offset * bytes_of(dtype);
  }
};

// One of an operand in float or double.
ADASPLASH2_INLINE double number_at(const void* data, Dtype dtype, int64_t at) {
  return dtype == Dtype::kFloat64 ? static_cast<const double*>(data)[at]
                                  : double(static_cast<const float*>(data)[at]);
}

constexpr double kNoSink = -__builtin_inf();

// Bounds of |q . k| and |s| below which no float32 overflows on the way to a score: 3e38 is its
// largest, and sums of products are rounded by far less than what lies between.
constexpr double kMostProduct = 1e30;
// A reach is longer by one part in so many, for the rounding of scores: sums of 256 products in
// float32 are off by less than one part in 30,000 of |q| |k|.
constexpr double kReachParts = 1000.0;
// A distance behind all keys, which are numbered in 32 bits, that int64 holds.
constexpr double kFarthest = 0x1p40;

// In the order in which it is made: s = scale * (q . k), softcap * tanh(s / softcap), + mask,
// - slope * |place - key|. Here for the rows of one query head, the same for every instruction set.
struct HeadScore {
  double scale, softcap, slope, sink;  // softcap 0 and kNoSink: there is none; slope: of all rows
  int64_t length_k, left, right, shift;
  const int32_t *begins, *ends, *places;  // of each row, or null: the window says it
  const void *mask, *scales, *slopes;     // null where there is none, of slopes one of each row
  Dtype mask_dtype, compute_dtype;
  int64_t mask_stride_row, mask_stride_key, scales_stride, slopes_stride;
  uint64_t dropped_below;  // of 32 random bits
  double kept_factor;
  uint64_t seed;
  int64_t number;         // of the head among those of all batches
  const KeyRange* reach;  // of each row block, or null; see reach_of

  // The key whose distance is 0.
  ADASPLASH2_INLINE int64_t place(int64_t row) const { return places ? places[row] : row + shift; }

  ADASPLASH2_INLINE KeyRange visible(int64_t row) const {
    if (begins) {
      const int64_t begin = begins[row] > 0 ? begins[row] : 0, end = ends[row];
      return KeyRange{begin, end}.intersection({0, length_k});
    }
    const int64_t at = row + shift;
    const int64_t begin = left >= 0 && at > left ? at - left : 0;
    const int64_t end = right >= 0 && at + right + 1 < length_k ? at + right + 1 : length_k;
    const int64_t first = begin < length_k ? begin : length_k;
    return {first, end > first ? end : first};
  }

  ADASPLASH2_INLINE double scale_of(int64_t row) const {
    return scales ? number_at(scales, compute_dtype, row * scales_stride) : scale;
  }

  ADASPLASH2_INLINE double slope_of(int64_t row) const {
    return slopes ? slope_from(number_at(slopes, compute_dtype, row * slopes_stride)) : slope;
  }
  // NaN for one that is below zero, where no value could be looked at.
  ADASPLASH2_INLINE static double slope_from(double given) {
    return given < 0.0 ? __builtin_nan("") : given;
  }

  ADASPLASH2_INLINE bool is_sloped() const { return slopes || slope != 0.0; }
  // Whether a mask may hide some of what `visible` says.
  ADASPLASH2_INLINE bool is_masked() const { return mask != nullptr; }
  ADASPLASH2_INLINE bool is_capped() const { return softcap != 0.0; }

  // Whether far keys may be left out for their distance alone.
  ADASPLASH2_INLINE bool has_reach() const {
    return (slopes || slope > 0.0) && sink < __builtin_inf() &&
           !(mask && mask_dtype != Dtype::kBool);
  }

  // The keys that may be in the support of `row`, of those that it sees. `product` is at least
  // every |q . k| of the row, `width` is 1 / (alpha-1).
  //
  // Let m bound |s| before the slope, d0 be the distance of the nearest key that is seen. That one
  // has s >= -m - slope d0, and so has the row's maximum; a key at distance d has
  // s <= m - slope d. The threshold of s is at least max s - width, for at it the maximum alone
  // has a probability of 1. So none has a probability where
  //     m - slope d <= -m - slope d0 - width,  which is  d >= d0 + (2 m + width) / slope.
  // A sink only raises the threshold. What kReachParts adds, and one key more, are for rounding; a
  // row that may overflow, or has a NaN, reaches all keys: it may be poisoned. So does one without
  // a slope.
  ADASPLASH2_INLINE KeyRange reach_of(int64_t row, double product, double width) const {
    const KeyRange seen = visible(row);
    const double factor = scale_of(row), size = factor < 0.0 ? -factor : factor;
    const double falls = slope_of(row);
    double m = size * product;
    if (!(product < kMostProduct && m < kMostProduct && falls > 0.0)) return seen;
    if (softcap > 0.0 && softcap < m) m = softcap;
    const int64_t nearest = nearest_seen(row);
    if (nearest < 0) return {seen.begin, seen.begin};
    const double exact = double(nearest) + (2.0 * m + width) / falls;
    const double far = exact + exact / kReachParts + 1.0;
    if (!(far < kFarthest)) return seen;
    const int64_t at = place(row);
    return seen.intersection({at - int64_t(far), at + int64_t(far) + 1});
  }

 private:
  // Distance of the nearest key that `row` sees, of which no mask but one of bools may hide some;
  // negative where it sees none.
  ADASPLASH2_INLINE int64_t nearest_seen(int64_t row) const {
    const KeyRange seen = visible(row);
    const int64_t at = place(row);
    if (seen.size() <= 0) return -1;
    const auto shows = [&](int64_t key) {
      return key >= seen.begin && key < seen.end &&
             (!mask || static_cast<const uint8_t*>(
                           mask)[row * mask_stride_row + key * mask_stride_key] != 0);
    };
    int64_t d = at < seen.begin ? seen.begin - at : at >= seen.end ? at - seen.end + 1 : 0;
    for (; at - d >= seen.begin || at + d < seen.end; ++d)
      if (shows(at - d) || shows(at + d)) return d;
    return -1;
  }
};

// Of rows [first, first + rows), by their `visible`: the range outside which none of them sees a
// key, and the one inside which each sees every key (where end <= begin there is none), as far as
// no mask hides it. Neither end of `visible` falls from one row to the next, so that the first and
// the last row tell.
template <class V>
ADASPLASH2_INLINE KeyRange seen_by_any(const V& of, int64_t first, int64_t rows) {
  return {of.visible(first).begin, of.visible(first + rows - 1).end};
}
template <class V>
ADASPLASH2_INLINE KeyRange seen_by_all(const V& of, int64_t first, int64_t rows) {
  return {of.visible(first + rows - 1).begin, of.visible(first).end};
}

// What an attention call says of its scores.
struct Score {
  double scale, softcap;
  int64_t length_k;
  int64_t left, right, shift;  // place - left <= key <= place + right, -1: all; place - row
  double dropout_p;
  Dtype compute_dtype;
  Operand mask, slopes, sinks, scales, begins, ends, places, seeds;
  const KeyRange* reach;  // of the row blocks of all heads, or null
  int64_t blocks_per_head;
  bool is_plain;  // a scale and top-left causal masks at most

  ADASPLASH2_INLINE void set_window(bool is_causal, int64_t to_left, int64_t to_right) {
    left = to_left;
    right = is_causal ? 0 : to_right;
  }
  // Once all else is set. What is left out here would be ignored.
  ADASPLASH2_INLINE void find_plain() {
    is_plain =
        left < 0 && right <= 0 && shift == 0 && softcap == 0.0 &&
        !(mask.data || slopes.data || sinks.data || scales.data || begins.data || seeds.data);
  }
  ADASPLASH2_INLINE bool has_slopes() const { return slopes.data != nullptr; }
  ADASPLASH2_INLINE bool has_sinks() const { return sinks.data != nullptr; }
  ADASPLASH2_INLINE bool has_dropout() const { return seeds.data != nullptr; }

  // Of a head of a batch, which has `number` among those of all batches.
  ADASPLASH2_INLINE HeadScore of_head(int64_t batch, int64_t head, int64_t number) const {
    HeadScore s = {};
    s.scale = scale;
    s.sink = kNoSink;
    s.length_k = length_k;
    s.left = left;
    s.right = right;
    s.number = number;
    if (is_plain) return s;
    s.softcap = softcap;
    s.shift = shift;
    s.compute_dtype = compute_dtype;
    const auto one = [&](const Operand& operand, double otherwise) {
      return operand.data ? number_at(operand.at(batch, head), operand.dtype, 0) : otherwise;
    };
    if (slopes.stride_row) {
      s.slopes = slopes.at(batch, head);
      s.slopes_stride = slopes.stride_row;
    } else {
      s.slope = HeadScore::slope_from(one(slopes, 0.0));
    }
    s.sink = one(sinks, kNoSink);
    if (begins.data) {
      s.begins = static_cast<const int32_t*>(begins.at(batch, head));
      s.ends = static_cast<const int32_t*>(ends.at(batch, head));
      s.places = static_cast<const int32_t*>(places.at(batch, head));
    }
    if (mask.data) {
      s.mask = mask.at(batch, head);
      s.mask_dtype = mask.dtype;
      s.mask_stride_row = mask.stride_row;
      s.mask_stride_key = mask.stride_key;
    }
    if (scales.data) {
      s.scales = scales.at(batch, head);
      s.scales_stride = scales.stride_row;
    }
    if (seeds.data) {
      s.seed = *static_cast<const uint64_t*>(seeds.at(batch, head));
      s.dropped_below = uint64_t(dropout_p * 0x1p32);
      s.kept_factor = 1.0 / (1.0 - dropout_p);
    }
    s.reach = reach ? reach + number * blocks_per_head : nullptr;
    return s;
  }
};

}  // namespace adasplash2

#if defined(ADASPLASH2_ISA)
namespace adasplash2::ADASPLASH2_ISA {

ADASPLASH2_INLINE float to_compute(uint8_t x) { return float(x); }

// Some numbers of a mask's row, `count` of them; zeros behind them.
template <class T, class M>
ADASPLASH2_INLINE Vec<T> load_strided(const M* p, int64_t stride, int64_t count) {
  if (stride == 1 && count >= kLanes<T>) {
    if constexpr (sizeof(M) == 1) {
      typedef uint8_t Bytes __attribute__((vector_size(kLanes<T>)));
      Bytes bytes;
      __builtin_memcpy(&bytes, p, sizeof(bytes));
      return __builtin_convertvector(bytes, Vec<T>);
    } else if constexpr (sizeof(to_compute(M{})) == sizeof(T)) {
      return load_compute(p);
    }
  }
  T lanes[kLanes<T>] = {};
  for (int64_t i = 0; i < count && i < kLanes<T>; ++i) lanes[i] = T(to_compute(p[i * stride]));
  return load(lanes);
}

// The scores of kLanes keys at once, as a row's values (see solve.h), and their derivative. Plain
// ones know a scale and top-left causal masks; the others ask at run time what there is, out of
// line: inlined wherever a score is made, that would be most of the code.
template <AlphaKind K, class T, bool IsPlain>
struct Scores {
  const HeadScore score;
  const T value_of_dot;    // of q . k = 1, where that is all that a score is made of
  const T value_of_score;  // of s = 1
  const bool is_scaled;    // whether it is: ranges of keys hide some, but change none

  ADASPLASH2_INLINE Scores(const HeadScore& s, const Alpha& alpha)
      : score(s),
        value_of_dot(T(value_factor<K>(alpha) * s.scale)),
        value_of_score(T(value_factor<K>(alpha))),
        is_scaled(IsPlain || !(s.is_masked() || s.scales || s.is_capped() || s.is_sloped())) {}

  ADASPLASH2_INLINE KeyRange visible(int64_t row) const {
    if constexpr (!IsPlain) return score.visible(row);
    return {0, score.right == 0 && row + 1 < score.length_k ? row + 1 : score.length_k};
  }
  // seen_by_any of rows of one block, less the keys that are too far away to have a probability.
  ADASPLASH2_INLINE KeyRange needed_by_any(int64_t first, int64_t rows) const {
    const KeyRange seen = seen_by_any(*this, first, rows);
    if (IsPlain || !score.reach) return seen;
    return seen.intersection(score.reach[first / kBlockRows]);
  }

  // Where they are scaled alone, of keys that are seen.
  ADASPLASH2_INLINE Vec<T> values(Vec<T> dots) const { return dots * value_of_dot; }

  // The values of the keys first_key, first_key + 1, ...; -inf where `row` may not see them.
  ADASPLASH2_INLINE Vec<T> values(Vec<T> dots, int64_t row, int64_t first_key) const {
    if constexpr (!IsPlain) return made(dots, row, first_key);
    return in_range(visible(row), first_key) ? values(dots) : broadcast(-kInfinity<T>);
  }
  // Likewise of a tile, in place: of its first `rows` rows, which are first_row, ... Once a tile:
  // each call out of line moves the tile to memory and back.
  template <class Tile>
  ADASPLASH2_INLINE void to_values(Tile& tile, int64_t first_row, int64_t rows,
                                   int64_t first_key) const {
    if constexpr (!IsPlain) return make(tile, first_row, rows, first_key);
    for (int64_t r = 0; r < rows; ++r)
      for (int v = 0; v < int(sizeof(tile.rows[0]) / sizeof(Vec<T>)); ++v)
        tile.rows[r][v] = values(tile.rows[r][v], first_row + r, first_key + v * kLanes<T>);
  }

  // Asks for what a mask says of some rows and the keys first_key, ..., some time before it is
  // read: its rows lie far apart, and are read a few keys at a time.
  ADASPLASH2_INLINE void prefetch(int64_t first_row, int64_t rows, int64_t first_key,
                                  int64_t keys) const {
    if (IsPlain || !score.mask || score.mask_stride_key != 1 || first_key < 0) return;
    const int64_t element = bytes_of(score.mask_dtype);
    for (int64_t row = first_row; row < first_row + rows; ++row) {
      const char* at = static_cast<const char*>(score.mask) +
                       (row * score.mask_stride_row + first_key) * element;
      for (int64_t byte = 0; byte < keys * element; byte += 64) __builtin_prefetch(at + byte);
    }
  }

  // Whether `row` may see the keys first_key, first_key + 1, ...
  ADASPLASH2_INLINE Ints<T> allowed(int64_t row, int64_t first_key) const {
    if constexpr (!IsPlain) return shown(row, first_key);
    return in_range(visible(row), first_key);
  }
  // Whether one of rows [first, first + rows) may see one of `keys`, a panel.
  ADASPLASH2_INLINE bool any_allowed(int64_t first, int64_t rows, KeyRange keys) const {
    return IsPlain || (!score.is_masked() && !score.begins) || any_shown(first, rows, keys);
  }

  ADASPLASH2_INLINE bool is_capped() const { return !IsPlain && score.is_capped(); }
  // Whether the derivative of a score, or what is `wanted` of scales, takes q . k.
  ADASPLASH2_INLINE bool needs_dots(const T* wanted) const { return is_capped() || wanted; }

  // ds / d(q . k): one number where s is linear in it and has no more parts, else 1, and what
  // begins with through_ does the rest.
  ADASPLASH2_INLINE T slope() const { return IsPlain ? T(score.scale) : T(1); }

  // Gradients of s -> those of scale * (q . k), a row's `factor` apart.
  ADASPLASH2_INLINE Vec<T> through_cap(Vec<T> ds, Vec<T> dots, int64_t row) const {
    return !is_capped() ? ds : uncapped(ds, dots, row);
  }
  ADASPLASH2_INLINE Vec<T> through_scale(Vec<T> ds, int64_t row, const Power<T>& power) const {
    if (IsPlain) return ds;
    const Vec<T> scaled = ds * T(score.scale_of(row));
    if (!is_steep<K>(power)) return scaled;
    return scaled == scaled ? bounded_by_largest<T>(scaled) : scaled;
  }

  ADASPLASH2_INLINE bool has_sink() const { return !IsPlain && score.sink != kNoSink; }
  ADASPLASH2_INLINE T sink_value() const { return T(score.sink) * value_of_score; }

  // |place - key|: exact as long as T holds the difference.
  ADASPLASH2_INLINE Vec<T> distances(int64_t row, Keys<T> keys) const {
    const Keys<T> offset = keys - int32_t(score.place(row));
    return __builtin_convertvector(offset < 0 ? -offset : offset, Vec<T>);
  }
  ADASPLASH2_INLINE static Keys<T> keys_from(int64_t first_key) {
    return iota<T>() + int32_t(first_key);
  }

 private:
  __attribute__((noinline)) Vec<T> made(Vec<T> dots, int64_t row, int64_t first_key) const {
    return made_inline(dots, row, first_key, visible(row));
  }
  template <class Tile>
  __attribute__((noinline)) void make(Tile& tile, int64_t first_row, int64_t rows,
                                      int64_t first_key) const {
    for (int64_t r = 0; r < rows; ++r) {
      const KeyRange seen = visible(first_row + r);
      int64_t key = first_key;
      for (Vec<T>& dots : tile.rows[r]) {
        dots = made_inline(dots, first_row + r, key, seen);
        key += kLanes<T>;
      }
    }
  }
  ADASPLASH2_INLINE Vec<T> made_inline(Vec<T> dots, int64_t row, int64_t first_key,
                                       KeyRange range) const {
    Ints<T> seen = in_range(range, first_key);
    if (is_scaled) return seen ? values(dots) : broadcast(-kInfinity<T>);
    Vec<T> s = dots * T(score.scale_of(row));
    if (score.is_capped()) s = tanh_of<T>(s / T(score.softcap)).value * T(score.softcap);
    if (score.mask) {
      const Vec<T> mask = mask_at(row, first_key);
      seen &= shows(mask);
      if (score.mask_dtype != Dtype::kBool) s += mask;
    }
    if (score.is_sloped()) s -= T(score.slope_of(row)) * distances(row, keys_from(first_key));
    return seen ? s * value_of_score : broadcast(-kInfinity<T>);
  }
  __attribute__((noinline)) Vec<T> uncapped(Vec<T> ds, Vec<T> dots, int64_t row) const {
    const T factor = T(score.scale_of(row));
    const Vec<T> derivative = tanh_of<T>(dots * factor / T(score.softcap)).derivative;
    return ds == T(0) ? ds : ds * derivative;  // also where q . k is NaN, of a hidden key
  }

  __attribute__((noinline)) Ints<T> shown(int64_t row, int64_t first_key) const {
    const Ints<T> seen = in_range(visible(row), first_key);
    return score.mask ? seen & shows(mask_at(row, first_key)) : seen;
  }
  __attribute__((noinline)) bool any_shown(int64_t first, int64_t rows, KeyRange keys) const {
    for (int64_t row = first; row < first + rows; ++row) {
      const KeyRange seen = visible(row).intersection(keys);
      if (seen.size() == 0) continue;
      if (!score.mask) return true;
      for (int64_t key = keys.begin; key < seen.end; key += kLanes<T>)
        if (not_below(shown(row, key) ? broadcast(T(1)) : Vec<T>{}, Vec<T>{})) return true;
    }
    return false;
  }

  ADASPLASH2_INLINE static Ints<T> in_range(KeyRange seen, int64_t first_key) {
    const Ints<T> lane = __builtin_convertvector(iota<T>(), Ints<T>);
    return (lane >= Ints<T>{} + lane_of(seen.begin - first_key)) &
           (lane < Ints<T>{} + lane_of(seen.end - first_key));
  }
  ADASPLASH2_INLINE static int lane_of(int64_t offset) {
    return offset < 0 ? 0 : (offset > kLanes<T> ? kLanes<T> : int(offset));
  }

  ADASPLASH2_INLINE Vec<T> mask_at(int64_t row, int64_t first_key) const {
    const int64_t stride = score.mask_stride_key, left = score.length_k - first_key;
    const int64_t at = row * score.mask_stride_row + first_key * stride;
    switch (score.mask_dtype) {
      case Dtype::kBool:
        return load_strided<T>(static_cast<const uint8_t*>(score.mask) + at, stride, left);
      case Dtype::kFloat32:
        return load_strided<T>(static_cast<const float*>(score.mask) + at, stride, left);
      case Dtype::kFloat64:
        return load_strided<T>(static_cast<const double*>(score.mask) + at, stride, left);
      case Dtype::kBfloat16:
        return load_strided<T>(static_cast<const Bfloat16*>(score.mask) + at, stride, left);
      case Dtype::kFloat16:
        return load_strided<T>(static_cast<const Float16*>(score.mask) + at, stride, left);
      default:
        return Vec<T>{};
    }
  }
  // What is hidden is hidden, whatever q . k is.
  ADASPLASH2_INLINE Ints<T> shows(Vec<T> mask) const {
    return score.mask_dtype == Dtype::kBool ? mask != T(0) : mask != -kInfinity<T>;
  }
};

}  // namespace adasplash2::ADASPLASH2_ISA
#endif
