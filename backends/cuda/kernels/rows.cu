// Entmax of dense rows, and its gradient: a block owns a row.
//
// Forward: one pass for the maximum, one that keeps what can be in the support (y > -1, each
// thread its own columns), then the threshold on what was kept, then one pass that writes.
// A row that keeps more than its lists hold reads itself again instead, from the L2.
#include "common.cuh"

namespace adasplash2 {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRowCapacity = 32;  // scores a thread keeps: 32 KiB of shared memory a block

struct RowParams {
  const void *x, *grad_y;  // strides in elements; y is dense
  void *y, *grad_x;
  i64 stride_x, stride_grad_y;
  int rows, length;
  float c, r;  // alpha - 1 and 1 / (alpha - 1)
};

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

__device__ __forceinline__ float score(const Scalar* x, int j, float c) {
  return c * to_float(x[j]);
}

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
    const float z = score(x, j, p.c);
    top = fmaxf(top, z);
    poisoned |= !(z < kInf);  // NaN or +inf
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
    const float shifted = score(x, j, p.c) - top;
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
      for (int j = threadIdx.x; j < p.length; j += kThreads) body(score(x, j, p.c) - top);
  };

  float powers[kBins + 1];
  if constexpr (kAlpha == AlphaKind::kGeneral)
    for (int k = 0; k <= kBins; ++k) powers[k] = k ? power(k / float(kBins), p.r) : 0.f;
  const Bracket<float> bracket = histogram_bracket<kAlpha>(histogram, powers);
  float lo = bracket.lo, hi = fminf(bracket.hi, kHighest), t = fminf(bracket.start, hi);
  bool done = false;
  for (int step = 0; step < kSolveSteps && !done; ++step) {
    Moments<float> m{0.f, 0.f, 0.f};
    for_scores([&](float shifted) { accumulate(m, shifted - t, p.r); });
    m = {over_block(m.s0, floats, add), over_block(m.s1, floats, add),
         over_block(m.s2, floats, add)};
    done = refine(m, p.r, lo, hi, t, 0.f, step);
  }
  float mass = 0.f;
  for_scores([&](float shifted) {
    const float above = shifted - t;
    if (above > 0.f) mass += probability(above, p.r);
  });
  mass = over_block(mass, floats, add);
  for (int j = threadIdx.x; j < p.length; j += kThreads) {
    const float above = score(x, j, p.c) - top - t;
    store(y + j, above > 0.f ? probability(above, p.r) / mass : 0.f);
  }
}

// u = y^(2-alpha) on the support
__device__ __forceinline__ float sensitivity(float y, float exponent) {
  if constexpr (kAlpha == AlphaKind::k15) return sqrtf(y);
  if (!(y > 0.f)) return y;  // zero, or NaN
  if constexpr (kAlpha == AlphaKind::k2) return 1.f;
  return power(y, exponent);
}

// dx = u (dy - sum u dy / sum u)
extern "C" __global__ void __launch_bounds__(kThreads)
    entmax_rows_grad(const __grid_constant__ RowParams p) {
  __shared__ float floats[kWarps];
  const Scalar* y = static_cast<const Scalar*>(p.y) + i64(blockIdx.x) * p.length;
  const Scalar* grad_y = static_cast<const Scalar*>(p.grad_y) + blockIdx.x * p.stride_grad_y;
  Scalar* grad_x = static_cast<Scalar*>(p.grad_x) + i64(blockIdx.x) * p.length;
  const float exponent = 1.f - p.c;  // 2 - alpha
  float total = 0.f, weighted = 0.f;
  for (int j = threadIdx.x; j < p.length; j += kThreads) {
    const float u = sensitivity(to_float(y[j]), exponent);
    if (u == 0.f) continue;  // off the support nothing is felt, not even a NaN
    total += u;
    weighted = fmaf(u, to_float(grad_y[j]), weighted);
  }
  total = over_block(total, floats, add);
  weighted = over_block(weighted, floats, add);
  const float delta = total == 0.f ? 0.f : weighted / total;
  for (int j = threadIdx.x; j < p.length; j += kThreads) {
    const float u = sensitivity(to_float(y[j]), exponent);
    store(grad_x + j, u == 0.f ? 0.f : u * (to_float(grad_y[j]) - delta));
  }
}

}  // namespace adasplash2
