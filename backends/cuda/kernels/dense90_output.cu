// Forward of rows in dense tiles on Hopper: thresholds and outputs.
//
// Thresholds start from a sample: two tiles of scores in registers, then, of many keys, some tiles
// that stand for all others. One or two passes over all keys follow, until the error that is
// expected of each row's threshold is within the tolerance. Then comes the pass that sums values.
// It sums probabilities, too: where the sum of some row misses one by more than it may, that pass
// is thrown away, and thresholds are sought further.
#include "dense90.cuh"

namespace adasplash2 {

// Whether a backward is to come, and whether the call counts what it did.
constexpr bool kSaves = ADASPLASH2_OUTPUT == kOutputSaves;
constexpr bool kCounts = ADASPLASH2_OUTPUT == kOutputCounts;

// --- thresholds ----------------------------------------------------------------------------

constexpr int kTileKeys = kHopperKeys;
using Tiles = KeyTiles<kTileKeys>;
using Scores = float[kTileKeys / 2];

// The sum of probabilities may miss one by so much, since they are divided by it in the end: the
// output is then off by less than half of that, which bfloat16 and float16 hide.
constexpr float kTolerance = ADASPLASH2_DTYPE == ADASPLASH2_FLOAT16 ? 0x1p-12f : 0x1p-10f;
// The same of rows whose scores all stay in registers, where a step costs no pass over keys: less
// than an ulp of one.
constexpr float kExactly = 1e-7f;
static_assert(kExactly < kEpsilon);
// A sum that misses one by this part of the tolerance is left as it is.
constexpr float kWellWithin = 0.1f;
// The part of the scores which a step passes that step_of_power() does not foresee.
constexpr float kUnforeseen = 0.1f;
// By so much a row's sum may miss one if its output is corrected. Where a threshold is off by d, p
// is by -2 d u, and their sum f by -2 d (sum u): sum p v - f O2 is off by squares of f alone, and
// so is the threshold after its last step: by 2e-6 where f is 2^-7, by 3e-5 where it is 2^-5. O2
// stays what it is, and the backward feels a part of f: where rows with 2^-5 may stay, few as they
// are, dQ of the worst ones is three times as far off as by rounding. Not so of alpha = 2, whose
// steps are exact where they pass no score; of wide values, whose sums leave no registers for the
// choice; and of calls that count, which tell what is kept.
constexpr bool kMayBeRough = kAlpha == AlphaKind::k15 && kPanelsV == 1 && !kCounts;
constexpr float kRough = !kMayBeRough                             ? 0.f
                         : ADASPLASH2_DTYPE == ADASPLASH2_FLOAT16 ? 0x1p-10f
                                                                  : 0x1p-7f;
// A row is left so where a part of that is foreseen: one that misses more after all is sought from
// its output on, which takes far longer than a pass before it.
constexpr float kForeseenRough = 0.25f * kRough;
constexpr int kSampleSteps = kAlpha == AlphaKind::k15 ? 2 : 3;
// Tiles from which on other samples follow that one: every so many tiles.
constexpr int kStride = 4, kStridedFrom = 6 * kStride;
constexpr int kFirstStride = 2 * kStride, kFirstStridedFrom = 6 * kFirstStride;
// By how many deviations of a sample's mass a guess keeps below what the sample says: steps from
// below go by more scores, and see what those from above would pass. Samples of a quarter of the
// keys or more err by less.
constexpr float kSampleCaution = 2.f, kLargeSampleCaution = 0.5f, kStridedCaution = 1.f;

// Where the inverse of the power is less, float32 cannot tell it from an exponential function.
constexpr float kLeastInverse = 0x1p-10f;

// Where nothing is known of a threshold from below: less than any, but finite, so that sums and
// differences with it are numbers.
constexpr float kUnbounded = -1e30f;

// What is known of one row's threshold.
struct Threshold {
  float tau, lo, hi;
  float slope;  // -f' at tau, after a step over all scores
  bool done;
  bool rough;  // its sum may miss one by more than the tolerance
  int steps;   // over all its scores
};

// Sums of one lane over a row's scores, and after join() those of the row. `least` are the bits of
// the smallest x that is not negative: as unsigned numbers, those of negative ones are larger.
struct RowSums {
  float s1 = 0.f, s2 = 0.f;
  u32 kept = 0, least = ~0u;

  // No score counts for more than 1: none is more than that above its row's threshold, and where
  // the present one is too low, its bracket will know. Maxima would take twice the time.
  template <int count>
  __device__ __forceinline__ void add(const float (&s)[count], int slot, float c, float tau) {
    float here1 = 0.f, here2 = 0.f;  // sums of sums: thousands of equal terms drift in one
#pragma unroll
    for (int n = 0; n < count / 4; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float x = fmaf(c, s[4 * n + 2 * slot + j], -tau), inside = __saturatef(x);
        kept += is_positive(inside);
        here1 += inside;
        if constexpr (kAlpha == AlphaKind::k15)
          here2 = fmaf(inside, inside, here2);
        else
          least = min(least, __float_as_uint(x));
      }
    s1 += here1;
    s2 += here2;
  }
  // Where each score stands for `weight` of them.
  __device__ __forceinline__ Moments<float> join(float weight) {
    if constexpr (kAlpha == AlphaKind::k2)
#pragma unroll
      for (int step = 1; step < 4; step *= 2)
        least = min(least, __shfl_xor_sync(kAllLanes, least, step));
    const auto m = sum_over<4>(Moments<float>{float(kept), s1, s2});
    return {weight * m.s0, weight * m.s1, weight * m.s2};
  }

