// What the tiles of dense.cu and of exact.cu share: products of a warp, thresholds, the rows and
// keys of a block.
//
// Here z = (alpha-1) scale q.k, x = z - tau, p = x^r, u = x^(r-1).
#pragma once

#include "score.cuh"
#include "work.cuh"

namespace adasplash2 {

constexpr int kRows = ADASPLASH2_BLOCK_ROWS;  // of a block, 16 a warp
constexpr int kTile = kRows;                  // rows of the tiles it walks over
static_assert(kStatsTile % kTile == 0);       // mark_tile() of a tile's first key tells of all
constexpr int kWarps = kRows / 16;
constexpr int kThreads = kWarps * 32;

constexpr int kBytes = kTile * tile_stride<kDim>;    // of a tile of queries or keys
constexpr int kBytesV = kTile * tile_stride<kDimV>;  // of a tile of values or their gradients

// --- products of a warp: 16 rows against 8 * parts rows or columns -------------------------

__device__ __forceinline__ float2 load_shared2(u32 address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}

// d += a b: b is 16 rows of 8 columns
__device__ __forceinline__ void add_product(float (&d)[4], const AFragment& a, u32 b0, u32 b1) {
  multiply(d, a, b0, b1, d[0], d[1], d[2], d[3]);
}

// a b^T, both rows of `dim` elements in shared memory
template <int parts, int dim>
__device__ __forceinline__ void dot_products(float (&out)[parts][4], u32 a, u32 b) {
  const int lane = lane_id();
#pragma unroll
  for (int n = 0; n < parts; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) out[n][i] = 0.f;
  if constexpr (kHalf) {
    const u32 a_at = a + lane % 16 * tile_stride<dim> + lane / 16 * 16;
    const u32 b_at = b + (lane / 16 * 8 + lane % 8) * tile_stride<dim> + lane / 8 % 2 * 16;
#pragma unroll
    for (int k = 0; k < dim / 16; ++k) {
      AFragment left;
      ldmatrix(left.r, a_at + k * 32);
#pragma unroll
      for (int n = 0; n < parts; n += 2) {
        u32 r[4];
        ldmatrix(r, b_at + n * 8 * tile_stride<dim> + k * 32);
        add_product(out[n], left, r[0], r[1]);
        add_product(out[n + 1], left, r[2], r[3]);
      }
    }
  } else {
#pragma unroll 1
    for (int at = 0; at < dim; at += 2) {
      const float2 low = load_shared2(a + lane / 4 * tile_stride<dim> + at * 4);
      const float2 high = load_shared2(a + (lane / 4 + 8) * tile_stride<dim> + at * 4);
#pragma unroll
      for (int n = 0; n < parts; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float2 r = load_shared2(b + (n * 8 + lane % 4 * 2 + j) * tile_stride<dim> + at * 4);
          out[n][j] = fmaf(low.y, r.y, fmaf(low.x, r.x, out[n][j]));
          out[n][2 + j] = fmaf(high.y, r.y, fmaf(high.x, r.x, out[n][2 + j]));
        }
    }
  }
}

// out += w b: w as dot_products() leaves it, b rows of `dim` elements in shared memory
template <int parts, int dim>
__device__ __forceinline__ void add_weighted(float (&out)[dim / 8][4], const float (&w)[parts][4],
                                             u32 b) {
  const int lane = lane_id();
  if constexpr (kHalf) {
    const u32 b_at = b + lane % 16 * tile_stride<dim> + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < parts / 2; ++k) {
      const AFragment left = {Scalar::pack(w[2 * k][0], w[2 * k][1]),
                              Scalar::pack(w[2 * k][2], w[2 * k][3]),
                              Scalar::pack(w[2 * k + 1][0], w[2 * k + 1][1]),
                              Scalar::pack(w[2 * k + 1][2], w[2 * k + 1][3])};
#pragma unroll
      for (int n = 0; n < dim / 8; n += 2) {
        u32 r[4];
        ldmatrix_transposed(r, b_at + k * 16 * tile_stride<dim> + n * 16);
        add_product(out[n], left, r[0], r[1]);
        add_product(out[n + 1], left, r[2], r[3]);
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < parts * 8; ++k) {
      const int from = (lane & ~3) | k % 8 / 2;
      const float low = __shfl_sync(kAllLanes, w[k / 8][k % 2], from);
      const float high = __shfl_sync(kAllLanes, w[k / 8][2 + k % 2], from);
#pragma unroll
      for (int n = 0; n < dim / 8; ++n) {
        const float2 r = load_shared2(b + k * tile_stride<dim> + (n * 8 + lane % 4 * 2) * 4);
        out[n][0] = fmaf(low, r.x, out[n][0]);
        out[n][1] = fmaf(low, r.y, out[n][1]);
        out[n][2] = fmaf(high, r.x, out[n][2]);
        out[n][3] = fmaf(high, r.y, out[n][3]);
      }
    }
  }
}

// --- thresholds ----------------------------------------------------------------------------

// tau = c top + t of a flat row. Of large alphas t may be less than a rounding of tau, and x then
// less than one of c q.k: so a general alpha goes by differences to the row's largest score, and
// keeps `top` and `t` for the backward where the arena would hold the row block's survivors.
constexpr bool kRelative = kAlpha == AlphaKind::kGeneral;

struct Threshold {
  float top, t;

