// Rows whose support is too large for lists: the scan marked their row blocks
// flat, and these kernels serve them with dense tiles, recomputing the scores in each pass.
// Blocks without a flat row block return at once, so the launch needs no word from the host.
//
// Tiles multiply their zeros too. What comes out and is not finite is marked, and made once more by
// exact.cu.
#include "dense.cuh"

namespace adasplash2 {

// float16 loses probabilities below 6e-8; rows of many keys come near. Scaled, none does.
constexpr float kProbScale = ADASPLASH2_DTYPE == ADASPLASH2_FLOAT16 ? 1024.f : 1.f;

constexpr int kStagesBytes = 2 * (kBytes + kBytesV);
static_assert(kBytes + kStagesBytes == ADASPLASH2_SHARED_DENSE_OUTPUT);
static_assert(kBytes + kBytesV + kStagesBytes == ADASPLASH2_SHARED_DENSE_GRAD_ROWS);
static_assert(kStagesBytes == ADASPLASH2_SHARED_DENSE_GRAD_COLUMNS);

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
        Scalar* to = row_in(head, stride, row) + at;
        const float x = out[n][2 * slot + j] * factor;
        store(to, add ? to_float(*to) + x : x);
      }
  }
}

// Whether a lane's sums of one of its two rows of `width` elements are numbers.
template <int width>
__device__ __forceinline__ bool are_finite(const float (&sums)[padded<width> / 8][4], int slot) {
  bool all = true;
#pragma unroll
  for (int n = 0; n < (width + 7) / 8; ++n)  // sums of padding are not even computed
#pragma unroll
    for (int j = 0; j < 2; ++j) all &= is_finite(sums[n][2 * slot + j]);
  return all;
}

// --- forward -------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(kThreads)
    dense_output(const __grid_constant__ Params p) {
  start_next_and_await();
  extern __shared__ __align__(16) char shared[];
  const Block b(p, blockIdx.x);
  if (!__syncthreads_or(b.flat[0] || b.flat[1])) return;
  b.load_queries(shared);
  cp_async_commit();
  char* stages = shared + kBytes;
  const u32 queries = shared_address(shared) + warp_id() * 16 * tile_stride<kDim>;
  const float c = signed_c(p);

  // The scan left each row's largest score and a lower bound of its threshold.
  float top[2], lo[2], hi[2] = {kHighest, kHighest}, t[2];
  bool poisoned[2], done[2], empty[2];
  int steps[2] = {0, 0};
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const i64 at = slot_number(p, b.head_row, b.row_of_slot(slot));
    const float seen = b.flat[slot] ? p.row_start[at].top : -kInf;
    const float bound = b.flat[slot] ? p.row_count[at].bound : -kInf;
    poisoned[slot] = !(seen < kInf);
    empty[slot] = seen == -kInf;  // no key scores above minus infinity
    done[slot] = poisoned[slot] || empty[slot];
    top[slot] = done[slot] ? 0.f : kRelative ? signed_value(p, seen) : p.c * seen;
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
  bool unsafe = false;
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const int kept = sum_over<4>(support[slot]);
    const float total = sum_over<4>(mass[slot]), factor = total > 0.f ? 1.f / total : 0.f;
#pragma unroll
    for (int n = 0; n < kDimV / 8; ++n) out[n][2 * slot] *= factor, out[n][2 * slot + 1] *= factor;
    unsafe |= b.flat[slot] && !poisoned[slot] && !are_finite<kHeadDimV>(out, slot);
    if (poisoned[slot])
#pragma unroll
      for (int n = 0; n < kDimV / 8; ++n) out[n][2 * slot] = out[n][2 * slot + 1] = kNaN;
    if (!b.flat[slot] || lane_id() % 4) continue;
    const int row = b.row_of_slot(slot);
    const i64 at = row_number(p, b.head_row, row);
    if (poisoned[slot] || empty[slot]) t[slot] = poisoned[slot] ? kNaN : kInf;
    p.tau[at] = kRelative ? fmaf(c, top[slot], t[slot]) : top[slot] + t[slot];
    if constexpr (kRelative) keep_threshold(p, b.head_row, row, {top[slot], t[slot]});
    const i64 at_row = slot_number(p, b.head_row, row);
    p.row_count[at_row].survivors = poisoned[slot] ? kPoisoned : kept;
    p.row_start[at_row].factor = factor;
    if (poisoned[slot]) poison_keys(p, b.kv_row(p), row);
    if (p.iterations) p.iterations[at] = steps[slot];
  }
  mark_output_if(unsafe, p, b.head_row, b.first_row);
  write_part<kHeadDimV, false>(out, row_of(p.o, b.batch, b.head, 0), p.o.row, b.first_row,
                               p.length_q, 1.f / kProbScale, b.flat);
}

// --- backward ------------------------------------------------------------------------------

