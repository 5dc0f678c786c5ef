// Which keys a query may see, and the sign of the scale. Masks are named here and nowhere else: a
// kernel asks these functions, and none asks which mask there is. What would change q . k
// otherwise, as a softcap does, has no place here: scans, gathers and dense kernels take products
// as they are.
//
// A score is s = q_sign (q . k), and z = c s with c = (alpha-1) |scale| > 0: the sign of the scale
// is in s, so that a larger score is always a larger z. Lists, their bounds, RowStart::top and
// RowCount::bound are in units of s; thresholds tau and t, and x = z - tau, in units of z. Scans
// and the Hopper kernels give the sign to queries or keys as they load them, with signed_value() or
// signed_pair(); dense.cuh, whose products are q . k as it is, takes signed_c() instead of c.
#pragma once

#include "common.cuh"

namespace adasplash2 {

constexpr bool kCausal = ADASPLASH2_CAUSAL;

// --- the sign of the scale ------------------------------------------------------------------

// q . k to a score, and back; also one of its factors.
template <class P>
__device__ __forceinline__ float signed_value(const P& p, float x) {
  return x * p.q_sign;
}
// The same of two 16-bit elements.
template <class P>
__device__ __forceinline__ u32 signed_pair(const P& p, u32 pair) {
  const u32 flip = p.q_sign < 0.f ? 0x80008000u : 0u, mask = p.q_sign == 0.f ? 0u : ~0u;
  return (pair ^ flip) & mask;
}
// Whether scores are q . k as it is.
__device__ __forceinline__ bool is_sign_plus(const Params& p) { return p.q_sign == 1.f; }
// z = signed_c() (q . k)
__device__ __forceinline__ float signed_c(const Params& p) { return p.c * p.q_sign; }
// What a gradient of scaled scores is multiplied with to be one of q . k.
__device__ __forceinline__ float score_slope(const Params& p) { return p.scale; }

// --- which keys a query sees ----------------------------------------------------------------

// Whether a query sees a key.
__device__ __forceinline__ bool is_seen(int row, int key, int length_k) {
  return key < length_k && (!kCausal || key <= row);
}

// Where the keys end that a query sees, or some query up to it.
__device__ __forceinline__ int seen_end(int last_row, int length_k) {
  return kCausal ? min(length_k, last_row + 1) : length_k;
}

// How many keys from `first_key` on a query sees, which are the first ones; negative where it sees
// fewer than are before.
__device__ __forceinline__ int seen_from(int row, int first_key, int length_k) {
  return seen_end(row, length_k) - first_key;
}

// Whether some query from `first_row` on does not see some key before `end`.
__device__ __forceinline__ bool some_hidden(int first_row, int end, int length_k) {
  return end > length_k || (kCausal && end > first_row + 1);
}

// Whether some query up to `last_row` sees a key from `first_key` on.
__device__ __forceinline__ bool any_seen(int last_row, int first_key, int length_k) {
  return first_key < length_k && !(kCausal && first_key > last_row);
}

// The first query that may see a key. So may all behind it: kernels go on to the last one.
__device__ __forceinline__ int first_row_of(int key) { return kCausal ? key : 0; }

// The tiles of `keys` keys that some row of a block sees: from `begin` on, before `end`. Kernels
// ask for both; no mask of theirs hides the first keys, so that `begin` costs nothing.
template <int keys>
struct KeyTiles {
  static constexpr int begin = 0;
  int end;

  __device__ __forceinline__ KeyTiles(int last_row, int length_k)
      : end((seen_end(last_row, length_k) + keys - 1) / keys) {}
  __device__ __forceinline__ int count() const { return end - begin; }
  // The order in which a scan takes them: the first one, where models keep their attention sinks,
  // then from the nearest on. Both have high scores, which make high bounds.
  __device__ __forceinline__ int nth(int i) const { return i == 0 ? begin : end - i; }
};

// The order in which blocks of a head's queries are taken: from the last one on. Where rows see
// different numbers of keys it sees the most, and no long block is left for the end.
__device__ __forceinline__ u32 nth_row_block(u32 i, int blocks) { return blocks - 1 - i; }

// Whether the first tile of a scan tells how many keys a row will keep of all. Not so of causal
// rows, whose nearest keys come after it.
__device__ __forceinline__ constexpr bool first_tile_tells() { return !kCausal; }

// The keys that a query sees where few queries are decoded: those from `begin` on, before `end`.
struct Range {
  int begin, end;

  __device__ __forceinline__ bool holds(int key) const { return key >= begin && key < end; }
  __device__ __forceinline__ bool holds_all(int first, int last) const {  // [first, last)
    return first >= begin && last <= end;
  }
  // The tiles of so many keys that hold one of them.
  template <int keys>
  __device__ __forceinline__ Range tiles() const {
    const int first = begin / keys;
    return {first, first + max(0, (end + keys - 1) / keys - first)};
  }
};

// Of the rows of a block: from the first key that some row sees to the last one, and the keys that
// all rows see.
struct SharedRange {
  Range any, all;

  __device__ __forceinline__ explicit SharedRange(int length_k)
      : any{length_k, 0}, all{0, length_k} {}
  __device__ __forceinline__ void add(const Range& row) {
    if (row.begin < row.end) any = {min(any.begin, row.begin), max(any.end, row.end)};
    all = {max(all.begin, row.begin), min(all.end, row.end)};
  }
};

__device__ __forceinline__ Range range_of(const DecodeParams& p, int batch, int query) {
  int begin = 0, end = p.length_k;
  if (p.ranges) {
    const int* of = p.ranges + batch * p.ranges_batch + query;
    begin = max(begin, of[0]);
    end = min(end, of[p.ranges_end]);
  } else {
    const int place = query + p.shift;
    if (p.left >= 0) begin = max(begin, place - p.left);
    if (p.right >= 0) end = min(end, place + p.right + 1);
  }
  return {begin, max(begin, end)};
}

// A poisoned row's NaN reaches every key that it may see: Params::poison is where the last of them
// ends.
__device__ __forceinline__ void poison_keys(const Params& p, int kv_row, int row) {
  atomicMax(p.poison + kv_row, seen_end(row, p.length_k));
}
__device__ __forceinline__ void poison_no_keys(const Params& p, int kv_row) {
  p.poison[kv_row] = 0;
}
__device__ __forceinline__ bool is_any_poisoned(const Params& p, int kv_row) {
  return p.poison[kv_row] > 0;
}
__device__ __forceinline__ bool is_poisoned(const Params& p, int kv_row, int key) {
  return key < p.poison[kv_row];
}

}  // namespace adasplash2