 private:
  // Of a number from 0 to 1, 1 or 0 by one bit of its exponent: those below 2^-63 do not count.
  static __device__ __forceinline__ u32 is_positive(float inside) {
    return __float_as_uint(inside) >> 29;
  }
};

// The step to where the probabilities sum to `mass` if the sum goes on as a power of the distance
// to some point above: the power that has its value and both derivatives here. refinement_step()
// solves for a support that stays what it is. As the density of scores changes slowly, a power also
// foresees those that a step passes, and leaves about a tenth of that residual. `bend` is 1/2 for a
// square, the power of equal scores, and 1 for an exponential function. Where it is more, few
// scores have nearly all of the sum, the support hardly matters, and the step is `otherwise`.
// Steps are checked by the sums that follow them: their quotients and logarithms may be off in the
// last bits, and lanes wait for nothing else meanwhile.
template <class Otherwise>
__device__ __forceinline__ float step_of_power(const Moments<float>& m, float mass,
                                               const Otherwise& otherwise) {
  const float half = __fdividef(0.5f, m.s1), length = m.s2 * half;
  const float inverse = 1.f - 2.f * m.s0 * length * half;
  if (!(inverse > kLeastInverse)) return otherwise();
  const float part = exp2f(-inverse * __log2f(__fdividef(m.s2, mass)));
  return __fdividef(length, inverse) * (1.f - part);
}

// The step from a row's sums to its threshold, or to more probability than one.
__device__ __forceinline__ float step_of(const Moments<float>& m, float mass) {
  const auto with_support = [&] { return refinement_step<kAlpha>(m, 0.f); };
  if constexpr (kAlpha == AlphaKind::k15) return step_of_power(m, mass, with_support);
  return with_support();
}

// A step by what a sample says of the row, each score for `weight` of them, within bounds.
__device__ __forceinline__ float guess(float tau, const Moments<float>& m, float weight,
                                       float caution, float low, float high) {
  const float mass = 1.f + caution * rsqrtf(fmaxf(1.f, __fdividef(m.s0, weight)));
  return fminf(fmaxf(tau + step_of(m, mass), low), high);
}

// What f at the threshold proves.
__device__ __forceinline__ void bracket(Threshold& t, float f) {
  if (f >= 0.f)
    t.lo = fmaxf(t.lo, t.tau);
  else
    t.hi = fminf(t.hi, t.tau);
}

__device__ __forceinline__ float inside(const Threshold& t, float tau) {
  return fminf(fmaxf(tau, t.lo), t.hi);
}

// One guarded step of a row by its sums, and RowSums::least, to where what is left of f is expected
// to be less than the tolerance, or than that of rough rows.
__device__ __forceinline__ void advance(Threshold& t, const Moments<float>& m, u32 least,
                                        float tolerance, float rough) {
  if (t.done) return;
  const float f = excess<kAlpha>(m);
  bracket(t, f);
  const float step = step_of(m, 1.f), next = t.tau + step;
  const bool inside = next >= t.lo && next <= t.hi;
  bool exact = fabsf(f) <= kWellWithin * tolerance, enough = exact;
  if constexpr (kAlpha == AlphaKind::k15) {
    // What is left comes from the scores that the step passes, about so many. kUnforeseen of them
    // are not foreseen, and by chance about the root of their number.
    const float passed = __fdividef(m.s0 * m.s0 * fabsf(step), 2.f * m.s1);
    const float left =
        step * step * (kUnforeseen * passed + passed * rsqrtf(fmaxf(passed, kEpsilon)));
    exact |= left <= tolerance;
    enough = exact || left <= rough;
    t.slope = 2.f * fmaxf(m.s1 - m.s0 * step, 0.5f * m.s1);
  } else {
    enough |= step >= 0.f && step < __uint_as_float(least);
    exact = enough;
    t.slope = m.s0;
  }
  t.rough = inside && enough && !exact;
  t.done = (inside && enough) || t.hi - t.lo <= 4.f * kEpsilon * fabsf(t.tau);
  if (!t.done || inside) t.tau = inside ? next : 0.5f * (t.lo + t.hi);
}

// --- forward -------------------------------------------------------------------------------

constexpr int kStagesK = ADASPLASH2_KEY_STAGES;
// Whether there are no more tiles of keys than stages: each is copied once, into the stage of its
// number, and all passes find it there.
constexpr bool kResident = ADASPLASH2_KEYS_STAY;
constexpr int kStagesV = kDenseValueStages;
constexpr int kKeyBytes = tile_bytes<kTileKeys, kPanels>;
constexpr int kValueBytes = tile_bytes<kTileKeys, kPanelsV>;
static_assert(kSwizzleAlignment + kOwnBytes + kStagesK * kKeyBytes + kStagesV * kValueBytes ==
              ADASPLASH2_SHARED_DENSE_OUTPUT);
using KeyRing = Ring<kStagesK>;
using ValueRing = Ring<kStagesV>;

// Of a warp's rows, the tiles with weights in the word of Params::live at hand, and where words go.
struct LiveWord {
  u32* to;
  u32 bits;
};

// Where the parts of a block's shared memory are, and their barriers.
struct Forward {
  LiveWord* live_words;
  u32 queries, keys, values, rows, full_q, full_k, empty_k, full_v, empty_v;

