// Forward, element path: scan every allowed key once, keep the survivors of each query row,
// solve tau on them and write them to the arena. Rows that keep too many are marked flat.
//
// A block owns kBlockRows queries of one head, a warp kWarpRows of them. In the accumulator
// layout of m16n8k16 four lanes share a row, so each lane keeps its own list of survivors for
// its part of four rows ("slots") and appends without atomics.
//
// The products start from minus the row's lower bound of tau, so the sign bit of an
// accumulator says whether the score survives, and one AND tells it for a group of scores.
// The bound is the threshold of the scores kept so far: f of a subset lies below f of the row,
// and so does its root.
#include "common.cuh"

namespace adasplash2 {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kBlockRows = kWarps * kWarpRows;
constexpr int kTileKeys = 64;  // keys that are copied to shared memory at a time
constexpr int kStages = 2;
constexpr int kChunk = 32;  // keys whose scores a warp holds at a time
constexpr int kSlots = 4;   // rows that a lane shares
constexpr int kCapacity = ADASPLASH2_CAPACITY;
constexpr int kAppend = kChunk / 4;  // what one chunk can add to a lane's list
// One entry of all lists of a warp: 4 x 32 scores, then 4 x 32 column codes of 16 bits.
constexpr int kEntryBytes = kSlots * 32 * 6;
// Evaluations of f when the bound is refreshed: the second comes from above the root and lands
// below it, the third proves that. More would tighten the bound by less than they cost.
constexpr int kBoundSteps = 3;
constexpr int kSolveSteps = 64;  // enough for bisection alone
// Scores are summed from minus the bound on, so a bound far below the row's maximum costs them
// bits. In windows: beyond it the group goes to the dense kernels, which sum from zero.
constexpr float kReach = 64.f;
constexpr float kBoundSlack = 1e-6f;  // of the window, above the rounding of f near its root

// A column as lane l sees it in 16 bits: chunk, then its 8 keys per lane. Holds 2^13 chunks.
__device__ __forceinline__ int column_of(u32 code, int lane) {
  return int(code >> 3) * kChunk + int(code >> 1 & 3) * 8 + lane % 4 * 2 + int(code & 1);
}

// The survivors of one warp. `end[s]` is the address of the first free entry of slot s,
// counted without the slot's own offset.
struct Lists {
  u32 base;
  u32 end[kSlots];

