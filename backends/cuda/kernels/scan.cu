// Forward, element path, on mma.sync: scan every allowed key once and keep the survivors of each
// query row (lists.cuh). Serves compute capability 8.0 and up, float32 (whose products are plain
// multiply-adds), rows that do not start on 16 bytes and head_dim above 128; scan90.cu is the
// Hopper version.
//
// A block owns kBlockRows queries of one head, a warp kWarpRows of them: two 16-row fragments
// share every key fragment, which halves the shared-memory reads that would bound the products.
#include "lists.cuh"

namespace adasplash2 {

constexpr int kWarpRows = kScanWarpRows;
constexpr int kSlots = kWarpRows / 8;                             // rows that a lane shares
constexpr int kFragments = kWarpRows / 16;                        // of 16 rows
constexpr u32 kAllRowBlocks = (1u << kWarpRows / kRowBlock) - 1;  // a bit for each of the warp
// Float32 queries stand in shared memory; wide ones leave room for two warps only.
constexpr int kBlockRows = ADASPLASH2_BLOCK_ROWS;
constexpr int kWarps = kBlockRows / kWarpRows;
constexpr int kThreads = kWarps * 32;
constexpr int kTileKeys = ADASPLASH2_TILE_KEYS;  // that are copied to shared memory at a time
constexpr int kStages = kScanStages;
constexpr int kChunk = 32;  // keys whose scores a warp holds at a time
static_assert(kTileKeys % kChunk == 0 && kChunk % kStagingKeys == 0);

constexpr int kQuarters = kChunk / 8;            // n8 fragments of a chunk
using Scores = float[kFragments][kQuarters][4];  // [m16 fragment][n8 fragment][accumulator]

// The queries of a warp as A fragments; float32 reads them from shared memory instead.
struct Queries {
  AFragment part[kHalf ? kFragments : 1][kHalf ? kDim / 16 : 1];
  u32 shared;  // float32: address of the warp's rows
};

template <int count>
__device__ __forceinline__ u32 load_pair(const Scalar* row, int at, bool inside) {
  const u32 low = inside && at < count ? reinterpret_cast<const u16*>(row)[at] : 0;
  const u32 high = inside && at + 1 < count ? reinterpret_cast<const u16*>(row)[at + 1] : 0;
  return low | high << 16;
}

// Load a warp's queries. One with NaN or infinity is loaded as zeros, and the bit of its slot is
// set in what is returned: lists must keep none of its scores.
__device__ __forceinline__ u32 load_queries(Queries& q, const Params& p, const Scalar* head,
                                            int first, char* tile) {
  const int lane = lane_id();
  u32 poisoned = 0;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int row = first + slot * 8 + lane / 4;
    const bool inside = row < p.length_q;
    const Scalar* from = row_in(head, p.q.row, inside ? row : 0);
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
          q.part[slot / 2][k].r[slot % 2 + half * 2] = signed_pair(p, raw);
        }
    } else {
      for (int at = lane % 4; at < kDim; at += 4) {
        const float x = inside && at < kHeadDim ? to_float(from[at]) : 0.f;
        bad |= !is_finite(x);
        reinterpret_cast<float*>(tile + (slot * 8 + lane / 4) * tile_stride<kDim>)[at] =
            signed_value(p, x);
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

// q k^T for a warp's rows and one chunk of keys.
__device__ __forceinline__ void products(Scores& s, const Queries& q, u32 keys) {
  const int lane = lane_id();
#pragma unroll
  for (int m = 0; m < kFragments; ++m)
#pragma unroll
    for (int n = 0; n < kQuarters; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] = 0.f;
  if constexpr (kHalf) {
    const u32 from = keys + (lane / 16 * 8 + lane % 8) * tile_stride<kDim> + lane / 8 % 2 * 16;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k)
#pragma unroll
      for (int n = 0; n < kQuarters; n += 2) {
        u32 b[4];
        ldmatrix(b, from + n * 8 * tile_stride<kDim> + k * 32);
#pragma unroll
        for (int m = 0; m < kFragments; ++m)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float (&d)[4] = s[m][n + i];
            multiply(d, q.part[m][k], b[2 * i], b[2 * i + 1], d[0], d[1], d[2], d[3]);
          }
      }
  } else {
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
        if (!is_seen(row, key, length_k)) s[slot / 2][n][slot % 2 * 2 + j] = -kInf;
      }
}

