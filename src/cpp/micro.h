// The two dense micro-kernels everything else is made of, and the packing they read.
//   dot_tile:          kTileRows query rows x one panel of keys, the whole depth in registers
//   add_weighted_rows: out[r] += sum_j weight[r][j] * matrix[j], for kWeightedRows rows at once
#pragma once

#include "simd.h"
#include "work.h"

namespace adasplash2::ADASPLASH2_ISA {

// 8 x 3 accumulators, 3 vectors of keys and a broadcast fill 32 registers; 4 x 3 fill 16.
constexpr int kTileRows = kVectorRegisters == 32 ? 8 : 4;
constexpr int kTileVectors = 3;
template <class T>
constexpr int kPanelKeys = kTileVectors * kLanes<T>;

constexpr int kWeightedRows = 4;
constexpr int kWeightedVectors = kVectorRegisters == 32 ? 4 : 2;

static_assert(kBlockRows % kTileRows == 0 && kTileRows % kWeightedRows == 0);

// Some rows of a head as [depth][count], zeros where there are fewer than `count`: the layout in
// which both micro-kernel operands stream.
template <class S, class T>
ADASPLASH2_INLINE void pack_transposed(HeadRef head, Part rows, int64_t count, int64_t depth,
                                       T* packed) {
  for (int64_t i = 0; i < rows.count; ++i) {
    const S* row = row_of<const S>(head, rows.first + i);
    for (int64_t k = 0; k < depth; ++k) packed[k * count + i] = to_compute(row[k]);
  }
  for (int64_t i = rows.count; i < count; ++i)
    for (int64_t k = 0; k < depth; ++k) packed[k * count + i] = T(0);
}

template <class T>
struct Tile {
  Vec<T> rows[kTileRows][kTileVectors];
};

// a: [depth][kTileRows], b: [depth][kPanelKeys]; tile[r][c] = sum_k a[k][r] * b[k][c].
template <class T>
ADASPLASH2_INLINE Tile<T> dot_tile(const T* a, const T* b, int64_t depth) {
  Tile<T> tile = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> keys[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) keys[v] = load(b + v * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const Vec<T> x = broadcast(a[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) tile.rows[r][v] += x * keys[v];
    }
    a += kTileRows;
    b += kPanelKeys<T>;
  }
  return tile;
}

// out[r][0..width) += sum_j weights[r * weight_stride + j * weight_step] * matrix[rows.first + j]
// for r < R and j < rows.count: weights may be read along their rows or down their columns. A
// weight of zero takes nothing, not even a NaN.
template <int R, class S, class T>
ADASPLASH2_INLINE void add_weighted_rows(const T* weights, int64_t weight_stride,
                                         int64_t weight_step, HeadRef matrix, Part rows,
                                         int64_t width, T* out, int64_t out_stride) {
  const int64_t n = rows.count;
  constexpr int V = kWeightedVectors, L = kLanes<T>;
  int64_t at = 0;
  for (; at + V * L <= width; at += V * L) {
    Vec<T> acc[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) acc[r][v] = load(out + r * out_stride + at + v * L);
    for (int64_t j = 0; j < n; ++j) {
      T w[R];
      bool any = false, all = true;
      for (int r = 0; r < R; ++r) {
        w[r] = weights[r * weight_stride + j * weight_step];
        any |= w[r] != T(0);
        all &= w[r] != T(0);
      }
      if (!any) continue;
      const S* row = row_of<const S>(matrix, rows.first + j) + at;
      Vec<T> x[V];
      for (int v = 0; v < V; ++v) x[v] = load_compute(row + v * L);
      for (int r = 0; r < R; ++r) {
        if (!all && w[r] == T(0)) continue;
        for (int v = 0; v < V; ++v) acc[r][v] += w[r] * x[v];
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) store(out + r * out_stride + at + v * L, acc[r][v]);
  }
  for (; at < width; at += L) {
    const int lanes = width - at < L ? int(width - at) : L;
    Vec<T> acc[R];
    for (int r = 0; r < R; ++r) acc[r] = load_partial(out + r * out_stride + at, lanes);
    for (int64_t j = 0; j < n; ++j) {
      const Vec<T> x = load_partial(row_of<const S>(matrix, rows.first + j) + at, lanes);
      for (int r = 0; r < R; ++r) {
        const T w = weights[r * weight_stride + j * weight_step];
        if (w != T(0)) acc[r] += w * x;
      }
    }
    for (int r = 0; r < R; ++r) {
      T buffer[L];
      store(buffer, acc[r]);
      __builtin_memcpy(out + r * out_stride + at, buffer, size_t(lanes) * sizeof(T));
    }
  }
}

// out[0..width) (+)= sum_{j < n} weights[j] * matrix[keys[j]]: a gather of few rows, of a HeadRef
// or a CacheRef.
template <bool Add, class S, class M, class T>
ADASPLASH2_INLINE void gather_rows(const T* weights, const int32_t* keys, int64_t n,
                                   const M& matrix, int64_t width, T* out) {
  constexpr int V = 4, L = kLanes<T>;
  int64_t at = 0;
  for (; at + V * L <= width; at += V * L) {
    Vec<T> acc[V] = {};
    for (int64_t j = 0; j < n; ++j) {
      const S* row = row_of<const S>(matrix, keys[j]) + at;
      const Vec<T> w = broadcast(weights[j]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[v] += w * load_compute(row + v * L);
    }
    for (int v = 0; v < V; ++v)
      store(out + at + v * L, Add ? acc[v] + load(out + at + v * L) : acc[v]);
  }
  for (; at + L <= width; at += L) {
    Vec<T> acc = {};
    for (int64_t j = 0; j < n; ++j)
      acc += broadcast(weights[j]) * load_compute(row_of<const S>(matrix, keys[j]) + at);
    store(out + at, Add ? acc + load(out + at) : acc);
  }
  for (; at < width; ++at) {
    T acc = Add ? out[at] : T(0);
    for (int64_t j = 0; j < n; ++j)
      acc += weights[j] * to_compute(row_of<const S>(matrix, keys[j])[at]);
    out[at] = acc;
  }
}

template <class S, class T>
ADASPLASH2_INLINE T dot(const T* a, const S* b, int64_t width) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[2] = {};
  int64_t at = 0;
  for (; at + 2 * L <= width; at += 2 * L) {
    acc[0] += load(a + at) * load_compute(b + at);
    acc[1] += load(a + at + L) * load_compute(b + at + L);
  }
  for (; at + L <= width; at += L) acc[0] += load(a + at) * load_compute(b + at);
  T total = sum<T>(acc[0] + acc[1]);
  for (; at < width; ++at) total += a[at] * to_compute(b[at]);
  return total;
}

}  // namespace adasplash2::ADASPLASH2_ISA
