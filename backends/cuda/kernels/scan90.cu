// Forward, element path, on wgmma (Hopper, sm_90a): scan every allowed key once and keep the
// survivors of each query row (lists.cuh). 16-bit types whose rows start on 16 bytes, head_dim up
// to 128.
//
// A block owns kBlockRows queries of one head. One thread has tiles of keys copied into a ring of
// stages (TMA); kGroups warpgroups of 64 rows each multiply and filter them. While one filters, the
// tensor cores work for others. (Taking turns at the tensor cores, as FlashAttention-3 does, was a
// third slower, the slowest filter held up the rest; a group that multiplies its next tile while it
// filters this one has registers for tiles of half the size only.)
//
// The same code has a second look at rows that their lists could not hold (ADASPLASH2_RETRY): one
// warpgroup has the whole shared memory for its lists, and starts from the bounds that the first
// look proved, so that nearly all it meets are survivors.
#include "lists.cuh"

namespace adasplash2 {

static_assert(kHalf && kAligned && kDim <= 128);

constexpr int kGroups = ADASPLASH2_WARPGROUPS;
constexpr int kStages = ADASPLASH2_STAGES;
constexpr bool kRetry = ADASPLASH2_RETRY;
constexpr int kConsumers = kGroups * 128;
constexpr int kThreads = kConsumers + 128;
// Registers move from the warpgroup that copies to those that hold scores: by eights, and together
// no more than the block was launched with.
constexpr int kCopierRegisters = 24;
constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
constexpr int kShare = (kLaunchRegisters * kThreads - kCopierRegisters * 128) / kConsumers / 8 * 8;
constexpr int kConsumerRegisters = kShare < 240 ? kShare : 240;
constexpr int kRows = 64;  // of a warpgroup: M of wgmma
constexpr int kBlockRows = kGroups * kRows;
constexpr int kTileKeys = 128;  // N of wgmma
constexpr int kSlots = 2;

// A tile stands in panels of 64 columns (128 bytes, the width of the swizzle), keys one below
// another: the 16-byte unit u of key n lies at unit u ^ (n % 8) of its line.
constexpr int kPanelBytes = kTileKeys * 128;
constexpr int kPanels = (kDim + 63) / 64;
constexpr int kStageBytes = kPanels * kPanelBytes;

// --- barriers in shared memory -------------------------------------------------------------

__device__ __forceinline__ void init_barrier(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Wait until the barrier's phase of this parity is complete.
__device__ __forceinline__ void await(u32 barrier, u32 parity) {
  asm volatile(
      "{.reg .pred done;"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;"
      "@!done bra again;}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Where a walk through the ring is: a stage, and the parity of its round.
struct Ring {
  int stage = 0;
  u32 parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// --- products ------------------------------------------------------------------------------

using Scores = float[kTileKeys / 2];  // 4 n + 2 s + j: column 8 n + j of the lane's slot s

// What wgmma needs to know of a tile: where it starts, 1,024 bytes from one group of eight keys
// to the next, 128-byte swizzle. Addresses are in units of 16 bytes and add without carry.
constexpr int kDescriptorUnit = 16;
__device__ __forceinline__ unsigned long long descriptor(u32 address) {
  return (unsigned long long)(address / kDescriptorUnit & 0x3fff) | 1ull << 16 | 64ull << 32 |
         1ull << 62;
}

__device__ __forceinline__ void multiply_tile(Scores& s, const Left& a, unsigned long long keys,
                                              int accumulate) {
#define ADASPLASH2_S4(i) "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3])
#if ADASPLASH2_DTYPE == 1
#define ADASPLASH2_TYPES ".f32.f16.f16 "
#else
#define ADASPLASH2_TYPES ".f32.bf16.bf16 "
#endif

  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %69, 0;"
      "wgmma.mma_async.sync.aligned.m64n128k16" ADASPLASH2_TYPES
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, "
      "%37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, "
      "%55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, p, 1, 1, 0;}"
      : ADASPLASH2_S4(0), ADASPLASH2_S4(4), ADASPLASH2_S4(8), ADASPLASH2_S4(12), ADASPLASH2_S4(16),
        ADASPLASH2_S4(20), ADASPLASH2_S4(24), ADASPLASH2_S4(28), ADASPLASH2_S4(32),
        ADASPLASH2_S4(36), ADASPLASH2_S4(40), ADASPLASH2_S4(44), ADASPLASH2_S4(48),
        ADASPLASH2_S4(52), ADASPLASH2_S4(56), ADASPLASH2_S4(60)
      : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "l"(keys), "r"(accumulate));
}

// q k^T of a warpgroup's 64 rows and one tile.
__device__ __forceinline__ void multiply(Scores& s, const Left (&q)[kDim / 16],
                                         unsigned long long tile) {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k)
    multiply_tile(s, q[k], tile + (k / 4 * kPanelBytes + k % 4 * 32) / kDescriptorUnit, k > 0);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (float& x : s) asm volatile("" : "+f"(x)::"memory");  // reads stay behind
}

// --- loads ---------------------------------------------------------------------------------

// What the copy engine knows of the keys, as the driver encodes it: dimensions (head_dim, length,
// heads, batch), boxes of 64 columns by kTileKeys keys.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

// A block of queries: where it is, and how many tiles of keys it may see.
struct Item {
  int head_row, batch, head, block, tiles;

  __device__ __forceinline__ Item(const Params& p, int number) {
    const int blocks = (p.length_q + kBlockRows - 1) / kBlockRows;
    head_row = number / blocks;            // head-major: K of one head stays in the L2
    block = blocks - 1 - number % blocks;  // longest rows first
    batch = head_row / p.heads_q, head = head_row % p.heads_q;
    const int seen = kCausal ? min(p.length_k, block * kBlockRows + kBlockRows) : p.length_k;
    tiles = (seen + kTileKeys - 1) / kTileKeys;
  }
  __device__ __forceinline__ bool has_flat_rows(const Params& p) const {
    const int first = block * (kBlockRows / kGroupRows);
    bool any = false;
    for (int i = first; i < min(p.groups_q, first + kBlockRows / kGroupRows); ++i)
      any |= p.flat[i64(head_row) * p.groups_q + i] != 0;
    return any;
  }
};

// body(item) for what this block has to do: one item, or its share of those with flat rows.
template <class Body>
__device__ __forceinline__ void for_items(const Params& p, const Body& body) {
  if constexpr (!kRetry) {
    body(Item(p, blockIdx.x));
  } else {
    const int items = p.batch * p.heads_q * ((p.length_q + kBlockRows - 1) / kBlockRows);
#pragma unroll 1
    for (int number = blockIdx.x; number < items; number += gridDim.x)
      if (const Item item(p, number); item.has_flat_rows(p)) body(item);
  }
}

// One thread has the tiles copied. Keys and columns out of bounds become zeros.
__device__ __forceinline__ void copy_tiles(const Params& p, const TensorMap& map, const Item& item,
                                           Ring& at, u32 stages, u32 full, u32 empty) {
  // A dimension that was expanded with stride 0 has one entry in the map.
  const int head_at = p.k.head ? item.head / p.group : 0, batch_at = p.k.batch ? item.batch : 0;
  for (int i = 0; i < item.tiles; ++i, at.advance()) {
    const int tile = nth_tile(i, item.tiles);
    await(empty + at.stage * 8, at.parity ^ 1);  // a new barrier counts as one of that parity
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full + at.stage * 8),
        "r"(kStageBytes)
        : "memory");
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      asm volatile(
          "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
          " [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(stages + at.stage * kStageBytes +
                                                       panel * kPanelBytes),
          "l"(&map), "r"(panel * 64), "r"(tile * kTileKeys), "r"(head_at), "r"(batch_at),
          "r"(full + at.stage * 8)
          : "memory");
  }
}

