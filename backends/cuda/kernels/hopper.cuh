// Hopper's own instructions (sm_90a): TMA, which brings tiles to shared memory, the barriers that
// tell of them, and wgmma, which multiplies them for a warpgroup of 128 threads.
//
// A tile stands in panels of 64 columns (128 bytes, the width of the swizzle), rows one below
// another: the 16-byte chunk c of row n lies at chunk c ^ (n % 8) of its line. Tiles start on 1,024
// bytes.
#pragma once

#include "common.cuh"

namespace adasplash2 {

using u64 = unsigned long long;

constexpr int kLineBytes = kSwizzleBytes;
template <int width>
constexpr int panels_of = (width + kPanelColumns - 1) / kPanelColumns;
constexpr int kPanels = panels_of<kDim>, kPanelsV = panels_of<kDimV>;

// --- barriers in shared memory -------------------------------------------------------------

__device__ __forceinline__ void init_barrier(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrive, and let the phase wait for so many bytes that TMA brings.
__device__ __forceinline__ void arrive_expect_tx(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Wait until the barrier's phase of this parity is complete.
__device__ __forceinline__ void await(u32 barrier, u32 parity) {
  asm volatile(
      "{.reg .pred done;"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;"
      "@!done bra again;}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// How many of so many threads say so, and whether one of a warpgroup does, by a barrier that has
// this number.
__device__ __forceinline__ int count_of(int threads, int number, bool mine) {
  int count;
  asm volatile(
      "{.reg .pred mine; setp.ne.b32 mine, %1, 0;"
      "barrier.cta.red.popc.u32 %0, %2, %3, mine;}"
      : "=r"(count)
      : "r"(int(mine)), "r"(number), "r"(threads)
      : "memory");
  return count;
}
__device__ __forceinline__ bool any_of_warpgroup(int number, bool mine) {
  int any;
  asm volatile(
      "{.reg .pred mine, all; setp.ne.b32 mine, %1, 0;"
      "barrier.cta.red.or.pred all, %2, 128, mine; selp.b32 %0, 1, 0, all;}"
      : "=r"(any)
      : "r"(int(mine)), "r"(number)
      : "memory");
  return any != 0;
}

// Where a walk through a ring of stages is: a stage, and the parity of its round. Barriers of
// stages are 8 bytes apart.
template <int stages>
struct Ring {
  int stage = 0;
  u32 parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ void await_full(u32 full) const { await(full + stage * 8, parity); }
  // A new barrier counts as one of the parity before.
  __device__ __forceinline__ void await_empty(u32 empty) const {
    await(empty + stage * 8, parity ^ 1);
  }
};

// What ordinary stores wrote to shared memory is seen by TMA and wgmma after this and
// a barrier.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Registers move from the warpgroup that copies to those that hold scores: by eights, and together
// no more than the block was launched with.
template <int warpgroups, int kept>
__device__ __forceinline__ void setmaxnreg_inc() {
  constexpr int threads = (warpgroups + 1) * kWarpgroupThreads, launched = 65536 / threads / 8 * 8;
  constexpr int share =
      (launched * threads - kept * kWarpgroupThreads) / (warpgroups * kWarpgroupThreads) / 8 * 8;
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(share < 240 ? share : 240));
}
template <int kept>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kept));
}

// Tiles start where the pattern of the swizzle does, behind the start of shared memory.
__device__ __forceinline__ u32 align_tiles(u32 shared) {
  return (shared + kSwizzleAlignment - 1) & ~u32(kSwizzleAlignment - 1);
}

// --- copies --------------------------------------------------------------------------------

// What TMA knows of a tensor, as the driver encodes it: dimensions (head_dim, length,
// heads, batch), boxes of 64 columns by some rows. What is out of bounds becomes zeros.
struct alignas(64) TensorMap {
  u64 opaque[16];
};

// One head of a tensor. A dimension that was expanded with stride 0 has one entry in the map.
struct Plane {
  int head, batch;
  __device__ __forceinline__ Plane(const View& view, int head, int batch)
      : head(view.head ? head : 0), batch(view.batch ? batch : 0) {}
};

// Copy `rows` rows from `first` on, in boxes of `box` rows.
template <int rows, int panels, int box>
__device__ __forceinline__ void tma_load_tile(u32 to, const TensorMap& map, int first,
                                              const Plane& plane, u32 barrier) {
#pragma unroll
  for (int panel = 0; panel < panels; ++panel)
#pragma unroll
    for (int at = 0; at < rows; at += box)
      asm volatile(
          "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
          " [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to + (panel * rows + at) * kLineBytes),
          "l"(&map), "r"(panel * kPanelColumns), "r"(first + at), "r"(plane.head), "r"(plane.batch),
          "r"(barrier)
          : "memory");
}

// --- products ------------------------------------------------------------------------------
//
// A warpgroup's sums of 64 rows: warp w has rows 16 w to 16 w + 15, and 4 n + 2 s + j is column
// 8 n + 2 (lane % 4) + j of row 8 s + lane / 4.

// What wgmma needs to know of a tile: where it starts, from panel to panel, 1,024 bytes from one
// group of eight rows to the next, 128-byte swizzle. Addresses are in units of 16 bytes and add
// without carry.
constexpr int kDescriptorBytes = 16;
__device__ __forceinline__ u64 descriptor(u32 address, int panel_bytes = kDescriptorBytes) {
  return u64(address / kDescriptorBytes & 0x3fff) | u64(panel_bytes / kDescriptorBytes) << 16 |
         64ull << 32 | 1ull << 62;
}

#define ADASPLASH2_D4(is, i) is(d[i]), is(d[i + 1]), is(d[i + 2]), is(d[i + 3])
#define ADASPLASH2_D16(is, i)                                               \
  ADASPLASH2_D4(is, i), ADASPLASH2_D4(is, i + 4), ADASPLASH2_D4(is, i + 8), \
      ADASPLASH2_D4(is, i + 12)
#define ADASPLASH2_D32(is) ADASPLASH2_D16(is, 0), ADASPLASH2_D16(is, 16)
#define ADASPLASH2_D64(is) ADASPLASH2_D32(is), ADASPLASH2_D16(is, 32), ADASPLASH2_D16(is, 48)
#define ADASPLASH2_NAMES32                                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ADASPLASH2_NAMES64                                                                       \
  ADASPLASH2_NAMES32                                                                             \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#if ADASPLASH2_DTYPE == ADASPLASH2_FLOAT16
#define ADASPLASH2_TYPES ".f32.f16.f16 "
#else
#define ADASPLASH2_TYPES ".f32.bf16.bf16 "
#endif
#define ADASPLASH2_WGMMA(n, sums, operands, adds, layouts)                        \
  "{.reg .pred p; setp.ne.b32 p, " adds ", 0;wgmma.mma_async.sync.aligned.m64n" n \
  "k16" ADASPLASH2_TYPES "{" sums "}, " operands ", p, 1, 1, " layouts ";}"

// The ADASPLASH2_MULTIPLY of the place where it stands, into sums that are there or that begin.
#define ADASPLASH2_ADD_OR_SET(adds) \
  if constexpr (adds)               \
    ADASPLASH2_MULTIPLY("+f");      \
  else                              \
    ADASPLASH2_MULTIPLY("=f");

// d = a b^T, or d += a b^T: 64 rows of a, 64 or 128 of b, 16 columns of both, in shared memory.
template <bool adds>
__device__ __forceinline__ void multiply_shared(float (&d)[32], u64 a, u64 b) {
#define ADASPLASH2_MULTIPLY(is)                                                      \
  asm volatile(ADASPLASH2_WGMMA("64", ADASPLASH2_NAMES32, "%32, %33", "%34", "0, 0") \
               : ADASPLASH2_D32(is)                                                  \
               : "l"(a), "l"(b), "n"(int(adds)))
  ADASPLASH2_ADD_OR_SET(adds)
#undef ADASPLASH2_MULTIPLY
}
template <bool adds>
__device__ __forceinline__ void multiply_shared(float (&d)[64], u64 a, u64 b) {
#define ADASPLASH2_MULTIPLY(is)                                                       \
  asm volatile(ADASPLASH2_WGMMA("128", ADASPLASH2_NAMES64, "%64, %65", "%66", "0, 0") \
               : ADASPLASH2_D64(is)                                                   \
               : "l"(a), "l"(b), "n"(int(adds)))
  ADASPLASH2_ADD_OR_SET(adds)
#undef ADASPLASH2_MULTIPLY
}

// The same with a in registers.
template <bool adds>
__device__ __forceinline__ void multiply_registers(float (&d)[64], const AFragment& a, u64 b){
#define ADASPLASH2_MULTIPLY(is)                                                            \
  asm volatile(                                                                            \
      ADASPLASH2_WGMMA("128", ADASPLASH2_NAMES64, "{%64, %65, %66, %67}, %68", "%69", "0") \
      : ADASPLASH2_D64(is)                                                                 \
      : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "l"(b), "n"(int(adds)))
    ADASPLASH2_ADD_OR_SET(adds)
#undef ADASPLASH2_MULTIPLY
}

// d += a b: 64 rows of a, in registers, 16 rows of b, 64 or 128 columns of b.
__device__ __forceinline__ void add_rows(float (&d)[32], const AFragment& a, u64 b) {
  asm volatile(ADASPLASH2_WGMMA("64", ADASPLASH2_NAMES32, "{%32, %33, %34, %35}, %36", "1", "1")
               : ADASPLASH2_D32("+f")
               : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "l"(b));
}
__device__ __forceinline__ void add_rows(float (&d)[64], const AFragment& a, u64 b) {
  asm volatile(ADASPLASH2_WGMMA("128", ADASPLASH2_NAMES64, "{%64, %65, %66, %67}, %68", "1", "1")
               : ADASPLASH2_D64("+f")
               : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "l"(b));
}

// Products are asynchronous: between wgmma_fence() and wgmma_wait() their sums and A fragments must
// be left alone.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until no more than the last `pending` of the commits are under way.
template <int pending = 0>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Reads of the sums, and writes to the operands, stay behind this.
__device__ __forceinline__ void fence_operands(float (&d)[32]) {
  asm volatile("" : ADASPLASH2_D32("+f")::"memory");
}
__device__ __forceinline__ void fence_operands(float (&d)[64]) {
  asm volatile("" : ADASPLASH2_D64("+f")::"memory");
}
template <int count>
__device__ __forceinline__ void fence_operands(AFragment (&a)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i)
    asm volatile("" : "+r"(a[i].r[0]), "+r"(a[i].r[1]), "+r"(a[i].r[2]), "+r"(a[i].r[3])::"memory");
}

// From a tile's start to the k-th 16 columns, in units of kDescriptorBytes.
__device__ __forceinline__ constexpr int columns_at(int k, int tile_rows) {
  return (k / 4 * tile_rows * kLineBytes + k % 4 * 32) / kDescriptorBytes;
}
// From a tile's start to the k-th 16 rows.
__device__ __forceinline__ constexpr int rows_at(int k) {
  return k * 16 * kLineBytes / kDescriptorBytes;
}

}  // namespace adasplash2