  __device__ __forceinline__ float distance(float c, float score) const {
    return fmaf(c, kRelative ? score - top : score, -t);
  }
};

__device__ __forceinline__ void keep_threshold(const Params& p, int head_row, int row,
                                               const Threshold& tau) {
  float* kept = kept_of_flat_row<float, 2>(p, head_row, row);
  kept[0] = tau.top, kept[1] = tau.t;
}
__device__ __forceinline__ Threshold threshold_of(const Params& p, int head_row, int row) {
  if constexpr (kRelative) {
    const float* kept = kept_of_flat_row<float, 2>(p, head_row, row);
    return {kept[0], kept[1]};
  }
  return {0.f, p.tau[row_number(p, head_row, row)]};
}

constexpr Threshold kNoSupport = {0.f, kInf};

// --- the rows and keys of a block -----------------------------------------------------------

constexpr int kParts = kTile / 8;
using Scores = float[kParts][4];
constexpr int kChunk = 32;  // scores of a row that a warp holds at a time where registers are few
constexpr int kChunkParts = kChunk / 8;
using ChunkScores = float[kChunkParts][4];

// The rows of a block and the keys they walk over.
struct Block : QueryBlock<kRows> {
  const Params& p;
  KeyTiles<kTile> tiles;
  int first_row;  // the warp's
  bool flat[2];   // of the lane's two rows

  __device__ Block(const Params& params, u32 number)
      : QueryBlock(params, number), p(params), tiles(first + kRows - 1, p.length_k) {
    first_row = first + warp_id() * 16;
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      const int row = row_of_slot(slot);
      flat[slot] = row < p.length_q && p.flat[row_block_of(p, head_row, row)];
    }
  }
  __device__ int row_of_slot(int slot) const { return first_row + slot * 8 + lane_id() / 4; }

  // Start to load the block's queries, and the gradients of their outputs.
  __device__ __forceinline__ void load_queries(char* to) const {
    load_tile<kRows, kHeadDim, kThreads>(to, row_of(p.q, batch, head, 0), p.q.row, first,
                                         p.length_q);
  }
  __device__ __forceinline__ void load_grads(char* to) const {
    load_tile<kRows, kHeadDimV, kThreads>(to, row_of(p.grad_o, batch, head, 0), p.grad_o.row, first,
                                          p.length_q);
  }

  __device__ bool allowed(int slot, int key) const {
    return is_seen(row_of_slot(slot), key, p.length_k);
  }
  __device__ bool edge(int tile) const {  // whether some pair of the warp's is forbidden
    return some_hidden(first_row, (tile + 1) * kTile, p.length_k);
  }

  // body(first key, keys, values) for each tile of keys, nearest first, with the next one
  // under way. Tiles stand in two stages from `at` on; values come along where asked for.
  template <bool with_values, class Body>
  __device__ __forceinline__ void for_tiles(char* at, const Body& body) const {
    const Scalar* keys = row_of(p.k, batch, kv_head, 0);
    const Scalar* values = row_of(p.v, batch, kv_head, 0);
    const auto start = [&](int tile, int stage) {
      char* to = at + stage * (kBytes + kBytesV);
      load_tile<kTile, kHeadDim, kThreads>(to, keys, p.k.row, tile * kTile, p.length_k);
      if constexpr (with_values)
        load_tile<kTile, kHeadDimV, kThreads>(to + kBytes, values, p.v.row, tile * kTile,
                                              p.length_k);
      cp_async_commit();
    };
    __syncthreads();  // the stages are free
    start(tiles.end - 1, 0);
    for (int tile = tiles.end - 1; tile >= tiles.begin; --tile) {
      const int stage = (tiles.end - 1 - tile) % 2;
      cp_async_wait();
      __syncthreads();
      if (tile > tiles.begin) start(tile - 1, 1 - stage);
      const u32 here = shared_address(at + stage * (kBytes + kBytesV));
      body(tile, here, here + kBytes);
    }
  }
};

