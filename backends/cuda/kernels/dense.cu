// Rows whose support is too large for lists: the scan marked their row blocks
// flat, and these kernels serve them with dense tiles, recomputing the scores in each pass.
// Blocks without a flat row block return at once, so the launch needs no word from the host.
//
// Here z = (alpha-1) scale q.k, x = z - tau, p = x^r, u = x^(r-1).
#include "score.cuh"
#include "work.cuh"

namespace adasplash2 {

constexpr int kRows = ADASPLASH2_BLOCK_ROWS;  // of a block, 16 a warp
constexpr int kTile = kRows;                  // rows of the tiles it walks over
constexpr int kWarps = kRows / 16;
constexpr int kThreads = kWarps * 32;
// float16 loses probabilities below 6e-8; rows of many keys come near. Scaled, none does.
constexpr float kProbScale = ADASPLASH2_DTYPE == ADASPLASH2_FLOAT16 ? 1024.f : 1.f;

constexpr int kBytes = kTile * tile_stride<kDim>;    // of a tile of queries or keys
constexpr int kBytesV = kTile * tile_stride<kDimV>;  // of a tile of values or their gradients
constexpr int kStagesBytes = 2 * (kBytes + kBytesV);
static_assert(kBytes + kStagesBytes == ADASPLASH2_SHARED_DENSE_OUTPUT);
static_assert(kBytes + kBytesV + kStagesBytes == ADASPLASH2_SHARED_DENSE_GRAD_ROWS);
static_assert(kStagesBytes == ADASPLASH2_SHARED_DENSE_GRAD_COLUMNS);

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

// Write, or add to, a warp's 16 rows of `width` elements.
template <int width, bool add>
__device__ __forceinline__ void write_part(const float (&out)[padded<width> / 8][4], Scalar* head,
                                           i64 stride, int first, int length, float factor,
                                           const bool (&wanted)[2]) {
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const int row = first + slot * 8 + lane_id() / 4;
    if (row >= length || !wanted[slot]) continue;
#pragma unroll
    for (int n = 0; n < padded<width> / 8; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = n * 8 + lane_id() % 4 * 2 + j;
        if (at >= width) continue;
        Scalar* to = head + i64(row) * stride + at;
        const float x = out[n][2 * slot + j] * factor;
        store(to, add ? to_float(*to) + x : x);
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

static_assert(sizeof(Threshold) == sizeof(Entry) && kArenaRow >= 1);
__device__ __forceinline__ Threshold& kept_threshold(const Params& p, int head_row, int row) {
  return reinterpret_cast<Threshold*>(
      p.entries)[arena_of(head_row * p.row_blocks + row / kRowBlock) + row % kRowBlock];
}

__device__ __forceinline__ Threshold threshold_of(const Params& p, int head_row, int row) {
  if constexpr (kRelative) {
    const Threshold& kept = kept_threshold(p, head_row, row);
    return kept;
  }
  return {0.f, p.tau[i64(head_row) * p.length_q + row]};
}

constexpr Threshold kNoSupport = {0.f, kInf};

// --- forward -------------------------------------------------------------------------------

constexpr int kParts = kTile / 8;
using Scores = float[kParts][4];

// The rows of a block and the keys they walk over.
struct Block : QueryBlock<kRows> {
  const Params& p;
  int first_row, tiles;  // the warp's
  bool flat[2];          // of the lane's two rows

  __device__ Block(const Params& params) : QueryBlock(params, blockIdx.x), p(params) {
    first_row = first + warp_id() * 16;
    tiles = (seen_end(first + kRows - 1, p.length_k) + kTile - 1) / kTile;
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      const int row = row_of_slot(slot);
      flat[slot] = row < p.length_q && p.flat[head_row * p.row_blocks + row / kRowBlock];
    }
  }
  __device__ int row_of_slot(int slot) const { return first_row + slot * 8 + lane_id() / 4; }
  __device__ int first_of_block() const { return first_row - warp_id() * 16; }

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
    start(tiles - 1, 0);
    for (int tile = tiles - 1; tile >= 0; --tile) {
      const int stage = (tiles - 1 - tile) % 2;
      cp_async_wait();
      __syncthreads();
      if (tile > 0) start(tile - 1, 1 - stage);
      const u32 here = shared_address(at + stage * (kBytes + kBytesV));
      body(tile, here, here + kBytes);
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads)
    dense_output(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) char shared[];
  const Block b(p);
  if (!__syncthreads_or(b.flat[0] || b.flat[1])) return;
  load_tile<kRows, kHeadDim, kThreads>(shared, row_of(p.q, b.batch, b.head, 0), p.q.row,
                                       b.first_of_block(), p.length_q);
  cp_async_commit();
  char* stages = shared + kBytes;
  const u32 queries = shared_address(shared) + warp_id() * 16 * tile_stride<kDim>;
  const float c = p.c * p.q_sign;

  // The scan left each row's largest score and a lower bound of its threshold.
  float top[2], lo[2], hi[2] = {kHighest, kHighest}, t[2];
  bool poisoned[2], done[2], empty[2];
  int steps[2] = {0, 0};
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const i64 at = i64(b.head_row) * p.row_blocks * kRowBlock + b.row_of_slot(slot);
    const float seen = b.flat[slot] ? p.row_start[at].top : -kInf;
    const float bound = b.flat[slot] ? p.row_count[at].bound : -kInf;
    poisoned[slot] = !(seen < kInf);
    empty[slot] = seen == -kInf;  // no key scores above minus infinity
    done[slot] = poisoned[slot] || empty[slot];
    top[slot] = done[slot] ? 0.f : (kRelative ? p.q_sign : p.c) * seen;
    t[slot] = done[slot] ? -1.f : fmaxf(-1.f, p.c * (bound - seen));
    // The scan rounds its scores otherwise, perhaps by more than a window above alpha = 2.
    lo[slot] = kRelative ? -1.f : t[slot];
  }
  const auto distance = [&](int slot, float score) {
    return kRelative ? fmaf(c, score - top[slot], -t[slot]) : fmaf(c, score, -top[slot]) - t[slot];
  };
  for (int step = 0; step < kSolveSteps && __syncthreads_or(!(done[0] && done[1])); ++step) {
    Moments<float> m[2] = {};
    float least[2] = {kInf, kInf};
    b.for_tiles<false>(stages, [&](int tile, u32 keys, u32) {
      Scores s;
      dot_products<kParts, kDim>(s, queries, keys);
      const bool edge = b.edge(tile);
      Moments<float> here[2] = {};  // sums of sums: thousands of equal terms drift in one
#pragma unroll
      for (int n = 0; n < kParts; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float x = distance(i / 2, s[n][i]);
          if (edge && !b.allowed(i / 2, tile * kTile + n * 8 + lane_id() % 4 * 2 + i % 2)) x = 0.f;
          accumulate(here[i / 2], x, p.r);
          least[i / 2] = fminf(least[i / 2], x > 0.f ? x : kInf);
        }
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        m[slot].s0 += here[slot].s0;
        m[slot].s1 += here[slot].s1;
        m[slot].s2 += here[slot].s2;
      }
    });
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      m[slot] = sum_over<4>(m[slot]);
      least[slot] = -max_over<4>(-least[slot]);
      if (done[slot]) continue;
      done[slot] = refine(m[slot], p.r, lo[slot], hi[slot], t[slot], least[slot], step);
      ++steps[slot];
    }
  }

  float out[kDimV / 8][4] = {};
  int support[2] = {0, 0};
  float mass[2] = {0.f, 0.f};
  b.for_tiles<true>(stages, [&](int tile, u32 keys, u32 values) {
    Scores s;
    dot_products<kParts, kDim>(s, queries, keys);
    const bool edge = b.edge(tile);
    bool live = false;
    float here[2] = {0.f, 0.f};
#pragma unroll
    for (int n = 0; n < kParts; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = distance(i / 2, s[n][i]);
        const bool kept =
            x > 0.f &&
            (!edge || b.allowed(i / 2, tile * kTile + n * 8 + lane_id() % 4 * 2 + i % 2));
        const float prob = kept ? probability(x, p.r) : 0.f;
        s[n][i] = kProbScale * prob;
        here[i / 2] += prob;
        support[i / 2] += kept;
        live |= kept && b.flat[i / 2];
      }
    mass[0] += here[0], mass[1] += here[1];
    if (p.tiles && live) mark_tile(p, b.head_row, b.first_row, tile * kTile);
    add_weighted<kParts, kDimV>(out, s, values);
  });
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const int kept = sum_over<4>(support[slot]);
    const float total = sum_over<4>(mass[slot]), factor = total > 0.f ? 1.f / total : 0.f;
