// The two dense micro-kernels everything else is made of, and the packing they read.
//   dot_tile:          kTileRows query rows x one panel of keys, the whole depth in registers
//   add_weighted_rows: out[r] += sum_j weight[r][j] * matrix[j], for some rows at once
// and the sums that are made of the latter.
#pragma once

#include "simd.h"
#include "work.h"

namespace adasplash2::ADASPLASH2_ISA {

// 8 x 3 accumulators, 3 vectors of keys and a broadcast fill 32 registers; 4 x 3 fill 16.
constexpr int kTileRows = kVectorRegisters == 32 ? 8 : 4;
constexpr int kTileVectors = 3;
template <class T>
constexpr int kPanelKeys = kTileVectors * kLanes<T>;

// kWeightedRows rows of weights are added at a time, in kWeightedVectors vectors of columns; where
// there are at most half as many vectors, kNarrowRows: a sum waits for itself, so that there have
// to be enough of them.
constexpr int kWeightedRows = 4;
constexpr int kWeightedVectors = kVectorRegisters == 32 ? 4 : 2;
constexpr int kNarrowRows = kVectorRegisters == 32 ? 8 : 4;

static_assert(kBlockRows % kTileRows == 0 && kTileRows % kNarrowRows == 0);
static_assert(kNarrowRows % kWeightedRows == 0);

// Calls f with how many rows of weights are added at a time.
template <int N>
struct Rows {
  static constexpr int value = N;
};
template <class T, class F>
ADASPLASH2_INLINE void with_weighted_rows(int64_t width, F f) {
  if (kNarrowRows > kWeightedRows && width <= kWeightedVectors / 2 * kLanes<T>)
    f(Rows<kNarrowRows>{});
  else
    f(Rows<kWeightedRows>{});
}

// Four rows of four numbers become four columns.
template <class T>
struct Four {
  typedef T type __attribute__((vector_size(4 * sizeof(T))));
};
template <class S, class T>
ADASPLASH2_INLINE void transpose_four(const S* const* rows, T* packed, int64_t stride) {
  using V = typename Four<T>::type;
  V in[4];
  for (int r = 0; r < 4; ++r)
    for (int k = 0; k < 4; ++k) in[r][k] = to_compute(rows[r][k]);
  for (int k = 0; k < 4; ++k) {
    const V column = {in[0][k], in[1][k], in[2][k], in[3][k]};
    __builtin_memcpy(packed + k * stride, &column, sizeof(column));
  }
}

// Some rows of a head as [depth][count], zeros where there are fewer than `count`: the layout in
// which both micro-kernel operands stream.
template <class S, class T>
ADASPLASH2_INLINE void pack_transposed(HeadRef head, Part rows, int64_t count, int64_t depth,
                                       T* packed) {
  int64_t i = 0;
  for (; i + 4 <= rows.count; i += 4) {
    const S* four[4];
    for (int r = 0; r < 4; ++r) four[r] = row_of<const S>(head, rows.first + i + r);
    int64_t k = 0;
    for (; k + 4 <= depth; k += 4) {
      transpose_four(four, packed + k * count + i, count);
      for (const S*& row : four) row += 4;
    }
    for (; k < depth; ++k)
      for (int r = 0; r < 4; ++r) packed[k * count + i + r] = to_compute(*four[r]++);
  }
  for (; i < rows.count; ++i) {
    const S* row = row_of<const S>(head, rows.first + i);
    for (int64_t k = 0; k < depth; ++k) packed[k * count + i] = to_compute(row[k]);
  }
  for (; i < count; ++i)
    for (int64_t k = 0; k < depth; ++k) packed[k * count + i] = T(0);
}

template <class T>
struct Tile {
  Vec<T> rows[kTileRows][kTileVectors];
};

template <class T>
ADASPLASH2_INLINE void store_tile(const Tile<T>& tile, T* to, int64_t stride) {
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) store(to + r * stride + v * kLanes<T>, tile.rows[r][v]);
}

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

// Whether a weight of zero takes nothing, not even a NaN. Where the matrix is finite it makes no
// difference, and asking each weight takes most of the time.
enum class Zeros { kTakeNothing, kMultiply };
template <Zeros Z>
struct Ask {
  static constexpr Zeros value = Z;
};

template <int N>
struct Vectors {
  static constexpr int value = N;
};

