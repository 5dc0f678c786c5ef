// dense.cu for Hopper: the same rows, the same contract, on wgmma and TMA
// (dense90_output.cu, dense90_grad.cu). 16-bit types whose rows start on 16 bytes, head_dim up to
// 128, alpha = 1.5 and 2. This is what forward and backward share.
//
// A block has two warpgroups of 64 rows each and a warp that has tiles copied. The forward keeps
// O2 = sum u v / sum u of each row, so that the backward has delta = dO . O2 without a pass over
// keys.
//
// Here z = c q.k with c > 0 (a negative scale is carried by the sign of the block's own operand),
// x = z - tau, p = x^r, u = x^(r-1).
#pragma once

#include "hopper.cuh"
#include "score.cuh"
#include "work.cuh"

namespace adasplash2 {

static_assert(kHalf && kAligned && kDim <= kHopperMaxHeadDim && kDimV <= kHopperMaxHeadDim);
static_assert(kAlpha != AlphaKind::kGeneral);

constexpr int kWarpgroups = kDenseWarpgroups;
constexpr int kConsumers = kWarpgroups * kWarpgroupThreads;
constexpr int kThreads = kConsumers + kWarpgroupThreads;
// Of setmaxnreg's steps of eight the last one that leaves 232 to each thread that multiplies. With
// 24, which would leave 240, kernels spill.
constexpr int kProducerRegisters = 40;
constexpr int kRows = kWarpgroupRows;
constexpr int kBlockRows = kWarpgroups * kRows;
constexpr int kBox = kDenseBox;
constexpr bool kNarrow = kPanels == 1 && kPanelsV == 1;
// float16 loses probabilities below 6e-8; rows of many keys come near. Scaled, none does.
constexpr float kProbScale = ADASPLASH2_DTYPE == ADASPLASH2_FLOAT16 ? 1024.f : 1.f;

template <int panels>
using Sums = float[panels * kPanelColumns / 2];  // of 64 rows and all columns of a tensor

template <int rows, int panels>
constexpr int tile_bytes = rows * panels * kLineBytes;
constexpr int kOwnBytes = tile_bytes<kBlockRows, kPanels>;
constexpr int kOwnBytesV = tile_bytes<kBlockRows, kPanelsV>;

// Barriers of the consumers alone, and of the whole block.
__device__ __forceinline__ void sync_consumers() {
  asm volatile("barrier.cta.sync 1, %0;" ::"n"(kConsumers) : "memory");
}
// Whether any consumer says so; the thread that copies only listens.
__device__ __forceinline__ bool any_of_block(bool mine) { return __syncthreads_or(mine); }

// The sign of the scale goes to an operand that the block owns.
__device__ __forceinline__ void sign_own(const Params& p, char* own, int bytes) {
  if (is_sign_plus(p)) return;
  for (int at = threadIdx.x; at < bytes / 4; at += kConsumers) {
    u32& pair = reinterpret_cast<u32*>(own)[at];
    pair = signed_pair(p, pair);
  }
  fence_async_proxy();
  sync_consumers();
}

// d = a b^T over `depth` columns; a of a block's tile, b of a tile of b_rows rows
template <int depth, int b_rows, int count>
__device__ __forceinline__ void add_dots(float (&d)[count], u64 a, u64 b) {
#pragma unroll
  for (int k = 0; k < depth / 16; ++k)
    if (k == 0)
      multiply_shared<false>(d, a, b);
    else
      multiply_shared<true>(d, a + columns_at(k, kBlockRows), b + columns_at(k, b_rows));
}
// d += w b over all rows of a tile
template <int steps, int count>
__device__ __forceinline__ void add_weighted(float (&d)[count], const AFragment (&w)[steps],
                                             u64 b) {
#pragma unroll
  for (int k = 0; k < steps; ++k) add_rows(d, w[k], b + rows_at(k));
}

// Write, or add to, a warp's 16 rows of `width` elements.
template <int width, int count>
__device__ __forceinline__ void write_rows(const float (&d)[count], Scalar* head, i64 stride,
                                           int first, int length, float factor,
                                           const bool (&wanted)[2], bool add = false) {
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const int row = first + slot * 8 + lane_id() / 4;
    if (row >= length || !wanted[slot]) continue;
    Scalar* to = row_in(head, stride, row) + lane_id() % 4 * 2;
#pragma unroll
    for (int n = 0; n < width / 8; ++n) {
      u32& pair = *reinterpret_cast<u32*>(to + n * 8);
      const float2 old = Scalar::unpack(add ? pair : 0u);
      pair = Scalar::pack(fmaf(d[4 * n + 2 * slot], factor, old.x),
                          fmaf(d[4 * n + 2 * slot + 1], factor, old.y));
    }
  }
}

