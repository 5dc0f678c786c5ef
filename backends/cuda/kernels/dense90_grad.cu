// Backward of rows in dense tiles on Hopper.
//
// Both kernels walk over pairs of tiles, x and y. A block of dense_grad_rows owns queries and
// gradients of outputs, and walks over keys (x) and values (y); one of dense_grad_columns owns keys
// and values, and walks over queries (x) and gradients of outputs (y).
#include "dense90.cuh"

namespace adasplash2 {

using GradRing = Ring<kGradStages>;
// What a block owns of an item, and of the next one where there is room.
constexpr int kOwnStages = ADASPLASH2_OWN_STAGES;
using OwnRing = Ring<kOwnStages>;

// How many tiles of queries there are, and whether one has flat rows: `parts` threads ask together,
// and each looks at some of its row blocks.
__device__ __forceinline__ int query_tiles(const Params& p) { return query_blocks<kBlockRows>(p); }
__device__ __forceinline__ bool has_flat_rows(const Params& p, int number, int part, int parts) {
  const QueryBlock<kBlockRows> b(p, number);
  bool any = false;
#pragma unroll 8
  for (int i = part; i < kBlockRows / kRowBlock; i += parts)
    if (const int at = b.first / kRowBlock + i; at < p.row_blocks)
      any |= of_row_blocks(p, p.flat, b.head_row)[at] != kListed;
  return any;
}

// The items that a block works on, one after another: while it ends with one the next one's tiles
// are on their way. Its own one where there are as many blocks, else every gridDim.x-th of those
// that are wanted.
struct Share {
  int count, items[kMostTiles], before[kThreads / 32];

  // body(item) for each, in order. Whoever copies and whoever multiplies goes through here.
  template <class Body>
  __device__ __forceinline__ void for_items(const Body& body) const {
#pragma unroll 1
    for (int i = 0; i < count; ++i) body(items[i]);
  }

  // All threads come together, and ask wanted(item, part, parts): as `parts` threads for one, or
  // each for some of its own.
  template <class Wanted>
  __device__ __forceinline__ void distribute(int all, const Wanted& wanted) {
    if (gridDim.x >= all) {
      const bool mine = any_of_block(wanted(blockIdx.x, threadIdx.x, kThreads));
      if (threadIdx.x == 0) count = mine, items[0] = blockIdx.x;
      __syncthreads();
      return;
    }
    const int each = (all + kThreads - 1) / kThreads, first = threadIdx.x * each;
    u32 found = 0;
    for (int i = 0; i < each && first + i < all; ++i) found |= u32(wanted(first + i, 0, 1)) << i;
    int rank = sum_upto(__popc(found));
    if (lane_id() == 31) before[warp_id()] = rank;
    __syncthreads();
    rank -= __popc(found);
    int total = 0;
#pragma unroll 1
    for (int warp = 0; warp < kThreads / 32; ++warp) {
      if (warp < warp_id()) rank += before[warp];
      total += before[warp];
    }
    for (; found; found &= found - 1, ++rank)
      if (rank % gridDim.x == blockIdx.x) items[rank / gridDim.x] = first + __ffs(found) - 1;
    if (threadIdx.x == 0) count = int((total + gridDim.x - 1 - blockIdx.x) / gridDim.x);
    __syncthreads();
  }
};

template <int rows>
struct Backward {
  static constexpr int kXBytes = tile_bytes<rows, kPanels>;
  static constexpr int kStageBytes = kXBytes + tile_bytes<rows, kPanelsV>;
  static constexpr int kOwnPairBytes = kOwnBytes + kOwnBytesV;
  static constexpr int kBarriers = 2 * kOwnStages + 2 * kGradStages;
  static constexpr int kSharedBytes =
      kSwizzleAlignment + kOwnStages * kOwnPairBytes + kGradStages * kStageBytes;

  u32 own, stages, full_own, empty_own, full, empty;