  static __device__ u32 score_offset(int slot) { return slot * 128; }
  static __device__ u32 code_offset(int slot) {
    return kSlots * 128 + slot / 2 * 128 + slot % 2 * 2;
  }
  __device__ u32 end_of(int slot) const {  // registers cannot be indexed at run time
    return slot == 0 ? end[0] : slot == 1 ? end[1] : slot == 2 ? end[2] : end[3];
  }
  __device__ bool above(int count) const {
    const u32 furthest = max(max(end[0], end[1]), max(end[2], end[3]));
    return __any_sync(kAllLanes, furthest > base + count * kEntryBytes);
  }
};

// Append where the sign says that the score is above the bound: predicated, no branch.
template <int slot>
__device__ __forceinline__ void append(u32& end, float score, u32 code) {
  asm volatile(
      "{.reg .pred kept; setp.ge.s32 kept, %1, 0;"
      "@kept st.shared.b32 [%0+%3], %1;"
      "@kept st.shared.u16 [%0+%4], %2;"
      "@kept add.u32 %0, %0, %5;}"
      : "+r"(end)
      : "r"(__float_as_int(score)), "h"(u16(code)), "n"(slot * 128),
        "n"(kSlots * 128 + slot / 2 * 128 + slot % 2 * 2), "n"(kEntryBytes)
      : "memory");
}

struct Solution {
  float top;      // largest score of the row, relative to the bound it was kept with
  float lo, tau;  // proven lower bound and threshold, both of y = c (score - top)
  int steps;
  bool poisoned;  // a kept score is NaN or infinite
  bool empty;     // nothing was kept: no key scores above minus infinity
};

// Threshold of the scores kept for one slot, on the four lanes that share the row.
__device__ __forceinline__ Solution solve(const Lists& lists, int slot, float c, float r,
                                          int steps) {
  const u32 first = lists.base + Lists::score_offset(slot);
  const u32 last = lists.end_of(slot) + Lists::score_offset(slot);
  Solution s{-kInf, -1.f, -1.f, 0, false, false};
  for (u32 at = first; at < last; at += kEntryBytes) {
    const float score = load_shared(at);
    s.top = fmaxf(s.top, score);
    s.poisoned |= !is_finite(score);
  }
  s.top = max_over<4>(s.top);
  s.poisoned = __ballot_sync(kAllLanes, s.poisoned) >> (lane_id() & ~3) & 15u;
  s.empty = s.top == -kInf;
  bool done = s.poisoned || s.empty;
  if (done) s.top = 0.f;
  s.lo = fmaxf(-1.f, -c * s.top);
  float hi = 0.f;
  s.tau = s.lo;
  for (int step = 0; step < steps && !__all_sync(kAllLanes, done); ++step) {
    Moments<float> m{0.f, 0.f, 0.f};
    for (u32 at = first; at < last; at += kEntryBytes)
      accumulate(m, fmaf(c, load_shared(at) - s.top, -s.tau), r);
    m = sum_over<4>(m);
    if (!done) {
      done = refine(m, r, s.lo, hi, s.tau);
      ++s.steps;
    }
  }
  return s;
}

// Raise the bounds to what the kept scores prove and drop what lies below. False where a row's
// maximum has left the reach of its bound.
__device__ __forceinline__ bool tighten(Lists& lists, float (&minus_bound)[kSlots],
                                        const Params& p) {
  bool near = true;
#pragma unroll 1
  for (int slot = 0; slot < kSlots; ++slot) {
    const Solution s = solve(lists, slot, p.c, p.r, kBoundSteps);
    near &= !(p.c * s.top > kReach);
    const float old = slot == 0   ? minus_bound[0]
                      : slot == 1 ? minus_bound[1]
                      : slot == 2 ? minus_bound[2]
                                  : minus_bound[3];
    const float rise = fmaxf(fmaf(s.lo - kBoundSlack, p.inv_c, s.top), 0.f);
    const float fresh = s.poisoned ? old : old - rise;
    const float moved = old - fresh;  // the rise as it was rounded: scores move by the same
    u32 keep = lists.base;
    for (u32 at = lists.base; at < lists.end_of(slot); at += kEntryBytes) {
      const float score = load_shared(at + Lists::score_offset(slot)) - moved;
      const u32 code = load_shared_u16(at + Lists::code_offset(slot));
      if (!(score < 0.f)) {  // keeps NaN, which poisons the row in the end
        store_shared(keep + Lists::score_offset(slot), score);
        store_shared_u16(keep + Lists::code_offset(slot), code);
        keep += kEntryBytes;
      }
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
      if (i == slot) minus_bound[i] = fresh, lists.end[i] = keep;
  }
  return __all_sync(kAllLanes, near);
}

constexpr int kQuarters = kChunk / 8;   // n8 fragments of a chunk
using Scores = float[2][kQuarters][4];  // [m16 fragment][n8 fragment][accumulator]

// The queries of a warp as left operands; float32 reads them from shared memory instead.
struct Queries {
  Left part[kHalf ? 2 : 1][kHalf ? kDim / 16 : 1];
  u32 shared;  // float32: address of the warp's rows
};

template <int count>
__device__ __forceinline__ u32 load_pair(const Scalar* row, int at, bool inside) {
  const u32 low = inside && at < count ? reinterpret_cast<const u16*>(row)[at] : 0;
  const u32 high = inside && at + 1 < count ? reinterpret_cast<const u16*>(row)[at + 1] : 0;
  return low | high << 16;
}

// Load a warp's queries; rows with NaN or infinity become zeros and are returned as a mask of
// slots, so that they do not flood the lists.
__device__ __forceinline__ u32 load_queries(Queries& q, const Params& p, const Scalar* head,
                                            int first, char* tile) {
  const int lane = lane_id();
  u32 poisoned = 0;
  const u32 flip = p.q_sign < 0.f ? 0x80008000u : 0u, mask = p.q_sign == 0.f ? 0u : ~0u;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int row = first + slot * 8 + lane / 4;
    const bool inside = row < p.length_q;
    const Scalar* from = head + i64(inside ? row : 0) * p.q.row;
    bool bad = false;
    if constexpr (kHalf) {
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = k * 16 + half * 8 + lane % 4 * 2;
          const u32 raw = load_pair<kHeadDim>(from, at, inside);
          const float2 pair = Scalar::unpack(raw);
          bad |= !is_finite(pair.x) || !is_finite(pair.y);
          q.part[slot / 2][k].r[slot % 2 + half * 2] = (raw ^ flip) & mask;
        }
    } else {
      for (int at = lane % 4; at < kDim; at += 4) {
        const float x = inside && at < kHeadDim ? to_float(from[at]) : 0.f;
        bad |= !is_finite(x);
        reinterpret_cast<float*>(tile + (slot * 8 + lane / 4) * tile_stride<kDim>)[at] =
            x * p.q_sign;
      }
    }
    if (__ballot_sync(kAllLanes, bad) >> (lane & ~3) & 15u) {
      poisoned |= 1u << slot;
      if constexpr (kHalf) {
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k)
          q.part[slot / 2][k].r[slot % 2] = q.part[slot / 2][k].r[slot % 2 + 2] = 0;
      } else {
        for (int at = lane % 4; at < kDim; at += 4)
          reinterpret_cast<float*>(tile + (slot * 8 + lane / 4) * tile_stride<kDim>)[at] = 0.f;
      }
    }
  }
  if constexpr (!kHalf) q.shared = shared_address(tile);
  __syncwarp();
  return poisoned;
}

