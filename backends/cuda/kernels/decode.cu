// Few queries without gradients against long caches.
//
// One block takes rows of all query heads that share a key head, so that each key is read once for
// them. Keys are split among blocks, so that few heads occupy a whole GPU.
//
// 1. decode_scan reads the keys, from memory into registers, and keeps a block's scores in shared
//    memory. From the largest ones of many subsets comes a bound for each row: the threshold of
//    some of a row's scores is at most that of all. What is above it is listed, by parts of the
//    keys. A list has room for all keys of its part, so that no row is too flat.
// 2. decode_solve, a block for each row: from the parts' largest scores a bound that few of the
//    lists' scores pass, from these the threshold and the output. Of a flat row, of which more pass
//    than shared memory holds, it finds the threshold on the lists themselves.
// 3. decode_weigh, for flat rows alone: the output, from the lists and the values.
//
// Lists and sums have one order: the same call gives the same bits.
#include "bounds.cuh"
#include "work.cuh"

namespace adasplash2 {

constexpr bool kPaged = ADASPLASH2_PAGED;
constexpr int kWarps = ADASPLASH2_WARPS, kThreads = 32 * kWarps;  // of a scan
constexpr int kHeld = ADASPLASH2_HELD_ROWS;  // rows of its blocks at most; a power of two
constexpr int kRowTiles = (kHeld + kDecodeRowTile - 1) / kDecodeRowTile;
constexpr int kRows = kRowTiles * kDecodeRowTile;               // as products have them
constexpr int kRowWarps = kWarps > kHeld ? kWarps / kHeld : 1;  // that list a row's keys
constexpr int kSubsets = 8 * kWarps;                            // of a block's keys

// A warp has a tile of 16 keys as the A fragments of mma.sync, so that its products have keys
// along M and rows along N: lane l holds scores of the keys l/4 and l/4 + 8, and of the rows
// 2 (l%4) + {0, 1} of each tile of rows. The order of the columns of q . k is free: what a lane
// loads, 16 bytes at a time, is what it multiplies itself, and no lane waits for another.
constexpr int kChunk = 16 / int(sizeof(Scalar));  // columns of a load
constexpr int kStepColumns = 4 * kChunk;          // and of the four lanes of a key
constexpr int kSteps = (kHeadDim + kStepColumns - 1) / kStepColumns;
constexpr int kQueryBytes = kSteps * kRows * 4 * 16;
static_assert(kQueryBytes == ADASPLASH2_FIXED_DECODE_SCAN);

// Registers have room for so many steps of a tile. A narrow tile is asked for before the one ahead
// of it is multiplied; of wide ones enough are under way anyway.
constexpr int kLoaded = kSteps < 8 ? kSteps : 8;
constexpr bool kIsAhead = kSteps <= 4;

// Neither is tuned; however many steps, bounds stay below thresholds.
constexpr int kRaiseSteps = 2;  // Newton's steps of a bound
constexpr int kBatch = 4;       // scores or rows of values that a lane loads at once

__device__ __forceinline__ int parts_of(const DecodeParams& p) { return p.splits * kRowWarps; }
__device__ __forceinline__ Part* parts_at(const DecodeParams& p, int row) {
  return p.parts + i64(row) * parts_of(p);
}

// --- scan ----------------------------------------------------------------------------------

using Scores = float[kRowTiles][4];  // of the lane's two rows of a tile: key l/4, then l/4 + 8

// The queries of a block, for all of its warps: for each chunk of columns, that chunk of every row.
__device__ __forceinline__ void load_queries(char* shared, const RowTile& b,
                                             const DecodeParams& p) {
  for (int i = threadIdx.x; i < kSteps * kRows * 4; i += kThreads) {
    const int row = i / 4 % kRows, column = (i / (4 * kRows) * 4 + i % 4) * kChunk;
    const QueryRow of(p, b.first + min(row, b.rows - 1));
    const Scalar* from = row_of(p.q, of.batch, of.head, of.query);
    Scalar* to = reinterpret_cast<Scalar*>(shared + i * 16);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const bool exists = row < b.rows && column + j < kHeadDim;
      store(to + j, exists ? signed_value(p, to_float(from[column + j])) : 0.f);
    }
  }
}