  __device__ __forceinline__ Backward(u32 memory, u32 barriers)
      : own(memory),
        stages(memory + kOwnStages * kOwnPairBytes),
        full_own(barriers),
        empty_own(full_own + 8 * kOwnStages),
        full(empty_own + 8 * kOwnStages),
        empty(full + 8 * kGradStages) {}
  __device__ __forceinline__ void start(int writers) const {
    for (int i = 0; i < kOwnStages; ++i)
      init_barrier(full_own + 8 * i, 1), init_barrier(empty_own + 8 * i, kConsumers);
    for (int i = 0; i < kGradStages; ++i)
      init_barrier(full + 8 * i, writers), init_barrier(empty + 8 * i, kConsumers);
    fence_async_proxy();
  }
  __device__ __forceinline__ void copy_own(const TensorMap& x, const Plane& of_x,
                                           const TensorMap& y, const Plane& of_y, int first,
                                           int stage) const {
    const u32 barrier = full_own + stage * 8, to = own + stage * kOwnPairBytes;
    arrive_expect_tx(barrier, kOwnPairBytes);
    tma_load_tile<kBlockRows, kPanels, kBox>(to, x, first, of_x, barrier);
    tma_load_tile<kBlockRows, kPanelsV, kBox>(to + kOwnBytes, y, first, of_y, barrier);
  }
  __device__ __forceinline__ void copy_pair(const TensorMap& x, const Plane& of_x,
                                            const TensorMap& y, const Plane& of_y, int first,
                                            int stage) const {
    arrive_expect_tx(full + stage * 8, kStageBytes);
    const u32 to = stages + stage * kStageBytes;
    tma_load_tile<rows, kPanels, kBox>(to, x, first, of_x, full + stage * 8);
    tma_load_tile<rows, kPanelsV, kBox>(to + kXBytes, y, first, of_y, full + stage * 8);
  }

  // s = own x^T and dp = own_y y^T
  __device__ __forceinline__ void start_dots(float (&s)[rows / 2], float (&dp)[rows / 2],
                                             int own_stage, int stage) const {
    const u32 mine = own + own_stage * kOwnPairBytes + uniform(warp_id() / 4) * kRows * kLineBytes,
              at = stages + stage * kStageBytes;
    wgmma_fence();
    add_dots<kDim, rows>(s, descriptor(mine), descriptor(at));
    add_dots<kDimV, rows>(dp, descriptor(mine + kOwnBytes), descriptor(at + kXBytes));
    wgmma_commit();
  }
  __device__ __forceinline__ u64 x_rows(int stage) const {
    return descriptor(stages + stage * kStageBytes, rows * kLineBytes);
  }
  __device__ __forceinline__ u64 y_rows(int stage) const {
    return descriptor(stages + stage * kStageBytes + kXBytes, rows * kLineBytes);
  }
  // Each thread arrives for itself. One lane could do so for its warp, but compute-sanitizer's
  // racecheck does not see that __syncwarp() puts the others' reads before it.
  __device__ __forceinline__ void give_back(int stage) const { arrive(empty + stage * 8); }
  // Wait for what an item owns, with the sign of the scale. `tiles` points to `own`.
  __device__ __forceinline__ void take_own(const Params& p, const OwnRing& ring,
                                           char* tiles) const {
    ring.await_full(full_own);
    sign_own(p, tiles + ring.stage * kOwnPairBytes, kOwnBytes);
  }
  __device__ __forceinline__ void give_back_own(OwnRing& ring) const {
    arrive(empty_own + ring.stage * 8);
    ring.advance();
  }
};

// x = z - tau where it is positive, else 0, also of a NaN. None is more than 1: then a row's
// probabilities would sum to more.
__device__ __forceinline__ float support(const Params& p, float score, float tau) {
  return __saturatef(fmaf(p.c, score, -tau));
}
// A score's share of its gradient: u (dp - delta). Of no weight and a dp that is not finite it is
// NaN: exact.cu does again what that reaches.
__device__ __forceinline__ float score_gradient(float inside, float dp, float delta) {
  if constexpr (kAlpha == AlphaKind::k15) return inside * (dp - delta);
  return inside > 0.f ? dp - delta : 0.f;
}

constexpr int kGradKeys = ADASPLASH2_GRAD_KEYS;
using GradRows = Backward<kGradKeys>;
static_assert(GradRows::kSharedBytes == ADASPLASH2_SHARED_DENSE_GRAD_ROWS);

// The tiles of keys in which some row of a block has weights, from the last one on. All lanes of a
// warp go through them together.
struct LiveKeys {
  __device__ __forceinline__ explicit LiveKeys(const Block& b)
      : words(live_tiles(b.p, b.head_row, min(b.first + lane_id() * kRowBlock, b.p.length_q - 1))),
        at(b.tiles<kLiveWordKeys>().end) {
    load();
  }

