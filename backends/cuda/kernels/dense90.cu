// dense.cu for Hopper: the same rows, the same contract, on wgmma and the copy engine. 16-bit types
// whose rows start on 16 bytes, head_dim up to 128, alpha = 1.5 and 2.
//
// A block has two warpgroups of 64 rows each and a thread that has tiles copied. Thresholds start
// from a sample: two tiles of scores in registers, then every eighth tile. One to three passes over
// all keys follow until every row of the block has its threshold, then the one that sums values.
// The forward also keeps O2 = sum u v / sum u of each row, so that the backward has
// delta = dO . O2 without a pass over keys.
//
// Here z = c q.k with c > 0 (a negative scale is carried by the sign of the block's own operand),
// x = z - tau, p = x^r, u = x^(r-1).
#include "hopper.cuh"

namespace adasplash2 {

static_assert(kHalf && kAligned && kDim <= 128 && kDimV <= 128);
static_assert(kAlpha != AlphaKind::kGeneral);

constexpr int kGroups = 2;
constexpr int kConsumers = kGroups * 128;
constexpr int kThreads = kConsumers + 128;
constexpr int kCopierRegisters = 40;
constexpr int kRows = 64;  // of a warpgroup: M of wgmma
constexpr int kBlockRows = kGroups * kRows;
constexpr int kBox = 64;  // rows that the copy engine brings at once
constexpr bool kNarrow = kPanels == 1 && kPanelsV == 1;
// float16 loses probabilities below 6e-8; rows of many keys come near. Scaled, none does.
constexpr float kProbScale = ADASPLASH2_DTYPE == 1 ? 1024.f : 1.f;

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
__device__ __forceinline__ void sign_own(char* own, int bytes, float sign) {
  if (sign == 1.f) return;
  for (int at = threadIdx.x; at < bytes / 4; at += kConsumers) {
    u32& pair = reinterpret_cast<u32*>(own)[at];
    pair = sign < 0.f ? pair ^ 0x80008000u : 0u;
  }
  publish_stores();
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
__device__ __forceinline__ void add_weighted(float (&d)[count], const Left (&w)[steps], u64 b) {
#pragma unroll
  for (int k = 0; k < steps; ++k) add_rows(d, w[k], b + rows_at(k));
}

// Write, or add to, a warp's 16 rows of `width` elements.
template <int width, bool add, int count>
__device__ __forceinline__ void write_rows(const float (&d)[count], Scalar* head, i64 stride,
                                           int first, int length, float factor,
                                           const bool (&wanted)[2]) {
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const int row = first + slot * 8 + lane_id() / 4;
    if (row >= length || !wanted[slot]) continue;
    Scalar* to = head + i64(row) * stride + lane_id() % 4 * 2;
#pragma unroll
    for (int n = 0; n < width / 8; ++n) {
      u32& pair = *reinterpret_cast<u32*>(to + n * 8);
      float2 x = {d[4 * n + 2 * slot] * factor, d[4 * n + 2 * slot + 1] * factor};
      if constexpr (add) {
        const float2 old = Scalar::unpack(pair);
        x.x += old.x, x.y += old.y;
      }
      pair = Scalar::pack(x.x, x.y);
    }
  }
}

// A lane's weights of 16 columns as a left operand of the product that sums over them.
template <class Weight>
__device__ __forceinline__ Left as_left(const Weight& w) {
  return {Scalar::pack(w(0), w(1)), Scalar::pack(w(2), w(3)), Scalar::pack(w(4), w(5)),
          Scalar::pack(w(6), w(7))};
}

// O2 of a row lies where the arena would hold the survivors of its group.
static_assert(kArenaRow * sizeof(Entry) >= 128 * sizeof(float));
__device__ __forceinline__ float* second_output(const Params& p, int head_row, int row) {
  return reinterpret_cast<float*>(p.entries +
                                  arena_of(head_row * p.groups_q + row / kGroupRows) +
                                  row % kGroupRows * kArenaRow);
}

// The query rows of a block, and what its lanes see of them.
struct Block {
  const Params& p;
  int head_row, batch, head, kv_head, first;  // the block's first row
  int first_row;                              // the warp's
  bool flat[2];                               // of the lane's two rows

  __device__ __forceinline__ explicit Block(const Params& params) : p(params) {
    const int blocks = (p.length_q + kBlockRows - 1) / kBlockRows;
    head_row = blockIdx.x / blocks;
    first = (blocks - 1 - blockIdx.x % blocks) * kBlockRows;
    batch = head_row / p.heads_q;
    head = head_row % p.heads_q;
    kv_head = head / p.group;
    first_row = first + warp_id() * 16;
#pragma unroll
    for (int slot = 0; slot < 2; ++slot)
      flat[slot] = warp_id() < kConsumers / 32 && row(slot) < p.length_q &&
                   p.flat[head_row * p.groups_q + row(slot) / kGroupRows];
  }
  __device__ __forceinline__ int row(int slot) const {
    return first_row + slot * 8 + lane_id() / 4;
  }
  // How many tiles of so many keys the block sees.
  __device__ __forceinline__ int tiles(int keys) const {
    return ((kCausal ? min(p.length_k, first + kBlockRows) : p.length_k) + keys - 1) / keys;
  }
  __device__ __forceinline__ int seen(int slot) const {  // keys
    return kCausal ? min(p.length_k, row(slot) + 1) : p.length_k;
  }
  // Scores of keys that a row does not see become minus infinity.
  template <int count>
  __device__ __forceinline__ void mask(float (&s)[count], int first_key) const {
    constexpr int keys = count * 2;
    if (first_key + keys <= p.length_k && !(kCausal && first_key + keys > first_row + 1)) return;
    const int limit[2] = {seen(0) - first_key - lane_id() % 4 * 2,
                          seen(1) - first_key - lane_id() % 4 * 2};
#pragma unroll
    for (int i = 0; i < count; ++i)
      if (i / 4 * 8 + i % 2 >= limit[i / 2 % 2]) s[i] = -kInf;
  }
};

// --- thresholds ----------------------------------------------------------------------------

constexpr int kTileKeys = 128;
using Scores = float[kTileKeys / 2];

// Where a step leaves less of f than this, the sum of probabilities, by which they are divided in
// the end, takes care of the rest.
constexpr float kTolerance = 1e-4f;
constexpr int kSampleSteps = 5;
constexpr int kStride = 8;  // of the tiles that the passes before the first full one look at
constexpr int kStridedPasses = 2;
constexpr int kStridedFrom = 3 * kStride;  // tiles

// What is known of one row's threshold.
struct Threshold {
  float tau, lo, hi;
  bool done;
  int steps;  // over all its scores
};

// Sums of one lane over a row's scores, and after join() those of the row. `least` are the bits of
// the smallest x that is not negative: as unsigned numbers, those of negative ones are larger.
struct RowSums {
  float s1 = 0.f, s2 = 0.f;
  int scores = 0;
  u32 negative = 0, least = ~0u;

