// Entmax of dense rows, and its gradient: a block owns a row.
//
// Forward: one pass for the maximum, one that keeps what can be in the support (y > -1, each
// thread its own columns), then the threshold on what was kept, then one pass that writes.
// A row that keeps more than its lists hold reads itself again instead, from the L2.
#include "common.cuh"

namespace adasplash2 {

constexpr int kThreads = kRowThreads;
constexpr int kWarps = kThreads / 32;
constexpr int kRowCapacity = 32;  // scores a thread keeps: 32 KiB of shared memory a block

// Over the block, in a fixed order; every thread gets the result.
template <class T, class Combine>
__device__ __forceinline__ T over_block(T x, T (&shared)[kWarps], const Combine& combine) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) x = combine(x, __shfl_xor_sync(kAllLanes, x, step));
  __syncthreads();
  if (lane_id() == 0) shared[warp_id()] = x;
  __syncthreads();
  x = shared[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) x = combine(x, shared[warp]);
  return x;
}

__device__ __forceinline__ float add(float a, float b) { return a + b; }

// A score's distance below the largest. The difference comes first: it is exact where it matters.
__device__ __forceinline__ float shifted_score(const Scalar* x, int j, float top, float c) {
  return c * (to_float(x[j]) - top);
}

// Where thresholds and distances are kept. The power r takes the digits of a base near 1: where it
// is large, t is kept with 1 added and the distance with 1 taken away.
struct Window {
  float r;
  bool shallow;
  __device__ __forceinline__ explicit Window(float r)
      : r(r), shallow(kAlpha == AlphaKind::kGeneral && r > 2.f) {}
  __device__ __forceinline__ float lift() const { return shallow ? 1.f : 0.f; }
  __device__ __forceinline__ bool inside(float distance) const { return distance > -lift(); }
  __device__ __forceinline__ float probability(float distance) const {
    if constexpr (kAlpha == AlphaKind::kGeneral)
      if (shallow) return power_above_one(distance, r);
    return adasplash2::probability(distance, r);
  }
  __device__ __forceinline__ void accumulate(Moments<float>& m, float distance) const {
    if constexpr (kAlpha == AlphaKind::kGeneral) {
      if (!inside(distance)) return;
      const float p = probability(distance);
      m.s1 += p / (distance + lift());
      m.s2 += p;
    } else {
      adasplash2::accumulate(m, distance, r);
    }
  }
  // A bracket of t in [-1, 0], and where to start in it: near alpha = 1 it is much wider than the
  // reach of Newton's steps from above.
  __device__ __forceinline__ Bracket<float> bracket(const Bracket<float>& found) const {
    const float hi = fminf(found.hi, kHighest);
    if (shallow) return {found.lo + 1.f, hi + 1.f, found.lo + 1.f};
    return {found.lo, hi, fminf(found.start, hi)};
  }
  __device__ __forceinline__ bool refine(const Moments<float>& m, float& lo, float& hi, float& t,
                                         int step) const {
    if (!shallow) return adasplash2::refine(m, r, lo, hi, t, 0.f, step);
    (m.s2 >= 1.f ? lo : hi) = t;
    return refine_general(m, r, lo, hi, t, 16.f * kEpsilon, step);
  }
};

