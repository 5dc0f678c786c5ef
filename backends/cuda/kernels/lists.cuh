// The survivors of a scan: lists in shared memory, the lower bound of tau that they prove, and
// the exact threshold at the end. Both scans (scan.cu, scan90.cu) keep theirs here.
//
// In the accumulator layout of mma.sync and wgmma four lanes share a row of 16, so each lane
// keeps its own list of each of its rows ("slots") and appends without atomics. Hits are rare and
// scattered: a warp that turned to them one by one would do little else. So a lane that meets a
// score above a bound first stages the block of scores it belongs to, as the accumulators
// stand, without a branch; when the staging memory is full all lanes filter theirs into the lists
// together.
//
// Scores are those of the tensor cores, q.k; z = c * score. Bounds are in units of scores.
#pragma once

#include "bounds.cuh"
#include "score.cuh"
#include "work.cuh"

namespace adasplash2 {

constexpr int kCapacity = ADASPLASH2_CAPACITY;
// How often the lists are worked on. Survivors are the same whatever these numbers are (1 or more);
// how many other scores pass, and how many rows go to dense tiles, are not. None is tuned.
//
// Bounds are raised when the longest list has grown by so many entries since. Where it has to grow
// by half instead, Gaussian rows of 8,192 keys (c = 0.5) raise 9 times instead of 56, and 298
// scores of a row pass instead of 270 (simulated).
constexpr int kRaiseGrow = 1;
constexpr int kRebalanceGrow = 3;  // the same for rebalance()
constexpr int kSpare = 2;          // entries by which lists may grow before staging has to make way
constexpr int kFirstSteps = 3;  // Newton's steps from what the largest score proves to first bounds
constexpr int kLastResorts = 4;  // raises before a full list sends its rows to dense tiles

constexpr int kAnyNumber = 0x7fffffff;  // of survivors

// With how many survivors a row, on the mean of a warp, its rows turn flat before the scan ends: a
// little more than the arena holds, since bounds lag, and lists hold scores that will not survive.
constexpr int kMostOfArena = kArenaRow + kArenaRow / 8;
// The same where dense90_output.cu serves flat rows, which see so many keys: where rows keep more,
// it is faster than lists.
__device__ __forceinline__ int most_kept(int keys) {
  return min(kKeptMost, kKeptLeast + keys / kKeptKeys);
}
// The same after some of the tiles. Rows keep more of more keys: Gaussian ones that keep 65 of
// 16,384 keep 59 of a half of them, 40 of the first 1,024. So the limit is lower while few keys are
// scanned. But rows that keep near keys find most of them early, and bounds lag at first: it is
// lower by only 5/64 for each halving of the keys, and for no more than three halvings.
__device__ __forceinline__ int most_so_far(int most, int tiles, int all) {
  return most - most * min(3, __clz(tiles) - __clz(all)) * 5 / 64;
}
// The same after the first tile, of a warp's rows together. Where first_tile_tells(), all rows of a
// block go to dense tiles for good, or all of them stay: with half of them here and half there, it
// would pay for both.
__device__ __forceinline__ int most_at_first(int keys) { return kFirstLeast + keys / kFirstKeys; }

struct Survivor {
  float score;
  int column;
};

// What the solver finds of one row.
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
  // A staging block (kStagingParts fragments of two slots) of all lanes: 16 bytes a lane for each
  // fragment, then the columns.
  static constexpr int kPairs = kSlots / 2;
  static constexpr u32 kPairBytes = 32 * kStagingLaneBytes;
  static constexpr u32 kStagingBytes = kPairs * kPairBytes;
  // Lists grow from the start of the warp's memory, staging blocks from its end: long lists leave
  // room for few of them, short ones for many.
  static constexpr u32 kBytes = kCapacity * kEntryBytes;
  static constexpr u32 kAppendBytes = kStagingAppend * kEntryBytes;
  static_assert(kBytes >= kMinStagingBlocks * kStagingBytes + 2 * kAppendBytes);
  static_assert(kEntryBytes == 32 * kSlots * kListEntryBytes);

