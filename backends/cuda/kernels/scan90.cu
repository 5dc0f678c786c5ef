// Forward, element path, on wgmma (Hopper, sm_90a): scan every allowed key once and keep the
// survivors of each query row (lists.cuh). 16-bit types whose rows start on 16 bytes, head_dim up
// to 128.
//
// A block owns kBlockRows queries of one head. One thread has tiles of keys copied into a ring of
// stages (TMA); kWarpgroups warpgroups of 64 rows each multiply and filter them. While one
// filters, the tensor cores work for others. (Taking turns at the tensor cores, as FlashAttention-3
// does, was a third slower, the slowest filter held up the rest; a warpgroup that multiplies
// its next tile while it filters this one has registers for tiles of half the size only.)
//
// The same code retries rows that their lists could not hold, though the arena may
// (ADASPLASH2_RETRY): one warpgroup has the whole shared memory for its lists, and starts from the
// bounds that the first scan proved, so that nearly all it meets are survivors.
//
// Dense tiles multiply 64 rows at least. So where one warp's rows are to go there for good, those
// of its warpgroup go along; by their first tile all rows of a block go there, or none.
#include "hopper.cuh"
#include "lists.cuh"

namespace adasplash2 {

static_assert(kHalf && kAligned && kDim <= kHopperMaxHeadDim);

constexpr int kWarpgroups = ADASPLASH2_WARPGROUPS;
constexpr int kStages = ADASPLASH2_STAGES;
constexpr bool kRetry = ADASPLASH2_RETRY;
constexpr int kConsumers = kWarpgroups * kWarpgroupThreads;
constexpr int kThreads = kConsumers + kWarpgroupThreads;
// The fewest that setmaxnreg knows; one thread that asks for tiles needs no more.
constexpr int kProducerRegisters = 24;
constexpr int kRows = kWarpgroupRows;
constexpr int kBlockRows = kWarpgroups * kRows;
constexpr int kTileKeys = kHopperKeys;
constexpr int kSlots = 2;

// Whether flat rows go to dense90_output.cu, else to dense.cu.
constexpr bool kDense90 = kAlpha != AlphaKind::kGeneral && kDimV <= kHopperMaxHeadDim;
// Whether a warpgroup whose rows are all flat may stop: dense90_output.cu finds the largest
// scores itself, dense.cu relies on the first scan.
constexpr bool kMayStop = kRetry || kDense90;
// Whether copies end when all warpgroups have stopped. Not those of a retry, which has more items.
constexpr bool kMayEnd = kMayStop && !kRetry;

constexpr int kPanelBytes = kTileKeys * kLineBytes;
constexpr int kStageBytes = kPanels * kPanelBytes;
constexpr int kBarriers = 2 * kStages;

// How a scan ends before its last tile. A warpgroup that needs no more tiles sets its bit in
// `stopped`. When the thread that copies sees all bits set, it copies no more: it writes the number
// of the next tile to `last`, which is -1 until then, and arrives at the barrier of that tile
// itself. Warps that wait there go on, see that the tile is the `last` one and end. If the thread
// reads `stopped` just before the last bit is set, it copies one tile too many, and announces the
// one after it. `last` is written before the arrival and read after the wait: a warp that missed it
// would wait for the next tile for ever. Both are accessed atomically. `most` is what a warp notes
// for Lists::filter(), which has no registers for it: hence volatile.
struct Notes {
  u32 stopped;  // bit of each warpgroup
  int last;
  volatile int most[kWarpgroups * 4];