  // Returns the first key of the next one, or less than zero.
  __device__ __forceinline__ int next() {
    while (!some) {
      if (at < 0) return -1;
      some = __reduce_or_sync(kAllLanes, ahead);
      // The first bit of each tile stands for all of its bits.
      if constexpr (kGradKeys == 2 * kLiveKeys) some = (some | some >> 1) & 0x55555555;
      first = at * kLiveWordKeys;
      load();
    }
    const int bit = 31 - __clz(some);
    some ^= 1u << bit;
    return first + bit * kLiveKeys;
  }

 private:
  static_assert(kGradKeys == kLiveKeys || kGradKeys == 2 * kLiveKeys);
  const u32* words;  // of one row block to each lane
  int at, first;     // the word that is loaded ahead; the first key of the one at hand
  u32 some = 0;      // tiles of that one that are still to come
  u32 ahead;

  __device__ __forceinline__ void load() {
    --at;
    ahead = at >= 0 && lane_id() < kBlockRows / kRowBlock ? words[at] : 0;
  }
};

// The tiles of keys of a block of rows: first(its first key) of the last one, then next(its first
// key) of each other; of a block without weights the first one, so that it writes its zeros. The
// warp that copies and those that multiply all go through here: each side takes every tile, or the
// other one waits for ever.
template <class First, class Next>
__device__ __forceinline__ void for_key_tiles(LiveKeys tiles, const First& first,
                                              const Next& next) {
  int key = tiles.next();
  first(max(key, 0));
#pragma unroll 1
  while (key >= 0 && (key = tiles.next()) >= 0) next(key);
}

// dQ of the block's rows, and their delta.
__device__ __forceinline__ void sum_grad_rows(const GradRows& at, char* own, const Block& b,
                                              OwnRing& own_ring, GradRing& ring) {
  const Params& p = b.p;
  const LiveKeys tiles(b);
  float tau[2], delta[2];
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    tau[slot] = kInf, delta[slot] = 0.f;
    if (b.flat[slot]) {
      const i64 at_tau = row_number(p, b.head_row, b.row(slot));
      const SecondOutput second(p, b.head_row, b.row(slot));
      const Scalar* grad = row_of(p.grad_o, b.batch, b.head, b.row(slot));
      tau[slot] = p.tau[at_tau];
#pragma unroll
      for (int n = lane_id() % 4 * 8; n < kHeadDimV; n += 32) {
        float g[8];
        load8<kHeadDimV>(grad, n, g);
        delta[slot] += second.times(n, g);
      }
    }
    delta[slot] = sum_over<4>(delta[slot]);
    if (b.flat[slot] && lane_id() % 4 == 0)
      p.delta[row_number(p, b.head_row, b.row(slot))] = delta[slot];
  }
  at.take_own(p, own_ring, own);