// out[r] += sum_j weights[r * weight_stride + j * weight_step] * matrix[rows.first + j] for r < R
// and j < rows.count, in columns [at, at + V vectors), or in the first `lanes` of one vector.
template <Zeros Z, int R, int V, class S, class T>
ADASPLASH2_INLINE void add_weighted_columns(const T* weights, int64_t weight_stride,
                                            int64_t weight_step, HeadRef matrix, Part rows,
                                            int64_t at, int lanes, T* out, int64_t out_stride) {
  constexpr int L = kLanes<T>;
  const auto load_some = [&](auto* p) {
    return lanes == L ? load_compute(p) : load_partial(p, lanes);
  };
  Vec<T> acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = load_some(out + r * out_stride + at + v * L);
  for (int64_t j = 0; j < rows.count; ++j) {
    const S* row = row_of<const S>(matrix, rows.first + j) + at;
    Vec<T> x[V];
    for (int v = 0; v < V; ++v) x[v] = load_some(row + v * L);
    for (int r = 0; r < R; ++r) {
      const T w = weights[r * weight_stride + j * weight_step];
      if (Z == Zeros::kTakeNothing && w == T(0)) continue;
      for (int v = 0; v < V; ++v) acc[r][v] += w * x[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      T buffer[L];
      store(buffer, acc[r][v]);
      __builtin_memcpy(out + r * out_stride + at + v * L, buffer, size_t(lanes) * sizeof(T));
    }
}

// The same in all `width` columns: weights may be read along their rows or down their columns.
template <Zeros Z, int R, class S, class T>
ADASPLASH2_INLINE void add_weighted_rows(const T* weights, int64_t weight_stride,
                                         int64_t weight_step, HeadRef matrix, Part rows,
                                         int64_t width, T* out, int64_t out_stride) {
  constexpr int V = R > kWeightedRows ? kWeightedVectors / 2 : kWeightedVectors, L = kLanes<T>;
  int64_t at = 0;
  const auto add = [&](auto vectors, int lanes) {
    constexpr int N = decltype(vectors)::value;
    add_weighted_columns<Z, R, N, S>(weights, weight_stride, weight_step, matrix, rows, at, lanes,
                                     out, out_stride);
    at += N * L;
  };
  while (at + V * L <= width) add(Vectors<V>{}, L);
  while (at + V / 2 * L <= width) add(Vectors<V / 2>{}, L);
  while (at + L <= width) add(Vectors<1>{}, L);
  if (at < width) add(Vectors<1>{}, int(width - at));
}

// Whether there is neither infinity nor NaN among n numbers.
template <class S>
ADASPLASH2_INLINE bool all_finite(const S* x, int64_t n) {
  using T = decltype(to_compute(S{}));
  constexpr int L = kLanes<T>;
  Vec<T> zeros = {};  // 0 * x, NaN where x is not finite
  int64_t i = 0;
  for (; i + L <= n; i += L) zeros += load_compute(x + i) * T(0);
  if (i < n) zeros += load_partial(x + i, int(n - i)) * T(0);
  return sum<T>(zeros) == T(0);
}
template <class S>
ADASPLASH2_INLINE bool all_finite(HeadRef matrix, Part rows, int64_t width) {
  bool finite = true;
  for (int64_t i = rows.first; i < rows.first + rows.count; ++i)
    finite &= all_finite(row_of<const S>(matrix, i), width);
  return finite;
}

// Whether the weights of R rows, `stride` apart, for the keys of a panel are all zero.
template <int R, class T>
ADASPLASH2_INLINE bool all_zero(const T* weights, int64_t stride) {
  Ints<T> zero = Ints<T>{} == Ints<T>{};
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kTileVectors; ++v)
      zero &= load(weights + r * stride + v * kLanes<T>) == T(0);
  return !not_below(zero ? Vec<T>{} : broadcast(T(1)), Vec<T>{});
}

// Asks for rows of a matrix some time before they are read.
template <class S>
ADASPLASH2_INLINE void prefetch_rows(HeadRef matrix, Part rows, int64_t width) {
  for (int64_t i = rows.first; i < rows.first + rows.count; ++i)
    for (int64_t k = 0; k < width; k += 64 / int64_t(sizeof(S)))
      __builtin_prefetch(row_of<const S>(matrix, i) + k);
}

// out[r] = sum_j weights[r * stride + j] * matrix[keys.first + j] for `rows` rows, a multiple of
// kTileRows. Behind the last key there are zeros to the end of a panel.
template <class S, class T>
__attribute__((noinline)) static void weighted_sums(const T* weights, int64_t stride, int64_t rows,
                                                    HeadRef matrix, Part keys, int64_t width,
                                                    T* out) {
  const auto sum_up = [&](auto zeros, auto together) {
    constexpr int R = decltype(together)::value;
    for (int64_t k = 0; k < rows * width; ++k) out[k] = T(0);
    const int64_t share = parts(kPanelKeys<T>, rows / R);
    for (int64_t j = 0; j < keys.count; j += kPanelKeys<T>) {
      const int64_t left = keys.count - j;
      const Part panel = {keys.first + j, left < kPanelKeys<T> ? left : kPanelKeys<T>};
      for (int64_t r = 0; r < rows; r += R) {
        const T* of_panel = weights + r * stride + j;
        if (all_zero<R>(of_panel, stride)) continue;
        // While R rows take this panel, their share of the next one comes, which they are likely
        // to take too: to look at its weights now would put others out of the first cache.
        const int64_t ahead = kPanelKeys<T> + r / R * share;
        if (ahead < left)
          prefetch_rows<S>(
              matrix, {panel.first + ahead, ahead + share < left ? share : left - ahead}, width);
        add_weighted_rows<decltype(zeros)::value, R, S>(of_panel, stride, 1, matrix, panel, width,
                                                        out + r * width, width);
      }
    }
  };
  with_weighted_rows<T>(width, [&](auto together) {
    sum_up(Ask<Zeros::kMultiply>{}, together);
    if (!all_finite(out, rows * width)) sum_up(Ask<Zeros::kTakeNothing>{}, together);
  });
}

// out[j] += sum_r weights[r * stride + j] * matrix[rows.first + r] for the keys j of a panel.
template <Zeros Z, class S, class T>
ADASPLASH2_INLINE void add_to_panel(const T* weights, int64_t stride, HeadRef matrix, Part rows,
                                    int64_t width, T* out) {
  with_weighted_rows<T>(width, [&](auto together) {
    constexpr int64_t R = decltype(together)::value, kWhole = kPanelKeys<T> / R * R;
    for (int64_t j = 0; j < kWhole; j += R) {
      // Few rows add to much memory: the next part of it comes while they add to this one.
      const T* next = out + (j + R) * width;
      for (int64_t k = 0; k < R * width; k += 64 / int64_t(sizeof(T)))
        __builtin_prefetch(next + k, 1);
      add_weighted_rows<Z, R, S>(weights + j, 1, stride, matrix, rows, width, out + j * width,
                                 width);
    }
    if constexpr (kWhole < kPanelKeys<T>)
      add_weighted_rows<Z, kPanelKeys<T> - kWhole, S>(weights + kWhole, 1, stride, matrix, rows,
                                                      width, out + kWhole * width, width);
  });
}

// out[0..width) (+)= sum_{j < n} entries[j].weight * matrix[entries[j].row]: a gather of few rows,
// of a HeadRef or a CacheRef. `Entries` gives weight(j) and row(j). Where it adds, sums go on
// from what is there, so that those in parts are those at once, to the last bit.
template <class S, class Entries, class M, class T>
ADASPLASH2_INLINE void gather_rows(const Entries& entries, int64_t n, const M& matrix,
                                   int64_t width, bool add, T* out) {
  constexpr int V = 4, L = kLanes<T>;
  int64_t at = 0;
  for (; at + V * L <= width; at += V * L) {
    Vec<T> acc[V] = {};
    for (int v = 0; add && v < V; ++v) acc[v] = load(out + at + v * L);
    for (int64_t j = 0; j < n; ++j) {
      const S* row = row_of<const S>(matrix, entries.row(j)) + at;
      const Vec<T> w = broadcast(entries.weight(j));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[v] += w * load_compute(row + v * L);
    }
    for (int v = 0; v < V; ++v) store(out + at + v * L, acc[v]);
  }
  for (; at + L <= width; at += L) {
    Vec<T> acc = add ? Vec<T>(load(out + at)) : Vec<T>{};
    for (int64_t j = 0; j < n; ++j)
      acc +=
          broadcast(entries.weight(j)) * load_compute(row_of<const S>(matrix, entries.row(j)) + at);
    store(out + at, acc);
  }
  for (; at < width; ++at) {
    T acc = add ? out[at] : T(0);
    for (int64_t j = 0; j < n; ++j)
      acc += entries.weight(j) * to_compute(row_of<const S>(matrix, entries.row(j))[at]);
    out[at] = acc;
  }
}

// Weights and rows in arrays of their own.
template <class T>
struct ListEntries {
  const T* weights;
  const int32_t* rows;
  ADASPLASH2_INLINE T weight(int64_t j) const { return weights[j]; }
  ADASPLASH2_INLINE int32_t row(int64_t j) const { return rows[j]; }
};

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
