// Gradients. With u = p^(2-alpha), dp_j = dO . v_j and delta = sum u dp / sum u:
//     ds_j = u_j (dp_j - delta),  dQ = scale * sum_j ds_j k_j,
//     dK_j = scale * sum_i ds_ij q_i,  dV_j = sum_i p_ij dO_i
// (Correia, Niculae, Martins 2019). Rows own dQ, keys own dK and dV, so nothing is shared and
// the order of summation is fixed. Flat rows recompute their scores from their thresholds.
#pragma once

#include "forward.h"

namespace adasplash2::ADASPLASH2_ISA {

template <class S, AlphaKind K>
struct BackwardRows {
  using T = ComputeOf<S>;
  static constexpr int64_t kKeys = kPanelKeys<T>;

  const BackwardRowsTask<T>& task;
  const AttentionProblem& problem;
  const Power<T> power;
  const T multiplier, scale;
  T *grad_out, *grad_query, *list, *query_packed, *grad_out_packed, *scores, *grads;
  int64_t score_stride, bytes;

  ADASPLASH2_INLINE BackwardRows(const BackwardRowsTask<T>& t, const AttentionProblem& p,
                                 bool any_flat)
      : task(t),
        problem(p),
        power(power_of<T>(p.alpha)),
        multiplier(T(multiplier_of<K>(p.alpha, p.scores.scale))),
        scale(T(p.scores.scale)) {
    Arena arena{static_cast<char*>(t.workspace)};
    score_stride = panels<T>(p.length_k) * kKeys + kLanes<T>;
    grad_out = arena.take<T>(p.head_dim_v);
    grad_query = arena.take<T>(kTileRows * p.head_dim);
    list = arena.take<T>(2 * kListStride<T>);
    if (any_flat) {
      query_packed = arena.take<T>(kTileRows * p.head_dim);
      grad_out_packed = arena.take<T>(kTileRows * p.head_dim_v);
      scores = arena.take<T>(kTileRows * score_stride);
      grads = arena.take<T>(kTileRows * score_stride);
    }
    bytes = arena.used;
  }

  ADASPLASH2_INLINE const S* row_of(HeadRef head, int64_t i) const {
    return static_cast<const S*>(head.data) + i * head.stride;
  }

  ADASPLASH2_INLINE void run() {
    for (int64_t first = 0; first < task.rows; first += kTileRows) {
      const int64_t rows = task.rows - first < kTileRows ? task.rows - first : kTileRows;
      bool any_flat = false;
      for (int64_t i = first; i < first + rows; ++i) {
        any_flat |= task.support[i] < 0;
        if (task.support[i] >= 0) list_row(i);
      }
      if (any_flat) flat_group(first, rows);
    }
  }

  ADASPLASH2_INLINE void list_row(int64_t i) {
    const int64_t begin = task.offsets[i], n = task.offsets[i + 1] - begin;
    const int32_t* keys = task.keys + begin;
    T *ds = list, *dp = list + kListStride<T>;
    __builtin_memcpy(ds, task.probabilities + begin, size_t(n) * sizeof(T));
    const S* dout = row_of(task.grad_out, i);
    for (int64_t k = 0; k < problem.head_dim_v; ++k) grad_out[k] = to_compute(dout[k]);
    for (int64_t j = 0; j < n; ++j)
      dp[j] = dot(grad_out, row_of(task.value, keys[j]), problem.head_dim_v);
    store(ds + n, Vec<T>{});
    store(dp + n, Vec<T>{});

    score_gradients<K>(ds, dp, n, scale, power);
    __builtin_memcpy(task.grad_scores + begin, ds, size_t(n) * sizeof(T));
    const T unit = into_range(ds, n);
    gather_rows<false>(ds, keys, n, static_cast<const S*>(task.key.data), task.key.stride,
                       problem.head_dim, grad_query);
    write(i, grad_query, unit);
  }

  // Steep ds may be so large that their products with keys overflow with both signs, whose sum is
  // NaN: such a row is divided by the unit that is returned.
  ADASPLASH2_INLINE T into_range(T* ds, int64_t n) const {
    const T unit = sizeof(T) == 4 ? T(0x1p64) : T(0x1p512);
    if (!is_steep<K>(power)) return T(1);
    T most = 0;
    for (int64_t j = 0; j < n; ++j) most = magnitude(ds[j]) > most ? magnitude(ds[j]) : most;
    if (!(most > unit)) return T(1);
    for (int64_t j = 0; j < n; ++j) ds[j] /= unit;
    return unit;
  }

