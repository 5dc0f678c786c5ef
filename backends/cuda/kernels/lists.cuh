// The survivors of a scan: lists in shared memory, the lower bound of tau that they prove, and
// the exact threshold at the end. Both scans (scan.cu, scan90.cu) keep theirs here.
//
// In the accumulator layout of mma.sync and wgmma four lanes share a row of 16, so each lane
// keeps its own list of each of its rows ("slots") and appends without atomics: compare, store,
// advance, all predicated. A row's bound is the threshold of scores kept so far, or less: f of a
// subset lies below f of the row, and so does its root. certain_rise() on the list from the present
// bound stays below the root.
//
// Scores are those of the tensor cores, q.k; z = c * score. Bounds are in units of scores.
#pragma once

#include "common.cuh"

namespace adasplash2 {

constexpr int kCapacity = ADASPLASH2_CAPACITY;
// Bounds stay this much below what is proven, in windows and relative to the score: above the
// rounding of f and of z near the root.
constexpr float kBoundSlack = 2e-6f;
// Keys of which a lane adds at most kGroupAppend scores to one list between two looks at its room.
constexpr int kFilterKeys = 32;
constexpr int kGroupAppend = kFilterKeys / 4;
// A list is refreshed when it has grown by this many entries since. Fewer refresh more often than
// a tighter bound saves, more append what a fresh bound would have dropped.
constexpr int kGrow = 8;
constexpr int kLastResorts = 4;  // rises before a full list sends its rows to dense tiles

__device__ __forceinline__ float max_or_nan(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}

template <int lanes>
__device__ __forceinline__ float max_or_nan_over(float x) {
#pragma unroll
  for (int step = 1; step < lanes; step *= 2)
    x = max_or_nan(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

struct Survivor {
  float score;
  int column;
};

// What a refresh or the solver finds of one row.
struct Solution {
  float top;  // largest score
  float tau;  // threshold of y = c (score - top)
  int steps;
  bool poisoned;  // a kept score is NaN or infinite
  bool empty;     // nothing was kept: no key scores above minus infinity
};

// The lists of one warp, `kSlots` rows a lane: slot s is row 8 s + lane / 4 of the warp.
template <int kSlots>
struct Lists {
  // One entry of all lists of the warp: its scores, slot by slot and lane by lane, then the
  // columns.
  static constexpr u32 kSlotBytes = 32 * 4;
  static constexpr u32 kColumns = kSlots * kSlotBytes;
  static constexpr u32 kEntryBytes = 2 * kColumns;
  static constexpr int kBytes = kCapacity * int(kEntryBytes);

  u32 base;         // the lane's first entry of slot 0
  u32 end[kSlots];  // first free entry, counted without the slot's own offset
  u32 limit;        // the same for all lanes: refresh when an end passes it
  float bound[kSlots];
  float top[kSlots];  // largest score this lane has met
  u32 poisoned;       // a bit a slot: rows that are NaN, or do not exist
  bool flat;          // some row keeps more than its lists hold: the warp's go to dense tiles
  // What the last tile left to settle(): nothing, lists that have grown, or scores that found no
  // room; and where the lists ended before it.
  enum class Pending { kNothing, kGrown, kLost } pending;
  u32 before[kSlots];

  __device__ __forceinline__ void start(u32 memory, u32 dead) {
    base = memory + lane_id() * 4;
    limit = base + kGrow * kEntryBytes;
    poisoned = dead;
    flat = false;
    pending = Pending::kNothing;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      end[slot] = base;
      bound[slot] = dead >> slot & 1u ? kInf : -kInf;
      top[slot] = -kInf;
    }
  }

  static __device__ __forceinline__ float under(float seen, float inv_c) {
    return seen - (1.f + kBoundSlack) * inv_c - kBoundSlack * fabsf(seen);
  }

  // The first bound of a row is its window's lower end under the first maximum it meets.
  __device__ __forceinline__ void set_first_bounds(float inv_c) {
    bool unset = false;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) unset |= bound[slot] == -kInf;
    if (!__any_sync(kAllLanes, unset)) return;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const float seen = max_or_nan_over<4>(top[slot]);
      if (bound[slot] == -kInf && is_finite(seen)) bound[slot] = under(seen, inv_c);
    }
  }