  template <int count>
  __device__ __forceinline__ void add(const float (&s)[count], int slot, float c, float tau) {
    float here1 = 0.f, here2 = 0.f;  // sums of sums: thousands of equal terms drift in one
#pragma unroll
    for (int n = 0; n < count / 4; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float x = fmaf(c, s[4 * n + 2 * slot + j], -tau), inside = fmaxf(x, 0.f);
        negative += __float_as_uint(x) >> 31;
        here1 += inside;
        if constexpr (kAlpha == AlphaKind::k15)
          here2 = fmaf(inside, inside, here2);
        else
          least = min(least, __float_as_uint(x));
      }
    s1 += here1;
    s2 += here2;
    scores += count / 2;
  }
  __device__ __forceinline__ Moments<float> join() {
    if constexpr (kAlpha == AlphaKind::k2)
#pragma unroll
      for (int step = 1; step < 4; step *= 2)
        least = min(least, __shfl_xor_sync(kAllLanes, least, step));
    return sum_over<4>(Moments<float>{float(scores - int(negative)), s1, s2});
  }
};

// One guarded step of a row by its sums over some of its keys; each of them stands for `weight`,
// together they are `keys`.
__device__ __forceinline__ void advance(Threshold& t, RowSums& sums, float weight, int keys) {
  Moments<float> m = sums.join();
  if (t.done) return;
  m.s0 *= weight, m.s1 *= weight, m.s2 *= weight;
  const float f = excess<kAlpha>(m);
  if (f >= 0.f)
    t.lo = fmaxf(t.lo, t.tau);
  else
    t.hi = fminf(t.hi, t.tau);
  const float step = refinement_step<kAlpha>(m, 0.f), next = t.tau + step;
  const bool inside = next >= t.lo && next <= t.hi;
  // Solved on the present support, so what is left is of the scores that a step passes: upwards
  // some of those counted, downwards some of all.
  bool enough = fabsf(f) <= kTolerance;
  if constexpr (kAlpha == AlphaKind::k15)
    enough |= (step >= 0.f ? m.s0 : float(keys)) * step * step <= kTolerance;
  else
    enough |= step >= 0.f && step < __uint_as_float(sums.least);
  t.done = (inside && enough) || t.hi - t.lo <= 4.f * kEpsilon * fabsf(t.tau);
  if (!t.done || inside) t.tau = inside ? next : 0.5f * (t.lo + t.hi);
}

// --- forward -------------------------------------------------------------------------------

constexpr int kStagesK = kNarrow ? 4 : 3;
constexpr int kStagesV = 2;
constexpr int kKeyBytes = tile_bytes<kTileKeys, kPanels>;
constexpr int kValueBytes = tile_bytes<kTileKeys, kPanelsV>;
using KeyRing = Ring<kStagesK>;
using ValueRing = Ring<kStagesV>;

// Where the parts of a block's shared memory are, and their barriers.
struct Forward {
  u32 queries, keys, values, full_q, full_k, empty_k, full_v, empty_v;

