// Scores, and which keys a query may see. Masks are named here and nowhere else.
//
// A score is s = q_sign (q . k), and z = c s with c = (alpha-1) |scale| > 0: the sign of the scale
// is in s, so that a larger score is always a larger z. Lists, their bounds, RowStart::top and
// RowCount::bound are in units of s; thresholds tau and t, and x = z - tau, in units of z. Scans
// and the Hopper kernels give the sign to queries or keys as they load them; dense.cuh, whose
// products are q . k as it is, gives it to c.
#pragma once

#include "common.cuh"

namespace adasplash2 {

constexpr bool kCausal = ADASPLASH2_CAUSAL;

// Whether a query sees a key.
__device__ __forceinline__ bool is_seen(int row, int key, int length_k) {
  return key < length_k && (!kCausal || key <= row);
}

// Where the keys end that a query sees, or some query up to it.
__device__ __forceinline__ int seen_end(int last_row, int length_k) {
  return kCausal ? min(length_k, last_row + 1) : length_k;
}

// Whether some query from `first_row` on does not see some key before `end`.
__device__ __forceinline__ bool some_hidden(int first_row, int end, int length_k) {
  return end > length_k || (kCausal && end > first_row + 1);
}

// Whether some query up to `last_row` sees a key from `first_key` on.
__device__ __forceinline__ bool any_seen(int last_row, int first_key, int length_k) {
  return first_key < length_k && !(kCausal && first_key > last_row);
}

// The first query that may see a key.
__device__ __forceinline__ int first_row_of(int key) { return kCausal ? key : 0; }

// The order in which a scan takes tiles: the first one, where models keep their attention sinks,
// then from the nearest on. Both have high scores, which make high bounds.
__device__ __forceinline__ int nth_tile(int i, int tiles) { return i == 0 ? 0 : tiles - i; }

// The keys that a query sees where few queries are decoded: those from `begin` on, before `end`.
struct Range {
  int begin, end;

  __device__ __forceinline__ bool holds(int key) const { return key >= begin && key < end; }
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

// The rows that a poisoned row's NaN reaches: every key it may see.
__device__ __forceinline__ void poison_keys(const Params& p, int batch, int kv_head, int row) {
  atomicMax(p.poison + batch * p.heads_kv + kv_head, seen_end(row, p.length_k));
}

}  // namespace adasplash2