  __device__ __forceinline__ void stop(int warpgroup) { atomicOr(&stopped, 1u << warpgroup); }
  __device__ __forceinline__ bool all_stopped() {
    return atomicOr(&stopped, 0u) == (1u << kWarpgroups) - 1;
  }
  __device__ __forceinline__ void announce(int tile) { atomicExch(&last, tile); }
  // Asked by a whole warp.
  __device__ __forceinline__ bool is_last(int tile) {
    return __shfl_sync(kAllLanes, lane_id() == 0 && atomicOr(&last, 0) == tile, 0);
  }
};
// Of how many items a retry notes whether they are worth it: one a thread, see Share.
constexpr int kNoted = kRetry ? kThreads : 1;
// The barriers and these are static shared memory: what is launched with has room for all.
static_assert(kSwizzleAlignment + kStages * kStageBytes + kWarpgroups * 4 * Lists<kSlots>::kBytes +
                  kBarriers * sizeof(u64) + sizeof(Notes) + kNoted <=
              ADASPLASH2_SHARED_SCAN);

// --- products ------------------------------------------------------------------------------

using Scores = float[kTileKeys / 2];

// q k^T of a warpgroup's 64 rows and one tile.
__device__ __forceinline__ void multiply(Scores& s, const AFragment (&q)[kDim / 16], u64 tile) {
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k)
    if (k == 0)
      multiply_registers<false>(s, q[k], tile);
    else
      multiply_registers<true>(s, q[k], tile + columns_at(k, kTileKeys));
  wgmma_commit();
  wgmma_wait();
  fence_operands(s);
}

// --- loads ---------------------------------------------------------------------------------

// A block of queries: where it is, and the tiles of keys that it may see.
struct Item : QueryBlock<kBlockRows> {
  KeyTiles<kTileKeys> tiles;

  __device__ __forceinline__ Item(const Params& p, int number)
      : QueryBlock(p, number), tiles(first + kBlockRows - 1, p.length_k) {}
  __device__ __forceinline__ bool is_worth_it(const Params& p) const {
    const int row_block = first / kRowBlock;
    bool any = false;
    for (int i = row_block; i < min(p.row_blocks, row_block + kBlockRows / kRowBlock); ++i)
      any |= of_row_blocks(p, p.flat, head_row)[i] == kToRetry;
    return any;
  }
};

// The items in which a block of a retry looks for rows: every gridDim.x-th one. Each thread checks
// one of the first items: mostly none is worth it, and to check one after another would take longer
// than all else.
struct Share {
  const Params& p;
  const int items;

  __device__ __forceinline__ explicit Share(const Params& p)
      : p(p), items(query_blocks<kBlockRows>(p)) {}
  __device__ __forceinline__ int number(int i) const { return blockIdx.x + i * gridDim.x; }
  __device__ __forceinline__ bool is_worth_it(int i) const {
    return number(i) < items && Item(p, number(i)).is_worth_it(p);
  }
};

// body(item) for what this block has to do: one item, or those of its share with flat rows.
template <class Body>
__device__ __forceinline__ void for_items(const Params& p, const bool* worth_it, const Body& body) {
  if constexpr (!kRetry) {
    body(Item(p, blockIdx.x));
  } else {
    const Share share(p);
#pragma unroll 1
    for (int i = 0; share.number(i) < share.items; ++i)
      if (i < kNoted ? worth_it[i] : share.is_worth_it(i)) body(Item(p, share.number(i)));
  }
}

using KeyRing = Ring<kStages>;

// One thread has the tiles copied, until all warpgroups have stopped.
__device__ __forceinline__ void tma_load_tiles(const Params& p, const TensorMap& map,
                                               const Item& item, KeyRing& at, u32 stages, u32 full,
                                               u32 empty, Notes& notes) {
  const Plane plane(p.k, item.kv_head, item.batch);
  for (int i = 0; i < item.tiles.count(); ++i, at.advance()) {
    at.await_empty(empty);
    if constexpr (kMayEnd) {
      if (notes.all_stopped()) {
        notes.announce(i);
        arrive(full + at.stage * 8);
        return;
      }
    }
    arrive_expect_tx(full + at.stage * 8, kStageBytes);
    tma_load_tile<kTileKeys, kPanels, kTileKeys>(stages + at.stage * kStageBytes, map,
                                                 item.tiles.nth(i) * kTileKeys, plane,
                                                 full + at.stage * 8);
  }
}