  static constexpr int kBarriers = 1 + 2 * kStagesK + 2 * kStagesV;
  __device__ __forceinline__ Forward(u32 memory, u32 barriers)
      : queries(memory),
        keys(memory + kOwnBytes),
        values(memory + kOwnBytes + kStagesK * kKeyBytes),
        full_q(barriers),
        full_k(barriers + 8),
        empty_k(full_k + 8 * kStagesK),
        full_v(empty_k + 8 * kStagesK),
        empty_v(full_v + 8 * kStagesV) {}
  __device__ __forceinline__ void start() const {
    init_barrier(full_q, 1);
    for (int i = 0; i < kStagesK; ++i)
      init_barrier(full_k + 8 * i, 1), init_barrier(empty_k + 8 * i, kConsumers / 32);
    for (int i = 0; i < kStagesV; ++i)
      init_barrier(full_v + 8 * i, 1), init_barrier(empty_v + 8 * i, kConsumers / 32);
    publish_stores();
  }
};

// The tiles of one pass: every stride-th from the last one down.
struct Walk {
  int count, last, stride;
  __device__ __forceinline__ Walk(int tiles, int stride)
      : count((tiles - 1) / stride + 1), last(tiles - 1), stride(stride) {}
  __device__ __forceinline__ int operator[](int i) const { return last - i * stride; }
};

// The two tiles of the sample; all there are where there are no more.
__device__ __forceinline__ int sampled(int i, int tiles) {
  return tiles <= 2 ? i : (tiles + 2 * tiles * i) / 4;
}

__device__ __forceinline__ void copy_forward(const Forward& at, const Block& b,
                                             const TensorMap& query_map, const TensorMap& key_map,
                                             const TensorMap& value_map) {
  const Params& p = b.p;
  const bool copies = threadIdx.x == kConsumers;
  const int tiles = b.tiles(kTileKeys);
  const Plane keys(p.k, b.kv_head, b.batch), values(p.v, b.kv_head, b.batch);
  KeyRing key_ring;
  ValueRing value_ring;
  const auto push_keys = [&](int tile) {
    key_ring.await_empty(at.empty_k);
    const u32 full = at.full_k + key_ring.stage * 8;
    arrive_expecting(full, kKeyBytes);
    copy_tile<kTileKeys, kPanels, kBox>(at.keys + key_ring.stage * kKeyBytes, key_map,
                                        tile * kTileKeys, keys, full);
    key_ring.advance();
  };
  const auto push_values = [&](int tile) {
    value_ring.await_empty(at.empty_v);
    const u32 full = at.full_v + value_ring.stage * 8;
    arrive_expecting(full, kValueBytes);
    copy_tile<kTileKeys, kPanelsV, kBox>(at.values + value_ring.stage * kValueBytes, value_map,
                                         tile * kTileKeys, values, full);
    value_ring.advance();
  };
  if (copies) {
    arrive_expecting(at.full_q, kOwnBytes);
    copy_tile<kBlockRows, kPanels, kBox>(at.queries, query_map, b.first,
                                         Plane(p.q, b.head, b.batch), at.full_q);
    for (int i = 0; i < min(tiles, 2); ++i) push_keys(sampled(i, tiles));
    if (tiles >= kStridedFrom)
      for (int pass = 0; pass < kStridedPasses; ++pass) {
        const Walk walk(tiles, kStride);
        for (int i = 0; i < walk.count; ++i) push_keys(walk[i]);
      }
  }
  const Walk walk(tiles, 1);
  bool solving = tiles > 2;
  while (solving) {
    if (copies)
      for (int i = 0; i < walk.count; ++i) push_keys(walk[i]);
    __syncwarp();
    solving = any_of_block(false);
  }
  if (copies)
    for (int i = 0; i < walk.count; ++i) push_keys(walk[i]), push_values(walk[i]);
}

template <bool saves, bool counts>
__device__ __forceinline__ void attend(const Forward& at, char* own, const Block& b) {
  const Params& p = b.p;
  const float c = p.c;
  const int tiles = b.tiles(kTileKeys);
  const u64 queries = descriptor(at.queries + uniform(warp_id() / 4) * kRows * kLineBytes);
  const u64 keys = descriptor(at.keys);
  const u64 values = descriptor(at.values, kTileKeys * kLineBytes);
  KeyRing key_ring;
  ValueRing value_ring;
  const auto start_scores = [&](Scores& s) {
    key_ring.await_full(at.full_k);
    begin_products();
    add_dots<kDim, kTileKeys>(s, queries, keys + key_ring.stage * (kKeyBytes / kDescriptorUnit));
    commit_products();
  };
  const auto finish_scores = [&](Scores& s) {
    await_products();
    settled(s);
    if (lane_id() == 0) arrive(at.empty_k + key_ring.stage * 8);
    key_ring.advance();
  };
  const auto scores = [&](Scores& s, int tile) {
    start_scores(s);
    finish_scores(s);
    b.mask(s, tile * kTileKeys);
  };

  // The scan left each row's largest score as far as it looked, NaN for a poisoned row, and a
  // lower bound of its threshold.
  Threshold t[2];
  float top[2] = {-kInf, -kInf}, floor[2];
  bool poisoned[2];
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const i64 at_row = i64(b.head_row) * p.groups_q * kGroupRows + b.row(slot);
    const float bound = b.flat[slot] ? __int_as_float(p.row_count[at_row]) : -kInf;
    poisoned[slot] = b.flat[slot] && !(__int_as_float(p.row_start[at_row]) < kInf);
    floor[slot] = bound > -kInf ? c * bound : -1e30f;
    t[slot].done = poisoned[slot] || !b.flat[slot];
    t[slot].steps = 0;
  }
  await(at.full_q, 0);
  sign_own(own, kOwnBytes, p.q_sign);

  {
    // The sample: its threshold for the mass that it would have of the whole row.
    Scores s[2];
    int allowed[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i >= tiles) {
#pragma unroll
        for (float& x : s[i]) x = -kInf;
        continue;
      }
      const int tile = sampled(i, tiles);
      scores(s[i], tile);
#pragma unroll
      for (int slot = 0; slot < 2; ++slot)
        allowed[slot] += max(0, min(kTileKeys, b.seen(slot) - tile * kTileKeys));
    }
    bool known[2];
    float weight[2];
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int n = 0; n < kTileKeys / 8; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j)
            asm("max.NaN.f32 %0, %0, %1;" : "+f"(top[slot]) : "f"(s[i][4 * n + 2 * slot + j]));
#pragma unroll
      for (int step = 1; step < 4; step *= 2)
        asm("max.NaN.f32 %0, %0, %1;"
            : "+f"(top[slot])
            : "f"(__shfl_xor_sync(kAllLanes, top[slot], step)));
      const float best = c * top[slot];
      known[slot] = is_finite(top[slot]) && !t[slot].done;
      weight[slot] = float(b.seen(slot)) / float(max(1, allowed[slot]));
      t[slot].lo = best - (kAlpha == AlphaKind::k15 ? rsqrtf(weight[slot]) : 1.f / weight[slot]);
      t[slot].hi = best;
      t[slot].tau = known[slot] ? t[slot].lo : floor[slot];
      t[slot].done = !known[slot];
    }
    const int limit = tiles > 2 ? kSampleSteps : kSolveSteps;