  static constexpr int kBarriers = 1 + 2 * kStagesK + 2 * kStagesV;
  __device__ __forceinline__ Forward(LiveWord* live_words, u32 memory, u32 rows, u32 barriers)
      : live_words(live_words),
        queries(memory),
        keys(memory + kOwnBytes),
        values(memory + kOwnBytes + kStagesK * kKeyBytes),
        rows(rows),
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
    fence_async_proxy();
  }
};

// The tiles of one pass, from `last` down to `first` or so.
struct Walk {
  int count, last, stride;
  __device__ __forceinline__ Walk(int first, int last, int stride)
      : count((last - first) / stride + 1), last(last), stride(stride) {}
  __device__ __forceinline__ int operator[](int i) const { return last - i * stride; }
};

// The tiles of a larger sample: the first and the last one, where models keep attention sinks and
// near keys, and after them every stride-th other one. Samples of different strides share none.
struct Strided : Walk {
  static constexpr int kOwn = 2;  // that stand for themselves alone
  int others;
  __device__ __forceinline__ Strided(const Tiles& tiles, int stride)
      : Walk(tiles.begin + 1, tiles.end - 1 - stride / kStride, stride),
        others(tiles.count() - kOwn) {}
  __device__ __forceinline__ int operator[](int i) const {
    return i == 0 ? Tiles::begin : i == 1 ? Tiles::begin + others + 1 : Walk::operator[](i - kOwn);
  }
  __device__ __forceinline__ int all() const { return kOwn + count; }
  __device__ __forceinline__ float weight() const { return float(others) / float(count); }
};

// The tiles of the sample: two, or all there are where there are no more.
struct Sample {
  static constexpr int kTiles = 2;
  Tiles tiles;
  __device__ __forceinline__ int count() const { return min(tiles.count(), kTiles); }
  __device__ __forceinline__ bool is_everything() const { return tiles.count() <= kTiles; }
  __device__ __forceinline__ bool is_large() const { return tiles.count() <= 4 * kTiles; }
  __device__ __forceinline__ int operator[](int i) const {
    const int all = tiles.count();
    return tiles.begin + (all <= kTiles ? i : (all + 2 * all * i) / 4);
  }
  __device__ __forceinline__ bool has(int tile) const {
    static_assert(kTiles == 2);
    return tile == (*this)[0] || tile == (*this)[1];
  }
};

// All passes over keys, in order. The thread that copies and the warps that multiply both go
// through here: each side takes every tile of every pass that it is given, or the other one waits
// forever. full_pass() and output_pass() tell whether the side needs another full one.
template <class Side>
__device__ __forceinline__ void for_passes(const Tiles& tiles, Side& side) {
  const Sample sample{tiles};
  side.sample_pass(sample);
  if (!kResident && tiles.count() >= kStridedFrom)
#pragma unroll 1  // one copy of it
    for (int stride = tiles.count() < kFirstStridedFrom ? kStride : kFirstStride; stride >= kStride;
         stride -= kFirstStride - kStride)
      side.strided_pass(Strided(tiles, stride));
  const Walk all(tiles.begin, tiles.end - 1, 1);
  int left = kSolveSteps;
  bool solving = false;
  if (sample.is_everything())
    left = 0;
  else
    solving = any_of_block(side.template full_pass<true>(all));
  typename Side::Outputs outputs;
#pragma unroll 1
  do {
#pragma unroll 1
    for (; solving && left > 0; --left) solving = any_of_block(side.template full_pass<false>(all));
    solving = any_of_block(side.output_pass(all, outputs));
  } while (solving && left > 0);
  side.write(outputs);
}

// The warp that has tiles copied; one thread of it does.
struct Producer {
  const Forward& at;
  const TensorMap &key_map, &value_map;
  const bool copies;
  const Plane key_plane, value_plane;
  int ahead = 0;  // tiles of keys of the next pass that were copied with the last one
  KeyRing key_ring;
  ValueRing value_ring;

  __device__ __forceinline__ Producer(const Forward& at, const Block& b, const TensorMap& query_map,
                                      const TensorMap& key_map, const TensorMap& value_map)
      : at(at),
        key_map(key_map),
        value_map(value_map),
        copies(threadIdx.x == kConsumers),
        key_plane(b.p.k, b.kv_head, b.batch),
        value_plane(b.p.v, b.kv_head, b.batch) {
    if (!copies) return;
    arrive_expect_tx(at.full_q, kOwnBytes);
    tma_load_tile<kBlockRows, kPanels, kBox>(at.queries, query_map, b.first,
                                             Plane(b.p.q, b.head, b.batch), at.full_q);
  }