  u32 base;         // the lane's first entry of slot 0
  u32 end[kSlots];  // first free entry, counted without the slot's own offset
  // When an end passes them; the same for all lanes but for their offset.
  u32 raise_at, rebalance_at;
  float bound[kSlots];
  float top[kSlots];  // largest score this lane has met
  u32 poisoned;       // a bit a slot: rows that are NaN, or do not exist
  bool unset;         // some row of the warp has no bound yet
  bool flat;  // its rows go to dense tiles: they keep too many, or one more than its lists hold
  int kept;   // how many they kept when they turned flat
  u32 first_staging;  // the lane's, of pair 0; the next one is below
  u32 last_staging;   // below it there is no room
  // Next free block, without the pair's own offset; below last_staging by more than one where
  // blocks found no room.
  u32 staging_end[kPairs];
  u32 before[kPairs];  // the same before the last tile
  bool due;            // the lane is about to run out of room for staging

  __device__ __forceinline__ void start(u32 memory, u32 dead) {
    base = memory + lane_id() * 4;
    first_staging = memory + kBytes - kStagingBytes + lane_id() * 16;
    poisoned = dead;
    unset = true;
    flat = false;
    kept = 0;
    due = false;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      end[slot] = base;
      bound[slot] = dead >> slot & 1u ? kInf : -kInf;
      top[slot] = -kInf;
    }
    raise_at = base;
    rebalance_at = base + kRebalanceGrow * kEntryBytes;
    clear_staging(0);
  }

  // Start from what a scan before handed over of the row block, whose rows are all of the warp's.
  __device__ __forceinline__ void resume(const Params& p, int row_block) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int at = place_of(row_block, slot * 8 + lane_id() / 4);
      top[slot] = p.row_start[at].top;
      if (!(top[slot] < kInf)) poisoned |= 1u << slot;
      if (poisoned >> slot & 1u)
        bound[slot] = kInf;
      else if (is_finite(top[slot]))
        bound[slot] = fmaxf(p.row_count[at].bound, under(top[slot], p.inv_c));
    }
  }

  // Leave room for as many staging blocks as the lists, `longest` entries now, may do without.
  __device__ __forceinline__ void clear_staging(int longest) {
    constexpr u32 most = kBytes - kMinStagingBlocks * kStagingBytes;
    const u32 lists = min(longest * kEntryBytes + kAppendBytes + kSpare * kEntryBytes, most);
    last_staging = first_staging + kStagingBytes - kBytes + lists;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) staging_end[pair] = first_staging;
  }
  // From a lane's staging block to its column.
  static __device__ __forceinline__ u32 to_column() { return kStagingParts * 512 - lane_id() * 12; }

  // The first bounds of rows, from the largest scores of parts of their first tile. Any scores of a
  // row prove a bound; these prove one that few others of the tile pass. Where more than most() a
  // row pass on the mean, lists would fill, and bounds be raised again and again. So the whole tile
  // raises the bounds once, in registers; if more than most() still pass, the warp turns flat
  // before anything is staged. It also turns flat where together(how many pass), which several
  // warps ask at once, says so. Returns whether it turned flat.
  template <int count, class Score, class Most, class Together>
  __device__ __forceinline__ bool set_first_bounds(const Score& score, const Params& p,
                                                   const Most& most, const Together& together) {
    bool still = false;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      constexpr int parts = 4, each = count * kStagingAppend / parts;
      float best[parts];
#pragma unroll
      for (int part = 0; part < parts; ++part) {
#pragma unroll
        for (int i = part * each; i < (part + 1) * each; ++i) {
          const float x = score(slot, i / 2, i % 2);
          best[part] = i == part * each ? x : max_or_nan(best[part], x);
        }
        top[slot] = max_or_nan(top[slot], best[part]);
      }
      const float seen = max_or_nan_over<4>(top[slot]);
      float first = under(seen, p.inv_c);
#pragma unroll 1
      for (int step = 0; step < kFirstSteps; ++step) {
        float s1 = 0.f, s2 = 0.f;
#pragma unroll
        for (float x : best) add_above(p.c * (x - first), p.r, s1, s2);
        first = raised<4>(first, s1, s2, p.inv_c, p.r);
      }
      if (bound[slot] == -kInf && is_finite(seen)) bound[slot] = first;
      still |= bound[slot] == -kInf;
    }
    unset = __any_sync(kAllLanes, still);
    const int limit = most();
    if (limit == kAnyNumber) return false;
    const int pass = passing<count>(score);
    if (together(pass)) {
      turn_flat(kAnyNumber);
      return true;
    }
    if (pass <= kSlots * 8 * limit) return false;
    raise_by_tile<count>(score, p);
    const int left = passing<count>(score);
    if (left <= kSlots * 8 * limit) return false;
    turn_flat(left);
    return true;
  }

  // How many of a tile's scores are above the bounds of the warp's rows. None is of a row without
  // one, or of one that is poisoned.
  template <int count, class Score>
  __device__ __forceinline__ int passing(const Score& score) const {
    u32 above = 0;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const float least = bound[slot] == -kInf ? kInf : bound[slot];
#pragma unroll
      for (int i = 0; i < count * kStagingAppend;
           ++i)  // the sign of a difference, without a branch
        above += __float_as_uint(least - score(slot, i / 2, i % 2)) >> 31;
    }
    return int(__reduce_add_sync(kAllLanes, above));
  }
  // Raise the bounds to what a tile's scores prove.
  template <int count, class Score>
  __device__ __forceinline__ void raise_by_tile(const Score& score, const Params& p) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      float s1 = 0.f, s2 = 0.f;