__device__ __forceinline__ float4 load_shared4(u32 address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// start + q k^T for 32 rows and one chunk of keys.
__device__ __forceinline__ void products(Scores& s, const Queries& q, u32 keys,
                                         const float (&start)[kSlots]) {
  const int lane = lane_id();
  if constexpr (kHalf) {
    const u32 from = keys + (lane / 16 * 8 + lane % 8) * tile_stride<kDim> + lane / 8 % 2 * 16;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k)
#pragma unroll
      for (int n = 0; n < kQuarters; n += 2) {
        u32 b[4];
        load_matrices(b, from + n * 8 * tile_stride<kDim> + k * 32);
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float (&d)[4] = s[m][n + i];
            if (k == 0)
              multiply(d, q.part[m][k], b[2 * i], b[2 * i + 1], start[2 * m], start[2 * m],
                       start[2 * m + 1], start[2 * m + 1]);
            else
              multiply(d, q.part[m][k], b[2 * i], b[2 * i + 1], d[0], d[1], d[2], d[3]);
          }
      }
  } else {
#pragma unroll
    for (int n = 0; n < kQuarters; ++n)
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot)
        s[slot / 2][n][slot % 2 * 2] = s[slot / 2][n][slot % 2 * 2 + 1] = start[slot];
#pragma unroll 2
    for (int at = 0; at < kDim; at += 4) {
      float4 a[kSlots];
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot)
        a[slot] = load_shared4(q.shared + (slot * 8 + lane / 4) * tile_stride<kDim> + at * 4);
#pragma unroll
      for (int n = 0; n < kQuarters; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float4 b =
              load_shared4(keys + (n * 8 + lane % 4 * 2 + j) * tile_stride<kDim> + at * 4);
#pragma unroll
          for (int slot = 0; slot < kSlots; ++slot) {
            float& d = s[slot / 2][n][slot % 2 * 2 + j];
            d = fmaf(a[slot].x, b.x, d);
            d = fmaf(a[slot].y, b.y, d);
            d = fmaf(a[slot].z, b.z, d);
            d = fmaf(a[slot].w, b.w, d);
          }
        }
    }
  }
}

// Scores of pairs that the masks forbid become minus infinity.
__device__ __forceinline__ void mask_scores(Scores& s, int first_row, int first_key, int length_k) {
  const int lane = lane_id();
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot)
#pragma unroll
    for (int n = 0; n < kQuarters; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int key = first_key + n * 8 + lane % 4 * 2 + j;
        const int row = first_row + slot * 8 + lane / 4;
        if (key >= length_k || (kCausal && key > row)) s[slot / 2][n][slot % 2 * 2 + j] = -kInf;
      }
}