  ADASPLASH2_INLINE void write(int64_t i, T* row, T unit) {
    if (unit != T(1))
      for (int64_t k = 0; k < problem.head_dim; ++k) row[k] *= unit;
    store_storage(static_cast<S*>(task.grad_query.data) + i * task.grad_query.stride, row,
                  problem.head_dim);
  }

  __attribute__((noinline)) void flat_group(int64_t first, int64_t rows) {
    pack_transposed<S, T>(row_of(task.query, first), task.query.stride, rows, kTileRows,
                          problem.head_dim, query_packed);
    pack_transposed<S, T>(row_of(task.grad_out, first), task.grad_out.stride, rows, kTileRows,
                          problem.head_dim_v, grad_out_packed);
    const int64_t keys = problem.scores.visible(task.row_begin + first + rows - 1).end;
    const int64_t panel_end = panels<T>(keys);
    for (int64_t panel = 0; panel < panel_end; ++panel) {
      const Tile<T> x = scores_tile(
          query_packed, task.packed_keys + panel * kKeys * problem.head_dim, problem.head_dim);
      const Tile<T> dp =
          scores_tile(grad_out_packed, task.packed_values + panel * kKeys * problem.head_dim_v,
                      problem.head_dim_v);
      for (int r = 0; r < kTileRows; ++r)
        for (int v = 0; v < kTileVectors; ++v) {
          const int64_t at = r * score_stride + panel * kKeys + v * kLanes<T>;
          store(scores + at, x.rows[r][v] * multiplier);
          store(grads + at, dp.rows[r][v]);
        }
    }
    T units[kTileRows];
    for (int64_t r = 0; r < kTileRows; ++r) {
      T* ds = scores + r * score_stride;
      flat_row(first + r, r < rows && task.support[first + r] < 0, panel_end * kKeys, ds,
               grads + r * score_stride);
      units[r] = into_range(ds, panel_end * kKeys);
    }
    for (int64_t k = 0; k < kTileRows * problem.head_dim; ++k) grad_query[k] = T(0);
    for (int64_t r = 0; r < kTileRows; r += kWeightedRows)
      add_weighted_rows<kWeightedRows>(
          scores + r * score_stride, score_stride, 1, keys, static_cast<const S*>(task.key.data),
          task.key.stride, problem.head_dim, grad_query + r * problem.head_dim, problem.head_dim);
    for (int64_t r = 0; r < rows; ++r)
      if (task.support[first + r] < 0)
        write(first + r, grad_query + r * problem.head_dim, units[r]);
  }

  // Scores -> ds * scale in place; zeros for a row that is not flat.
  ADASPLASH2_INLINE void flat_row(int64_t i, bool is_flat, int64_t width, T* x, const T* dp) {
    if (!is_flat) {
      for (int64_t j = 0; j < width; j += kLanes<T>) store(x + j, Vec<T>{});
      return;
    }
    const KeyRange visible = problem.scores.visible(task.row_begin + i);
    for (int64_t j = 0; j < width; j += kLanes<T>)
      store(x + j,
            probability<K>(mask_keys<T>(load(x + j), j, visible), task.thresholds[i], power));
    task.delta[i] = score_gradients<K>(x, dp, width, scale, power);
  }
};

template <class S>
static int64_t backward_rows_workspace(const AttentionProblem& problem, bool any_flat) {
  const BackwardRowsTask<ComputeOf<S>> task = {};
  return BackwardRows<S, AlphaKind::k15>(task, problem, any_flat).bytes;
}

template <class S>
static void backward_rows(const BackwardRowsTask<ComputeOf<S>>& task) {
  with_kind(task.problem->alpha.kind, [&](auto kind) {
    BackwardRows<S, decltype(kind)::value>(task, *task.problem, task.packed_keys != nullptr).run();
  });
}

template <class T>
constexpr int64_t kTaskKeys = (kBlockRows + kPanelKeys<T> - 1) / kPanelKeys<T> * kPanelKeys<T>;

template <class S, AlphaKind K>
struct BackwardKeys {
  using T = ComputeOf<S>;
  static constexpr int64_t kKeys = kPanelKeys<T>;