// A lane's columns of a key, zeros where it is not `wanted`.
__device__ __forceinline__ uint4 load_columns(const Scalar* key, int column, bool wanted) {
  wanted = wanted && column < kHeadDim;
  if constexpr (kAligned) return load16(key + (wanted ? column : 0), wanted);
  uint4 out;
  auto* to = reinterpret_cast<Scalar*>(&out);
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    to[i] = wanted && column + i < kHeadDim ? key[column + i] : Scalar{};
  return out;
}

// A lane's columns of its two keys of a tile, of kLoaded steps from `first_step` on.
struct TileColumns {
  uint4 of[kLoaded][2];

  __device__ __forceinline__ void load(const Cache<kPaged>& keys, int tile, int first_step,
                                       const Range& seen) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = tile * kDecodeTile + half * 8 + lane_id() / 4;
      const bool exists = seen.holds(key);
      const Scalar* from = keys.at(exists ? key : seen.begin);
#pragma unroll
      for (int i = 0; i < kLoaded; ++i) {
        const int step = first_step + i;
        of[i][half] =
            load_columns(from, (step * 4 + lane_id() % 4) * kChunk, exists && step < kSteps);
      }
    }
  }
};

// Each of four lanes has products of its part of a key's columns with eight rows. They are summed
// over the lanes, and each lane gets the sums of its two rows.
__device__ __forceinline__ void sum_rows(const float (&partial)[kDecodeRowTile], float& first,
                                         float& second) {
  const bool high = lane_id() & 2, odd = lane_id() & 1;
  float half[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float given = high ? partial[i] : partial[i + 4];
    half[i] = (high ? partial[i + 4] : partial[i]) + __shfl_xor_sync(kAllLanes, given, 2);
  }
  float both[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float given = odd ? half[i] : half[i + 2];
    both[i] = (odd ? half[i + 2] : half[i]) + __shfl_xor_sync(kAllLanes, given, 1);
  }
  first = both[0], second = both[1];
}

// q . k of all rows and a tile of keys.
struct Products {
  float sums[kRowTiles][kHalf ? 4 : 2 * kDecodeRowTile] = {};

  // Add those of the columns that a lane has; `queries` are as load_queries() wrote them.
  __device__ __forceinline__ void add(const TileColumns& columns, int first_step,
                                      const char* queries) {
#pragma unroll
    for (int i = 0; i < kLoaded; ++i) {
      const uint4 *q = reinterpret_cast<const uint4*>(queries) + (first_step + i) * kRows * 4,
                  &a = columns.of[i][0], &b = columns.of[i][1];
      if (first_step + i >= kSteps) break;
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n) {
        if constexpr (kHalf) {
          auto& d = reinterpret_cast<float (&)[4]>(sums[n][0]);
          const uint4 c = q[n * kDecodeRowTile * 4 + lane_id()];
          multiply(d, {{a.x, b.x, a.y, b.y}}, c.x, c.y, d[0], d[1], d[2], d[3]);
          multiply(d, {{a.z, b.z, a.w, b.w}}, c.z, c.w, d[0], d[1], d[2], d[3]);
        } else {
          const float4 x[2] = {reinterpret_cast<const float4&>(a),
                               reinterpret_cast<const float4&>(b)};
#pragma unroll
          for (int row = 0; row < kDecodeRowTile; ++row) {
            const float4 y =
                reinterpret_cast<const float4*>(q)[(n * kDecodeRowTile + row) * 4 + lane_id() % 4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float& sum = sums[n][half * kDecodeRowTile + row];
              sum = fmaf(x[half].x, y.x, sum);
              sum = fmaf(x[half].y, y.y, sum);
              sum = fmaf(x[half].z, y.z, sum);
              sum = fmaf(x[half].w, y.w, sum);
            }
          }
        }
      }
    }
  }
  __device__ __forceinline__ void finish(Scores& s) const {
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
      if constexpr (kHalf) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = sums[n][i];
      } else {
        using OfRows = float[kDecodeRowTile];
        sum_rows(reinterpret_cast<const OfRows&>(sums[n][0]), s[n][0], s[n][1]);
        sum_rows(reinterpret_cast<const OfRows&>(sums[n][kDecodeRowTile]), s[n][2], s[n][3]);
      }
    }
  }
};