  constexpr int kSteps = kGradKeys / 16;
  constexpr bool kOverlap = kNarrow;
  Sums<kPanels> grad = {};
  AFragment weights[kSteps];
  const auto start = [&](float (&s)[kGradKeys / 2], float (&dp)[kGradKeys / 2]) {
    ring.await_full(at.full);
    at.start_dots(s, dp, own_ring.stage, ring.stage);
  };
  const auto weigh = [&](float (&s)[kGradKeys / 2], float (&dp)[kGradKeys / 2], int first_key) {
    wgmma_wait();
    fence_operands(s), fence_operands(dp), fence_operands(grad), fence_operands(weights);
    b.mask(s, first_key);
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
      weights[k] = as_a_fragment([&](int e) {
        const int slot = e / 2 % 2;
        return score_gradient(support(p, s[8 * k + e], tau[slot]), dp[8 * k + e], delta[slot]);
      });
  };
  const auto add = [&](int stage) {
    wgmma_fence();
    add_weighted(grad, weights, at.x_rows(stage));
    wgmma_commit();
  };
  const auto first = [&](int first_key) {
    float s[kGradKeys / 2], dp[kGradKeys / 2];
    start(s, dp);
    weigh(s, dp, first_key);
  };
  const auto next = [&](int first_key) {
    const int before = ring.stage;
    ring.advance();
    float s[kGradKeys / 2], dp[kGradKeys / 2];
    if constexpr (kOverlap) start(s, dp);
    add(before);
    wgmma_wait();
    if constexpr (!kOverlap) fence_operands(grad), start(s, dp), wgmma_wait();
    at.give_back(before);
    weigh(s, dp, first_key);
  };
  for_key_tiles(tiles, first, next);
  at.give_back_own(own_ring);
  add(ring.stage);
  wgmma_wait();
  fence_operands(grad);
  at.give_back(ring.stage);
  ring.advance();
  bool unsafe = false;
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const bool poisoned = tau[slot] != tau[slot];
    unsafe |= b.flat[slot] && !poisoned && !are_finite<kHeadDim>(grad, slot);
    if (poisoned)
#pragma unroll
      for (int n = 0; n < kPanels * 8; ++n)
        grad[4 * n + 2 * slot] = grad[4 * n + 2 * slot + 1] = kNaN;
  }
  mark_rows_if(unsafe, p, b.head_row, b.first_row);
  write_rows<kHeadDim>(grad, row_of(p.grad_q, b.batch, b.head, 0), p.grad_q.row, b.first_row,
                       p.length_q, score_slope(p), b.flat);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    dense_grad_rows(const __grid_constant__ Params p, const __grid_constant__ TensorMap query_map,
                    const __grid_constant__ TensorMap key_map,
                    const __grid_constant__ TensorMap value_map,
                    const __grid_constant__ TensorMap grad_map) {
  start_next_and_await();
  extern __shared__ __align__(16) char shared[];
  __shared__ __align__(8) u64 barriers[GradRows::kBarriers];
  __shared__ Share share;
  share.distribute(query_tiles(p), [&](int item, int part, int parts) {
    return has_flat_rows(p, item, part, parts);
  });
  if (share.count == 0) return;
  const u32 start = shared_address(shared), memory = align_tiles(start);
  OwnRing own;
  GradRing ring;
  const GradRows at(memory, shared_address(barriers));
  if (threadIdx.x == 0) at.start(1);
  __syncthreads();
  if (uniform(warp_id()) >= kConsumers / 32) {
    setmaxnreg_dec<kProducerRegisters>();
    if (uniform(warp_id()) != kConsumers / 32) return;
    share.for_items([&](int item) {
      const Block b(p, item);
      const LiveKeys tiles(b);
      own.await_empty(at.empty_own);
      if (lane_id() == 0)
        at.copy_own(query_map, Plane(p.q, b.head, b.batch), grad_map,
                    Plane(p.grad_o, b.head, b.batch), b.first, own.stage);
      __syncwarp();
      own.advance();
      const Plane keys(p.k, b.kv_head, b.batch), values(p.v, b.kv_head, b.batch);
      const auto copy = [&](int first_key) {
        ring.await_empty(at.empty);
        if (lane_id() == 0) at.copy_pair(key_map, keys, value_map, values, first_key, ring.stage);
        __syncwarp();
        ring.advance();
      };
      for_key_tiles(tiles, copy, copy);
    });
  } else {
    setmaxnreg_inc<kWarpgroups, kProducerRegisters>();
    share.for_items(
        [&](int item) { sum_grad_rows(at, shared + (memory - start), Block(p, item), own, ring); });
  }
}

// What flat rows add to dK and dV; a block owns kBlockRows keys.
using GradColumns = Backward<kGradQueries>;
static_assert(GradColumns::kSharedBytes == ADASPLASH2_SHARED_DENSE_GRAD_COLUMNS);

// What the warp that copies says of a tile of queries.
struct alignas(16) Queries {
  float2 tau_delta[kGradQueries];  // tau is infinite of rows that have no part in it
  int first;                       // -1 after the last tile
  bool mixed;                      // whether there are such rows, which may hold NaN
};

// The keys of a block.
struct Keys : KeyBlock<kBlockRows> {
  int start;   // the first query that may see them
  bool alone;  // whether lists have no part in their gradients: these are written, not added to