#pragma unroll
    for (int n = 0; n < kDimV / 8; ++n) out[n][2 * slot] *= factor, out[n][2 * slot + 1] *= factor;
    if (poisoned[slot])
#pragma unroll
      for (int n = 0; n < kDimV / 8; ++n) out[n][2 * slot] = out[n][2 * slot + 1] = kNaN;
    if (!b.flat[slot] || lane_id() % 4) continue;
    const int row = b.row_of_slot(slot);
    const i64 at = i64(b.head_row) * p.length_q + row;
    if (poisoned[slot] || empty[slot]) t[slot] = poisoned[slot] ? kNaN : kInf;
    p.tau[at] = kRelative ? fmaf(c, top[slot], t[slot]) : top[slot] + t[slot];
    if constexpr (kRelative) kept_threshold(p, b.head_row, row) = {top[slot], t[slot]};
    const i64 at_row = i64(b.head_row) * p.row_blocks * kRowBlock + row;
    p.row_count[at_row].survivors = poisoned[slot] ? kPoisoned : kept;
    p.row_start[at_row].factor = factor;
    if (poisoned[slot]) poison_keys(p, b.batch, b.kv_head, row);
    if (p.iterations) p.iterations[at] = steps[slot];
  }
  write_part<kHeadDimV, false>(out, row_of(p.o, b.batch, b.head, 0), p.o.row, b.first_row,
                               p.length_q, 1.f / kProbScale, b.flat);
}