  __device__ __forceinline__ void sample_pass(const Sample& sample) {
    if (!copies) return;
#pragma unroll 1  // it has few registers
    for (int i = 0; i < sample.count(); ++i) push_keys(sample[i]);
    if constexpr (kResident)
#pragma unroll 1
      for (int tile = sample.tiles.end - 1; tile >= sample.tiles.begin; --tile)
        if (!sample.has(tile)) push_keys(tile);
  }
  __device__ __forceinline__ void strided_pass(const Strided& walk) {
    if (copies)
#pragma unroll 1  // it has few registers
      for (int i = 0; i < walk.all(); ++i) push_keys(walk[i]);
  }
  // Whatever pass comes next, it begins with the same keys: they are on their way before the block
  // knows which one it is.
  template <bool>
  __device__ __forceinline__ bool full_pass(const Walk& walk) {
    const int next = min(kStagesK, walk.count);
    if (copies && !kResident)
#pragma unroll 1  // it has few registers
      for (int i = ahead; i < walk.count + next; ++i)
        push_keys(walk[i < walk.count ? i : i - walk.count]);
    ahead = next;
    __syncwarp();
    return false;  // it takes part in the vote, but needs no pass
  }
  struct Outputs {};
  __device__ __forceinline__ bool output_pass(const Walk& walk, Outputs&) {
    if (copies)
#pragma unroll 1  // it has few registers
      for (int i = 0; i < walk.count; ++i) {
        if (!kResident && i >= ahead) push_keys(walk[i]);
        push_values(walk[i]);
      }
    ahead = 0;
    __syncwarp();
    return false;
  }
  __device__ __forceinline__ void write(const Outputs&) const {}

 private:
  __device__ __forceinline__ void push_keys(int tile) {
    if constexpr (!kResident) key_ring.await_empty(at.empty_k);
    const int stage = kResident ? tile : key_ring.stage;
    const u32 full = at.full_k + stage * 8;
    arrive_expect_tx(full, kKeyBytes);
    tma_load_tile<kTileKeys, kPanels, kBox>(at.keys + stage * kKeyBytes, key_map, tile * kTileKeys,
                                            key_plane, full);
    if constexpr (!kResident) key_ring.advance();
  }
  __device__ __forceinline__ void push_values(int tile) {
    value_ring.await_empty(at.empty_v);
    const u32 full = at.full_v + value_ring.stage * 8;
    arrive_expect_tx(full, kValueBytes);
    tma_load_tile<kTileKeys, kPanelsV, kBox>(at.values + value_ring.stage * kValueBytes, value_map,
                                             tile * kTileKeys, value_plane, full);
    value_ring.advance();
  }
};

// Where values are wide, the sums of both outputs leave registers for half a tile of scores. It is
// half a tile without a second output, too: the bits of an output must not depend on whether there
// will be a backward.
constexpr int kParts = kPanelsV, kPartKeys = kTileKeys / kParts;
constexpr int kSteps = kPartKeys / 16;
using PartScores = float[kPartKeys / 2];

// What a lane sums over keys in the output pass.
struct RowOutputs {
  Sums<kPanelsV> out = {}, second = {};
  AFragment probs[kSteps], weights[kSaves || kMayBeRough ? kSteps : 1];
  int support[2] = {0, 0};
  float mass[2] = {0.f, 0.f}, sum_u[2] = {0.f, 0.f};
};

// A warpgroup's 64 rows: their thresholds, then their outputs.
struct Attention {
  const Forward& at;
  const Block& b;
  const Params& p;
  const float c;
  const u64 queries, keys, values;
  KeyRing key_ring;
  ValueRing value_ring;
  Threshold t[2];
  static constexpr int kKept = 4;  // numbers of a row
  using Outputs = RowOutputs;

  float top[2] = {-kInf, -kInf}, floor[2];
  bool poisoned[2];