  __device__ __forceinline__ Keys(const Params& p, int number)
      : KeyBlock(p, number), start(first_row_of(first)), alone(is_all_flat(p, kv_row)) {}

  // Whether there may be something to add to what lists left, or to write. `parts` threads ask.
  __device__ __forceinline__ bool are_wanted(const Params& p, int part, int parts) const {
    const int kind = p.all_flat[kv_row];
    if (kind != kMixed) return kind == kAllFlat;
    if (parts == 1) return true;  // the warp that copies will find out
    return is_any_flat(p, head_row(p), start, part, parts);
  }

  // Zeros of those that no query sees.
  template <int width>
  __device__ __forceinline__ void clear(const Params& p, const View& grad) const {
    Scalar* head = row_of(grad, batch, kv_head, 0);
    for (int i = threadIdx.x; i < kBlockRows * (width / 2); i += kConsumers)
      if (const int key = first + i / (width / 2); key < p.length_k)
        reinterpret_cast<u32*>(row_in(head, grad.row, key))[i % (width / 2)] = 0;
  }
};

// The tiles of queries with flat rows that have weights of the block's keys, in order, for the warp
// that copies. Its lanes check 32 tiles at once: others are skipped without a wait for memory.
struct FlatTiles {
  int member = 0, first;  // of the query heads that share the keys, and the first query

  __device__ __forceinline__ explicit FlatTiles(const Keys& b) : ahead(b.start) {}

  // Returns whether there is another one.
  __device__ __forceinline__ bool next(const Params& p, const Keys& b) {
    while (!some) {
      if (ahead >= p.length_q) ahead = b.start, ++member;
      if (member >= p.gqa_group || b.start >= p.length_q) return false;
      start = ahead;
      ahead += 32 * kGradQueries;
      const int head_row = b.head_row(p) + member, word = b.first / kLiveWordKeys;
      const u32 bits = kBits << b.first % kLiveWordKeys / kLiveKeys;
      bool any = false;
#pragma unroll
      for (int i = 0; i < kGradQueries / kRowBlock; ++i)
        if (const int row = start + lane_id() * kGradQueries + i * kRowBlock; row < p.length_q)
          any |=
              p.flat[row_block_of(p, head_row, row)] && (live_tiles(p, head_row, row)[word] & bits);
      some = __ballot_sync(kAllLanes, any);
    }
    first = start + (__ffs(some) - 1) * kGradQueries;
    some &= some - 1;
    return true;
  }

 private:
  static constexpr u32 kBits = (1u << kBlockRows / kLiveKeys) - 1;  // of the block's keys
  u32 some = 0;      // of 32 tiles from `start` on, those that are still to come
  int start, ahead;  // where the next 32 begin
};

// What its lanes know of a tile, each of one in 32 queries. All of it is loaded at once, and before
// there is room for the tile: else the tensor cores would wait for memory.
struct QueryRows {
  static constexpr int kEach = kGradQueries / 32;
  float tau[kEach], delta[kEach];
  bool inside[kEach], flat[kEach];

  __device__ __forceinline__ void load(const Params& p, int head_row, int first) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = first + i * 32 + lane_id();
      const i64 at = row_number(p, head_row, row);
      inside[i] = row < p.length_q;
      flat[i] = inside[i] && p.flat[row_block_of(p, head_row, row)];
      tau[i] = inside[i] ? p.tau[at] : kInf;
      delta[i] = inside[i] ? p.delta[at] : 0.f;
    }
  }
  // Returns whether there are rows that have no part in it.
  __device__ __forceinline__ bool put(Queries& to) const {
    bool mixed = false;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const bool kept = flat[i] && tau[i] < kInf;  // not so of a poisoned row
      to.tau_delta[i * 32 + lane_id()] = {kept ? tau[i] : kInf, kept ? delta[i] : 0.f};
      mixed |= inside[i] && !kept;
    }
    return __any_sync(kAllLanes, mixed);
  }
};