// --- backward ------------------------------------------------------------------------------

// delta and dQ of flat rows: one pass for delta = sum u dp / sum u, one for dQ.
extern "C" __global__ void __launch_bounds__(kThreads)
    dense_grad_rows(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) char shared[];
  const Block b(p);
  if (!__syncthreads_or(b.flat[0] || b.flat[1])) return;
  load_tile<kRows, kHeadDim, kThreads>(shared, row_of(p.q, b.batch, b.head, 0), p.q.row,
                                       b.first_of_block(), p.length_q);
  load_tile<kRows, kHeadDimV, kThreads>(shared + kBytes, row_of(p.grad_o, b.batch, b.head, 0),
                                        p.grad_o.row, b.first_of_block(), p.length_q);
  cp_async_commit();
  char* stages = shared + kBytes + kBytesV;
  const u32 queries = shared_address(shared) + warp_id() * 16 * tile_stride<kDim>;
  const u32 grads = shared_address(shared + kBytes) + warp_id() * 16 * tile_stride<kDimV>;
  const float c = p.c * p.q_sign;
  Threshold tau[2];
#pragma unroll
  for (int slot = 0; slot < 2; ++slot)
    tau[slot] = b.flat[slot] ? threshold_of(p, b.head_row, b.row_of_slot(slot)) : kNoSupport;

  // u where the key is in the support, else 0
  const auto weights = [&](Scores& s, int tile) {
    const bool edge = b.edge(tile);
#pragma unroll
    for (int n = 0; n < kParts; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = tau[i / 2].distance(c, s[n][i]);
        const bool kept =
            x > 0.f &&
            (!edge || b.allowed(i / 2, tile * kTile + n * 8 + lane_id() % 4 * 2 + i % 2));
        s[n][i] = kept ? weight(x, p.r) : 0.f;
      }
  };

  float sum_u[2] = {}, delta[2] = {};
  b.for_tiles<true>(stages, [&](int tile, u32 keys, u32 values) {
    Scores s, dp;
    dot_products<kParts, kDim>(s, queries, keys);
    dot_products<kParts, kDimV>(dp, grads, values);
    weights(s, tile);
    float here_u[2] = {}, here[2] = {};
#pragma unroll
    for (int n = 0; n < kParts; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        here_u[i / 2] += s[n][i];
        here[i / 2] = fmaf(s[n][i], dp[n][i], here[i / 2]);
      }
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) sum_u[slot] += here_u[slot], delta[slot] += here[slot];
  });
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const float total = sum_over<4>(sum_u[slot]);
    delta[slot] = sum_over<4>(delta[slot]) / total;
    if (b.flat[slot] && lane_id() % 4 == 0)
      p.delta[i64(b.head_row) * p.length_q + b.row_of_slot(slot)] = delta[slot];
  }

  float grad_q[kDim / 8][4] = {};
  b.for_tiles<true>(stages, [&](int tile, u32 keys, u32 values) {
    Scores s, dp;
    dot_products<kParts, kDim>(s, queries, keys);
    dot_products<kParts, kDimV>(dp, grads, values);
    weights(s, tile);
#pragma unroll
    for (int n = 0; n < kParts; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        s[n][i] = s[n][i] > 0.f ? s[n][i] * (dp[n][i] - delta[i / 2]) : 0.f;
    add_weighted<kParts, kDim>(grad_q, s, keys);
  });
#pragma unroll
  for (int slot = 0; slot < 2; ++slot)
    if (b.flat[slot] && tau[slot].t != tau[slot].t)
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
        grad_q[n][2 * slot] = grad_q[n][2 * slot + 1] = tau[slot].t;
  write_part<kHeadDim, false>(grad_q, row_of(p.grad_q, b.batch, b.head, 0), p.grad_q.row,
                              b.first_row, p.length_q, p.scale, b.flat);
}