constexpr int kStageBytes = kTileKeys * tile_stride<kDim>;
constexpr int kQueryBytes = kHalf ? 0 : kBlockRows * tile_stride<kDim>;
static_assert(kStages * kStageBytes + kWarps * Lists<kSlots>::kBytes + kQueryBytes ==
              ADASPLASH2_SHARED_SCAN);

extern "C" __global__ void __launch_bounds__(kThreads, 1) scan(const __grid_constant__ Params p) {
  start_next_and_await();
  extern __shared__ __align__(16) char shared[];
  const QueryBlock<kBlockRows> block(p, blockIdx.x);
  const int warp = warp_id();
  const int first_row = block.first + warp * kWarpRows;
  const int row_block = row_block_of(p, block.head_row, first_row);
  const Scalar* keys = row_of(p.k, block.batch, block.kv_head, 0);

  char* queries_at = shared + kStages * kStageBytes + kWarps * Lists<kSlots>::kBytes +
                     warp * (kQueryBytes / kWarps);
  Queries queries;
  u32 dead =
      load_queries(queries, p, row_of(p.q, block.batch, block.head, 0), first_row, queries_at);
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot)
    if (first_row + slot * 8 + lane_id() / 4 >= p.length_q) dead |= 1u << slot;
  Lists<kSlots> lists;
  lists.start(shared_address(shared) + kStages * kStageBytes + warp * Lists<kSlots>::kBytes, dead);

  const bool outside = first_row >= p.length_q;
  const KeyTiles<kTileKeys> tiles(block.first + kBlockRows - 1, p.length_k);
  const auto load = [&](int i) {
    load_tile<kTileKeys, kHeadDim, kThreads>(shared + i % kStages * kStageBytes, keys, p.k.row,
                                             tiles.nth(i) * kTileKeys, p.length_k);
    cp_async_commit();
  };
  load(0);
  for (int i = 0; i < tiles.count(); ++i) {
    const int tile = tiles.nth(i), stage = i % kStages;
    cp_async_wait();
    __syncthreads();
    if (i + 1 < tiles.count()) load(i + 1);
    const u32 stage_at = shared_address(shared + stage * kStageBytes);
#pragma unroll 1
    for (int part = kTileKeys / kChunk - 1; part >= 0; --part) {
      const int first_key = tile * kTileKeys + part * kChunk;
      if (outside || !any_seen(first_row + kWarpRows - 1, first_key, p.length_k)) continue;
      const bool edge = some_hidden(first_row, first_key + kChunk, p.length_k);
      Scores s;
      products(s, queries, stage_at + part * kChunk * tile_stride<kDim>);
      if (edge) mask_scores(s, first_row, first_key, p.length_k);
      const auto score = [&](int slot, int n, int j) { return s[slot / 2][n][slot % 2 * 2 + j]; };
      const int column = first_key + lane_id() % 4 * 2;
      lists.stage_tile<kChunk / kStagingKeys>(
          score, column, p, [] { return kAnyNumber; }, [](int) { return false; });
      lists.filter_if_due<kChunk / kStagingKeys>(
          score, column, p, [](bool due) { return __any_sync(kAllLanes, due); },
          [] { return kMostOfArena; });
    }
  }
  if (outside) return;
  lists.finish(p);
  const u32 overflow =
      lists.flat ? kAllRowBlocks : lists.write(p, block.head_row, row_block, first_row);
  if (overflow) lists.hand_over(p, row_block, first_row, overflow);
#pragma unroll
  for (int part = 0; part < kSlots / 2; ++part)
    if (lane_id() == 0 && first_row + part * kRowBlock < p.length_q)
      p.flat[row_block + part] = overflow >> part & 1u ? kFlat : kListed;
}

}  // namespace adasplash2