__device__ __forceinline__ void copy_queries(const GradColumns& at, Queries* queries,
                                             const Params& p, const Keys& b,
                                             const TensorMap& query_map, const TensorMap& grad_map,
                                             GradRing& ring) {
  FlatTiles tiles(b);
  QueryRows next;
  const auto look_ahead = [&] {
    const bool more = tiles.next(p, b);
    if (more) next.load(p, b.head_row(p) + tiles.member, tiles.first);
    return more;
  };
  bool more = look_ahead();
#pragma unroll 1
  while (more) {
    const QueryRows rows = next;
    const int head = b.first_head(p) + tiles.member, here = tiles.first;
    more = look_ahead();
    ring.await_empty(at.empty);
    Queries& q = queries[ring.stage];
    const bool mixed = rows.put(q);
    if (lane_id() == 0) {
      q.first = here, q.mixed = mixed;
      at.copy_pair(query_map, Plane(p.q, head, b.batch), grad_map, Plane(p.grad_o, head, b.batch),
                   here, ring.stage);
    } else {
      arrive(at.full + ring.stage * 8);
    }
    ring.advance();
  }
  ring.await_empty(at.empty);
  if (lane_id() == 0) queries[ring.stage].first = -1;
  arrive(at.full + ring.stage * 8);
  ring.advance();
}

// Write a gradient of a warp's keys, or add to what lists left of it. Where keys are unsafe it
// stays as it is, or becomes zero.
template <int width, int count>
__device__ __forceinline__ void write_keys(float (&sums)[count], const Params& p, const View& to,
                                           const Keys& b, int first_key, float factor,
                                           bool of_values) {
  const bool unsafe = !are_finite<width>(sums, 0) || !are_finite<width>(sums, 1);
  if (mark_keys_if(unsafe, p, b.kv_row, first_key, of_values)) {
    if (!b.alone) return;
#pragma unroll
    for (float& x : sums) x = 0.f;
  }
  const bool all[2] = {true, true};
  write_rows<width>(sums, row_of(to, b.batch, b.kv_head, 0), to.row, first_key, p.length_k, factor,
                    all, !b.alone);
}

