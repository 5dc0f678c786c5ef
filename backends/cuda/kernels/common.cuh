// What every kernel shares: compile-time parameters, the argument block, element types,
// tensor-core fragments and small warp helpers.
//
// A translation unit is one kernel family compiled for one problem kind. Constants and the structs
// in memory are those of layout.py, which makes layout.cuh. What depends on the kind comes as
// macros from sizes.py, each with ADASPLASH2_ before its name:
//   DTYPE                    BFLOAT16, FLOAT16 or FLOAT32
//   HEAD_DIM, HEAD_DIM_V     of queries and keys, and of values, 1 to 256
//   ALPHA                    an AlphaKind
//   CAUSAL                   0 or 1, see score.cuh
//   ALIGNED                  1 where every row of every tensor starts on 16 bytes
//   ARENA_BYTES              of the arena of survivors per query row
//   KEY_BYTES, ROW_BYTES     of the number of a key there, and of a row among those of a key
//   KEEPS_WEIGHTS            1 where the backward is given z - tau of each survivor
//   OUTPUT_LANES, GRAD_LANES lanes that share one row in the gathers of the output, of gradients
// and for the scans, which keep lists,
//   CAPACITY                 memory of a warp's lists, in entries of a lane
//   BLOCK_ROWS, TILE_KEYS    queries of a block, keys of a tile (scan.cu)
//   WARPGROUPS, STAGES       of a block that filter, tiles of keys in shared memory (scan90.cu)
//   RETRY                    1 to retry rows that lists could not hold (scan90.cu)
// for those of few queries
//   PAGED                    1 where keys and values lie in pages
//   HELD_ROWS, WARPS         of a block that scans
//   RESIDENTS                such blocks that a multiprocessor has room for
// and for the dense kernels
//   BLOCK_ROWS, KEY_BLOCKS   rows of a block, blocks for a tile's gradients (dense.cu, exact.cu)
//   KEY_STAGES, KEYS_STAY    stages of keys, and whether there is one for each tile (dense90.cuh)
//   OWN_STAGES               stages of what a block of gradients owns there
//   GRAD_KEYS                keys of a backward's tile there
//   OUTPUT                   OUTPUT_PLAIN, _SAVES or _COUNTS (dense90_output.cu)
// SHARED_ and a kernel's name is the dynamic shared memory that it is launched with, FIXED_ what of
// it is the same whatever the call, STATIC_ what it declares beside it, where sizes.py counts on
// that. No other header than threshold.h is included: NVRTC needs no CUDA toolkit to compile these
// files.
#pragma once

#include "adasplash2/threshold.h"
#include "layout.cuh"