// A warp's queries as A fragments. One with NaN or infinity is loaded as zeros, and the bit of its
// slot is set in what is returned: lists must keep none of its scores.
__device__ __forceinline__ u32 load_queries(AFragment (&q)[kDim / 16], const Params& p,
                                            const Scalar* head, int first) {
  u32 dead = 0;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int row = first + slot * 8 + lane_id() / 4;
    const bool inside = row < p.length_q;
    const Scalar* from = row_in(head, p.q.row, inside ? row : 0) + lane_id() % 4 * 2;
    bool bad = false;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = k * 16 + half * 8;
        const u32 raw = inside && at < kHeadDim ? *reinterpret_cast<const u32*>(from + at) : 0u;
        const float2 pair = Scalar::unpack(raw);
        bad |= !is_finite(pair.x) || !is_finite(pair.y);
        q[k].r[slot + half * 2] = signed_pair(p, raw);
      }
    if (__ballot_sync(kAllLanes, bad) >> (lane_id() & ~3) & 15u) {
      dead |= 1u << slot;
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) q[k].r[slot] = q[k].r[slot + 2] = 0;
    }
    if (!inside) dead |= 1u << slot;
  }
  return dead;
}

// --- the scan ------------------------------------------------------------------------------

// The scan of one warpgroup.
__device__ __forceinline__ void consume(const Params& p, const Item& item, KeyRing& at, u32 stages,
                                        u32 full, u32 empty, Notes& notes) {
  const int warp = uniform(warp_id());
  const int first_of_warpgroup = item.first + warp / 4 * kRows;
  const int first_row = item.first + warp * 16;
  const int row_block = row_block_of(p, item.head_row, first_row);
  AFragment q[kDim / 16];
  u32 dead = load_queries(q, p, row_of(p.q, item.batch, item.head, 0), first_row);
  const bool wanted = first_row < p.length_q && (!kRetry || p.flat[row_block] == kToRetry);
  if (!wanted) dead = ~0u;
  Lists<kSlots> lists;
  lists.start(stages + kStages * kStageBytes + warp * Lists<kSlots>::kBytes, dead);
  if (kRetry && wanted) lists.resume(p, row_block);

  constexpr int kParts = kTileKeys / kStagingKeys;
  const u64 first_tile = descriptor(stages);
  const auto take = [&] {
    at.await_full(full);
    return first_tile + at.stage * (kStageBytes / kDescriptorBytes);
  };
  // All warps of a warpgroup filter together: while one filters, the others cannot multiply.
  const auto vote = [warp](bool due) { return any_of_warpgroup(1 + warp / 4, due); };
  const auto give_back = [&] {
    if (lane_id() == 0) arrive(empty + at.stage * 8);
    at.advance();
  };
  const auto most = [&] {
    return kDense90 ? most_kept(seen_end(first_row + 15, p.length_k)) : kMostOfArena;
  };
  // Whether a flat warp keeps so many that a retry would not help: more than the arena holds or,
  // where dense90_output.cu serves flat rows, more than half of what is too many for lists.
  const auto hopeless = [&] {
    return lists.flat && lists.kept > kRowBlock * (kDense90 ? most() / 2 : kArenaRow);
  };
  // The last key that the warpgroup needs: that some of its rows sees, or -1 where it needs no
  // more.
  int last_seen = seen_end(first_of_warpgroup + kRows - 1, p.length_k) - 1;
  const auto stop = [&] {
    last_seen = -1;
    if (kMayEnd && threadIdx.x % kWarpgroupThreads == 0) notes.stop(warp / 4);
  };
  if (first_of_warpgroup >= p.length_q) stop();
  const auto stage_and_filter = [&](const auto& score, int first_key) {
    const int column = first_key + lane_id() % 4 * 2;
    const auto limit = [&] { return notes.most[warp_id()]; };
    // The mean of the block: a warp at the limit says so with 16 of its lanes, others with more or
    // fewer in proportion to the scores that pass. All warps come here with their first tile, but
    // those of warpgroups without rows. Were it each warpgroup's own mean, most blocks near the
    // limit would have one that scans all keys, which takes nearly as long as if all did.
    const auto together = [&](int pass) {
      if (!first_tile_tells() || !kMayEnd || first_key > item.tiles.begin * kTileKeys) return false;
      const int limit = most_at_first(p.length_k);
      const bool mine = lane_id() < (16 * pass + limit / 2) / limit;
      const int asked = min(kWarpgroups, (p.length_q - item.first + kRows - 1) / kRows);
      return count_of(asked * kWarpgroupThreads, 1 + kWarpgroups, mine) > asked * 4 * 16;
    };
    // No limit where there is one tile only, of which lists hold what they can, and none in a
    // retry, where most scores that pass survive.
    lists.template stage_tile<kParts>(
        score, column, p, [&] { return kMayEnd && item.tiles.count() > 1 ? limit() : kAnyNumber; },
        together);
    return lists.template filter_if_due<kParts>(score, column, p, vote, limit);
  };
  for (int i = 0; i < item.tiles.count(); ++i) {
    const int first_key = item.tiles.nth(i) * kTileKeys;
    const u64 tile = take();
    if (first_key > last_seen) {
      const bool ended = kMayEnd && notes.is_last(i);
      give_back();
      if (ended) break;
      continue;
    }
    if (lane_id() == 0)
      notes.most[warp] =
          kDense90 && !kRetry ? most_so_far(most(), i + 1, item.tiles.count()) : most();
    __syncwarp();
    Scores s;
    multiply(s, q, tile);
    give_back();
    if (some_hidden(first_row, first_key + kTileKeys, p.length_k))
#pragma unroll
      for (int i = 0; i < kTileKeys / 2; ++i) {
        const int key = first_key + i / 4 * 8 + lane_id() % 4 * 2 + i % 2;
        const int row = first_row + i / 2 % 2 * 8 + lane_id() / 4;
        if (!is_seen(row, key, p.length_k)) s[i] = -kInf;
      }
    const bool filtered = stage_and_filter(
        [&](int slot, int n, int j) { return s[n * 4 + slot * 2 + j]; }, first_key);
    if (kMayStop && filtered && vote(lists.flat)) {
      if (vote(hopeless()))
        lists.give_up(), stop();
      else if (!vote(wanted && !lists.flat))
        stop();
    }
  }
  if (!wanted) return;
  lists.finish(p);
  const u32 overflow = lists.flat ? 1u : lists.write(p, item.head_row, row_block, first_row);
  if (overflow) lists.hand_over(p, row_block, first_row, overflow);
  const bool may_fit = lists.flat && !hopeless();
  if (lane_id() == 0) p.flat[row_block] = !overflow ? kListed : may_fit ? kToRetry : kFlat;
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    scan(const __grid_constant__ Params p, const __grid_constant__ TensorMap map) {
  start_next_and_await();
  extern __shared__ __align__(16) char shared[];  // 1,024 would count in full beside barriers[]
  __shared__ __align__(8) u64 barriers[kBarriers];
  __shared__ Notes notes;
  const u32 stages = align_tiles(shared_address(shared));
  const u32 full = shared_address(barriers), empty = full + kStages * 8;
  if (threadIdx.x < kStages) {
    init_barrier(full + threadIdx.x * 8, 1);
    init_barrier(empty + threadIdx.x * 8, kWarpgroups * 4);
    fence_async_proxy();
  }
  if (threadIdx.x == 0) notes.stopped = 0, notes.last = -1;
  __shared__ bool worth_it[kNoted];
  if constexpr (kRetry) worth_it[threadIdx.x] = Share(p).is_worth_it(threadIdx.x);
  __syncthreads();
  if (uniform(warp_id()) >= kConsumers / 32) {
    setmaxnreg_dec<kProducerRegisters>();
    KeyRing at;
    if (threadIdx.x == kConsumers)
      for_items(p, worth_it, [&](const Item& item) {
        tma_load_tiles(p, map, item, at, stages, full, empty, notes);
      });
  } else {
    setmaxnreg_inc<kWarpgroups, kProducerRegisters>();
    KeyRing at;
    for_items(p, worth_it,
              [&](const Item& item) { consume(p, item, at, stages, full, empty, notes); });
  }
}

}  // namespace adasplash2