__device__ __forceinline__ void sum_grad_columns(const GradColumns& at, char* own,
                                                 const Queries* queries, const Params& p,
                                                 const Keys& b, OwnRing& own_ring, GradRing& ring) {
  constexpr int kSteps = kGradQueries / 16;
  constexpr bool kOverlap = kNarrow;  // else too few registers
  const int first_key = b.first + warp_id() * 16;
  Sums<kPanels> grad_k = {};
  Sums<kPanelsV> grad_v = {};
  AFragment probs[kSteps], weights[kSteps];
  using Dots = float[kGradQueries / 2];
  at.take_own(p, own_ring, own);

  // Whether there is another tile; rows without a part in it must not reach the keys through
  // 0 * NaN.
  const auto next = [&] {
    ring.await_full(at.full);
    const Queries& q = queries[ring.stage];
    if (q.first < 0) {
      at.give_back(ring.stage);
      ring.advance();
      return false;
    }
    if (q.mixed) {
      char* tile = own + (at.stages - at.own) + ring.stage * GradColumns::kStageBytes;
      for (int i = threadIdx.x / 8; i < kGradQueries; i += kConsumers / 8)
        if (!(q.tau_delta[i].x < kInf))
#pragma unroll
          for (int panel = 0; panel < kPanels + kPanelsV; ++panel)
            reinterpret_cast<uint4*>(tile + (panel * kGradQueries + i) *
                                                kLineBytes)[threadIdx.x % 8] = {0, 0, 0, 0};
      fence_async_proxy();
      sync_consumers();
    }
    return true;
  };
  const auto weigh = [&](Dots& s, Dots& dp) {
    wgmma_wait();
    fence_operands(s), fence_operands(dp), fence_operands(grad_k), fence_operands(grad_v),
        fence_operands(probs), fence_operands(weights);
    const Queries& q = queries[ring.stage];
    if (q.first < first_row_of(first_key + 15)) {
      // Queries before these do not see the keys of the lane's two rows.
      const int first_query = q.first + lane_id() % 4 * 2, key = first_key + lane_id() / 4;
      const int from[2] = {first_row_of(key) - first_query, first_row_of(key + 8) - first_query};
#pragma unroll
      for (int i = 0; i < kGradQueries / 2; ++i)
        if (i / 4 * 8 + i % 2 < from[i / 2 % 2]) s[i] = -kInf;
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      float prob[8];
      float4 of_two[2];  // tau and delta of two queries
#pragma unroll
      for (int n = 0; n < 2; ++n)
        of_two[n] =
            *reinterpret_cast<const float4*>(q.tau_delta + (2 * k + n) * 8 + lane_id() % 4 * 2);
      weights[k] = as_a_fragment([&](int e) {
        const float4& at_two = of_two[e / 4];
        const float tau = e % 2 ? at_two.z : at_two.x, delta = e % 2 ? at_two.w : at_two.y;
        const float inside = support(p, s[8 * k + e], tau);
        prob[e] = kProbScale * (kAlpha == AlphaKind::k15 ? inside * inside : inside);
        return score_gradient(inside, dp[8 * k + e], delta);
      });
      probs[k] = as_a_fragment([&](int e) { return prob[e]; });
    }
  };
  const auto start = [&](Dots& s, Dots& dp) { at.start_dots(s, dp, own_ring.stage, ring.stage); };
  const auto add = [&](int stage) {
    wgmma_fence();
    add_weighted(grad_v, probs, at.y_rows(stage));
    add_weighted(grad_k, weights, at.x_rows(stage));
    wgmma_commit();
  };
  if (!next()) {
    at.give_back_own(own_ring);
    if (b.alone) b.clear<kHeadDim>(p, p.grad_k), b.clear<kHeadDimV>(p, p.grad_v);
    return;
  }
  {
    Dots s, dp;
    start(s, dp);
    weigh(s, dp);
  }
#pragma unroll 1
  while (true) {
    const int before = ring.stage;
    if constexpr (!kOverlap) {
      add(before);
      wgmma_wait();
      fence_operands(grad_k), fence_operands(grad_v);
      at.give_back(before);
    }
    ring.advance();
    if (!next()) {
      at.give_back_own(own_ring);
      if constexpr (kOverlap) {
        add(before);
        wgmma_wait();
        at.give_back(before);
      }
      break;
    }
    Dots s, dp;
    start(s, dp);
    if constexpr (kOverlap) {
      add(before);
      wgmma_wait();
      at.give_back(before);
    }
    weigh(s, dp);
  }
  fence_operands(grad_k), fence_operands(grad_v);
  write_keys<kHeadDim>(grad_k, p, p.grad_k, b, first_key, score_slope(p), false);
  write_keys<kHeadDimV>(grad_v, p, p.grad_v, b, first_key, 1.f / kProbScale, true);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    dense_grad_columns(const __grid_constant__ Params p,
                       const __grid_constant__ TensorMap query_map,
                       const __grid_constant__ TensorMap key_map,
                       const __grid_constant__ TensorMap value_map,
                       const __grid_constant__ TensorMap grad_map) {
  start_next_and_await();
  extern __shared__ __align__(16) char shared[];
  __shared__ __align__(8) u64 barriers[GradColumns::kBarriers];
  __shared__ __align__(16) Queries queries[kGradStages];
  __shared__ Share share;
  const int tiles = key_blocks<kBlockRows>(p);
  share.distribute(tiles, [&](int item, int part, int parts) {
    return Keys(p, item).are_wanted(p, part, parts);
  });
  if (share.count == 0) return;
  const u32 start = shared_address(shared), memory = align_tiles(start);
  OwnRing own;
  GradRing ring;
  const GradColumns at(memory, shared_address(barriers));
  if (threadIdx.x == 0) at.start(32);
  __syncthreads();
  if (uniform(warp_id()) >= kConsumers / 32) {
    setmaxnreg_dec<kProducerRegisters>();
    if (uniform(warp_id()) != kConsumers / 32) return;
    share.for_items([&](int item) {
      const Keys b(p, item);
      own.await_empty(at.empty_own);
      if (lane_id() == 0)
        at.copy_own(key_map, Plane(p.k, b.kv_head, b.batch), value_map,
                    Plane(p.v, b.kv_head, b.batch), b.first, own.stage);
      __syncwarp();
      own.advance();
      copy_queries(at, queries, p, b, query_map, grad_map, ring);
    });
  } else {
    setmaxnreg_inc<kWarpgroups, kProducerRegisters>();
    share.for_items([&](int item) {
      sum_grad_columns(at, shared + (memory - start), queries, p, Keys(p, item), own, ring);
    });
  }
}

}  // namespace adasplash2