namespace adasplash2 {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

constexpr int kHeadDim = ADASPLASH2_HEAD_DIM;
constexpr int kHeadDimV = ADASPLASH2_HEAD_DIM_V;
constexpr AlphaKind kAlpha = static_cast<AlphaKind>(ADASPLASH2_ALPHA);
constexpr bool kAligned = ADASPLASH2_ALIGNED;
constexpr int kArenaBytes = ADASPLASH2_ARENA_BYTES;

template <int bytes>
struct Number {
  using type = u32;
};
template <>
struct Number<2> {
  using type = u16;
};
using KeyNumber = Number<ADASPLASH2_KEY_BYTES>::type;
using RowNumber = Number<ADASPLASH2_ROW_BYTES>::type;
static_assert(kArenaBytes >= kArenaRow * int(sizeof(KeyNumber)) && kArenaBytes % 16 == 0);

template <int width>
constexpr int padded = (width + 15) / 16 * 16;
constexpr int kDim = padded<kHeadDim>;  // widths as the matrix fragments see them
constexpr int kDimV = padded<kHeadDimV>;

constexpr u32 kAllLanes = 0xffffffffu;
constexpr float kInf = __builtin_bit_cast(float, 0x7f800000);
constexpr float kNaN = __builtin_bit_cast(float, 0x7fffffff);

// --- element types -------------------------------------------------------------------------

struct Bf16 {
  u16 bits;
  static __device__ __forceinline__ float2 unpack(u32 pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  }
  static __device__ __forceinline__ u32 pack(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
};

struct Fp16 {
  u16 bits;
  static __device__ __forceinline__ float2 unpack(u32 pair) {
    float2 out;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(out.x), "=f"(out.y)
        : "r"(pair));
    return out;
  }
  static __device__ __forceinline__ u32 pack(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
};

struct Fp32 {
  float bits;
  // Pairs in a word exist for 16-bit types only; these let their branches compile.
  static __device__ float2 unpack(u32) { return {}; }
  static __device__ u32 pack(float, float) { return 0; }
};

#if ADASPLASH2_DTYPE == ADASPLASH2_BFLOAT16
using Scalar = Bf16;
#elif ADASPLASH2_DTYPE == ADASPLASH2_FLOAT16
using Scalar = Fp16;
#else
using Scalar = Fp32;
#endif
constexpr bool kHalf = sizeof(Scalar) == 2;

__device__ __forceinline__ float to_float(Scalar x) {
  if constexpr (kHalf)
    return Scalar::unpack(u32(x.bits)).x;
  else
    return x.bits;
}

__device__ __forceinline__ void store(Scalar* to, float x) {
  if constexpr (kHalf)
    to->bits = u16(Scalar::pack(x, 0.f));
  else
    to->bits = x;
}

// Load 16 bytes that no running kernel writes; zeros where they are not wanted. This takes a
// predicate instead of a branch, after which each load would be waited for: so those of several
// rows are under way together.
__device__ __forceinline__ uint4 load16(const void* from, bool wanted) {
  uint4 x = {0, 0, 0, 0};
  asm("{.reg .pred wanted; setp.ne.b32 wanted, %5, 0;"
      "@wanted ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
      : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)
      : "l"(__cvta_generic_to_global(from)), "r"(int(wanted)));
  return x;
}

// Elements [at, at + 8) of a row that holds `width`; zeros beyond it, and where it is not wanted.
template <int width>
__device__ __forceinline__ void load8(const Scalar* row, int at, float (&out)[8],
                                      bool wanted = true) {
  if constexpr (kAligned && kHalf) {
    const uint4 raw = load16(row + at, wanted && at < width);
    const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = Scalar::unpack(words[i]);
      out[2 * i] = pair.x;
      out[2 * i + 1] = pair.y;
    }
  } else if constexpr (kAligned) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const uint4 raw = load16(row + at + i, wanted && at + i < width);
      out[i] = __uint_as_float(raw.x), out[i + 1] = __uint_as_float(raw.y);
      out[i + 2] = __uint_as_float(raw.z), out[i + 3] = __uint_as_float(raw.w);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = wanted && at + i < width ? to_float(row[at + i]) : 0.f;
  }
}

template <int width>
__device__ __forceinline__ void store8(Scalar* row, int at, const float (&in)[8]) {
  if constexpr (kAligned && kHalf) {
    if (at < width)
      *reinterpret_cast<uint4*>(row + at) = {Scalar::pack(in[0], in[1]), Scalar::pack(in[2], in[3]),
                                             Scalar::pack(in[4], in[5]),
                                             Scalar::pack(in[6], in[7])};
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (at + i < width) store(row + at + i, in[i]);
  }
}

// --- launches ------------------------------------------------------------------------------

// From Hopper on a kernel may start while those before it in a call still run (driver.py), so each
// begins with one of these: before it touches memory those have ended, and what they wrote is seen.
__device__ __forceinline__ void await_kernels_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The same for every kernel but the last one of a call: the next one may start where this one's
// blocks leave room, since it waits in the same way. What follows the last one is not of this
// library and may not wait.
__device__ __forceinline__ void start_next_and_await() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  await_kernels_before();
}

// --- warp helpers --------------------------------------------------------------------------

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / 32; }

// Tells the compiler that all lanes of the warp hold the same.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(kAllLanes, x, 0); }