  const BackwardKeysTask<T>& task;
  const AttentionProblem& problem;
  const Power<T> power;
  const T multiplier, scale;
  T *grad_keys, *grad_values, *query_packed, *grad_out_packed, *probabilities, *grads;
  int64_t bytes;

  ADASPLASH2_INLINE BackwardKeys(const BackwardKeysTask<T>& t, const AttentionProblem& p)
      : task(t),
        problem(p),
        power(power_of<T>(p.alpha)),
        multiplier(T(multiplier_of<K>(p.alpha, p.scores.scale))),
        scale(T(p.scores.scale)) {
    Arena arena{static_cast<char*>(t.workspace)};
    grad_keys = arena.take<T>(kTaskKeys<T> * p.head_dim);
    grad_values = arena.take<T>(kTaskKeys<T> * p.head_dim_v);
    query_packed = arena.take<T>(kBlockRows * p.head_dim);
    grad_out_packed = arena.take<T>(kBlockRows * p.head_dim_v);
    probabilities = arena.take<T>(kBlockRows * kKeys);
    grads = arena.take<T>(kBlockRows * kKeys);
    bytes = arena.used;
  }

  ADASPLASH2_INLINE void run() {
    for (int64_t k = 0; k < task.keys * problem.head_dim; ++k) grad_keys[k] = T(0);
    for (int64_t k = 0; k < task.keys * problem.head_dim_v; ++k) grad_values[k] = T(0);
    for (int64_t j = 0; j < task.keys; ++j) gather_column(j);
    if (task.flat_blocks) {
      const int64_t blocks = problem.blocks_per_head();
      for (int64_t head = 0; head < problem.group(); ++head)
        for (int64_t block = 0; block < blocks; ++block)
          if (task.flat_blocks[head * blocks + block]) add_flat_block(head, block);
    }
    for (int64_t j = 0; j < task.keys; ++j) {
      store_storage(static_cast<S*>(task.grad_key.data) + j * task.grad_key.stride,
                    grad_keys + j * problem.head_dim, problem.head_dim);
      store_storage(static_cast<S*>(task.grad_value.data) + j * task.grad_value.stride,
                    grad_values + j * problem.head_dim_v, problem.head_dim_v);
    }
  }

  ADASPLASH2_INLINE void gather_column(int64_t j) {
    // Entries are ordered by head, then row: one gather per query head of the group.
    int64_t at = task.offsets[j];
    const int64_t end = task.offsets[j + 1], length = problem.length_q;
    while (at < end) {
      const int64_t head = task.rows[at] / length, limit = (head + 1) * length;
      int64_t stop = at;
      while (stop < end && task.rows[stop] < limit) ++stop;
      add_gathered(task.grad_scores, at, stop, head, task.queries[head], problem.head_dim,
                   grad_keys + j * problem.head_dim);
      add_gathered(task.probabilities, at, stop, head, task.grad_outs[head], problem.head_dim_v,
                   grad_values + j * problem.head_dim_v);
      at = stop;
    }
  }

  ADASPLASH2_INLINE void add_gathered(const T* weights, int64_t begin, int64_t end, int64_t head,
                                      HeadRef matrix, int64_t width, T* out) {
    // Rows carry the head in front: step the base back instead of subtracting it each time.
    const S* base =
        reinterpret_cast<const S*>(reinterpret_cast<uintptr_t>(matrix.data) -
                                   uintptr_t(head * problem.length_q * matrix.stride) * sizeof(S));
    gather_rows<true>(weights + begin, task.rows + begin, end - begin, base, matrix.stride, width,
                      out);
  }