// The first row of a lane's two in a tile of rows, `j` counts them.
__device__ __forceinline__ int row_of_lane(int n, int j) {
  return n * kDecodeRowTile + lane_id() % 4 * 2 + j;
}

// Scores of what a row may not see become -inf.
__device__ __forceinline__ void hide(Scores& s, int first, const Range* seen) {
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = first + i / 2 * 8 + lane_id() / 4;
      if (!seen[row_of_lane(n, i % 2)].holds(key)) s[n][i] = -kInf;
    }
}

// The scores of a block, in shared memory; those of a row stand together.
struct BlockScores {
  const DecodeParams& p;
  const RowTile& b;
  float* scores;
  int begin, end;  // tiles of keys

  __device__ __forceinline__ float* of_row(int row) const { return scores + row * p.row_scores; }
  __device__ __forceinline__ int first_key() const { return begin * kDecodeTile; }

  // A warp puts those of a tile there.
  __device__ __forceinline__ void put(const Scores& s, int tile) const {
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = row_of_lane(n, j);
        if (row >= kHeld) continue;
        float* to = of_row(row) + (tile - begin) * kDecodeTile + lane_id() / 4;
        to[0] = s[n][j], to[8] = s[n][2 + j];
      }
  }

  // List what of a row is above its bound, in one of kRowWarps parts, from the largest scores of
  // subsets of all keys of the block.
  __device__ __forceinline__ void list(int row, int part, const float (&tops)[kSubsets]) const {
    const int lane = lane_id();
    float own[kSubsets / 32], top = -kInf;
#pragma unroll
    for (int i = 0; i < kSubsets / 32; ++i)
      own[i] = tops[i * 32 + lane], top = max_or_nan(top, own[i]);
    top = max_or_nan_over<32>(top);
    float bound = top < kInf ? under(top, p.inv_c) : kInf;  // of a poisoned row nothing is listed
#pragma unroll 1
    for (int step = 0; step < kRaiseSteps; ++step) {
      float s1 = 0.f, s2 = 0.f;
#pragma unroll
      for (const float one : own) add_above(p.c * (one - bound), p.r, s1, s2);
      bound = raised<32>(bound, s1, s2, p.inv_c, p.r);
    }
    const int tiles = end - begin, each = (tiles + kRowWarps - 1) / kRowWarps;
    const int first = min(part * each, tiles) * kDecodeTile;
    const int last = min((part + 1) * each, tiles) * kDecodeTile;
    const float* from = of_row(row);
    const i64 to = i64(b.first + row) * p.list_length + first_key() + first;
    int count = 0;
    top = -kInf;
#pragma unroll 1
    for (int at = first + lane; at - lane < last; at += 32 * kBatch) {
      float scores[kBatch], most = -kInf;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        scores[i] = at + 32 * i < last ? from[at + 32 * i] : -kInf;
        most = max_or_nan(most, scores[i]);
      }
      top = max_or_nan(top, most);
      if (!__any_sync(kAllLanes, most > bound)) continue;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const bool above = scores[i] > bound;
        const u32 mine = __ballot_sync(kAllLanes, above);
        const int place = count + __popc(mine & ((1u << lane) - 1));
        if (above)
          p.scores[to + place] = scores[i], p.offsets[to + place] = u16(at + 32 * i - first);
        count += __popc(mine);
      }
    }
    top = max_or_nan_over<32>(top);
    if (lane == 0)
      parts_at(p, b.first + row)[b.split * kRowWarps + part] = {top, bound, first_key() + first,
                                                                count};
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, ADASPLASH2_RESIDENTS)
    decode_scan(const __grid_constant__ DecodeParams p) {
  start_next_and_await();
  extern __shared__ __align__(16) char shared[];
  __shared__ Range seen[kRows];
  __shared__ float tops[kHeld][kSubsets];
  static_assert(sizeof(seen) + sizeof(tops) == ADASPLASH2_STATIC_DECODE_SCAN);
  const RowTile b = RowTile::of<kHeld>(p, p.splits);
  const int lane = lane_id(), warp = warp_id();
  for (int i = threadIdx.x; i < kRows; i += kThreads)
    seen[i] = i < b.rows ? QueryRow(p, b.first + i).seen(p) : Range{0, 0};
  __syncthreads();
  SharedRange of_rows(p.length_k);
  for (int i = 0; i < b.rows; ++i) of_rows.add(seen[i]);
  const Range any = of_rows.any, all = of_rows.all;
  // The split's keys, in whole tiles.
  const Range own = share_of(any.tiles<kDecodeTile>(), b.split, p.splits);
  const int begin = own.begin, end = own.end;
  const BlockScores scores{p, b, reinterpret_cast<float*>(shared + kQueryBytes), begin, end};

  const Cache<kPaged> keys(p, p.k, b.batch, b.kv_head);
  int tile = begin + warp;
  TileColumns next;
  if (kIsAhead && tile < end) next.load(keys, tile, 0, any);
  load_queries(shared, b, p);
  __syncthreads();
  float top[kRowTiles][2];
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) top[n][0] = top[n][1] = -kInf;
#pragma unroll 1
  for (; tile < end; tile += kWarps) {
    Products products;
    if constexpr (kIsAhead) {
      const TileColumns now = next;
      if (tile + kWarps < end) next.load(keys, tile + kWarps, 0, any);
      products.add(now, 0, shared);
    } else {
#pragma unroll 1
      for (int step = 0; step < kSteps; step += kLoaded) {
        next.load(keys, tile, step, any);
        products.add(next, step, shared);
      }
    }
    Scores s;
    products.finish(s);
    if (!all.holds_all(tile * kDecodeTile, (tile + 1) * kDecodeTile))
      hide(s, tile * kDecodeTile, seen);
    scores.put(s, tile);
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        top[n][j] = max_or_nan(top[n][j], max_or_nan(s[n][j], s[n][2 + j]));
  }
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j)
      if (row_of_lane(n, j) < kHeld) tops[row_of_lane(n, j)][warp * 8 + lane / 4] = top[n][j];
  __syncthreads();
  for (int of_row = warp; of_row < b.rows * kRowWarps; of_row += kWarps)
    scores.list(of_row / kRowWarps, of_row % kRowWarps, tops[of_row / kRowWarps]);
}