// Over each lane group: `lanes` lanes that are neighbours or, where `apart` is not 1, so far from
// each other.
template <int lanes, int apart = 1, class T>
__device__ __forceinline__ T sum_over(T x) {
#pragma unroll
  for (int step = apart; step < lanes * apart; step *= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Over the first `lanes` lanes, up to this one and with it.
template <int lanes = 32>
__device__ __forceinline__ int sum_upto(int x) {
#pragma unroll
  for (int step = 1; step < lanes; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, x, step);
    if (lane_id() >= step) x += other;
  }
  return x;
}

template <int lanes>
__device__ __forceinline__ float max_over(float x) {
#pragma unroll
  for (int step = 1; step < lanes; step *= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

__device__ __forceinline__ float max_or_nan(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}

template <int lanes, int apart = 1>
__device__ __forceinline__ float max_or_nan_over(float x) {
#pragma unroll
  for (int step = apart; step < lanes * apart; step *= 2)
    x = max_or_nan(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < kInf; }

// --- the mathematics of one score ----------------------------------------------------------

// x = 2^whole rest > 0, where the rest lies between the roots of 1/2 and 2.
struct Binary {
  int whole;
  float rest;
};
__device__ __forceinline__ Binary split_binary(float x) {
  const int bits = __float_as_int(x), whole = (bits - 0x3f3504f3) >> 23;
  return {whole, __int_as_float(bits - whole * (1 << 23))};
}

// 2^(exponent (whole + rest)). The logarithm comes in two parts, since the rounding of a large one
// would grow to several ulps of the power.
__device__ __forceinline__ float power_of_two(Binary log2, float exponent) {
  const float part = exponent * log2.rest;
  const float most = exponent * float(log2.whole), sum = most + part;
  const float lost = fmaf(exponent, float(log2.whole), -most) + (part - (sum - most));
  const float y = exp2f(sum);
  return fmaf(y, 0.69314718f * lost, y);
}

// x^exponent of x > 0.
__device__ __forceinline__ float power(float x, float exponent) {
  const Binary parts = split_binary(x);
  return power_of_two({parts.whole, log2f(parts.rest)}, exponent);
}

// log2(1 + w) of w > -1, right to a few of its own ulps also where w is far below an ulp of 1.
__device__ __forceinline__ Binary log2_above_one(float w) {
  const Binary parts = split_binary(1.f + w);
  const float d = parts.whole == 0 ? w : parts.rest - 1.f;
  const float f = d / (2.f + d), g = f * f;  // log(1 + d) = 2 artanh(f), |f| < 0.172
  const float series =
      fmaf(g, fmaf(g, fmaf(g, fmaf(g, 1.f / 9.f, 1.f / 7.f), 0.2f), 1.f / 3.f), 1.f);
  return {parts.whole, 2.8853900818f * f * series};
}

// (1 + w)^exponent of w > -1.
__device__ __forceinline__ float power_above_one(float w, float exponent) {
  return power_of_two(log2_above_one(w), exponent);
}

// 1 - mass^-exponent, right to round-off also where the power is nearly 1.
__device__ __forceinline__ float shortfall(float mass, float exponent) {
  const Binary log2 = log2_above_one(mass - 1.f);
  return -expm1f(-0.69314718f * exponent * (float(log2.whole) + log2.rest));
}

// p = x^r
__device__ __forceinline__ float probability(float x, float r) {
  if constexpr (kAlpha == AlphaKind::k15) return x * x;
  if constexpr (kAlpha == AlphaKind::k2) return x;
  return power(x, r);
}

// u = p^(2-alpha) = x^(r-1), the weight of a score in the backward
__device__ __forceinline__ float weight(float x, float r) {
  if constexpr (kAlpha == AlphaKind::k15) return x;
  if constexpr (kAlpha == AlphaKind::k2) return 1.f;
  return power(x, r) / x;
}

__device__ __forceinline__ void accumulate(Moments<float>& m, float x, float r) {
  if constexpr (kAlpha == AlphaKind::kGeneral) {
    if (x > 0.f) {  // s0 is not asked for
      const float p = power(x, r);
      m.s1 += p / x;
      m.s2 += p;
    }
  } else {
    const float inside = fmaxf(x, 0.f);
    m.s0 += x > 0.f ? 1.f : 0.f;
    m.s1 += inside;
    if constexpr (kAlpha == AlphaKind::k15) m.s2 = fmaf(inside, inside, m.s2);
  }
}

template <int lanes>
__device__ __forceinline__ Moments<float> sum_over(Moments<float> m) {
  return {sum_over<lanes>(m.s0), sum_over<lanes>(m.s1), sum_over<lanes>(m.s2)};
}

// How far above t the root lies at least, from f(t) > 0 and sum u. Each x^r stays above a line
// that falls to zero at x or before: its tangent where it is convex, and above alpha = 2, where
// it is concave, its chord x^r - d x^(r-1).
__device__ __forceinline__ float certain_rise(float f, float sum_u, float r) {
  return f / ((kAlpha == AlphaKind::kGeneral ? fmaxf(r, 1.f) : r) * sum_u);
}

constexpr int kSolveSteps = 64;  // enough for bisection alone, to a few floats
constexpr float kEpsilon = 0x1p-23f;
// The longest step that refine() takes for the last one without another look at f, in windows: the
// round-off of what it was solved on is then far below that of tau.
constexpr float kSureStep = 1.f / 32.f;
// Newton's steps before every other one becomes a bisection. Convex rows need no more.
constexpr int kFreeSteps = 8;
// Upper end of tau's window. n equal scores have their threshold n^(1-alpha) below them, which is
// less than any float32 for large alpha; but the largest score must keep a distance to it.
constexpr float kHighest = kAlpha == AlphaKind::kGeneral ? -0x1p-126f : 0.f;

// refine() without a closed form: Newton's step for (sum x^r)^(1/r), which is a line in t where
// one score or equal ones hold the mass. Up to alpha = 2 it is convex, so that steps from below
// end at the root. Above, it drops with infinite slope at every score, and steps can circle around
// one: hence the bisections. They halve the floats between lo and hi, not the window, since the
// root of equal scores is tiny. A step of less than an ulp takes an ulp, to close the bracket.
// `roundoff` is that of f.
__device__ __forceinline__ bool refine_general(const Moments<float>& m, float r, float lo, float hi,
                                               float& t, float roundoff, int step_number) {
  const float f = m.s2 - 1.f, ulp = kEpsilon * fabsf(t);
  const float step = m.s2 * shortfall(m.s2, 1.f / r) / m.s1;
  const bool still = fabsf(step) <= ulp;
  const bool done = fabsf(f) <= roundoff || (still && r >= 1.f);
  const float next = t + (still && !done ? copysignf(ulp, f) : step);
  const bool inside = next >= lo && next < hi;
  if (done || hi - lo <= ulp) {
    if (done && inside) t = next;
    return true;
  }
  const bool bisect = step_number > kFreeSteps && step_number % 2;
  const int low = __float_as_int(lo), high = __float_as_int(hi);  // of the same sign
  t = inside && !bisect ? next : __int_as_float(low + (high - low) / 2);
  return false;
}

// The `step_number`-th guarded step on f(t): narrows [lo, hi] around the root by the moments at t
// and moves t inside it. True when t is final: f is zero to its round-off, or t can move no closer.
// `least` is the smallest x above zero: a step of a closed form that stays below it keeps the
// support it was solved on, so it ends at the root and nothing is left to prove. It must be short
// too, since the rounding of f grows with its distance from the root.
__device__ __forceinline__ bool refine(const Moments<float>& m, float r, float& lo, float& hi,
                                       float& t, float least, int step_number) {
  const float f = excess<kAlpha>(m);
  if (f >= 0.f)
    lo = t;
  else
    hi = t;
  const float roundoff = kEpsilon * (4.f + r);
  if constexpr (kAlpha == AlphaKind::kGeneral)
    return refine_general(m, r, lo, hi, t, roundoff, step_number);
  const float step = refinement_step<kAlpha>(m, r);
  const float slack = 4.f * kEpsilon * r * m.s1 * fabsf(t);
  const float next = t + step;
  const bool inside = next >= lo && next <= hi;
  const bool still = fabsf(step) <= 0.25f * kEpsilon * fabsf(t);
  const bool solved = step >= 0.f && step < fminf(least, kSureStep);
  const bool done = solved || fabsf(f) <= roundoff || (still && fabsf(f) <= roundoff + slack);
  if (done) {
    if (inside) t = next;
    return true;
  }
  const float old = t;
  t = inside && !still ? next : 0.5f * (lo + hi);
  // Where the bracket is as narrow as float32 allows, its middle is its end.
  return hi - lo <= 2.f * kEpsilon * fabsf(old) && (t == old || t == lo || t == hi);
}

// --- shared memory, copies and matrix fragments --------------------------------------------

__device__ __forceinline__ u32 shared_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ float load_shared(u32 address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ int load_shared_int(u32 address) {
  int x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ float4 load_shared4(u32 address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
__device__ __forceinline__ void store_shared(u32 address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}
__device__ __forceinline__ void store_shared(u32 address, int x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

// Start copying 16 bytes, of which those from `bytes` on become zeros without being read.
__device__ __forceinline__ void cp_async16(u32 to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
__device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Until no more than the last `pending` of the commits are under way.
template <int pending>
__device__ __forceinline__ void cp_async_wait_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Bytes from one row of a tile in shared memory to the next. The 16 bytes of padding put eight
// successive rows on different banks, so ldmatrix reads them without conflict.
template <int dim>
constexpr int tile_stride = dim * int(sizeof(Scalar)) + 16;

// A 16-row A fragment. Lane l holds rows l/4 and l/4 + 8 at columns 2 (l%4) + {0, 1, 8, 9}.
struct AFragment {
  u32 r[4];
};

__device__ __forceinline__ void ldmatrix(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// d = a b + c for a 16x16 times 16x8 product
__device__ __forceinline__ void multiply(float (&d)[4], const AFragment& a, u32 b0, u32 b1,
                                         float c0, float c1, float c2, float c3) {
#define ADASPLASH2_MMA(type)                                                                    \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                    \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                          \
      : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b0), "r"(b1), "f"(c0), "f"(c1), \
        "f"(c2), "f"(c3))
#if ADASPLASH2_DTYPE == ADASPLASH2_FLOAT16
  ADASPLASH2_MMA("f16");
#else
  ADASPLASH2_MMA("bf16");
#endif
#undef ADASPLASH2_MMA
}

}  // namespace adasplash2