#pragma unroll 1
    for (int step = 0; step < limit && !__all_sync(kAllLanes, t[0].done && t[1].done); ++step) {
      RowSums sums[2];
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        t[slot].steps += tiles <= 2 && !t[slot].done;
        sums[slot].add(s[0], slot, c, t[slot].tau);
        sums[slot].add(s[1], slot, c, t[slot].tau);
        advance(t[slot], sums[slot], weight[slot], b.seen(slot));
      }
    }
  }
  const auto restart = [&](int slot) {
    t[slot].lo = is_finite(top[slot]) ? fmaxf(floor[slot], c * top[slot] - 1.f) : floor[slot];
    t[slot].hi = kInf;
    t[slot].tau = fmaxf(t[slot].tau, t[slot].lo);
    t[slot].done = poisoned[slot] || !b.flat[slot];
  };
  if (tiles >= kStridedFrom) {
    const Walk walk(tiles, kStride);
#pragma unroll 1
    for (int pass = 0; pass < kStridedPasses; ++pass) {
      RowSums sums[2];
      if (pass == 0) restart(0), restart(1);
#pragma unroll 1
      for (int i = 0; i < walk.count; ++i) {
        Scores s;
        scores(s, walk[i]);
#pragma unroll
        for (int slot = 0; slot < 2; ++slot) sums[slot].add(s, slot, c, t[slot].tau);
      }
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        // All but the last tile of the walk are whole.
        const int whole = (walk.count - 1) * kTileKeys;
        const int last = max(0, min(kTileKeys, b.seen(slot) - walk[0] * kTileKeys));
        const float seen = float(b.seen(slot));
        advance(t[slot], sums[slot], seen / float(whole + last), b.seen(slot));
      }
    }
  }
  const Walk walk(tiles, 1);
  bool solving = tiles > 2;
#pragma unroll 1
  for (int pass = 0; solving; ++pass) {
    if (pass == 0) restart(0), restart(1);
    RowSums sums[2];
#pragma unroll 1
    for (int i = 0; i < walk.count; ++i) {
      Scores s;
      scores(s, walk[i]);
      if (pass == 0)
#pragma unroll
        for (int slot = 0; slot < 2; ++slot)
#pragma unroll
          for (int n = 0; n < kTileKeys / 8; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j)
              asm("max.NaN.f32 %0, %0, %1;" : "+f"(top[slot]) : "f"(s[4 * n + 2 * slot + j]));
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) sums[slot].add(s, slot, c, t[slot].tau);
    }
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      if (pass == 0) {
#pragma unroll
        for (int step = 1; step < 4; step *= 2)
          asm("max.NaN.f32 %0, %0, %1;"
              : "+f"(top[slot])
              : "f"(__shfl_xor_sync(kAllLanes, top[slot], step)));
        t[slot].done |= !is_finite(top[slot]);
        t[slot].lo = fmaxf(t[slot].lo, c * top[slot] - 1.f);
        t[slot].hi = c * top[slot];
      }
      t[slot].steps += !t[slot].done;
      advance(t[slot], sums[slot], 1.f, b.seen(slot));
    }
    solving = any_of_block(pass < kSolveSteps && !(t[0].done && t[1].done));
  }
  bool empty[2];
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    poisoned[slot] |= b.flat[slot] && !(top[slot] < kInf);
    empty[slot] = top[slot] == -kInf;  // no key scores above minus infinity
    if (poisoned[slot] || empty[slot]) t[slot].tau = poisoned[slot] ? kNaN : kInf;
  }

  // Sums of both outputs leave registers for half a tile. Without the second one, too: the bits of
  // an output do not depend on whether there will be a backward.
  constexpr int kParts = kPanelsV, kPartKeys = kTileKeys / kParts;
  constexpr int kSteps = kPartKeys / 16;
  Sums<kPanelsV> out = {}, second = {};
  Left probs[kSteps], weights[saves ? kSteps : 1];
  int support[2] = {0, 0};
  float mass[2] = {0.f, 0.f}, sum_u[2] = {0.f, 0.f};
  using PartScores = float[kPartKeys / 2];
  const auto start_part = [&](PartScores& s, int part) {
    if (part == 0) key_ring.await_full(at.full_k);
    begin_products();
    add_dots<kDim, kTileKeys>(s, queries, keys + key_ring.stage * (kKeyBytes / kDescriptorUnit) +
                                              part * rows_at(kSteps));
    commit_products();
  };
  const auto finish_part = [&](PartScores& s, int part) {
    settled(s);
    if (part < kParts - 1) return;
    if (lane_id() == 0) arrive(at.empty_k + key_ring.stage * 8);
    key_ring.advance();
  };
  const auto weigh = [&](PartScores& s, int first_key) {
    b.mask(s, first_key);
    float here[2] = {0.f, 0.f}, here_u[2] = {0.f, 0.f};
    bool live[2] = {false, false};  // 64 keys each
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      float prob[8], u[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int slot = e / 2 % 2;
        const float x = fmaf(c, s[8 * k + e], -t[slot].tau), inside = x > 0.f ? x : 0.f;
        prob[e] = kAlpha == AlphaKind::k15 ? inside * inside : inside;
        u[e] = kAlpha == AlphaKind::k15 ? inside : x > 0.f ? 1.f : 0.f;
        here[slot] += prob[e];
        if constexpr (saves) here_u[slot] += u[e];
        if constexpr (counts) {
          support[slot] += x > 0.f;
          live[k / 4] |= x > 0.f && b.flat[slot];
        }
      }
      probs[k] = as_left([&](int e) { return kProbScale * prob[e]; });
      if constexpr (saves) weights[k] = as_left([&](int e) { return u[e]; });
    }
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) mass[slot] += here[slot], sum_u[slot] += here_u[slot];
    if constexpr (counts)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (live[half]) mark_tile(p, b.head_row, b.first_row, first_key + half * 64);
  };
  const auto start_values = [&](int part) {
    if (part == 0) value_ring.await_full(at.full_v);
    const u64 rows =
        values + value_ring.stage * (kValueBytes / kDescriptorUnit) + part * rows_at(kSteps);
    begin_products();
    add_weighted(out, probs, rows);
    if constexpr (saves) add_weighted(second, weights, rows);
    commit_products();
  };
  const auto finish_values = [&](int part) {
    settled(out);
    settled(probs);
    if constexpr (saves) settled(second), settled(weights);
    if (part < kParts - 1) return;
    if (lane_id() == 0) arrive(at.empty_v + value_ring.stage * 8);
    value_ring.advance();
  };
  {
    PartScores s;
    start_part(s, 0);
    await_products();
    finish_part(s, 0);
    weigh(s, walk[0] * kTileKeys);
  }