// The first bound of a row is its window's lower end under the maximum of the first chunk in
// which it sees a finite score. `unset` has a bit for each slot that waits for one.
__device__ __forceinline__ void first_bounds(Scores& s, float (&minus_bound)[kSlots], u32& unset,
                                             float inv_c) {
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    float top = -kInf;
#pragma unroll
    for (int n = 0; n < kQuarters; ++n)
      top = fmaxf(top, fmaxf(s[slot / 2][n][slot % 2 * 2], s[slot / 2][n][slot % 2 * 2 + 1]));
    top = max_over<4>(top);
    if (!(unset >> slot & 1u) || !is_finite(top)) continue;
    unset &= ~(1u << slot);
    minus_bound[slot] = fmaf(1.f + kBoundSlack, inv_c, -top);
#pragma unroll
    for (int n = 0; n < kQuarters; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) s[slot / 2][n][slot % 2 * 2 + j] += minus_bound[slot];
  }
}

__device__ __forceinline__ void keep_survivors(const Scores& s, Lists& lists, u32 chunk) {
#pragma unroll
  for (int n = 0; n < kQuarters; ++n) {
    int below = -1;  // sign bit: every score of this lane is below its bound
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) below &= __float_as_int(s[m][n][i]);
    if (__any_sync(kAllLanes, below >= 0)) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const u32 code = chunk * 8 + n * 2 + j;
        append<0>(lists.end[0], s[0][n][j], code);
        append<1>(lists.end[1], s[0][n][2 + j], code);
        append<2>(lists.end[2], s[1][n][j], code);
        append<3>(lists.end[3], s[1][n][2 + j], code);
      }
    }
  }
}

// Solve every row of the warp and write its survivors. False where the arena cannot hold them,
// or a row's maximum has left the reach of its bound.
__device__ __forceinline__ bool write_rows(const Lists& lists, const float (&minus_bound)[kSlots],
                                           const Params& p, int head_row, int group, int first_row,
                                           u32 poisoned) {
  const int lane = lane_id();
  const i64 arena = i64(group) * kWarpRows * kArenaRow;
  int used = 0;
#pragma unroll 1
  for (int slot = 0; slot < kSlots; ++slot) {
    const Solution s = solve(lists, slot, p.c, p.r, kSolveSteps);
    if (__any_sync(kAllLanes, p.c * s.top > kReach)) return false;
    const int row = first_row + slot * 8 + lane / 4;
    const bool bad = s.poisoned || (poisoned >> slot & 1u);
    const u32 last = bad ? lists.base : lists.end_of(slot);
    const float minus = slot == 0   ? minus_bound[0]
                        : slot == 1 ? minus_bound[1]
                        : slot == 2 ? minus_bound[2]
                                    : minus_bound[3];
    int mine = 0;
    for (u32 at = lists.base + Lists::score_offset(slot); at < last + Lists::score_offset(slot);
         at += kEntryBytes)
      mine += fmaf(p.c, load_shared(at) - s.top, -s.tau) > 0.f;
    int before = mine;  // inclusive prefix over the warp: rows in order, lanes of a row in order
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, before, step);
      if (lane >= step) before += other;
    }
    const int total = __shfl_sync(kAllLanes, before, 31);
    const int start = used + __shfl_sync(kAllLanes, before - mine, lane & ~3);
    const int count = sum_over<4>(mine);
    int at_entry = used + before - mine;
    used += total;
    if (used > kWarpRows * kArenaRow) return false;
    for (u32 at = lists.base; at < last; at += kEntryBytes) {
      const float x = fmaf(p.c, load_shared(at + Lists::score_offset(slot)) - s.top, -s.tau);
      if (x > 0.f) {
        const int column = column_of(load_shared_u16(at + Lists::code_offset(slot)), lane);
        p.entries[arena + at_entry++] = {column, x};
        if (p.tiles)
          p.tiles[(i64(head_row) * ((p.length_q + 63) / 64) + row / 64) * ((p.length_k + 63) / 64) +
                  column / 64] = 1;
      }
    }
    if (lane % 4 == 0) {
      const int at = group * kWarpRows + slot * 8 + lane / 4;
      p.row_start[at] = start;
      p.row_count[at] = bad ? -1 : count;
      if (row < p.length_q) {
        const i64 at_tau = i64(head_row) * p.length_q + row;
        p.tau[at_tau] = bad       ? __int_as_float(0x7fffffff)
                        : s.empty ? kInf
                                  : fmaf(p.c, s.top - minus, s.tau);
        if (bad) poison_keys(p, head_row / p.heads_q, head_row % p.heads_q / p.group, row);
        if (p.iterations) p.iterations[at_tau] = s.steps;
      }
    }
  }
  return true;
}