  // Scores, p and ds of one row block against each panel of this task's keys.
  __attribute__((noinline)) void add_flat_block(int64_t head, int64_t block) {
    const int64_t first = block * kBlockRows, left = problem.length_q - first;
    const int64_t rows = left < kBlockRows ? left : kBlockRows;
    if (problem.scores.visible(first + rows - 1).end <= task.key_begin) return;
    const HeadRef query = task.queries[head], grad_out = task.grad_outs[head];
    const S* query_rows = static_cast<const S*>(query.data) + first * query.stride;
    const S* grad_rows = static_cast<const S*>(grad_out.data) + first * grad_out.stride;
    const int64_t groups = (rows + kTileRows - 1) / kTileRows;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = g * kTileRows, valid = rows - at < kTileRows ? rows - at : kTileRows;
      pack_transposed<S, T>(query_rows + at * query.stride, query.stride, valid, kTileRows,
                            problem.head_dim, query_packed + at * problem.head_dim);
      pack_transposed<S, T>(grad_rows + at * grad_out.stride, grad_out.stride, valid, kTileRows,
                            problem.head_dim_v, grad_out_packed + at * problem.head_dim_v);
    }
    for (int64_t key = 0; key < task.keys; key += kKeys) {
      for (int64_t g = 0; g < groups; ++g) flat_tile(head, first, rows, g * kTileRows, key);
      // Weights are read down their columns; padding keys of the last panel have none.
      const int64_t end = key + kKeys < task.keys ? key + kKeys : task.keys;
      for (int64_t j = key; j < end; j += kWeightedRows) {
        const int64_t n = end - j < kWeightedRows ? end - j : kWeightedRows;
        const T *p = probabilities + (j - key), *ds = grads + (j - key);
        T* dk = grad_keys + j * problem.head_dim;
        T* dv = grad_values + j * problem.head_dim_v;
        if (n == kWeightedRows) {
          add_columns<kWeightedRows>(p, ds, rows, query_rows, query, grad_rows, grad_out, dk, dv);
        } else {
          for (int64_t c = 0; c < n; ++c)
            add_columns<1>(p + c, ds + c, rows, query_rows, query, grad_rows, grad_out,
                           dk + c * problem.head_dim, dv + c * problem.head_dim_v);
        }
      }
    }
  }

  template <int R>
  ADASPLASH2_INLINE void add_columns(const T* p, const T* ds, int64_t rows, const S* query_rows,
                                     HeadRef query, const S* grad_rows, HeadRef grad_out, T* dk,
                                     T* dv) {
    add_weighted_rows<R>(p, 1, kKeys, rows, grad_rows, grad_out.stride, problem.head_dim_v, dv,
                         problem.head_dim_v);
    add_weighted_rows<R>(ds, 1, kKeys, rows, query_rows, query.stride, problem.head_dim, dk,
                         problem.head_dim);
  }

  ADASPLASH2_INLINE void flat_tile(int64_t head, int64_t first, int64_t rows, int64_t at,
                                   int64_t key) {
    const int64_t panel = (task.key_begin + key) / kKeys;
    const Tile<T> x =
        scores_tile(query_packed + at * problem.head_dim,
                    task.packed_keys + panel * kKeys * problem.head_dim, problem.head_dim);
    const Tile<T> dp =
        scores_tile(grad_out_packed + at * problem.head_dim_v,
                    task.packed_values + panel * kKeys * problem.head_dim_v, problem.head_dim_v);
    for (int64_t r = 0; r < kTileRows; ++r) {
      const int64_t i = head * problem.length_q + first + at + r;
      const bool is_flat = at + r < rows && task.support[i] < 0;
      const KeyRange visible = problem.scores.visible(first + at + r);
      for (int v = 0; v < kTileVectors; ++v) {
        Vec<T> p = {}, ds = {};
        if (is_flat) {
          const int64_t first_key = task.key_begin + key + v * kLanes<T>;
          p = probability<K>(x.rows[r][v] * multiplier, task.thresholds[i], power);
          const Vec<T> u = sensitivity<K>(p, power);
          ds = score_gradient<K>(p, u, dp.rows[r][v] - task.delta[i], scale, power);
          const Ints<T> seen = mask_keys<T>(Vec<T>{}, first_key, visible) == T(0);
          p = seen ? p : Vec<T>{};
          ds = seen ? ds : Vec<T>{};
        }
        store(probabilities + (at + r) * kKeys + v * kLanes<T>, p);
        store(grads + (at + r) * kKeys + v * kLanes<T>, ds);
      }
    }
  }
};

template <class S>
static int64_t backward_keys_workspace(const AttentionProblem& problem) {
  const BackwardKeysTask<ComputeOf<S>> task = {};
  return BackwardKeys<S, AlphaKind::k15>(task, problem).bytes;
}

template <class S>
static void backward_keys(const BackwardKeysTask<ComputeOf<S>>& task) {
  with_kind(task.problem->alpha.kind,
            [&](auto kind) { BackwardKeys<S, decltype(kind)::value>(task, *task.problem).run(); });
}

}  // namespace adasplash2::ADASPLASH2_ISA