#pragma unroll 1
  for (int i = 1; i < walk.count * kParts; ++i) {
    PartScores s;
    start_part(s, i % kParts);  // while the values of the part before are summed
    start_values((i - 1) % kParts);
    await_products();
    finish_part(s, i % kParts);
    finish_values((i - 1) % kParts);
    weigh(s, walk[i / kParts] * kTileKeys + i % kParts * kPartKeys);
  }
  start_values(kParts - 1);
  await_products();
  finish_values(kParts - 1);

#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const float total = sum_over<4>(mass[slot]), total_u = sum_over<4>(sum_u[slot]);
    const int kept = sum_over<4>(support[slot]);
    const float factor = total > 0.f ? 1.f / total : 0.f;
#pragma unroll
    for (int n = 0; n < kPanelsV * 8; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& x = out[4 * n + 2 * slot + j];
        x = poisoned[slot] ? kNaN : x * factor;
      }
    if (!b.flat[slot]) continue;
    if constexpr (saves) {
      float* to = second_output(p, b.head_row, b.row(slot)) + lane_id() % 4 * 2;
      const float factor_u = total_u > 0.f ? 1.f / total_u : 0.f;
#pragma unroll
      for (int n = 0; n < kDimV / 8; ++n)
        *reinterpret_cast<float2*>(to + n * 8) = {second[4 * n + 2 * slot] * factor_u,
                                                  second[4 * n + 2 * slot + 1] * factor_u};
    }
    if (lane_id() % 4) continue;
    const i64 at_row = i64(b.head_row) * p.groups_q * kGroupRows + b.row(slot);
    const i64 at_tau = i64(b.head_row) * p.length_q + b.row(slot);
    p.tau[at_tau] = t[slot].tau;
    p.row_count[at_row] = poisoned[slot] ? -1 : kept;
    p.row_start[at_row] = __float_as_int(factor);
    if (poisoned[slot]) poison_keys(p, b.batch, b.kv_head, b.row(slot));
    if (p.iterations) p.iterations[at_tau] = t[slot].steps;
  }
  write_rows<kHeadDimV, false>(out, row_of(p.o, b.batch, b.head, 0), p.o.row, b.first_row,
                               p.length_q, 1.f / kProbScale, b.flat);
}

template <bool saves, bool counts>
__device__ __forceinline__ void output(const Params& p, const TensorMap& query_map,
                                       const TensorMap& key_map, const TensorMap& value_map) {
  extern __shared__ __align__(16) char shared[];
  __shared__ __align__(8) u64 barriers[Forward::kBarriers];
  const Block b(p);
  if (!any_of_block(b.flat[0] || b.flat[1])) return;
  const u32 start = shared_address(shared), memory = (start + 1023) & ~1023u;
  const Forward at(memory, shared_address(barriers));
  if (threadIdx.x == 0) at.start();
  __syncthreads();
  if (uniform(warp_id()) >= kConsumers / 32) {
    give_registers<kCopierRegisters>();
    copy_forward(at, b, query_map, key_map, value_map);
  } else {
    take_registers<kGroups, kCopierRegisters>();
    attend<saves, counts>(at, shared + (memory - start), b);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    dense_output(const __grid_constant__ Params p, const __grid_constant__ TensorMap query_map,
                 const __grid_constant__ TensorMap key_map,
                 const __grid_constant__ TensorMap value_map) {
  output<false, false>(p, query_map, key_map, value_map);
}
// The same for a forward with a backward to come.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    dense_output_saving(const __grid_constant__ Params p,
                        const __grid_constant__ TensorMap query_map,
                        const __grid_constant__ TensorMap key_map,
                        const __grid_constant__ TensorMap value_map) {
  output<true, false>(p, query_map, key_map, value_map);
}
// The same for one that records what it did.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    dense_output_counting(const __grid_constant__ Params p,
                          const __grid_constant__ TensorMap query_map,
                          const __grid_constant__ TensorMap key_map,
                          const __grid_constant__ TensorMap value_map) {
  output<false, true>(p, query_map, key_map, value_map);
}

// --- backward ------------------------------------------------------------------------------
//
// Both kernels walk over pairs of tiles, x (keys or queries) and y (values or their gradients),
// beside the pair that the block owns (the other way round).

constexpr int kGradStages = 3;
using GradRing = Ring<kGradStages>;

template <int rows>
struct Backward {
  static constexpr int kXBytes = tile_bytes<rows, kPanels>;
  static constexpr int kStageBytes = kXBytes + tile_bytes<rows, kPanelsV>;
  static constexpr int kBarriers = 1 + 2 * kGradStages;

  u32 own, own_y, stages, full_own, full, empty;