// delta and dQ of flat rows: one pass for delta = sum u dp / sum u, one for dQ.
extern "C" __global__ void __launch_bounds__(kThreads)
    dense_grad_rows(const __grid_constant__ Params p) {
  start_next_and_await();
  extern __shared__ __align__(16) char shared[];
  const Block b(p, blockIdx.x);
  if (!__syncthreads_or(b.flat[0] || b.flat[1])) return;
  b.load_queries(shared);
  b.load_grads(shared + kBytes);
  cp_async_commit();
  char* stages = shared + kBytes + kBytesV;
  const u32 queries = shared_address(shared) + warp_id() * 16 * tile_stride<kDim>;
  const u32 grads = shared_address(shared + kBytes) + warp_id() * 16 * tile_stride<kDimV>;
  const float c = signed_c(p);
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
      p.delta[row_number(p, b.head_row, b.row_of_slot(slot))] = delta[slot];
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
  bool unsafe = false;
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const bool poisoned = tau[slot].t != tau[slot].t;
    unsafe |= b.flat[slot] && !poisoned && !are_finite<kHeadDim>(grad_q, slot);
    if (b.flat[slot] && poisoned)
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
        grad_q[n][2 * slot] = grad_q[n][2 * slot + 1] = tau[slot].t;
  }
  mark_rows_if(unsafe, p, b.head_row, b.first_row);
  write_part<kHeadDim, false>(grad_q, row_of(p.grad_q, b.batch, b.head, 0), p.grad_q.row,
                              b.first_row, p.length_q, score_slope(p), b.flat);
}

// What flat rows add to dK and dV; a block owns kRows keys. Wide heads take two blocks a
// tile, one for each gradient, because their sums do not fit the registers together.
constexpr bool kSplit = ADASPLASH2_KEY_BLOCKS == 2;

// Add to what lists left of a gradient of the warp's keys. Where keys are unsafe it stays as it is.
template <int width>
__device__ __forceinline__ void add_to_keys(const float (&sums)[padded<width> / 8][4],
                                            const View& to, const Keys& b, float factor,
                                            bool of_values) {
  const bool unsafe = !are_finite<width>(sums, 0) || !are_finite<width>(sums, 1);
  if (mark_keys_if(unsafe, b.p, b.kv_row, b.first_key, of_values)) return;
  const bool all[2] = {true, true};
  write_part<width, true>(sums, row_of(to, b.batch, b.kv_head, 0), to.row, b.first_key,
                          b.p.length_k, factor, all);
}

template <bool want_k, bool want_v>
__device__ __forceinline__ void grad_columns_of_flat_rows(const Params& p, char* shared) {
  __shared__ QueryRows rows;
  const Keys b(p, blockIdx.x);

  const bool any = is_any_flat(p, b.head_row(p), b.start, threadIdx.x, kThreads);
  if (!__syncthreads_or(any)) return;

  b.load(shared);
  char* queries_at = shared + kBytes + kBytesV;
  char* grads_at = queries_at + kBytes;
  const u32 keys = shared_address(shared) + warp_id() * 16 * tile_stride<kDim>;
  const u32 values = shared_address(shared + kBytes) + warp_id() * 16 * tile_stride<kDimV>;
  const float c = signed_c(p);
  float grad_k[want_k ? kDim / 8 : 1][4] = {};
  float grad_v[want_v ? kDimV / 8 : 1][4] = {};

  b.for_tiles(queries_at, grads_at, rows, [&](int first_row) {
    // A poisoned row, or one of a listed row block, must not reach the keys through 0 * NaN.
    for (int i = 0; i < kTile; ++i)
      if (!(rows.t[i] < kInf)) {
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
      ChunkScores s, dp;
      dot_products<kChunkParts, kDim>(s, keys, queries);
      if constexpr (want_k) dot_products<kChunkParts, kDimV>(dp, values, grads);
      b.for_scores(s, rows, c, first_row, chunk, [&](int n, int i, int at, float x, bool kept) {
        s[n][i] = kept ? kProbScale * rows.factor[at] * probability(x, p.r) : 0.f;
        if constexpr (want_k) dp[n][i] = kept ? weight(x, p.r) * (dp[n][i] - rows.delta[at]) : 0.f;
      });
      if constexpr (want_v) add_weighted<kChunkParts, kDimV>(grad_v, s, grads);
      if constexpr (want_k) add_weighted<kChunkParts, kDim>(grad_k, dp, queries);
    }
  });
  if constexpr (want_k) add_to_keys<kHeadDim>(grad_k, p.grad_k, b, score_slope(p), false);
  if constexpr (want_v) add_to_keys<kHeadDimV>(grad_v, p.grad_v, b, 1.f / kProbScale, true);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    dense_grad_columns(const __grid_constant__ Params p) {
  start_next_and_await();
  extern __shared__ __align__(16) char shared[];
  if constexpr (!kSplit)
    grad_columns_of_flat_rows<true, true>(p, shared);
  else if (blockIdx.y == 0)
    grad_columns_of_flat_rows<true, false>(p, shared);
  else
    grad_columns_of_flat_rows<false, true>(p, shared);
}

}  // namespace adasplash2