  // NaN is not kept: the row's maximum is NaN, which poisons it.
  template <int slot>
  __device__ __forceinline__ void append(float score, int column, float above) {
    asm volatile(
        "{.reg .pred kept; setp.gt.f32 kept, %1, %3;"
        "@kept st.shared.b32 [%0+%4], %1;"
        "@kept st.shared.b32 [%0+%5], %2;"
        "@kept add.u32 %0, %0, %6;}"
        : "+r"(end[slot])
        : "f"(score), "r"(column), "f"(above), "n"(slot * kSlotBytes),
          "n"(kColumns + slot * kSlotBytes), "n"(kEntryBytes)
        : "memory");
  }

  static __device__ __forceinline__ Survivor load(u32 address) {
    return {load_shared(address), __float_as_int(load_shared(address + kColumns))};
  }
  static __device__ __forceinline__ void store(u32 address, const Survivor& s) {
    store_shared(address, s.score);
    store_shared(address + kColumns, __int_as_float(s.column));
  }

  __device__ __forceinline__ u32 furthest() const {
    u32 out = end[0];
#pragma unroll
    for (int slot = 1; slot < kSlots; ++slot) out = max(out, end[slot]);
    return out;
  }
  // Entries of the warp's longest list. wgmma must not be under way across a loop that the compiler
  // takes for divergent, hence uniform().
  __device__ __forceinline__ int entries() const {
    return uniform(int(__reduce_max_sync(kAllLanes, furthest() - base) / kEntryBytes));
  }
  __device__ __forceinline__ bool past(u32 address) const {
    return __any_sync(kAllLanes, furthest() > address);
  }