  __device__ __forceinline__ Backward(u32 memory, u32 barriers)
      : own(memory),
        own_y(memory + kOwnBytes),
        stages(memory + kOwnBytes + kOwnBytesV),
        full_own(barriers),
        full(barriers + 8),
        empty(full + 8 * kGradStages) {}
  __device__ __forceinline__ void start(int writers) const {
    init_barrier(full_own, 1);
    for (int i = 0; i < kGradStages; ++i)
      init_barrier(full + 8 * i, writers), init_barrier(empty + 8 * i, kConsumers / 32);
    publish_stores();
  }
  __device__ __forceinline__ void copy_own(const TensorMap& x, const Plane& of_x,
                                           const TensorMap& y, const Plane& of_y,
                                           int first) const {
    arrive_expecting(full_own, kOwnBytes + kOwnBytesV);
    copy_tile<kBlockRows, kPanels, kBox>(own, x, first, of_x, full_own);
    copy_tile<kBlockRows, kPanelsV, kBox>(own_y, y, first, of_y, full_own);
  }
  __device__ __forceinline__ void copy_pair(const TensorMap& x, const Plane& of_x,
                                            const TensorMap& y, const Plane& of_y, int first,
                                            int stage) const {
    arrive_expecting(full + stage * 8, kStageBytes);
    const u32 to = stages + stage * kStageBytes;
    copy_tile<rows, kPanels, kBox>(to, x, first, of_x, full + stage * 8);
    copy_tile<rows, kPanelsV, kBox>(to + kXBytes, y, first, of_y, full + stage * 8);
  }

  // s = own x^T and dp = own_y y^T
  __device__ __forceinline__ void start_dots(float (&s)[rows / 2], float (&dp)[rows / 2],
                                             int stage) const {
    const u32 group = uniform(warp_id() / 4) * kRows * kLineBytes, at = stages + stage * kStageBytes;
    begin_products();
    add_dots<kDim, rows>(s, descriptor(own + group), descriptor(at));
    add_dots<kDimV, rows>(dp, descriptor(own_y + group), descriptor(at + kXBytes));
    commit_products();
  }
  __device__ __forceinline__ u64 x_rows(int stage) const {
    return descriptor(stages + stage * kStageBytes, rows * kLineBytes);
  }
  __device__ __forceinline__ u64 y_rows(int stage) const {
    return descriptor(stages + stage * kStageBytes + kXBytes, rows * kLineBytes);
  }
  __device__ __forceinline__ void give_back(int stage) const {
    if (lane_id() == 0) arrive(empty + stage * 8);
  }
};

// A score's share of its gradient: u (dp - delta) in the support, else 0.
__device__ __forceinline__ float score_gradient(float x, float dp, float delta) {
  if constexpr (kAlpha == AlphaKind::k15) return x > 0.f ? x * (dp - delta) : 0.f;
  return x > 0.f ? dp - delta : 0.f;
}

constexpr int kGradKeys = kNarrow ? 128 : 64;
using GradRows = Backward<kGradKeys>;

// dQ of the block's rows, and their delta.
__device__ __forceinline__ void sum_grad_rows(const GradRows& at, char* own, const Block& b) {
  const Params& p = b.p;
  float tau[2], delta[2];
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    tau[slot] = kInf, delta[slot] = 0.f;
    if (b.flat[slot]) {
      const i64 at_tau = i64(b.head_row) * p.length_q + b.row(slot);
      const float* second = second_output(p, b.head_row, b.row(slot));
      const Scalar* grad = row_of(p.grad_o, b.batch, b.head, b.row(slot));
      tau[slot] = p.tau[at_tau];
#pragma unroll
      for (int n = lane_id() % 4 * 8; n < kHeadDimV; n += 32) {
        float g[8];
        load8<kHeadDimV>(grad, n, g);
#pragma unroll
        for (int i = 0; i < 8; ++i) delta[slot] = fmaf(g[i], second[n + i], delta[slot]);
      }
    }
    delta[slot] = sum_over<4>(delta[slot]);
    if (b.flat[slot] && lane_id() % 4 == 0)
      p.delta[i64(b.head_row) * p.length_q + b.row(slot)] = delta[slot];
  }
  await(at.full_own, 0);
  sign_own(own, kOwnBytes, p.q_sign);

  constexpr int kSteps = kGradKeys / 16;
  constexpr bool kOverlap = kNarrow;
  Sums<kPanels> grad = {};
  Left weights[kSteps];
  GradRing ring;
  const int tiles = b.tiles(kGradKeys);
  const auto start = [&](float (&s)[kGradKeys / 2], float (&dp)[kGradKeys / 2]) {
    ring.await_full(at.full);
    at.start_dots(s, dp, ring.stage);
  };
  const auto weigh = [&](float (&s)[kGradKeys / 2], float (&dp)[kGradKeys / 2], int first_key) {
    await_products();
    settled(s), settled(dp), settled(grad), settled(weights);
    b.mask(s, first_key);
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
      weights[k] = as_left([&](int e) {
        const int slot = e / 2 % 2;
        return score_gradient(fmaf(p.c, s[8 * k + e], -tau[slot]), dp[8 * k + e], delta[slot]);
      });
  };
  const auto add = [&](int stage) {
    begin_products();
    add_weighted(grad, weights, at.x_rows(stage));
    commit_products();
  };
  {
    float s[kGradKeys / 2], dp[kGradKeys / 2];
    start(s, dp);
    weigh(s, dp, (tiles - 1) * kGradKeys);
  }