#pragma unroll
      for (int i = 0; i < count * kStagingAppend; ++i)
        add_above(p.c * (score(slot, i / 2, i % 2) - bound[slot]), p.r, s1, s2);
      bound[slot] = raised<4>(bound[slot], s1, s2, p.inv_c, p.r);
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
    return {load_shared(address), load_shared_int(address + kColumns)};
  }
  static __device__ __forceinline__ void store(u32 address, const Survivor& s) {
    store_shared(address, s.score);
    store_shared(address + kColumns, s.column);
  }

  __device__ __forceinline__ u32 furthest() const {
    u32 out = end[0];
#pragma unroll
    for (int slot = 1; slot < kSlots; ++slot) out = max(out, end[slot]);
    return out;
  }
  // Entries of the warp's longest list; uniform() keeps the compiler from taking loops over them
  // for divergent.
  __device__ __forceinline__ int entries() const {
    return uniform(int(__reduce_max_sync(kAllLanes, furthest() - base) / kEntryBytes));
  }
  __device__ __forceinline__ bool past(u32 address) const {
    return __any_sync(kAllLanes, furthest() > address);
  }

  // Raise the bounds to what the kept scores prove.
  __device__ __forceinline__ void raise(float c, float inv_c, float r) {
    float s1[kSlots], s2[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      s1[slot] = s2[slot] = 0.f;
      top[slot] = max_or_nan_over<4>(top[slot]);
      if (!(top[slot] < kInf)) poisoned |= 1u << slot;
      if (poisoned >> slot & 1u)
        bound[slot] = kInf, end[slot] = base;
      else
        bound[slot] = fmaxf(bound[slot], under(top[slot], inv_c));
    }
    const int longest = entries();
#pragma unroll 2
    for (int i = 0; i < longest; ++i) {
      const u32 at = base + i * kEntryBytes;
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const float score = at < end[slot] ? load_shared(at + slot * kSlotBytes) : -kInf;
        add_above(c * (score - bound[slot]), r, s1[slot], s2[slot]);
      }
    }
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      bound[slot] = raised<4>(bound[slot], s1[slot], s2[slot], inv_c, r);
    raise_at = base + (longest + kRaiseGrow - 1) * kEntryBytes;
  }

  // Entries of all lists of the warp: survivors, and scores that are not dropped yet.
  __device__ __forceinline__ int survivors() const {
    u32 bytes = 0;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) bytes += end[slot] - base;
    return __reduce_add_sync(kAllLanes, bytes / kEntryBytes);
  }

  // Drop what lies below the bounds and share the rest evenly among the four lanes of each
  // row, so that no list fills before its row has too many.
  __device__ __forceinline__ void rebalance() {
    int kept_of_row[kSlots];
    const int quad = lane_id() & ~3;
    const u32 quad_base = base - lane_id() % 4 * 4;
    const int longest = entries();
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) kept_of_row[slot] = 0;
#pragma unroll 1
    for (int i = 0; i < longest; ++i) {
      const u32 at = base + i * kEntryBytes;
      Survivor found[kSlots];
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) found[slot] = load(at + slot * kSlotBytes);
      __syncwarp();  // entries move to places that all lanes have read
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const bool kept = at < end[slot] && found[slot].score > bound[slot];
        const u32 mine = __ballot_sync(kAllLanes, kept) >> quad & 15u;
        const int place = kept_of_row[slot] + __popc(mine & ((1u << lane_id() % 4) - 1u));
        kept_of_row[slot] += __popc(mine);
        if (kept)
          store(quad_base + slot * kSlotBytes + place / 4 * kEntryBytes + place % 4 * 4,
                found[slot]);
      }
    }
    __syncwarp();
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      end[slot] = base + (kept_of_row[slot] + 3 - lane_id() % 4) / 4 * kEntryBytes;
    const u32 longest_now = base + entries() * kEntryBytes;
    raise_at = longest_now + (kRaiseGrow - 1) * kEntryBytes;
    rebalance_at = longest_now + kRebalanceGrow * kEntryBytes;
  }

  // Whether every list has room for what a staging block may add, while `blocks` of these are kept.
  __device__ __forceinline__ bool has_room(int blocks) const {
    const u32 room = min(kBytes - blocks * kStagingBytes, kMaxList * kEntryBytes);
    return !past(base + room - kAppendBytes);
  }
  // Make that room; false where a row keeps too many.
  __device__ __forceinline__ bool make_room(int blocks, float c, float inv_c, float r) {
    for (int step = 0; step < kLastResorts; ++step) {
      raise(c, inv_c, r);
      rebalance();
      if (has_room(blocks)) return true;
    }
    return false;
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

  // Solve every row of the warp and write its survivors to the arena of its row blocks. These are
  // two slots each, from `row_block` on; returns the overflow: a bit for each that the arena cannot
  // hold.
  __device__ __forceinline__ u32 write(const Params& p, int head_row, int row_block,
                                       int first_row) const {
    const int lane = lane_id();
    Solution found[kSlots];
    solve(found, p.c, p.r);
    u32 overflow = 0;
#pragma unroll
    for (int part = 0; part < kSlots / 2; ++part) {
      if (first_row + part * kRowBlock >= p.length_q)
        break;  // the next row block is another head's
      KeyNumber* columns = columns_of(p, row_block + part);
      float* weights = weights_of(p, row_block + part);
      int start[2], count[2], before[2], used = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int slot = part * 2 + i;
        const Solution& s = found[slot];
        int mine = 0;
        if (!s.poisoned)
          for (u32 at = base; at < end[slot]; at += kEntryBytes)
            mine += fmaf(p.c, load_shared(at + slot * kSlotBytes) - s.top, -s.tau) > 0.f;
        const int upto = sum_upto(mine);  // rows in order, lanes of a row in order
        before[i] = used + upto - mine;
        start[i] = __shfl_sync(kAllLanes, before[i], lane & ~3);
        count[i] = sum_over<4>(mine);
        used += __shfl_sync(kAllLanes, upto, 31);
      }
      if (used > kRowBlock * kArenaRow) {
        overflow |= 1u << part;
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
              columns[to] = KeyNumber(kept.column);
              weights[to++] = x;
              if (p.tiles) mark_tile(p, head_row, row, kept.column);
            }
          }
        if (lane % 4 == 0) {
          const int at = place_of(row_block + part, i * 8 + lane / 4);
          p.row_start[at].entry = start[i];
          p.row_count[at].survivors = s.poisoned ? kPoisoned : count[i];
          if (row < p.length_q) {
            const i64 at_tau = row_number(p, head_row, row);
            p.tau[at_tau] = s.poisoned ? kNaN : s.empty ? kInf : fmaf(p.c, s.top, s.tau);
            if (s.poisoned) {
              const Head of(p, head_row);
              poison_keys(p, of.kv_row(p), row);
            }
            if (p.iterations) p.iterations[at_tau] = s.steps;
          }
        }
      }
    }
    return overflow;
  }

  // What the dense kernels start from: a row's largest score and its bound.
  __device__ __forceinline__ void hand_over(const Params& p, int row_block, int first_row,
                                            u32 overflow) const {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (first_row + slot / 2 * kRowBlock >= p.length_q) break;
      const float seen = max_or_nan_over<4>(top[slot]);
      if (lane_id() % 4 == 0 && (overflow >> slot / 2 & 1u)) {
        const int at = place_of(row_block + slot / 2, slot % 2 * 8 + lane_id() / 4);
        p.row_start[at].top = poisoned >> slot & 1u ? kNaN : seen;
        const float proven = flat ? load_shared(base + slot * kSlotBytes) : bound[slot];
        p.row_count[at].bound = proven;
      }
    }
  }

  // Store a staging block of two slots where one of its scores is above their bound. Where there is
  // no room nothing is stored, but the end moves on all the same.
  template <int pair>
  __device__ __forceinline__ void stage_block(const float (&x)[kStagingParts][4], float seen,
                                              float seen_next, int column) {
    static_assert(kStagingParts == 2);
    asm volatile(
        "{.reg .pred hit, room; .reg .u32 at;"
        "setp.gt.f32 hit, %1, %2;"
        "setp.gt.or.f32 hit, %3, %4, hit;"
        "setp.ge.and.u32 room, %0, %5, hit;"
        "@room st.shared.v4.f32 [%0+%17], {%8, %9, %10, %11};"
        "@room st.shared.v4.f32 [%0+%18], {%12, %13, %14, %15};"
        "add.u32 at, %0, %6;"
        "@room st.shared.b32 [at+%17], %7;"
        "@hit sub.u32 %0, %0, %16;}"
        : "+r"(staging_end[pair])
        : "f"(seen), "f"(bound[2 * pair]), "f"(seen_next), "f"(bound[2 * pair + 1]),
          "r"(last_staging), "r"(to_column()), "r"(column), "f"(x[0][0]), "f"(x[0][1]),
          "f"(x[0][2]), "f"(x[0][3]), "f"(x[1][0]), "f"(x[1][1]), "f"(x[1][2]), "f"(x[1][3]),
          "n"(kStagingBytes), "n"(pair * kPairBytes), "n"(pair * kPairBytes + 512)
        : "memory");
  }

  template <int pair, class Score>
  __device__ __forceinline__ void stage_pair(const Score& score, int block, int first_column) {
    float x[kStagingParts][4], seen[2];
#pragma unroll
    for (int part = 0; part < kStagingParts; ++part)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[part][i] = score(2 * pair + i / 2, block * kStagingParts + part, i % 2);
        seen[i / 2] = part + i % 2 ? max_or_nan(seen[i / 2], x[part][i]) : x[part][i];
      }