extern "C" __global__ void __launch_bounds__(kThreads)
    entmax_rows(const __grid_constant__ RowParams p) {
  __shared__ float kept[kRowCapacity][kThreads];
  __shared__ int histogram[kBins];
  __shared__ float floats[kWarps];
  __shared__ int ints[kWarps];
  const Scalar* x = static_cast<const Scalar*>(p.x) + blockIdx.x * p.stride_x;
  Scalar* y = static_cast<Scalar*>(p.y) + i64(blockIdx.x) * p.length;

  float top = -kInf;
  int poisoned = 0;
  for (int j = threadIdx.x; j < p.length; j += kThreads) {
    const float s = to_float(x[j]);
    top = fmaxf(top, s);
    poisoned |= !(s < kInf);  // NaN or +inf
  }
  top = over_block(top, floats, [](float a, float b) { return fmaxf(a, b); });
  poisoned = over_block(poisoned, ints, [](int a, int b) { return a | b; });
  if (poisoned || top == -kInf) {
    const float all = poisoned ? __int_as_float(0x7fffffff) : 0.f;
    for (int j = threadIdx.x; j < p.length; j += kThreads) store(y + j, all);
    return;
  }

  if (threadIdx.x < kBins) histogram[threadIdx.x] = 0;
  __syncthreads();
  int mine = 0;
  for (int j = threadIdx.x; j < p.length; j += kThreads) {
    const float shifted = shifted_score(x, j, top, p.c);
    if (shifted > -1.f) {
      if (mine < kRowCapacity) kept[mine][threadIdx.x] = shifted;
      ++mine;
      atomicAdd(&histogram[bin_of(shifted)], 1);  // whole numbers: the order does not matter
    }
  }
  const bool listed =
      over_block(mine, ints, [](int a, int b) { return max(a, b); }) <= kRowCapacity;
  const auto for_scores = [&](const auto& body) {
    if (listed)
      for (int i = 0; i < mine; ++i) body(kept[i][threadIdx.x]);
    else
      for (int j = threadIdx.x; j < p.length; j += kThreads) body(shifted_score(x, j, top, p.c));
  };

  float powers[kBins + 1];
  if constexpr (kAlpha == AlphaKind::kGeneral)
    for (int k = 0; k <= kBins; ++k) powers[k] = k ? power(k / float(kBins), p.r) : 0.f;
  const Window window(p.r);
  const auto [low, high, start] = window.bracket(histogram_bracket<kAlpha>(histogram, powers));
  float lo = low, hi = high, t = start;
  bool done = false;
  for (int step = 0; step < kSolveSteps && !done; ++step) {
    Moments<float> m{0.f, 0.f, 0.f};
    for_scores([&](float shifted) { window.accumulate(m, shifted - t); });
    m = {over_block(m.s0, floats, add), over_block(m.s1, floats, add),
         over_block(m.s2, floats, add)};
    done = window.refine(m, lo, hi, t, step);
  }
  float mass = 0.f;
  for_scores([&](float shifted) {
    const float distance = shifted - t;
    if (window.inside(distance)) mass += window.probability(distance);
  });
  mass = over_block(mass, floats, add);
  for (int j = threadIdx.x; j < p.length; j += kThreads) {
    const float distance = shifted_score(x, j, top, p.c) - t;
    store(y + j, window.inside(distance) ? window.probability(distance) / mass : 0.f);
  }
}

// u = (y / least)^(2-alpha) on the support
__device__ __forceinline__ float sensitivity(float y, float least, float exponent) {
  if constexpr (kAlpha == AlphaKind::k15) return sqrtf(y);
  if (!(y > 0.f)) return y;  // zero, or NaN
  if constexpr (kAlpha == AlphaKind::k2) return 1.f;
  return power(y / least, exponent);
}

// The smallest normal number, and the largest.
constexpr float kLeast = 0x1p-126f, kMost = 0x1.fffffep127f;

// dx = u (dy - sum u dy / sum u). Above alpha = 2 u may leave float32: it is taken relative to the
// largest one, that of the least y, and a gradient that leaves float32 stops at its end.
extern "C" __global__ void __launch_bounds__(kThreads)
    entmax_rows_grad(const __grid_constant__ RowParams p) {
  __shared__ float floats[kWarps];
  const Scalar* y = static_cast<const Scalar*>(p.y) + i64(blockIdx.x) * p.length;
  const Scalar* grad_y = static_cast<const Scalar*>(p.grad_y) + blockIdx.x * p.stride_grad_y;
  Scalar* grad_x = static_cast<Scalar*>(p.grad_x) + i64(blockIdx.x) * p.length;
  const float exponent = 1.f - p.c;  // 2 - alpha
  const bool steep = kAlpha == AlphaKind::kGeneral && exponent < 0.f;
  float least = 1.f;
  if (steep) {
    for (int j = threadIdx.x; j < p.length; j += kThreads) {
      const float prob = to_float(y[j]);
      if (prob > 0.f) least = fminf(least, prob);
    }
    least = fmaxf(over_block(least, floats, [](float a, float b) { return fminf(a, b); }), kLeast);
  }
  const float root = steep ? power(least, 0.5f * exponent) : 1.f;  // of the largest u
  float total = 0.f, weighted = 0.f;
  for (int j = threadIdx.x; j < p.length; j += kThreads) {
    const float u = sensitivity(to_float(y[j]), least, exponent);
    if (u == 0.f) continue;  // off the support nothing is felt, not even a NaN
    total += u;
    weighted = fmaf(u, to_float(grad_y[j]), weighted);
  }
  total = over_block(total, floats, add);
  weighted = over_block(weighted, floats, add);
  const float delta = total == 0.f ? 0.f : weighted / total;
  for (int j = threadIdx.x; j < p.length; j += kThreads) {
    const float u = sensitivity(to_float(y[j]), least, exponent);
    float dx = u == 0.f ? 0.f : u * (to_float(grad_y[j]) - delta);
    if (steep && dx != 0.f && is_finite(dx)) dx = fmaxf(fminf(dx * root * root, kMost), -kMost);
    store(grad_x + j, dx);
  }
}

}  // namespace adasplash2