  __device__ __forceinline__ Attention(const Forward& at, char* own, const Block& b)
      : at(at),
        b(b),
        p(b.p),
        c(b.p.c),
        queries(descriptor(at.queries + uniform(warp_id() / 4) * kRows * kLineBytes)),
        keys(descriptor(at.keys)),
        values(descriptor(at.values, kTileKeys * kLineBytes)) {
    // The scan left each row's largest score as far as it looked, NaN for a poisoned row, and a
    // lower bound of its threshold.
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      const i64 at_row = slot_number(p, b.head_row, b.row(slot));
      const float bound = b.flat[slot] ? p.row_count[at_row].bound : kInf;  // no weights of others
      poisoned[slot] = b.flat[slot] && !(p.row_start[at_row].top < kInf);
      floor[slot] = bound > -kInf ? c * bound : kUnbounded;
      t[slot].done = poisoned[slot] || !b.flat[slot];
      t[slot].rough = false, t[slot].slope = 1.f, t[slot].steps = 0;
    }
    await(at.full_q, 0);
    sign_own(p, own, kOwnBytes);
  }

  // The sample: its threshold for the mass that it would have of the whole row.
  __device__ __forceinline__ void sample_pass(const Sample& sample) {
    Scores s[Sample::kTiles];
    int allowed[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < Sample::kTiles; ++i) {
      if (i >= sample.tiles.count()) {
#pragma unroll
        for (float& x : s[i]) x = -kInf;
        continue;
      }
      const int tile = sample[i];
      scores(s[i], tile);
#pragma unroll
      for (int slot = 0; slot < 2; ++slot)
        allowed[slot] += max(0, min(kTileKeys, b.seen_from(slot, tile * kTileKeys)));
    }
    float weight[2], low[2], high[2];
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
#pragma unroll
      for (int i = 0; i < Sample::kTiles; ++i) raise_top(slot, s[i]);
      top[slot] = max_or_nan_over<4>(top[slot]);
      const bool known = is_finite(top[slot]) && !t[slot].done;
      weight[slot] = float(b.seen_from(slot, 0)) / float(max(1, allowed[slot]));
      const float window = kAlpha == AlphaKind::k15 ? rsqrtf(weight[slot]) : 1.f / weight[slot];
      high[slot] = c * top[slot], low[slot] = high[slot] - 1.f;
      t[slot].lo = low[slot], t[slot].hi = high[slot];
      t[slot].tau = known ? high[slot] - window : floor[slot];
      t[slot].done = !known;
    }
    const int limit = sample.is_everything() ? kSolveSteps : kSampleSteps;
    const float caution = sample.is_large() ? kLargeSampleCaution : kSampleCaution;