#pragma unroll 1
  for (int tile = tiles - 2; tile >= 0; --tile) {
    const int before = ring.stage;
    ring.advance();
    float s[kGradKeys / 2], dp[kGradKeys / 2];
    if constexpr (kOverlap) start(s, dp);
    add(before);
    await_products();
    if constexpr (!kOverlap) settled(grad), start(s, dp), await_products();
    at.give_back(before);
    weigh(s, dp, tile * kGradKeys);
  }
  add(ring.stage);
  await_products();
  settled(grad);
#pragma unroll
  for (int slot = 0; slot < 2; ++slot)
    if (tau[slot] != tau[slot])
#pragma unroll
      for (int n = 0; n < kPanels * 8; ++n)
        grad[4 * n + 2 * slot] = grad[4 * n + 2 * slot + 1] = kNaN;
  write_rows<kHeadDim, false>(grad, row_of(p.grad_q, b.batch, b.head, 0), p.grad_q.row,
                              b.first_row, p.length_q, p.scale, b.flat);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    dense_grad_rows(const __grid_constant__ Params p, const __grid_constant__ TensorMap query_map,
                    const __grid_constant__ TensorMap key_map,
                    const __grid_constant__ TensorMap value_map,
                    const __grid_constant__ TensorMap grad_map) {
  extern __shared__ __align__(16) char shared[];
  __shared__ __align__(8) u64 barriers[GradRows::kBarriers];
  const Block b(p);
  if (!any_of_block(b.flat[0] || b.flat[1])) return;
  const u32 start = shared_address(shared), memory = (start + 1023) & ~1023u;
  const GradRows at(memory, shared_address(barriers));
  if (threadIdx.x == 0) at.start(1);
  __syncthreads();
  if (uniform(warp_id()) >= kConsumers / 32) {
    give_registers<kCopierRegisters>();
    if (threadIdx.x != kConsumers) return;
    at.copy_own(query_map, Plane(p.q, b.head, b.batch), grad_map,
                Plane(p.grad_o, b.head, b.batch), b.first);
    const Plane keys(p.k, b.kv_head, b.batch), values(p.v, b.kv_head, b.batch);
    GradRing ring;
    for (int tile = b.tiles(kGradKeys) - 1; tile >= 0; --tile, ring.advance()) {
      ring.await_empty(at.empty);
      at.copy_pair(key_map, keys, value_map, values, tile * kGradKeys, ring.stage);
    }
  } else {
    take_registers<kGroups, kCopierRegisters>();
    sum_grad_rows(at, shared + (memory - start), b);
  }
}

// What flat rows add to dK and dV; a block owns kBlockRows keys.
constexpr int kGradQueries = 64;
using GradColumns = Backward<kGradQueries>;

// What the warp that copies says of a tile of queries.
struct alignas(16) Queries {
  float2 tau_delta[kGradQueries];  // tau is infinite of rows that have no part in it
  int first;                       // -1 after the last tile
  bool mixed;                      // whether there are such rows, which may hold NaN
};

// The keys of a block.
struct KeyBlock {
  int batch, kv_head, first, start;  // start: the first query that may see them

  __device__ __forceinline__ explicit KeyBlock(const Params& p) {
    const int blocks = (p.length_k + kBlockRows - 1) / kBlockRows;
    const int kv_row = blockIdx.x / blocks;
    batch = kv_row / p.heads_kv, kv_head = kv_row % p.heads_kv;
    first = blockIdx.x % blocks * kBlockRows;
    start = kCausal ? first : 0;
  }
  // The first of the rows of the heads that share the keys.
  __device__ __forceinline__ int head_row(const Params& p) const {
    return batch * p.heads_q + kv_head * p.group;
  }
};

__device__ __forceinline__ void copy_queries(const GradColumns& at, Queries* queries,
                                             const Params& p, const KeyBlock& b,
                                             const TensorMap& query_map,
                                             const TensorMap& grad_map) {
  GradRing ring;
#pragma unroll 1
  for (int member = 0; member < p.group; ++member) {
    const int head_row = b.head_row(p) + member, head = b.kv_head * p.group + member;
    const u8* flat = p.flat + i64(head_row) * p.groups_q;
#pragma unroll 1
    for (int first = b.start; first < p.length_q; first += kGradQueries) {
      const int group = first / kGroupRows + lane_id();
      if (!__any_sync(kAllLanes, lane_id() < kGradQueries / kGroupRows && group < p.groups_q &&
                                     flat[group]))
        continue;
      ring.await_empty(at.empty);
      Queries& q = queries[ring.stage];
      bool mixed = false;
#pragma unroll
      for (int i = lane_id(); i < kGradQueries; i += 32) {
        const int row = first + i;
        const bool used = row < p.length_q && flat[row / kGroupRows];
        const i64 at_row = i64(head_row) * p.length_q + row;
        const float tau = used ? p.tau[at_row] : kInf;
        const bool kept = tau < kInf;  // not so of a poisoned row
        q.tau_delta[i] = {kept ? tau : kInf, kept ? p.delta[at_row] : 0.f};
        mixed |= row < p.length_q && !kept;
      }
      mixed = __any_sync(kAllLanes, mixed);
      if (lane_id() == 0) {
        q.first = first, q.mixed = mixed;
        at.copy_pair(query_map, Plane(p.q, head, b.batch), grad_map,
                     Plane(p.grad_o, head, b.batch), first, ring.stage);
      } else {
        arrive(at.full + ring.stage * 8);
      }
      ring.advance();
    }
  }
  ring.await_empty(at.empty);
  if (lane_id() == 0) queries[ring.stage].first = -1;
  arrive(at.full + ring.stage * 8);
}

