// What dense tiles cannot do: the rows and keys whose results are not finite, once more.
//
// A tile multiplies its zeros too, so that a NaN or an infinity in it reaches, as 0 * NaN, rows and
// keys whose support does not hold it. The dense kernels, on Hopper too, mark what they find not
// finite; these kernels do what is marked again and leave out what has no weight. Scores are the
// same products as in dense.cu, but sums go row by row of a tile: slower, and right whatever it
// holds.
//
// They need no word from the host: each is launched after the kernel that marks, reads whether
// there are marks, and mostly returns.
#include "dense.cuh"

namespace adasplash2 {

constexpr int kWeightBytes = kRows * kTile * int(sizeof(float));
static_assert(2 * kBytes + kBytesV + kWeightBytes == ADASPLASH2_SHARED_EXACT_OUTPUT);
static_assert(2 * (kBytes + kBytesV) + kWeightBytes == ADASPLASH2_SHARED_EXACT_GRAD_ROWS);
static_assert(2 * (kBytes + kBytesV) + kWeightBytes == ADASPLASH2_SHARED_EXACT_GRAD_COLUMNS);

// The weights of a warp's 16 rows for each row of a tile, in shared memory.
struct Weights {
  float* of_warp;

  __device__ __forceinline__ explicit Weights(char* at)
      : of_warp(reinterpret_cast<float*>(at) + warp_id() * kTile * kRowBlock) {}
  // From where dot_products() leaves scores, for rows of the tile from `first` on.
  __device__ __forceinline__ void put(const ChunkScores& w, int first) const {
#pragma unroll
    for (int n = 0; n < kChunkParts; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = first + n * 8 + lane_id() % 4 * 2 + i % 2;
        of_warp[at * kRowBlock + i / 2 * 8 + lane_id() / 4] = w[n][i];
      }
  }
  __device__ __forceinline__ float4 get(int row_of_tile, int first) const {  // of four rows
    return *reinterpret_cast<const float4*>(of_warp + row_of_tile * kRowBlock + first);
  }
};

// Sums of a warp's 16 rows, of `width` columns, `most` or less; lane l has columns l, l + 32, ...
template <int most>
struct Sums {
  static constexpr int kColumns = (most + 31) / 32;
  const int width;
  float of_row[kRowBlock][kColumns] = {};

  __device__ __forceinline__ explicit Sums(int width = most) : width(width) {}

  // Add the rows of a tile; one without a weight has no part in a sum, whatever it holds.
  __device__ __forceinline__ void add(const Weights& weights, const char* tile) {
    const int stride = (width + 15) / 16 * 16 * int(sizeof(Scalar)) + tile_stride<0>;
    __syncwarp();  // the weights are there
#pragma unroll 1
    for (int i = 0; i < kTile; ++i) {
      const auto* row = reinterpret_cast<const Scalar*>(tile + i * stride);
      float x[kColumns];
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const int column = lane_id() + 32 * n;
        x[n] = column < width ? to_float(row[column]) : 0.f;
      }
#pragma unroll
      for (int first = 0; first < kRowBlock; first += 4) {
        const float4 four = weights.get(i, first);
        const float w[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (w[j] != 0.f)
#pragma unroll
            for (int n = 0; n < kColumns; ++n)
              of_row[first + j][n] = fmaf(w[j], x[n], of_row[first + j][n]);
      }
    }
  }

  // Write, or add to, the rows from `first` on; factors are those of a lane's two rows, as they
  // stand with scores.
  template <bool to_sum>
  __device__ __forceinline__ void write(Scalar* head, i64 stride, int first, int length,
                                        const float (&factor)[2]) const {
#pragma unroll
    for (int i = 0; i < kRowBlock; ++i) {
      const float of_this = __shfl_sync(kAllLanes, factor[i / 8], i % 8 * 4);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const int column = lane_id() + 32 * n;
        if (first + i >= length || column >= width) continue;
        Scalar* to = row_in(head, stride, first + i) + column;
        const float x = of_row[i][n] * of_this;
        store(to, to_sum ? to_float(*to) + x : x);
      }
    }
  }
};

// --- rows ----------------------------------------------------------------------------------

// body(block, whether the warp's rows are marked) for each block that has such rows.
template <class Body>
__device__ __forceinline__ void for_unsafe_rows(const Params& p, const u8* marks,
                                                const Body& body) {
  const u32 blocks = query_blocks<kRows>(p);
  for (u32 number = blockIdx.x; number < blocks; number += gridDim.x) {
    const Block b(p, number);
    const bool wanted =
        b.first_row < p.length_q && marks[row_block_of(p, b.head_row, b.first_row)] == kUnsafe;
    if (__syncthreads_or(wanted)) body(b, wanted);  // and the memory of the block before is free
  }
}