#pragma unroll
    for (int i = 0; i < 2; ++i) top[2 * pair + i] = max_or_nan(top[2 * pair + i], seen[i]);
    stage_block<pair>(x, seen[0], seen[1], first_column + block * kStagingKeys);
  }
  template <class Score>
  __device__ __forceinline__ void stage_blocks(const Score& score, int first, int count,
                                               int first_column) {
#pragma unroll
    for (int block = first; block < first + count; ++block) {
      stage_pair<0>(score, block, first_column);
      if constexpr (kPairs == 2) stage_pair<1>(score, block, first_column);
    }
  }

  // Stage the scores of a tile of `count` staging blocks that may be survivors: `first_column` is
  // the lane's first, and score (slot, n, j) belongs to column first_column + 8 n + j. There is
  // a branch for the first tile only, of whose scores no more than most() a row may be above the
  // first bounds. A flat warp still keeps its rows' largest scores.
  template <int count, class Score, class Most, class Together>
  __device__ __forceinline__ void stage_tile(const Score& score, int first_column, const Params& p,
                                             const Most& most, const Together& together) {
    static_assert(count % kMinStagingBlocks == 0, "filter_if_due() stages so many at a time anew");
    const bool turns = unset && set_first_bounds<count>(score, p, most, together);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) before[pair] = staging_end[pair];
    stage_blocks(score, 0, count, first_column);
    // Due as soon as another tile like this one would find no room, and when the warp turns flat.
    due = turns;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair)
      due |= 2 * staging_end[pair] - before[pair] + kStagingBytes < last_staging;
  }

  // Filter after stage_tile() where vote(due) says so, the same to all lanes of the warp; a tile
  // that found no room is staged once more. Returns what the vote said.
  template <int count, class Score, class Vote, class Most>
  __device__ __forceinline__ bool filter_if_due(const Score& score, int first_column,
                                                const Params& p, const Vote& vote,
                                                const Most& most) {
    if (!vote(due)) return false;
    due = false;
    bool lost = false;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair)
      lost |= staging_end[pair] + kStagingBytes < last_staging;
    lost = __any_sync(kAllLanes, lost);
    if (lost)
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) staging_end[pair] = before[pair];
#pragma unroll 1  // one copy of filter()
    for (int block = 0; block < count; block += kMinStagingBlocks) {
      filter(p, most);
      if (!lost) break;
#pragma unroll
      for (int here = 0; here < count; here += kMinStagingBlocks)
        if (here == block) stage_blocks(score, here, kMinStagingBlocks, first_column);
    }
    return true;
  }

  // Take what is above the bounds from the staging blocks to the lists. A warp whose rows keep more
  // than most() on their mean turns flat, and keeps nothing from then on.
  template <class Most>
  __device__ __forceinline__ void filter(const Params& p, const Most& most) {
    u32 lowest = staging_end[0];
#pragma unroll
    for (int pair = 1; pair < kPairs; ++pair) lowest = min(lowest, staging_end[pair]);
    // The last one first: lists may grow into its place.
    int block = uniform(int(__reduce_max_sync(kAllLanes, first_staging - lowest) / kStagingBytes));
#pragma unroll 1
    while (--block >= 0 && !flat) {
      filter_staged<0>(block);
      if constexpr (kPairs == 2) filter_staged<1>(block);
      __syncwarp();  // lists may grow over what all lanes have read
      const int taken = max(block, kMinStagingBlocks);
      if (!has_room(taken) && !make_room(taken, p.c, p.inv_c, p.r)) turn_flat(survivors());
    }
    if (past(raise_at)) raise(p.c, p.inv_c, p.r);
    if (past(rebalance_at)) {
      rebalance();
      const int limit = most();
      if (const int all = survivors(); limit < kAnyNumber && all > kSlots * 8 * limit)
        turn_flat(all);
    }
    clear_staging(entries());
  }

  // filter() after the last tile: with the scan done, lists serve all rows that they hold.
  __device__ __forceinline__ void finish(const Params& p) {
    filter(p, [] { return kAnyNumber; });
    __syncwarp();
  }

  template <int pair>
  __device__ __forceinline__ void filter_staged(int i) {
    const u32 at = first_staging + pair * kPairBytes - i * kStagingBytes;
    const bool mine = at > staging_end[pair] + pair * kPairBytes;
    const float above[2] = {mine ? bound[2 * pair] : kInf, mine ? bound[2 * pair + 1] : kInf};
    const int column = load_shared_int(at + to_column());
#pragma unroll
    for (int part = 0; part < kStagingParts; ++part) {
      const float4 x = load_shared4(at + part * 512);
      append<2 * pair>(x.x, column + part * 8, above[0]);
      append<2 * pair>(x.y, column + part * 8 + 1, above[0]);
      append<2 * pair + 1>(x.z, column + part * 8, above[1]);
      append<2 * pair + 1>(x.w, column + part * 8 + 1, above[1]);
    }
  }

  // Leave the rows to the dense tiles, for good.
  __device__ __forceinline__ void give_up() {
    if (!flat) turn_flat(kAnyNumber);
    kept = kAnyNumber;
  }
  __device__ __forceinline__ void turn_flat(int number) {
    flat = true;
    kept = number;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      store_shared(base + slot * kSlotBytes, bound[slot]);  // for hand_over()
      bound[slot] = kInf;
    }
  }
};

}  // namespace adasplash2