#pragma unroll 1
    for (int step = 0; step < limit && !__all_sync(kAllLanes, t[0].done && t[1].done); ++step) {
      RowSums sums[2];
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        sums[slot].add(s[0], slot, c, t[slot].tau);
        sums[slot].add(s[1], slot, c, t[slot].tau);
        const auto m = sums[slot].join(weight[slot]);
        if (sample.is_everything()) {
          t[slot].steps += !t[slot].done;
          advance(t[slot], m, sums[slot].least, kExactly, kExactly);
        } else if (!t[slot].done) {
          t[slot].tau = guess(t[slot].tau, m, weight[slot], caution, low[slot], high[slot]);
        }
      }
    }
    if (sample.is_everything()) settle_rows();
  }

  // A step of every row by a larger sample.
  __device__ __forceinline__ void strided_pass(const Strided& walk) {
    restart(0), restart(1);
    RowSums sums[2];
    Moments<float> own[2];
    for_scores(walk, walk.all(), [&](const Scores& s, int i) {
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        sums[slot].add(s, slot, c, t[slot].tau);
        if (i != Strided::kOwn - 1) continue;
        own[slot] = sums[slot].join(1.f);
        sums[slot] = RowSums();
      }
    });
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      auto m = sums[slot].join(walk.weight());
      m.s0 += own[slot].s0, m.s1 += own[slot].s1, m.s2 += own[slot].s2;
      if (!t[slot].done)
        t[slot].tau = guess(t[slot].tau, m, walk.weight(), kStridedCaution, t[slot].lo, t[slot].hi);
    }
  }

  // One step of every row by all of its keys; whether there must be another one.
  template <bool first>
  __device__ __forceinline__ bool full_pass(const Walk& walk) {
    if constexpr (first) restart(0), restart(1);
    RowSums sums[2];
    // A warp's rows of a slot that are all found need no sums: later passes are for few rows.
    bool sought[2];
#pragma unroll
    for (int slot = 0; slot < 2; ++slot)
      sought[slot] = first || __any_sync(kAllLanes, !t[slot].done);
    for_scores(walk, walk.count, [&](const Scores& s, int) {
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        if constexpr (first) raise_top(slot, s);
        if (sought[slot]) sums[slot].add(s, slot, c, t[slot].tau);
      }
    });
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      if constexpr (first) {
        top[slot] = max_or_nan_over<4>(top[slot]);
        t[slot].done |= !is_finite(top[slot]);
        t[slot].lo = fmaxf(t[slot].lo, c * top[slot] - 1.f);
        t[slot].hi = c * top[slot];
      }
      t[slot].steps += !t[slot].done;
      const auto m = sums[slot].join(1.f);
      advance(t[slot], m, sums[slot].least, 0.5f * kTolerance, kForeseenRough);
    }
    if constexpr (first) settle_rows();
    return !(t[0].done && t[1].done);
  }

  // The outputs by the thresholds as they are; whether some of these must be sought further.
  __device__ __forceinline__ bool output_pass(const Walk& walk, Outputs& o) {
    keep_rows();
    if (kSaves && lane_id() == 0)
      at.live_words[warp_id()] = {
          b.first_row < p.length_q ? live_tiles(p, b.head_row, b.first_row) : nullptr, 0};
    o = {};
    if (kSaves || (kMayBeRough && any_of_warpgroup(2 + warp_id() / 4, t[0].rough || t[1].rough)))
      sum_outputs<true>(walk, o);
    else
      sum_outputs<false>(walk, o);
    return missed(o, 0) | missed(o, 1);
  }

  // Outputs of probabilities that sum to one, and what a backward needs of each row.
  __device__ __forceinline__ void write(Outputs& o) {
    bool unsafe = false;
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      const float total = o.mass[slot], total_u = sum_over<4>(o.sum_u[slot]);
      const int kept = sum_over<4>(o.support[slot]);
      const float factor_u = total_u > 0.f ? 1.f / total_u : 0.f;
      // A row's bits are the same whether or not O2 is there for others.
      const bool rough = kMayBeRough && t[slot].rough;
      const float factor = rough ? 1.f : total > 0.f ? 1.f / total : 0.f;
      const float of_second = rough ? kProbScale * (1.f - total) * factor_u : 0.f;
#pragma unroll
      for (int n = 0; n < kPanelsV * 8; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = o.out[4 * n + 2 * slot + j];
          x *= factor;
          if constexpr (kMayBeRough) x = fmaf(of_second, o.second[4 * n + 2 * slot + j], x);
          if (is_poisoned(slot)) x = kNaN;
        }
      unsafe |= b.flat[slot] && !is_poisoned(slot) && !are_finite<kHeadDimV>(o.out, slot);
      if constexpr (kSaves) keep_second(o, slot, factor_u);
      if (!b.flat[slot] || lane_id() % 4) continue;
      const i64 at_row = slot_number(p, b.head_row, b.row(slot));
      const i64 at_tau = row_number(p, b.head_row, b.row(slot));
      // The last step, by what is known of the slope: the backward's probabilities sum to one.
      const float tau = t[slot].tau, slope = rough ? 2.f * total_u : t[slot].slope;
      const float last =
          total > 0.f && slope > 0.f ? inside(t[slot], tau + (total - 1.f) / slope) : tau;
      p.tau[at_tau] = last;
      p.row_count[at_row].survivors = is_poisoned(slot) ? kPoisoned : kept;
      p.row_start[at_row].factor = total > 0.f ? 1.f / (total - slope * (last - tau)) : 0.f;
      if (is_poisoned(slot)) poison_keys(p, b.kv_row(p), b.row(slot));
      if (p.iterations) p.iterations[at_tau] = t[slot].steps;
    }
    mark_output_if(unsafe, p, b.head_row, b.first_row);
    write_rows<kHeadDimV>(o.out, row_of(p.o, b.batch, b.head, 0), p.o.row, b.first_row, p.length_q,
                          1.f / kProbScale, b.flat);
  }

 private:
  // All lanes of the warp come together. One entry that is not finite leaves the row no delta.
  __device__ __forceinline__ void keep_second(const Outputs& o, int slot, float factor_u) const {
    float most = 0.f;
#pragma unroll
    for (int n = 0; n < kDimV / 8; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) most = max_or_nan(most, fabsf(o.second[4 * n + 2 * slot + j]));
    most = max_or_nan_over<4>(most);
    float off = 0.f;
#pragma unroll
    for (int n = 0; n < kDimV / 8; ++n) {
      const float2 pair = second_pair(o, slot, n, factor_u),
                   near = Scalar::unpack(Scalar::pack(pair.x, pair.y));
      off = fmaxf(off, fmaxf(fabsf(pair.x - near.x), fabsf(pair.y - near.y)));
    }
    const bool as_they_are =
        is_finite(most) && max_over<4>(off) <= most * factor_u * SecondOutput::kRounding;
    if (!b.flat[slot]) return;
    const SecondOutput to(p, b.head_row, b.row(slot));
    // Of what is hardly a number any more, 1 / most would be infinite.
    const float lift = most < 0x1p-60f ? 0x1p80f : 1.f, share = to.kWhole / (most * lift);
#pragma unroll
    for (int n = 0; n < kDimV / 8; ++n) {
      const float2 pair =
          as_they_are ? second_pair(o, slot, n, factor_u) : second_pair(o, slot, n, lift);
      to.put(n * 8 + lane_id() % 4 * 2, as_they_are ? Scalar::pack(pair.x, pair.y)
                                                    : to.shares(pair.x * share, pair.y * share));
    }
    if (lane_id() % 4 == 0) *to.largest = as_they_are ? to.kAsTheyAre : most * factor_u;
  }
  // A lane's two entries of O2 in each eight columns.
  static __device__ __forceinline__ float2 second_pair(const Outputs& o, int slot, int n,
                                                       float factor) {
    return {o.second[4 * n + 2 * slot] * factor, o.second[4 * n + 2 * slot + 1] * factor};
  }

  // --- thresholds

  // use(scores of a tile, i) of every tile of a walk.
  template <class Walked, class Use>
  __device__ __forceinline__ void for_scores(const Walked& walk, int count, const Use& use) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      Scores s;
      scores(s, walk[i]);
      use(s, i);
    }
  }
  // The scores of one tile, and its stage given back.
  __device__ __forceinline__ void scores(Scores& s, int tile) {
    await_keys(tile);
    wgmma_fence();
    add_dots<kDim, kTileKeys>(s, queries, keys_of(tile));
    wgmma_commit();
    wgmma_wait();
    fence_operands(s);
    give_back_keys();
    b.mask(s, tile * kTileKeys);
  }
  __device__ __forceinline__ void await_keys(int tile) const {
    if constexpr (kResident)
      await(at.full_k + tile * 8, 0);
    else
      key_ring.await_full(at.full_k);
  }
  __device__ __forceinline__ u64 keys_of(int tile) const {
    return keys + (kResident ? tile : key_ring.stage) * (kKeyBytes / kDescriptorBytes);
  }
  __device__ __forceinline__ void give_back_keys() {
    if constexpr (kResident) return;
    if (lane_id() == 0) arrive(at.empty_k + key_ring.stage * 8);
    key_ring.advance();
  }
  __device__ __forceinline__ void raise_top(int slot, const Scores& s) {
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) top[slot] = max_or_nan(top[slot], s[4 * n + 2 * slot + j]);
  }
  // A bracket of what is proven; what the sample found is where to start in it.
  __device__ __forceinline__ void restart(int slot) {
    const float low = is_finite(top[slot]) ? fmaxf(floor[slot], c * top[slot] - 1.f) : floor[slot];
    t[slot].lo = low, t[slot].hi = kInf;
    t[slot].tau = fmaxf(t[slot].tau, t[slot].lo);
    t[slot].done = poisoned[slot] || !b.flat[slot];
  }

  // Rows without a threshold: poisoned ones, and those where no key scores above minus infinity.
  __device__ __forceinline__ void settle_rows() {
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      const bool dead = poisoned[slot] || (b.flat[slot] && !(top[slot] < kInf));
      if (dead || top[slot] == -kInf) t[slot].tau = dead ? kNaN : kInf;
    }
  }

  // --- outputs

  // The sums of outputs leave no registers for all that is known of rows.
  __device__ __forceinline__ u32 kept(int slot) const {
    return at.rows + (b.row(slot) - b.first) * u32(kKept * sizeof(float));
  }
  __device__ __forceinline__ void keep_rows() const {
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      store_shared(kept(slot), t[slot].lo);
      store_shared(kept(slot) + 4, t[slot].hi);
      store_shared(kept(slot) + 8, t[slot].slope);
      store_shared(kept(slot) + 12, 2 * t[slot].steps + t[slot].rough);
    }
  }
  __device__ __forceinline__ void take_row(int slot) {
    t[slot].lo = load_shared(kept(slot));
    t[slot].hi = load_shared(kept(slot) + 4);
    t[slot].slope = load_shared(kept(slot) + 8);
    const int steps = load_shared_int(kept(slot) + 12);
    t[slot].steps = steps / 2, t[slot].rough = steps % 2;
    t[slot].done = true;
  }
  __device__ __forceinline__ bool is_poisoned(int slot) const {
    return b.flat[slot] && !(t[slot].tau == t[slot].tau);
  }
  __device__ __forceinline__ void start_part(PartScores& s, int tile, int part) {
    if (part == 0) await_keys(tile);
    wgmma_fence();
    add_dots<kDim, kTileKeys>(s, queries, keys_of(tile) + part * rows_at(kSteps));
    wgmma_commit();
  }
  __device__ __forceinline__ void finish_part(PartScores& s, int part) {
    fence_operands(s);
    if (part == kParts - 1) give_back_keys();
  }
  // Both outputs over all keys, or the first one.
  template <bool second>
  __device__ __forceinline__ void sum_outputs(const Walk& walk, Outputs& o) {
    {
      PartScores s;
      start_part(s, walk[0], 0);
      wgmma_wait();
      finish_part(s, 0);
      weigh<second>(o, s, walk[0] * kTileKeys);
    }
#pragma unroll 1
    for (int i = 1; i < walk.count * kParts; ++i) {
      PartScores s;
      // While the values of the part before are summed.
      start_part(s, walk[i / kParts], i % kParts);
      start_values<second>(o, (i - 1) % kParts);
      wgmma_wait();
      finish_part(s, i % kParts);
      finish_values<second>(o, (i - 1) % kParts);
      weigh<second>(o, s, walk[i / kParts] * kTileKeys + i % kParts * kPartKeys);
    }
    start_values<second>(o, kParts - 1);
    wgmma_wait();
    finish_values<second>(o, kParts - 1);
  }
  // Scores to probabilities, and to weights of the second output.
  template <bool second>
  __device__ __forceinline__ void weigh(Outputs& o, PartScores& s, int first_key) {
    b.mask(s, first_key);
    // By each kLiveKeys keys: the sums of second weights, and, to be counted, whether some are in
    // the support.
    constexpr int kTiles = kPartKeys / kLiveKeys;
    static_assert(kPartKeys % kLiveKeys == 0 && kLiveKeys == kStatsTile);
    float here[2] = {0.f, 0.f}, here_u[kTiles][2] = {};
    bool live[kTiles] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      float prob[8], u[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int slot = e / 2 % 2;
        // No score is more than 1 above its threshold, and multiply-adds saturate for free.
        const float inside = __saturatef(fmaf(c, s[8 * k + e], -t[slot].tau));
        prob[e] = kAlpha == AlphaKind::k15 ? inside * inside : inside;
        u[e] = kAlpha == AlphaKind::k15 ? inside : inside > 0.f ? 1.f : 0.f;
        here[slot] += prob[e];
        if constexpr (kCounts) {
          o.support[slot] += inside > 0.f;
          live[k / (kLiveKeys / 16)] |= inside > 0.f && b.flat[slot];
        }
      }
      o.probs[k] = as_a_fragment([&](int e) { return kProbScale * prob[e]; });
      if constexpr (second) {
        // The weights are summed as they are multiplied, rounded: O2 of equal values is then that
        // value.
        o.weights[k] = as_a_fragment([&](int e) { return u[e]; });
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 pair = Scalar::unpack(o.weights[k].r[i]);
          here_u[k / (kLiveKeys / 16)][i % 2] += pair.x + pair.y;
        }
      }
    }
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      o.mass[slot] += here[slot];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) o.sum_u[slot] += here_u[i][slot];
    }
    if constexpr (kCounts)
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
        if (live[i]) mark_tile(p, b.head_row, b.first_row, first_key + i * kStatsTile);
    if constexpr (kSaves) keep_live(here_u, first_key);
  }
  // Which tiles have weights for the backward. They come from the last one on: a word is complete
  // with its first tile. Thresholds take a last step after that. A key that only this step lets in
  // may be left out: its weight is less than the step, which is what the row's sum misses by 2 sum
  // u. It is kept in shared memory, since no registers are left where values are wide.
  template <int tiles>
  __device__ __forceinline__ void keep_live(const float (&sum_u)[tiles][2], int first_key) const {
    const u32 tile = u32(first_key) % kLiveWordKeys / kLiveKeys;
#pragma unroll
    for (int i = 0; i < tiles; ++i)
      if (__any_sync(kAllLanes, sum_u[i][0] + sum_u[i][1] > 0.f) && lane_id() == 0)
        at.live_words[warp_id()].bits |= 1u << tile << i;
    if (u32(first_key) % kLiveWordKeys != kTileKeys - kPartKeys || lane_id() != 0) return;
    LiveWord& kept = at.live_words[warp_id()];
    if (kept.to) kept.to[u32(first_key) / kLiveWordKeys] = kept.bits;
    kept.bits = 0;
  }
  template <bool second>
  __device__ __forceinline__ void start_values(Outputs& o, int part) {
    if (part == 0) value_ring.await_full(at.full_v);
    const u64 rows =
        values + value_ring.stage * (kValueBytes / kDescriptorBytes) + part * rows_at(kSteps);
    wgmma_fence();
    add_weighted(o.out, o.probs, rows);
    if constexpr (second) add_weighted(o.second, o.weights, rows);
    wgmma_commit();
  }
  template <bool second>
  __device__ __forceinline__ void finish_values(Outputs& o, int part) {
    fence_operands(o.out);
    fence_operands(o.probs);
    if constexpr (second) fence_operands(o.second), fence_operands(o.weights);
    if (part < kParts - 1) return;
    if (lane_id() == 0) arrive(at.empty_v + value_ring.stage * 8);
    value_ring.advance();
  }
  // Whether a row's probabilities sum to something else than one and a step could mend that. From
  // there on its threshold is sought again.
  __device__ __forceinline__ bool missed(Outputs& o, int slot) {
    const float total = o.mass[slot] = sum_over<4>(o.mass[slot]);
    take_row(slot);
    if (!b.flat[slot] || !is_finite(t[slot].tau)) return false;
    const float f = total - 1.f, step = f / t[slot].slope,
                least = 4.f * kEpsilon * fabsf(t[slot].tau);
    const float most = kMayBeRough && t[slot].rough ? kRough : kTolerance;
    if (!(fabsf(f) > most && fabsf(step) > least && t[slot].hi - t[slot].lo > least)) return false;
    bracket(t[slot], f);
    t[slot].tau = inside(t[slot], t[slot].tau + step);
    t[slot].done = t[slot].rough = false;
    return true;
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    dense_output(const __grid_constant__ Params p, const __grid_constant__ TensorMap query_map,
                 const __grid_constant__ TensorMap key_map,
                 const __grid_constant__ TensorMap value_map) {
  start_next_and_await();
  extern __shared__ __align__(16) char shared[];
  __shared__ __align__(8) u64 barriers[Forward::kBarriers];
  __shared__ float rows[kBlockRows * Attention::kKept];
  __shared__ LiveWord live_words[kConsumers / 32];
  const Block b(p, blockIdx.x);
  if (!any_of_block(b.flat[0] || b.flat[1])) return;
  const u32 start = shared_address(shared), memory = align_tiles(start);
  const Forward at(live_words, memory, shared_address(rows), shared_address(barriers));
  if (threadIdx.x == 0) at.start();
  __syncthreads();
  if (uniform(warp_id()) >= kConsumers / 32) {
    setmaxnreg_dec<kProducerRegisters>();
    Producer producer(at, b, query_map, key_map, value_map);
    for_passes(b.tiles<kTileKeys>(), producer);
  } else {
    setmaxnreg_inc<kWarpgroups, kProducerRegisters>();
    Attention attention(at, shared + (memory - start), b);
    for_passes(b.tiles<kTileKeys>(), attention);
  }
}

}  // namespace adasplash2