// --- thresholds, and the output of rows that are not flat ----------------------------------

constexpr int kSolveWarps = kSolveThreads / 32;
constexpr int kPartsAtOnce = 4, kPartLanes = 32 / kPartsAtOnce;  // not tuned
constexpr int kLanes = ADASPLASH2_OUTPUT_LANES,
              kLaneGroups = 32 / kLanes;  // that share a value's row
constexpr int kWidth = kLanes * 8;

// Combines over the block, in a fixed order; every thread gets the result. One barrier is enough,
// since two calls that follow each other use different memory.
struct OverBlock {
  float4 (&shared)[2][kSolveWarps];
  int turn = 0;

  template <class Combine>
  __device__ __forceinline__ float4 operator()(float4 x, const Combine& combine) {
    x = over_lanes<32>(x, combine);
    turn ^= 1;
    if (lane_id() == 0) shared[turn][warp_id()] = x;
    __syncthreads();
    return over_lanes<kSolveWarps>(shared[turn][lane_id() % kSolveWarps], combine);
  }

 private:
  template <int lanes, class Combine>
  static __device__ __forceinline__ float4 over_lanes(float4 x, const Combine& combine) {
#pragma unroll
    for (int step = 1; step < lanes; step *= 2)
      x = combine(x,
                  {__shfl_xor_sync(kAllLanes, x.x, step), __shfl_xor_sync(kAllLanes, x.y, step),
                   __shfl_xor_sync(kAllLanes, x.z, step), __shfl_xor_sync(kAllLanes, x.w, step)});
    return x;
  }
};