__device__ __forceinline__ void sum_grad_columns(const GradColumns& at, char* own,
                                                 const Queries* queries, const Params& p,
                                                 const KeyBlock& b) {
  constexpr int kSteps = kGradQueries / 16;
  constexpr bool kOverlap = kNarrow;  // else too few registers
  const int first_key = b.first + warp_id() * 16;
  Sums<kPanels> grad_k = {};
  Sums<kPanelsV> grad_v = {};
  Left probs[kSteps], weights[kSteps];
  using Dots = float[kGradQueries / 2];
  GradRing ring;
  await(at.full_own, 0);
  sign_own(own, kOwnBytes, p.q_sign);

  // Whether there is another tile; rows without a part in it must not reach the keys through
  // 0 * NaN.
  const auto next = [&] {
    ring.await_full(at.full);
    const Queries& q = queries[ring.stage];
    if (q.first < 0) return false;
    if (q.mixed) {
      char* tile = own + (at.stages - at.own) + ring.stage * GradColumns::kStageBytes;
      for (int i = threadIdx.x / 8; i < kGradQueries; i += kConsumers / 8)
        if (!(q.tau_delta[i].x < kInf))
#pragma unroll
          for (int panel = 0; panel < kPanels + kPanelsV; ++panel)
            reinterpret_cast<uint4*>(tile + (panel * kGradQueries + i) *
                                                kLineBytes)[threadIdx.x % 8] = {0, 0, 0, 0};
      publish_stores();
      sync_consumers();
    }
    return true;
  };
  const auto weigh = [&](Dots& s, Dots& dp) {
    await_products();
    settled(s), settled(dp), settled(grad_k), settled(grad_v), settled(probs), settled(weights);
    const Queries& q = queries[ring.stage];
    // Queries before these do not see the keys of the lane's two rows.
    int from[2] = {0, 0};
    if (kCausal)
      for (int slot = 0; slot < 2; ++slot)
        from[slot] = first_key + slot * 8 + lane_id() / 4 - q.first - lane_id() % 4 * 2;
    const bool edge = kCausal && q.first < first_key + 15;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      float prob[8];
      float4 of_two[2];  // tau and delta of two queries
#pragma unroll
      for (int n = 0; n < 2; ++n)
        of_two[n] = *reinterpret_cast<const float4*>(q.tau_delta + (2 * k + n) * 8 +
                                                     lane_id() % 4 * 2);
      weights[k] = as_left([&](int e) {
        const int slot = e / 2 % 2;
        const float4& at_two = of_two[e / 4];
        const float tau = e % 2 ? at_two.z : at_two.x, delta = e % 2 ? at_two.w : at_two.y;
        float x = fmaf(p.c, s[8 * k + e], -tau);
        if (edge && (2 * k + e / 4) * 8 + e % 2 < from[slot]) x = -kInf;
        const float inside = x > 0.f ? x : 0.f;
        prob[e] = kProbScale * (kAlpha == AlphaKind::k15 ? inside * inside : inside);
        return score_gradient(x, dp[8 * k + e], delta);
      });
      probs[k] = as_left([&](int e) { return prob[e]; });
    }
  };
  const auto start = [&](Dots& s, Dots& dp) { at.start_dots(s, dp, ring.stage); };
  const auto add = [&](int stage) {
    begin_products();
    add_weighted(grad_v, probs, at.y_rows(stage));
    add_weighted(grad_k, weights, at.x_rows(stage));
    commit_products();
  };
  next();  // there is one, or the block would have returned
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
      await_products();
      settled(grad_k), settled(grad_v);
      at.give_back(before);
    }
    ring.advance();
    if (!next()) {
      if constexpr (kOverlap) {
        add(before);
        await_products();
      }
      break;
    }
    Dots s, dp;
    start(s, dp);
    if constexpr (kOverlap) {
      add(before);
      await_products();
      at.give_back(before);
    }
    weigh(s, dp);
  }
  settled(grad_k), settled(grad_v);
  const bool all[2] = {true, true};
  write_rows<kHeadDim, true>(grad_k, row_of(p.grad_k, b.batch, b.kv_head, 0), p.grad_k.row,
                             first_key, p.length_k, p.scale, all);
  write_rows<kHeadDimV, true>(grad_v, row_of(p.grad_v, b.batch, b.kv_head, 0), p.grad_v.row,
                              first_key, p.length_k, 1.f / kProbScale, all);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    dense_grad_columns(const __grid_constant__ Params p,
                       const __grid_constant__ TensorMap query_map,
                       const __grid_constant__ TensorMap key_map,
                       const __grid_constant__ TensorMap value_map,
                       const __grid_constant__ TensorMap grad_map) {
  extern __shared__ __align__(16) char shared[];
  __shared__ __align__(8) u64 barriers[GradColumns::kBarriers];
  __shared__ __align__(16) Queries queries[kGradStages];
  const KeyBlock b(p);
  bool any = false;
  for (int i = threadIdx.x; i < p.group * p.groups_q; i += kThreads)
    any |= i % p.groups_q * kGroupRows + kGroupRows > b.start &&
           p.flat[i64(b.head_row(p)) * p.groups_q + i];
  if (!any_of_block(any)) return;
  const u32 start = shared_address(shared), memory = (start + 1023) & ~1023u;
  const GradColumns at(memory, shared_address(barriers));
  if (threadIdx.x == 0) at.start(32);
  __syncthreads();
  if (uniform(warp_id()) >= kConsumers / 32) {
    give_registers<kCopierRegisters>();
    if (uniform(warp_id()) != kConsumers / 32) return;
    if (lane_id() == 0)
      at.copy_own(key_map, Plane(p.k, b.kv_head, b.batch), value_map,
                  Plane(p.v, b.kv_head, b.batch), b.first);
    __syncwarp();
    copy_queries(at, queries, p, b, query_map, grad_map);
  } else {
    take_registers<kGroups, kCopierRegisters>();
    sum_grad_columns(at, shared + (memory - start), queries, p, b);
  }
}

}  // namespace adasplash2