// Whether a lane's sums of one of its two rows of `width` elements are numbers.
template <int width, int count>
__device__ __forceinline__ bool are_finite(const float (&sums)[count], int slot) {
  bool all = true;
#pragma unroll
  for (int n = 0; n < width / 8; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) all &= is_finite(sums[4 * n + 2 * slot + j]);
  return all;
}

// A lane's weights of 16 columns as an A fragment of the product that sums over them.
template <class Weight>
__device__ __forceinline__ AFragment as_a_fragment(const Weight& w) {
  return {Scalar::pack(w(0), w(1)), Scalar::pack(w(2), w(3)), Scalar::pack(w(4), w(5)),
          Scalar::pack(w(6), w(7))};
}

// O2 of a row for the backward, in 16 bits an entry: as they are where they are numbers of the
// input's type but for rounding, as the mean of the same values is, so that dp - delta of a key
// that has all of the probability is zero; else as shares of the largest.
struct SecondOutput {
  static constexpr float kWhole = 32767.f;
  static constexpr float kRounding = 0x1p-21f;  // of the largest
  static constexpr float kAsTheyAre = -1.f;     // instead of the largest

  u16* entries;
  float* largest;  // in the place of a listed row's first weight

  __device__ __forceinline__ SecondOutput(const Params& p, int head_row, int row)
      : entries(kept_of_flat_row<u16, kDimV>(p, head_row, row)),
        largest(p.first_weight + slot_number(p, head_row, row)) {}

  __device__ __forceinline__ void put(int at, u32 pair) const {
    *reinterpret_cast<u32*>(entries + at) = pair;
  }
  static __device__ __forceinline__ u32 shares(float low, float high) {
    return (u32(__float2int_rn(low)) & 0xffffu) | u32(__float2int_rn(high)) << 16;
  }
  // The product of 8 entries from `at` on with x.
  __device__ __forceinline__ float times(int at, const float (&x)[8]) const {
    const uint4 raw = *reinterpret_cast<const uint4*>(entries + at);
    const u32 pairs[4] = {raw.x, raw.y, raw.z, raw.w};
    const float most = *largest;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 pair = {float(short(pairs[i])) * (1.f / kWhole),
                     float(int(pairs[i]) >> 16) * (1.f / kWhole)};
      if (most < 0.f) pair = Scalar::unpack(pairs[i]);
      sum = fmaf(x[2 * i], pair.x, sum);
      sum = fmaf(x[2 * i + 1], pair.y, sum);
    }
    return most < 0.f ? sum : sum * most;
  }
};

// What Params::live has of a row block.
__device__ __forceinline__ u32* live_tiles(const Params& p, int head_row, int row) {
  const int words = (p.length_k + kLiveWordKeys - 1) / kLiveWordKeys;
  return p.live + i64(row_block_of(p, head_row, row)) * words;
}

// The query rows of a block, and what its lanes see of them.
struct Block : QueryBlock<kBlockRows> {
  const Params& p;
  int first_row;  // the warp's
  bool flat[2];   // of the lane's two rows

  __device__ __forceinline__ Block(const Params& params, int number)
      : QueryBlock(params, number), p(params) {
    first_row = first + warp_id() * 16;
#pragma unroll
    for (int slot = 0; slot < 2; ++slot)
      flat[slot] = warp_id() < kConsumers / 32 && row(slot) < p.length_q &&
                   p.flat[row_block_of(p, head_row, row(slot))];
  }
  __device__ __forceinline__ int row(int slot) const {
    return first_row + slot * 8 + lane_id() / 4;
  }
  // The tiles of so many keys that the block sees.
  template <int keys>
  __device__ __forceinline__ KeyTiles<keys> tiles() const {
    return {first + kBlockRows - 1, p.length_k};
  }
  // How many keys are seen from one on; zero or less for none.
  __device__ __forceinline__ int seen_from(int slot, int first_key) const {
    return adasplash2::seen_from(row(slot), first_key, p.length_k);
  }
  // Scores of keys that a row does not see become minus infinity.
  template <int count>
  __device__ __forceinline__ void mask(float (&s)[count], int first_key) const {
    constexpr int keys = count * 2;
    if (!some_hidden(first_row, first_key + keys, p.length_k)) return;
    const int first = first_key + lane_id() % 4 * 2;  // the lane's
    const int limit[2] = {seen_from(0, first), seen_from(1, first)};
#pragma unroll
    for (int i = 0; i < count; ++i)
      if (i / 4 * 8 + i % 2 >= limit[i / 2 % 2]) s[i] = -kInf;
  }
};

}  // namespace adasplash2