// A warp's queries as left operands; those with NaN or infinity become zeros and are returned as
// a mask of slots, so that they do not flood the lists.
__device__ __forceinline__ u32 load_queries(Left (&q)[kDim / 16], const Params& p,
                                            const Scalar* head, int first) {
  const u32 flip = p.q_sign < 0.f ? 0x80008000u : 0u, mask = p.q_sign == 0.f ? 0u : ~0u;
  u32 dead = 0;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int row = first + slot * 8 + lane_id() / 4;
    const bool inside = row < p.length_q;
    const Scalar* from = head + i64(inside ? row : 0) * p.q.row + lane_id() % 4 * 2;
    bool bad = false;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = k * 16 + half * 8;
        const u32 raw = inside && at < kHeadDim ? *reinterpret_cast<const u32*>(from + at) : 0u;
        const float2 pair = Scalar::unpack(raw);
        bad |= !is_finite(pair.x) || !is_finite(pair.y);
        q[k].r[slot + half * 2] = (raw ^ flip) & mask;
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
__device__ __forceinline__ void consume(const Params& p, const Item& item, Ring& at, u32 stages,
                                        u32 full, u32 empty) {
  const int warp = uniform(warp_id());
  const int first_of_group = item.block * kBlockRows + warp / 4 * kRows;
  const int first_row = item.block * kBlockRows + warp * 16;
  const int group = item.head_row * p.groups_q + first_row / kGroupRows;
  Left q[kDim / 16];
  u32 dead = load_queries(q, p, row_of(p.q, item.batch, item.head, 0), first_row);
  const bool wanted = first_row < p.length_q && (!kRetry || p.flat[group]);
  if (!wanted) dead = ~0u;
  Lists<kSlots> lists;
  lists.start(stages + kStages * kStageBytes + warp * Lists<kSlots>::kBytes, dead);
  if (kRetry && wanted) lists.resume(p, group);

  constexpr int kParts = kTileKeys / kStripKeys;
  const unsigned long long first_tile = descriptor(stages);
  const auto take = [&] {
    await(full + at.stage * 8, at.parity);
    return first_tile + at.stage * (kStageBytes / kDescriptorUnit);
  };
  // All warps of a warpgroup sift together: each would hold up the others when its turn comes.
  const auto vote = [warp](bool due) {
    int any;
    asm volatile(
        "{.reg .pred mine, all; setp.ne.b32 mine, %1, 0;"
        "barrier.cta.red.or.pred all, %2, 128, mine; selp.b32 %0, 1, 0, all;}"
        : "=r"(any)
        : "r"(int(due)), "r"(1 + warp / 4)
        : "memory");
    return any != 0;
  };
  const auto give_back = [&] {
    if (lane_id() == 0) arrive(empty + at.stage * 8);
    at.advance();
  };
  // Keys beyond these are seen by none of the group's rows; none at all by a group without rows.
  int last_seen = first_of_group >= p.length_q ? -1
                  : kCausal                    ? first_of_group + kRows - 1
                                               : p.length_k;
  const auto look = [&](const auto& score, int first_key) {
    const int column = first_key + lane_id() % 4 * 2;
    lists.template filter<kParts>(score, column, p);
    lists.template settle<kParts>(score, column, p, vote);
  };
  for (int i = 0; i < item.tiles; ++i) {
    const int first_key = nth_tile(i, item.tiles) * kTileKeys;
    const unsigned long long tile = take();
    if (first_key > last_seen) {
      give_back();
      continue;
    }
    Scores s;
    multiply(s, q, tile);
    give_back();
    if (first_key + kTileKeys > p.length_k || (kCausal && first_key + kTileKeys > first_row + 1))
      look(
          [&](int slot, int n, int j) {
            const int key = first_key + n * 8 + lane_id() % 4 * 2 + j;
            const int row = first_row + slot * 8 + lane_id() / 4;
            return key < p.length_k && (!kCausal || key <= row) ? s[n * 4 + slot * 2 + j] : -kInf;
          },
          first_key);
    else
      look([&](int slot, int n, int j) { return s[n * 4 + slot * 2 + j]; }, first_key);
    // Where the second look is in vain, too, the largest scores are known already.
    if (kRetry && !vote(wanted && !lists.flat)) last_seen = -1;
  }
  if (!wanted) return;
  lists.sift(p);
  __syncwarp();
  const u32 overfull = lists.flat ? 1u : lists.write(p, item.head_row, group, first_row);
  if (overfull) lists.hand_over(p, group, first_row, overfull);
  if (lane_id() == 0) p.flat[group] = overfull;
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    scan(const __grid_constant__ Params p, const __grid_constant__ TensorMap map) {
  extern __shared__ __align__(16) char shared[];  // 1,024 would count in full beside barriers[]
  __shared__ __align__(8) unsigned long long barriers[2 * kStages];
  const u32 stages = (shared_address(shared) + 1023) & ~1023u;
  const u32 full = shared_address(barriers), empty = full + kStages * 8;
  if (threadIdx.x < kStages) {
    init_barrier(full + threadIdx.x * 8, 1);
    init_barrier(empty + threadIdx.x * 8, kGroups * 4);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  if (uniform(warp_id()) >= kConsumers / 32) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCopierRegisters));
    Ring at;
    if (threadIdx.x == kConsumers)
      for_items(p, [&](const Item& item) { copy_tiles(p, map, item, at, stages, full, empty); });
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
    Ring at;
    for_items(p, [&](const Item& item) { consume(p, item, at, stages, full, empty); });
  }
}

}  // namespace adasplash2