// What rows bring to a tile of their queries; those of listed row blocks have no support.
struct QueryRows {
  float top[kTile], t[kTile], delta[kTile], factor[kTile];

  __device__ __forceinline__ void load(const Params& p, int head_row, int first_row) {
    const u8* flat = of_row_blocks(p, p.flat, head_row);
    for (int i = threadIdx.x; i < kTile; i += kThreads) {
      const int row = first_row + i;
      const bool used = row < p.length_q && flat[row / kRowBlock];
      const i64 at = row_number(p, head_row, row);
      const Threshold tau = used ? threshold_of(p, head_row, row) : kNoSupport;
      if constexpr (kRelative) top[i] = tau.top;
      t[i] = tau.t;
      delta[i] = used ? p.delta[at] : 0.f;
      factor[i] = used ? p.row_start[slot_number(p, head_row, row)].factor : 0.f;
    }
  }
  __device__ __forceinline__ float distance(float c, float score, int at) const {
    return Threshold{top[at], t[at]}.distance(c, score);
  }
};

// The keys of a block and the flat rows that may see them.
struct Keys : KeyBlock<kRows> {
  const Params& p;
  int start, first_key;  // the first tile's first query; the warp's first key

  __device__ __forceinline__ Keys(const Params& params, u32 number)
      : KeyBlock(params, number), p(params) {
    start = first_row_of(first) / kTile * kTile;
    first_key = first + warp_id() * 16;
  }
  __device__ __forceinline__ int key_of_slot(int slot) const {
    return first_key + slot * 8 + lane_id() / 4;
  }

  // Start to load them, and their values behind them.
  __device__ __forceinline__ void load(char* to) const {
    load_tile<kRows, kHeadDim, kThreads>(to, row_of(p.k, batch, kv_head, 0), p.k.row, first,
                                         p.length_k);
    load_tile<kRows, kHeadDimV, kThreads>(to + kBytes, row_of(p.v, batch, kv_head, 0), p.v.row,
                                          first, p.length_k);
    cp_async_commit();
  }

  // body(n, i, row of the tile, x, whether the row keeps the key) for each s[n][i] that
  // dot_products() leaves of the warp's keys and a tile's rows from `chunk` on. `c` comes from
  // before the loop over chunks: computed here, it makes kernels longer.
  template <class Body>
  __device__ __forceinline__ void for_scores(const ChunkScores& s, const QueryRows& rows, float c,
                                             int first_row, int chunk, const Body& body) const {
#pragma unroll
    for (int n = 0; n < kChunkParts; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = chunk + n * 8 + lane_id() % 4 * 2 + i % 2;
        const float x = rows.distance(c, s[n][i], at);
        body(n, i, at, x, x > 0.f && is_seen(first_row + at, key_of_slot(i / 2), p.length_k));
      }
  }

  // body(first query) for each tile with flat rows; queries, output gradients and `rows` stand in
  // shared memory then.
  template <class Body>
  __device__ __forceinline__ void for_tiles(char* queries, char* grads, QueryRows& rows,
                                            const Body& body) const {
    for (int member = 0; member < p.gqa_group; ++member) {
      const int of_head = head_row(p) + member, head = first_head(p) + member;
      const u8* flat = of_row_blocks(p, p.flat, of_head);
      for (int first_row = start; first_row < p.length_q; first_row += kTile) {
        bool wanted = false;
        for (int i = first_row / kRowBlock; i < min(p.row_blocks, (first_row + kTile) / kRowBlock);
             ++i)
          wanted |= flat[i];
        if (!wanted) continue;
        __syncthreads();  // the tile before is read
        load_tile<kTile, kHeadDim, kThreads>(queries, row_of(p.q, batch, head, 0), p.q.row,
                                             first_row, p.length_q);
        load_tile<kTile, kHeadDimV, kThreads>(grads, row_of(p.grad_o, batch, head, 0), p.grad_o.row,
                                              first_row, p.length_q);
        cp_async_commit();
        rows.load(p, of_head, first_row);
        cp_async_wait();
        __syncthreads();
        body(first_row);
      }
    }
  }
};

}  // namespace adasplash2