__device__ __forceinline__ float4 add(const float4& a, const float4& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// Scores that a warp keeps in shared memory.
struct Kept {
  float score[kSolveKept];
  int key[kSolveKept];
};

// The parts of a row that have scores above its bound. Each warp takes some of them, in order.
struct LiveParts {
  const Part* parts;
  int count;
  float bound;

  template <class Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
    for (int first = warp_id(); first < count; first += 32 * kSolveWarps) {
      const int mine = first + lane_id() * kSolveWarps;
      u32 live = __ballot_sync(kAllLanes, mine < count && parts[mine].top > bound);
      for (; live; live &= live - 1) body(parts[first + (__ffs(live) - 1) * kSolveWarps]);
    }
  }
};

extern "C" __global__ void __launch_bounds__(kSolveThreads, 1)
    decode_solve(const __grid_constant__ DecodeParams p) {
  start_next_and_await();
  __shared__ Kept all_kept[kSolveWarps];
  __shared__ float4 exchanged[2][kSolveWarps];
  __shared__ float sums[kSolveWarps][kWidth];
  const QueryRow row(p, blockIdx.x);
  const int lane = lane_id(), warp = warp_id();
  const int number = row.at % SharedRows::rows_of(p);
  if (threadIdx.x == 0 && number % kDecodeRowTile == 0)
    p.arrivals[RowTile::number<kDecodeRowTile>(p, row.at / SharedRows::rows_of(p), number)] = 0;
  OverBlock over_block{exchanged};
  LiveParts live{parts_at(p, row.at), parts_of(p), -kInf};

  float seen = -kInf;
  for (int i = threadIdx.x; i < live.count; i += kSolveThreads) {
    const Part part = live.parts[i];
    seen = max_or_nan(seen, part.top);
    live.bound = fmaxf(live.bound, part.bound);
  }
  const float4 found =
      over_block({seen, live.bound, 0.f, 0.f}, [](const float4& a, const float4& b) {
        return float4{max_or_nan(a.x, b.x), fmaxf(a.y, b.y), 0.f, 0.f};
      });
  const bool poisoned = !(found.x < kInf), empty = found.x == -kInf;
  if (poisoned || empty) {  // the same to the whole block
    for (int i = threadIdx.x; i < kHeadDimV; i += kSolveThreads)
      store(row.output(p) + i, poisoned ? kNaN : 0.f);
    if (threadIdx.x == 0) {
      p.tau[row.at] = poisoned ? kNaN : kInf;
      p.solved[row.at] = {0.f, kInf};
      if (p.support) p.support[row.at] = p.iterations[row.at] = 0;
    }
    return;
  }
  const float top = found.x;
  live.bound = fmaxf(found.y, under(top, p.inv_c));
  for (int step = 0; step < kRaiseSteps; ++step) {
    float s1 = 0.f, s2 = 0.f;
    for (int i = threadIdx.x; i < live.count; i += kSolveThreads)
      add_above(p.c * (live.parts[i].top - live.bound), p.r, s1, s2);
    const float4 total = over_block({s1, s2, 0.f, 0.f}, add);
    live.bound = raised<1>(live.bound, total.x, total.y, p.inv_c, p.r);
  }

  // What is above the bound is copied to shared memory. A warp reads kPartsAtOnce lists at once.
  const i64 list = i64(row.at) * p.list_length;
  Kept& kept = all_kept[warp];
  int count = 0;
  for (int first = warp * kPartsAtOnce; first < live.count && count <= kSolveKept;
       first += kSolveWarps * kPartsAtOnce) {
    const int number = first + lane / kPartLanes;
    Part part{-kInf, 0.f, 0, 0};
    if (number < live.count) part = live.parts[number];
    const i64 from = list + part.first;
    const int entries = part.top > live.bound ? part.count : 0;
    for (int at = lane % kPartLanes; __any_sync(kAllLanes, at < entries);
         at += kPartLanes * kBatch) {
      float scores[kBatch];
      int keys[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int entry = at + i * kPartLanes;
        scores[i] = -kInf, keys[i] = part.first;
        if (entry < entries) scores[i] = p.scores[from + entry], keys[i] += p.offsets[from + entry];
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const bool above = scores[i] > live.bound;
        const u32 mine = __ballot_sync(kAllLanes, above);
        const int to = count + __popc(mine & ((1u << lane) - 1));
        if (above && to < kSolveKept) kept.score[to] = scores[i], kept.key[to] = keys[i];
        count += __popc(mine);
      }
      if (count > kSolveKept) break;
    }
  }
  const bool flat = __syncthreads_or(count > kSolveKept);
  __syncwarp();

  // body(score) for the warp's share of the row's scores: in shared memory, or in the lists where
  // the row is flat.
  const auto for_scores = [&](const auto& body) {
    if (!flat) {
      for (int i = lane; i < count; i += 32) body(kept.score[i]);
      return;
    }
    live.for_each([&](const Part& part) {
      const float4* scores = reinterpret_cast<const float4*>(p.scores + list + part.first);
#pragma unroll 4
      for (int i = 4 * lane; i < part.count; i += 128) {
        const float4 four = scores[i / 4];
        body(four.x);  // behind the end of a list may be anything
        body(i + 1 < part.count ? four.y : -kInf);
        body(i + 2 < part.count ? four.z : -kInf);
        body(i + 3 < part.count ? four.w : -kInf);
      }
    });
  };

  float lo = fmaxf(-1.f, p.c * (live.bound - top)), hi = kHighest, t = lo;
  int steps = 0;
  for (bool done = false; steps < kSolveSteps && !done; ++steps) {
    Moments<float> m{0.f, 0.f, 0.f};
    float least = kInf;
    for_scores([&](float score) {
      const float x = fmaf(p.c, score - top, -t);
      const bool inside = x > 0.f;
      accumulate(m, inside ? x : 0.f, p.r);
      least = fminf(least, inside ? x : kInf);
    });
    const float4 total =
        over_block({m.s0, m.s1, m.s2, least}, [](const float4& a, const float4& b) {
          return float4{a.x + b.x, a.y + b.y, a.z + b.z, fminf(a.w, b.w)};
        });
    done = refine({total.x, total.y, total.z}, p.r, lo, hi, t, total.w, steps);
  }
  if (threadIdx.x == 0) {
    p.tau[row.at] = fmaf(p.c, top, t);
    p.solved[row.at] = {top, flat ? t : kInf};
  }
  const auto distance = [&](float score) { return fmaf(p.c, score - top, -t); };

  if (p.support) {  // the call counts what it did
    int inside = 0;
    const auto mark = [&](float score, int key) {
      if (!(distance(score) > 0.f)) return;
      ++inside;
      mark_tile(p, row.head_row, row.query, key);
    };
    if (!flat)
      for (int i = lane; i < count; i += 32) mark(kept.score[i], kept.key[i]);
    else
      live.for_each([&](const Part& part) {
        for (int i = lane; i < part.count; i += 32)
          mark(p.scores[list + part.first + i], part.first + p.offsets[list + part.first + i]);
      });
    const float4 total = over_block({float(inside), 0.f, 0.f, 0.f}, add);
    if (threadIdx.x == 0) p.support[row.at] = int(total.x), p.iterations[row.at] = steps;
  }
  if (flat) return;

  const Cache<kPaged> values(p, p.v, row.batch, row.kv_head);
  const int lane_group = lane / kLanes, column = lane % kLanes * 8;
  float out[8] = {}, mass = 0.f;
  for (int first = lane_group; first < count; first += kLaneGroups * kBatch) {
    float prob[kBatch], value[kBatch][8] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = first + i * kLaneGroups;
      const float x = at < count ? distance(kept.score[at]) : 0.f;
      prob[i] = x > 0.f ? probability(x, p.r) : 0.f;
      if (prob[i] != 0.f) load8<kHeadDimV>(values.at(kept.key[at]), column, value[i]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (prob[i] == 0.f) continue;  // nothing is taken, not even a NaN
      mass += prob[i];
#pragma unroll
      for (int j = 0; j < 8; ++j) out[j] = fmaf(prob[i], value[i][j], out[j]);
    }
  }
#pragma unroll
  for (float& x : out) x = sum_over<kLaneGroups, kLanes>(x);
  if (lane_group == 0)
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[warp][column + j] = out[j];
  const float whole = over_block({column == 0 ? mass : 0.f, 0.f, 0.f, 0.f}, add).x;
  for (int i = threadIdx.x; i < kHeadDimV; i += kSolveThreads) {
    float total = 0.f;
#pragma unroll
    for (int one = 0; one < kSolveWarps; ++one) total += sums[one][i];
    store(row.output(p) + i, total / whole);
  }
}