  // Raise the bounds to what the kept scores prove, drop what lies below the bounds that stood,
  // and deal the rest out evenly to the four lanes of each row, so that no list fills before its
  // row has too many.
  __device__ __forceinline__ void refresh(float c, float inv_c, float r) {
    float s1[kSlots], s2[kSlots];
    int kept_of_row[kSlots];
    const int quad = lane_id() & ~3;
    const u32 quad_base = base - lane_id() % 4 * 4;
    const int longest_before = entries();
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      s1[slot] = s2[slot] = 0.f;
      kept_of_row[slot] = 0;
      top[slot] = max_or_nan_over<4>(top[slot]);
      if (!(top[slot] < kInf)) poisoned |= 1u << slot;
      if (poisoned >> slot & 1u)
        bound[slot] = kInf, end[slot] = base;
      else
        bound[slot] = fmaxf(bound[slot], under(top[slot], inv_c));
    }
#pragma unroll 1
    for (int i = 0; i < longest_before; ++i) {
      const u32 at = base + i * kEntryBytes;
      Survivor found[kSlots];
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) found[slot] = load(at + slot * kSlotBytes);
      __syncwarp();  // entries move to places that all lanes have read
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const Survivor& s = found[slot];
        const bool kept = at < end[slot] && s.score > bound[slot];
        const float x = kept ? c * (s.score - bound[slot]) : 0.f;
        if constexpr (kAlpha == AlphaKind::kGeneral) {
          const float u = kept ? power(x, r - 1.f) : 0.f;
          s1[slot] += u;
          s2[slot] = fmaf(u, x, s2[slot]);
        } else if constexpr (kAlpha == AlphaKind::k15) {
          s1[slot] += x;
          s2[slot] = fmaf(x, x, s2[slot]);
        } else {
          s1[slot] += kept ? 1.f : 0.f;
          s2[slot] += x;
        }
        const u32 mine = __ballot_sync(kAllLanes, kept) >> quad & 15u;
        const int place = kept_of_row[slot] + __popc(mine & ((1u << lane_id() % 4) - 1u));
        kept_of_row[slot] += __popc(mine);
        if (kept) store(quad_base + slot * kSlotBytes + place / 4 * kEntryBytes + place % 4 * 4, s);
      }
    }
    __syncwarp();
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      end[slot] = base + (kept_of_row[slot] + 3 - lane_id() % 4) / 4 * kEntryBytes;
      const float sum_u = sum_over<4>(s1[slot]), f = sum_over<4>(s2[slot]) - 1.f;
      if (f > 0.f) {  // never where nothing is kept
        const float rise = (certain_rise(f, sum_u, r) - kBoundSlack) * inv_c;
        bound[slot] = fmaxf(bound[slot], bound[slot] + rise - kBoundSlack * fabsf(bound[slot]));
      }
    }
    limit = base + min(entries() + kGrow, kCapacity - kGroupAppend) * kEntryBytes;
  }

  // Room for kGroupAppend more entries in every list; false where refreshing does not make it.
  __device__ __forceinline__ bool make_room(float c, float inv_c, float r) {
    for (int step = 0; step < kLastResorts; ++step) {
      if (!past(limit)) return true;
      refresh(c, inv_c, r);
    }
    return !past(base + (kCapacity - kGroupAppend) * kEntryBytes);
  }

  // Thresholds of all slots at once, from the bounds on.
  __device__ __forceinline__ void solve(Solution (&out)[kSlots], float c, float r) const {
    float lo[kSlots], hi[kSlots];
    bool done[kSlots];
    const u32 stop = base + entries() * kEntryBytes;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      Solution& s = out[slot];
      s.top = max_or_nan_over<4>(top[slot]);
      s.poisoned = (poisoned >> slot & 1u) || !(s.top < kInf);
      s.empty = !s.poisoned && s.top == -kInf;
      done[slot] = s.poisoned || s.empty;
      if (done[slot]) s.top = 0.f;
      lo[slot] = done[slot] ? -1.f : fmaxf(-1.f, c * (bound[slot] - s.top));
      hi[slot] = kHighest;
      s.tau = lo[slot];
      s.steps = 0;
    }
    for (int step = 0; step < kSolveSteps; ++step) {
      bool all = true;
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) all &= done[slot];
      if (__all_sync(kAllLanes, all)) break;
      Moments<float> m[kSlots];
      float least[kSlots];
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) m[slot] = {0.f, 0.f, 0.f}, least[slot] = kInf;
#pragma unroll 2
      for (u32 at = base; at < stop; at += kEntryBytes)
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) {
          const float score = load_shared(at + slot * kSlotBytes);
          const float x = fmaf(c, score - out[slot].top, -out[slot].tau);
          const bool inside = at < end[slot] && x > 0.f;
          accumulate(m[slot], inside ? x : 0.f, r);
          least[slot] = fminf(least[slot], inside ? x : kInf);
        }
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        m[slot] = sum_over<4>(m[slot]);
        least[slot] = -max_over<4>(-least[slot]);
        if (done[slot]) continue;
        done[slot] = refine(m[slot], r, lo[slot], hi[slot], out[slot].tau, least[slot], step);
        ++out[slot].steps;
      }
    }
  }

  // Solve every row of the warp and write its survivors to the arena of its groups. The groups
  // are two slots each, from `group` on; returns a bit for each one that the arena cannot hold.
  __device__ __forceinline__ u32 write(const Params& p, int head_row, int group,
                                       int first_row) const {
    const int lane = lane_id();
    Solution found[kSlots];
    solve(found, p.c, p.r);
    u32 overfull = 0;
#pragma unroll
    for (int part = 0; part < kSlots / 2; ++part) {
      if (first_row + part * kGroupRows >= p.length_q) break;  // the next group is another head's
      const i64 arena = arena_of(group + part);
      int start[2], count[2], before[2], used = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int slot = part * 2 + i;
        const Solution& s = found[slot];
        int mine = 0;
        if (!s.poisoned)
          for (u32 at = base; at < end[slot]; at += kEntryBytes)
            mine += fmaf(p.c, load_shared(at + slot * kSlotBytes) - s.top, -s.tau) > 0.f;
        int upto = mine;  // inclusive over the warp: rows in order, lanes of a row in order
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
          const int other = __shfl_up_sync(kAllLanes, upto, step);
          if (lane >= step) upto += other;
        }
        before[i] = used + upto - mine;
        start[i] = __shfl_sync(kAllLanes, before[i], lane & ~3);
        count[i] = sum_over<4>(mine);
        used += __shfl_sync(kAllLanes, upto, 31);
      }
      if (used > kGroupRows * kArenaRow) {
        overfull |= 1u << part;
        continue;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int slot = part * 2 + i;
        const Solution& s = found[slot];
        const int row = first_row + slot * 8 + lane / 4;
        int to = before[i];
        if (!s.poisoned)
          for (u32 at = base; at < end[slot]; at += kEntryBytes) {
            const Survivor kept = load(at + slot * kSlotBytes);
            const float x = fmaf(p.c, kept.score - s.top, -s.tau);
            if (x > 0.f) {
              p.entries[arena + to++] = {kept.column, x};
              if (p.tiles) mark_tile(p, head_row, row, kept.column);
            }
          }
        if (lane % 4 == 0) {
          const int at = (group + part) * kGroupRows + i * 8 + lane / 4;
          p.row_start[at] = start[i];
          p.row_count[at] = s.poisoned ? -1 : count[i];
          if (row < p.length_q) {
            const i64 at_tau = i64(head_row) * p.length_q + row;
            p.tau[at_tau] = s.poisoned ? kNaN : s.empty ? kInf : fmaf(p.c, s.top, s.tau);
            if (s.poisoned)
              poison_keys(p, head_row / p.heads_q, head_row % p.heads_q / p.group, row);
            if (p.iterations) p.iterations[at_tau] = s.steps;
          }
        }
      }
    }
    return overfull;
  }

  // What the dense kernels start from: a row's largest score and its bound.
  __device__ __forceinline__ void hand_over(const Params& p, int group, int first_row,
                                            u32 overfull) const {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (first_row + slot / 2 * kGroupRows >= p.length_q) break;
      const float seen = max_or_nan_over<4>(top[slot]);
      if (lane_id() % 4 == 0 && (overfull >> slot / 2 & 1u)) {
        const int at = (group + slot / 2) * kGroupRows + slot % 2 * 8 + lane_id() / 4;
        p.row_start[at] = __float_as_int(poisoned >> slot & 1u ? kNaN : seen);
        p.row_count[at] = __float_as_int(bound[slot]);
      }
    }
  }

  // Append what survives of the group of kFilterKeys keys number `group`; false where a list of
  // this lane had no room for all that may come.
  template <class Score>
  __device__ __forceinline__ bool append_group(const Score& score, int group, int first_column) {
    bool fits = true;
    float above[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const bool room = end[slot] <= base + (kCapacity - kGroupAppend) * kEntryBytes;
      above[slot] = room ? bound[slot] : kInf;
      fits &= room;
    }
    asm volatile("" : "+r"(first_column));  // columns are formed here, not for every tile
#pragma unroll
    for (int i = 0; i < kGroupAppend; ++i) {
      const int n = group * (kFilterKeys / 8) + i / 2, j = i % 2;
      const int column = first_column + n * 8 + j;
      append<0>(score(0, n, j), column, above[0]);
      append<1>(score(1, n, j), column, above[1]);
      if constexpr (kSlots == 4) {
        append<2>(score(2, n, j), column, above[2]);
        append<3>(score(3, n, j), column, above[3]);
      }
    }
    return fits;
  }

  // Filter the scores of a tile of `groups` times kFilterKeys keys: `first_column` is the lane's
  // first, and score (slot, n, j) belongs to column first_column + 8 n + j. Only predicates and
  // branches that the whole warp takes, so that products may be under way. The maxima of a flat
  // warp go on being kept.
  template <int groups, class Score>
  __device__ __forceinline__ void filter(const Score& score, int first_column, float inv_c) {
    bool any[groups], some = false;
#pragma unroll
    for (int group = 0; group < groups; ++group) {
      any[group] = false;
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const int n = group * (kFilterKeys / 8);
        float seen = score(slot, n, 0);
#pragma unroll
        for (int i = 1; i < kGroupAppend; ++i)
          seen = max_or_nan(seen, score(slot, n + i / 2, i % 2));
        top[slot] = max_or_nan(top[slot], seen);
        any[group] |= seen > bound[slot];
      }
      some |= any[group];
    }
    if (!__any_sync(kAllLanes, some && !flat)) return;
    set_first_bounds(inv_c);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) before[slot] = end[slot];
    bool fits = true;
#pragma unroll
    for (int group = 0; group < groups; ++group)
      if (__any_sync(kAllLanes, any[group])) fits &= append_group(score, group, first_column);
    pending = __any_sync(kAllLanes, !fits)                ? Pending::kLost
              : __any_sync(kAllLanes, furthest() > limit) ? Pending::kGrown
                                                          : Pending::kNothing;
  }

  // Refresh after filter() where it is due; scores that found no room are appended once more, with
  // a look at the room after each group. The warp turns flat where that is in vain.
  template <int groups, class Score>
  __device__ __forceinline__ void settle(const Score& score, int first_column, const Params& p) {
    if (pending == Pending::kNothing) return;
    int group = groups;
    if (pending == Pending::kLost) {
      group = 0;
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) end[slot] = before[slot];
    }
#pragma unroll 1  // one copy of the refresh
    for (; group <= groups && !flat; ++group) {
#pragma unroll
      for (int here = 0; here < groups; ++here)
        if (here == group) append_group(score, here, first_column);
      flat = !make_room(p.c, p.inv_c, p.r);
    }
    pending = Pending::kNothing;
  }
};

}  // namespace adasplash2