// What flat rows add to dK and dV; a block owns kRows keys. Wide heads take two blocks a
// tile, one for each gradient, because their sums do not fit the registers together.
constexpr bool kSplit = ADASPLASH2_KEY_BLOCKS == 2;
constexpr int kChunk = 32;  // queries whose scores a warp holds at a time
constexpr int kChunkParts = kChunk / 8;

template <bool want_k, bool want_v>
__device__ __forceinline__ void grad_columns_of_flat_rows(const Params& p, char* shared) {
  __shared__ float row_top[kTile], row_t[kTile], row_delta[kTile], row_factor[kTile];
  const KeyBlock<kRows> block(p, blockIdx.x);
  const int batch = block.batch, kv_head = block.kv_head;
  const int first_key = block.first + warp_id() * 16;
  const int first_head_row = block.head_row(p);
  const int start = first_row_of(block.first) / kTile * kTile;

  bool any = false;
  for (int i = threadIdx.x; i < p.gqa_group * p.row_blocks; i += kThreads)
    any |= i % p.row_blocks * kRowBlock + kRowBlock > start &&
           p.flat[i64(first_head_row) * p.row_blocks + i];
  if (!__syncthreads_or(any)) return;

  load_tile<kRows, kHeadDim, kThreads>(shared, row_of(p.k, batch, kv_head, 0), p.k.row, block.first,
                                       p.length_k);
  load_tile<kRows, kHeadDimV, kThreads>(shared + kBytes, row_of(p.v, batch, kv_head, 0), p.v.row,
                                        block.first, p.length_k);
  cp_async_commit();
  char* queries_at = shared + kBytes + kBytesV;
  char* grads_at = queries_at + kBytes;
  const u32 keys = shared_address(shared) + warp_id() * 16 * tile_stride<kDim>;
  const u32 values = shared_address(shared + kBytes) + warp_id() * 16 * tile_stride<kDimV>;
  const float c = p.c * p.q_sign;
  float grad_k[want_k ? kDim / 8 : 1][4] = {};
  float grad_v[want_v ? kDimV / 8 : 1][4] = {};

  for (int member = 0; member < p.gqa_group; ++member) {
    const int head_row = first_head_row + member, head = kv_head * p.gqa_group + member;
    const u8* flat = p.flat + i64(head_row) * p.row_blocks;
    for (int first_row = start; first_row < p.length_q; first_row += kTile) {
      bool wanted = false;
      for (int i = first_row / kRowBlock; i < min(p.row_blocks, (first_row + kTile) / kRowBlock);
           ++i)
        wanted |= flat[i];
      if (!wanted) continue;
      __syncthreads();  // the tile before is read
      load_tile<kTile, kHeadDim, kThreads>(queries_at, row_of(p.q, batch, head, 0), p.q.row,
                                           first_row, p.length_q);
      load_tile<kTile, kHeadDimV, kThreads>(grads_at, row_of(p.grad_o, batch, head, 0),
                                            p.grad_o.row, first_row, p.length_q);
      cp_async_commit();
      for (int i = threadIdx.x; i < kTile; i += kThreads) {
        const int row = first_row + i;
        const bool used = row < p.length_q && flat[row / kRowBlock];
        const i64 at = i64(head_row) * p.length_q + row;
        const Threshold tau = used ? threshold_of(p, head_row, row) : kNoSupport;
        if constexpr (kRelative) row_top[i] = tau.top;
        row_t[i] = tau.t;
        row_delta[i] = used ? p.delta[at] : 0.f;
        row_factor[i] =
            used ? p.row_start[i64(head_row) * p.row_blocks * kRowBlock + row].factor : 0.f;
      }
      cp_async_wait();
      __syncthreads();
      // A poisoned row, or one of a listed row block, must not reach the keys through 0 * NaN.
      for (int i = 0; i < kTile; ++i)
        if (!(row_t[i] < kInf)) {
          for (int at = threadIdx.x; at < tile_stride<kDim> / 4; at += kThreads)
            reinterpret_cast<u32*>(queries_at + i * tile_stride<kDim>)[at] = 0;
          for (int at = threadIdx.x; at < tile_stride<kDimV> / 4; at += kThreads)
            reinterpret_cast<u32*>(grads_at + i * tile_stride<kDimV>)[at] = 0;
        }
      __syncthreads();
#pragma unroll 1
      for (int chunk = 0; chunk < kTile; chunk += kChunk) {
        const u32 queries = shared_address(queries_at) + chunk * tile_stride<kDim>;
        const u32 grads = shared_address(grads_at) + chunk * tile_stride<kDimV>;
        float s[kChunkParts][4], dp[kChunkParts][4];
        dot_products<kChunkParts, kDim>(s, keys, queries);
        if constexpr (want_k) dot_products<kChunkParts, kDimV>(dp, values, grads);
#pragma unroll
        for (int n = 0; n < kChunkParts; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int at = chunk + n * 8 + lane_id() % 4 * 2 + i % 2;
            const int key = first_key + i / 2 * 8 + lane_id() / 4;
            const float x = Threshold{row_top[at], row_t[at]}.distance(c, s[n][i]);
            const bool kept = x > 0.f && is_seen(first_row + at, key, p.length_k);
            s[n][i] = kept ? kProbScale * row_factor[at] * probability(x, p.r) : 0.f;
            if constexpr (want_k)
              dp[n][i] = kept ? weight(x, p.r) * (dp[n][i] - row_delta[at]) : 0.f;
          }
        if constexpr (want_v) add_weighted<kChunkParts, kDimV>(grad_v, s, grads);
        if constexpr (want_k) add_weighted<kChunkParts, kDim>(grad_k, dp, queries);
      }
    }
  }
  const bool all[2] = {true, true};
  if constexpr (want_k)
    write_part<kHeadDim, true>(grad_k, row_of(p.grad_k, batch, kv_head, 0), p.grad_k.row, first_key,
                               p.length_k, p.scale, all);
  if constexpr (want_v)
    write_part<kHeadDimV, true>(grad_v, row_of(p.grad_v, batch, kv_head, 0), p.grad_v.row,
                                first_key, p.length_k, 1.f / kProbScale, all);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    dense_grad_columns(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) char shared[];
  if constexpr (!kSplit)
    grad_columns_of_flat_rows<true, true>(p, shared);
  else if (blockIdx.y == 0)
    grad_columns_of_flat_rows<true, false>(p, shared);
  else
    grad_columns_of_flat_rows<false, true>(p, shared);
}

}  // namespace adasplash2