// --- the output of flat rows ---------------------------------------------------------------

// Blocks of decode_weigh that a multiprocessor has room for at least: of four warps, 168 registers
// a thread, with which it spills nothing.
constexpr int kWeighWarps = kWeighThreads / 32, kWeighResidents = 3;

// A warp goes along the lists of its part, for eight rows at once: a key that several of them keep
// is read once. The block that ends last adds up the sums of all splits.
extern "C" __global__ void __launch_bounds__(kWeighThreads, kWeighResidents)
    decode_weigh(const __grid_constant__ DecodeParams p) {
  await_kernels_before();
  constexpr int kTile = kDecodeRowTile;
  __shared__ __align__(16) float all_weights[kWeighWarps][kWeighedKeys][kTile];
  __shared__ float sums[kWeighWarps][kTile][kWidth];
  __shared__ float masses[kWeighWarps][kTile];
  __shared__ bool is_last;
  const RowTile b = RowTile::of<kTile>(p, p.weighed);
  const int lane = lane_id(), warp = warp_id();
  // Lanes 0 to 7 have a row each.
  const bool has_row = lane < b.rows;
  const Solved solved = has_row ? p.solved[b.first + lane] : Solved{0.f, kInf};
  const u32 flat = __ballot_sync(kAllLanes, solved.t < kInf);
  if (flat == 0) return;

  const int number = b.split * kWeighWarps + warp;
  const bool has_part = number < parts_of(p);
  const int first_key = has_part ? parts_at(p, b.first)[number].first : 0;  // of all rows alike
  int count = 0, place = 0;
  if (has_part && solved.t < kInf) {
    const Part part = parts_at(p, b.first + lane)[number];
    if (fmaf(p.c, part.top - solved.top, -solved.t) > 0.f) count = part.count;
  }
  const Cache<kPaged> values(p, p.v, b.batch, b.kv_head);
  const int lane_group = lane / kLanes, column = lane % kLanes * 8;
  float (&weights)[kWeighedKeys][kTile] = all_weights[warp];
  float out[kTile][8] = {}, mass[kTile] = {};
  for (;;) {
    const i64 own = i64(b.first + lane) * p.list_length + first_key;
    int first = place < count ? p.offsets[own + place] : kDecodePart;
    first = __reduce_min_sync(kAllLanes, first);
    if (first == kDecodePart) break;
    __syncwarp();  // the weights before are read
#pragma unroll
    for (int row = 0; row < kTile; ++row) weights[lane][row] = 0.f;
    __syncwarp();
    u32 weighed = 0;  // the keys that some row keeps
#pragma unroll
    for (int row = 0; row < kTile; ++row) {
      const int at = __shfl_sync(kAllLanes, place, row) + lane;
      const int entries = __shfl_sync(kAllLanes, count, row);
      const float top = __shfl_sync(kAllLanes, solved.top, row);
      const float t = __shfl_sync(kAllLanes, solved.t, row);
      const i64 list = i64(b.first + row) * p.list_length + first_key;
      int key = kWeighedKeys;
      if (at < entries) key = p.offsets[list + at] - first;
      const bool here = key < kWeighedKeys;
      if (here) {
        const float x = fmaf(p.c, p.scores[list + at] - top, -t);
        const float prob = x > 0.f ? probability(x, p.r) : 0.f;
        weights[key][row] = prob;
        mass[row] += prob;
        if (prob != 0.f) weighed |= 1u << key;
      }
      const int taken = __popc(__ballot_sync(kAllLanes, here));
      if (lane == row) place += taken;
    }
    weighed = __reduce_or_sync(kAllLanes, weighed);
    __syncwarp();
#pragma unroll 1
    for (int of_batch = lane_group; of_batch < kWeighedKeys; of_batch += kLaneGroups * kBatch) {
      float value[kBatch][8] = {};
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int key = of_batch + i * kLaneGroups;
        if (weighed >> key & 1u)
          load8<kHeadDimV>(values.at(first_key + first + key), column, value[i]);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float4* of_key = reinterpret_cast<const float4*>(weights[of_batch + i * kLaneGroups]);
        const float4 low = of_key[0], high = of_key[1];
        const float w[kTile] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int row = 0; row < kTile; ++row)
          if (w[row] != 0.f)  // else nothing is taken, not even a NaN
#pragma unroll
            for (int j = 0; j < 8; ++j) out[row][j] = fmaf(w[row], value[i][j], out[row][j]);
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kTile; ++row) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float total = sum_over<kLaneGroups, kLanes>(out[row][j]);
      if (lane_group == 0) sums[warp][row][column + j] = total;
    }
    const float total = sum_over<32>(mass[row]);
    if (lane == 0) masses[warp][row] = total;
  }
  __syncthreads();

  const auto split_of = [&](int row, int split) { return i64(b.first + row) * p.weighed + split; };
  for (int i = threadIdx.x; i < kTile * kWidth; i += kWeighThreads) {
    const int row = i / kWidth, at = i % kWidth;
    if (!(flat >> row & 1u)) continue;
    float total = 0.f, whole = 0.f;
#pragma unroll
    for (int one = 0; one < kWeighWarps; ++one)
      total += sums[one][row][at], whole += masses[one][row];
    p.partials[split_of(row, b.split) * kWidth + at] = total;
    if (at == 0) p.masses[split_of(row, b.split)] = whole;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int* arrivals = p.arrivals + RowTile::number<kTile>(p, b.kv_row, b.first - b.first_row);
    is_last = atomicAdd(arrivals, 1) == p.weighed - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int i = threadIdx.x; i < kTile * kWidth; i += kWeighThreads) {
    const int row = i / kWidth, at = i % kWidth;
    if (!(flat >> row & 1u) || at >= kHeadDimV) continue;
    float total = 0.f, whole = 0.f;
#pragma unroll 4
    for (int split = 0; split < p.weighed; ++split) {
      total += __ldcg(p.partials + split_of(row, split) * kWidth + at);
      whole += __ldcg(p.masses + split_of(row, split));
    }
    store(QueryRow(p, b.first + row).output(p) + at, total / whole);
  }
}

}  // namespace adasplash2