// The thresholds of a lane's two rows, and which keys of a tile they keep.
struct Rows {
  const Block& b;
  const float c;
  Threshold tau[2];

  __device__ __forceinline__ explicit Rows(const Block& b) : b(b), c(signed_c(b.p)) {
#pragma unroll
    for (int slot = 0; slot < 2; ++slot)
      tau[slot] = b.flat[slot] ? threshold_of(b.p, b.head_row, b.row_of_slot(slot)) : kNoSupport;
  }
  __device__ __forceinline__ bool poisoned(int slot) const { return tau[slot].t != tau[slot].t; }

  // Scores of keys from `first_key` on become weigh(slot, n, i, x) where they are kept, else zero.
  template <class Weigh>
  __device__ __forceinline__ void weigh(ChunkScores& s, int first_key, const Weigh& weigh) const {
#pragma unroll
    for (int n = 0; n < kChunkParts; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int slot = i / 2, key = first_key + n * 8 + lane_id() % 4 * 2 + i % 2;
        const float x = tau[slot].distance(c, s[n][i]);
        s[n][i] = x > 0.f && b.allowed(slot, key) ? weigh(slot, n, i, x) : 0.f;
      }
  }

  // body(tile) for each tile of keys, when they and their values are in shared memory.
  template <class Body>
  __device__ __forceinline__ void for_tiles(char* keys, char* values, const Body& body) const {
    const Params& p = b.p;
    for (int tile = b.tiles.end - 1; tile >= b.tiles.begin; --tile) {
      __syncthreads();  // the tile before is read
      load_tile<kTile, kHeadDim, kThreads>(keys, row_of(p.k, b.batch, b.kv_head, 0), p.k.row,
                                           tile * kTile, p.length_k);
      load_tile<kTile, kHeadDimV, kThreads>(values, row_of(p.v, b.batch, b.kv_head, 0), p.v.row,
                                            tile * kTile, p.length_k);
      cp_async_commit();
      cp_async_wait();
      __syncthreads();
      body(tile);
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads)
    exact_output(const __grid_constant__ Params p) {
  await_kernels_before();
  extern __shared__ __align__(16) char shared[];
  if (*p.unsafe_output == 0) return;
  char *keys_at = shared + kBytes, *values_at = keys_at + kBytes;
  const Weights weights(values_at + kBytesV);
  const u32 queries = shared_address(shared) + warp_id() * 16 * tile_stride<kDim>;
  for_unsafe_rows(p, p.flat, [&](const Block& b, bool wanted) {
    b.load_queries(shared);
    const Rows rows(b);
    Sums<kHeadDimV> out;
    float mass[2] = {0.f, 0.f};
    rows.for_tiles(keys_at, values_at, [&](int tile) {
      if (!wanted) return;
#pragma unroll 1
      for (int chunk = 0; chunk < kTile; chunk += kChunk) {
        ChunkScores s;
        dot_products<kChunkParts, kDim>(s, queries,
                                        shared_address(keys_at) + chunk * tile_stride<kDim>);
        float here[2] = {0.f, 0.f};
        rows.weigh(s, tile * kTile + chunk, [&](int slot, int, int, float x) {
          const float prob = probability(x, p.r);
          here[slot] += prob;
          return prob;
        });
        mass[0] += here[0], mass[1] += here[1];
        weights.put(s, chunk);
      }
      out.add(weights, values_at);
    });
    if (!wanted) return;
    float factor[2];
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      const float total = sum_over<4>(mass[slot]);
      factor[slot] = rows.poisoned(slot) ? kNaN : total > 0.f ? 1.f / total : 0.f;
    }
    out.template write<false>(row_of(p.o, b.batch, b.head, 0), p.o.row, b.first_row, p.length_q,
                              factor);
  });
}

// delta and dQ, as in dense.cu.
extern "C" __global__ void __launch_bounds__(kThreads)
    exact_grad_rows(const __grid_constant__ Params p) {
  start_next_and_await();
  extern __shared__ __align__(16) char shared[];
  if (p.unsafe_grads[0] == 0) return;
  char *grads_at = shared + kBytes, *keys_at = grads_at + kBytesV, *values_at = keys_at + kBytes;
  const Weights weights(values_at + kBytesV);
  const u32 queries = shared_address(shared) + warp_id() * 16 * tile_stride<kDim>;
  const u32 grads = shared_address(grads_at) + warp_id() * 16 * tile_stride<kDimV>;
  for_unsafe_rows(p, p.unsafe_rows, [&](const Block& b, bool wanted) {
    b.load_queries(shared);
    b.load_grads(grads_at);
    const Rows rows(b);
    float sum_u[2] = {0.f, 0.f}, sum_udp[2] = {0.f, 0.f}, delta[2] = {0.f, 0.f};
    Sums<kHeadDim> grad_q;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      rows.for_tiles(keys_at, values_at, [&](int tile) {
        if (!wanted) return;
#pragma unroll 1
        for (int chunk = 0; chunk < kTile; chunk += kChunk) {
          ChunkScores s, dp;
          dot_products<kChunkParts, kDim>(s, queries,
                                          shared_address(keys_at) + chunk * tile_stride<kDim>);
          dot_products<kChunkParts, kDimV>(dp, grads,
                                           shared_address(values_at) + chunk * tile_stride<kDimV>);
          float here_u[2] = {0.f, 0.f}, here[2] = {0.f, 0.f};
          rows.weigh(s, tile * kTile + chunk, [&](int slot, int n, int i, float x) {
            const float u = weight(x, p.r);
            if (u == 0.f) return 0.f;  // a power may underflow: nothing is felt, not even a NaN
            here_u[slot] += u;
            here[slot] = fmaf(u, dp[n][i], here[slot]);
            return u * (dp[n][i] - delta[slot]);
          });
          if (pass == 0)
#pragma unroll
            for (int slot = 0; slot < 2; ++slot)
              sum_u[slot] += here_u[slot], sum_udp[slot] += here[slot];
          weights.put(s, chunk);
        }
        if (pass == 1) grad_q.add(weights, keys_at);
      });
      if (pass == 0 && wanted)
#pragma unroll
        for (int slot = 0; slot < 2; ++slot)
          delta[slot] = sum_over<4>(sum_udp[slot]) / sum_over<4>(sum_u[slot]);
    }
    if (!wanted) return;
    float factor[2];
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      factor[slot] = rows.poisoned(slot) ? kNaN : score_slope(p);
      if (b.flat[slot] && lane_id() % 4 == 0)
        p.delta[row_number(p, b.head_row, b.row_of_slot(slot))] = delta[slot];
    }
    grad_q.template write<false>(row_of(p.grad_q, b.batch, b.head, 0), p.grad_q.row, b.first_row,
                                 p.length_q, factor);
  });
}