constexpr int kStageBytes = kTileKeys * tile_stride<kDim>;
constexpr int kListBytes = kCapacity * kEntryBytes;
constexpr int kQueryBytes = kHalf ? 0 : kBlockRows * tile_stride<kDim>;

extern "C" __global__ void __launch_bounds__(kThreads, kHalf ? 2 : 1)
    scan(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) char shared[];
  const int blocks = (p.length_q + kBlockRows - 1) / kBlockRows;
  const int head_row = blockIdx.x / blocks;            // head-major: K of one head stays in the L2
  const int block = blocks - 1 - blockIdx.x % blocks;  // longest rows first
  const int batch = head_row / p.heads_q, head = head_row % p.heads_q;
  const int warp = warp_id();
  const int first_row = block * kBlockRows + warp * kWarpRows;
  const int group = head_row * p.groups_q + first_row / kWarpRows;
  const Scalar* keys = row_of(p.k, batch, head / p.group, 0);

  char* lists_at = shared + kStages * kStageBytes + warp * kListBytes;
  char* queries_at =
      shared + kStages * kStageBytes + kWarps * kListBytes + warp * (kQueryBytes / kWarps);
  Queries queries;
  const u32 poisoned = load_queries(queries, p, row_of(p.q, batch, head, 0), first_row, queries_at);

  Lists lists;
  lists.base = shared_address(lists_at) + lane_id() * 4;
  float minus_bound[kSlots];
  u32 unset = 0;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    lists.end[slot] = lists.base;
    const bool dead = first_row + slot * 8 + lane_id() / 4 >= p.length_q || (poisoned >> slot & 1u);
    minus_bound[slot] = dead ? -kHuge : 0.f;
    if (!dead) unset |= 1u << slot;
  }

  const int seen = kCausal ? min(p.length_k, block * kBlockRows + kBlockRows) : p.length_k;
  const bool outside = first_row >= p.length_q;
  bool flat = false;

  const int tiles = (seen + kTileKeys - 1) / kTileKeys;
  load_tile<kTileKeys, kHeadDim, kThreads>(shared, keys, p.k.row, (tiles - 1) * kTileKeys,
                                           p.length_k);
  copy_commit();
  for (int tile = tiles - 1; tile >= 0; --tile) {
    copy_wait();
    if (__syncthreads_and(flat || outside)) break;
    const int stage = (tiles - 1 - tile) % kStages;
    if (tile > 0) {
      load_tile<kTileKeys, kHeadDim, kThreads>(shared + (1 - stage) * kStageBytes, keys, p.k.row,
                                               (tile - 1) * kTileKeys, p.length_k);
      copy_commit();
    }
    const u32 stage_at = shared_address(shared + stage * kStageBytes);
#pragma unroll 1
    for (int part = kTileKeys / kChunk - 1; part >= 0; --part) {
      const int first_key = tile * kTileKeys + part * kChunk;
      if (flat || outside || first_key >= p.length_k ||
          (kCausal && first_key >= first_row + kWarpRows))
        continue;
      const bool edge =
          first_key + kChunk > p.length_k || (kCausal && first_key + kChunk > first_row + 1);
      Scores s;
      products(s, queries, stage_at + part * kChunk * tile_stride<kDim>, minus_bound);
      if (edge) mask_scores(s, first_row, first_key, p.length_k);
      if (__any_sync(kAllLanes, unset != 0)) first_bounds(s, minus_bound, unset, p.inv_c);
      keep_survivors(s, lists, first_key / kChunk);
      if (lists.above(kCapacity - kAppend)) {
        flat = !tighten(lists, minus_bound, p) || lists.above(kCapacity - kAppend);
      }
    }
  }
  if (outside) return;
  __syncwarp();
  if (!flat) flat = !write_rows(lists, minus_bound, p, head_row, group, first_row, poisoned);
  if (lane_id() == 0) p.flat[group] = flat;
}

}  // namespace adasplash2