// --- keys ----------------------------------------------------------------------------------

// What flat rows add to dK, or in the other half of the blocks to dV.
extern "C" __global__ void __launch_bounds__(kThreads)
    exact_grad_columns(const __grid_constant__ Params p) {
  await_kernels_before();
  extern __shared__ __align__(16) char shared[];
  __shared__ QueryRows rows;
  if (p.unsafe_grads[1] == 0) return;
  char *values_at = shared + kBytes, *queries_at = values_at + kBytesV;
  char* grads_at = queries_at + kBytes;
  const Weights weights(grads_at + kBytesV);
  const u32 keys = shared_address(shared) + warp_id() * 16 * tile_stride<kDim>;
  const u32 values = shared_address(values_at) + warp_id() * 16 * tile_stride<kDimV>;
  const float c = signed_c(p);
  const bool of_values = blockIdx.y;
  const u32 blocks = key_blocks<kRows>(p);
  for (u32 number = blockIdx.x; number < blocks; number += gridDim.x) {
    const Keys b(p, number);
    const bool wanted =
        b.first_key < p.length_k && *mark_of_keys(p, b.kv_row, b.first_key, of_values) == kUnsafe;
    if (!__syncthreads_or(wanted)) continue;  // and the memory of the block before is free
    b.load(shared);
    Sums<(kHeadDim > kHeadDimV ? kHeadDim : kHeadDimV)> sums(of_values ? kHeadDimV : kHeadDim);
    b.for_tiles(queries_at, grads_at, rows, [&](int first_row) {
      if (!wanted) return;
#pragma unroll 1
      for (int chunk = 0; chunk < kTile; chunk += kChunk) {
        ChunkScores s, dp;
        dot_products<kChunkParts, kDim>(s, keys,
                                        shared_address(queries_at) + chunk * tile_stride<kDim>);
        dot_products<kChunkParts, kDimV>(dp, values,
                                         shared_address(grads_at) + chunk * tile_stride<kDimV>);
        b.for_scores(s, rows, c, first_row, chunk, [&](int n, int i, int at, float x, bool kept) {
          const float prob = kept ? probability(x, p.r) : 0.f, u = kept ? weight(x, p.r) : 0.f;
          const float ds = u != 0.f ? u * (dp[n][i] - rows.delta[at]) : 0.f;
          s[n][i] = of_values ? rows.factor[at] * prob : ds;
        });
        weights.put(s, chunk);
      }
      sums.add(weights, of_values ? grads_at : queries_at);
    });
    if (!wanted) continue;
    const float scale = of_values ? 1.f : score_slope(p), factor[2] = {scale, scale};
    const View& to = of_values ? p.grad_v : p.grad_k;
    sums.template write<true>(row_of(to, b.batch, b.kv_head, 0), to.row, b.first_key, p.length_k,
                              factor);
  }
}

}  // namespace adasplash2
