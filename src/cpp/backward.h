// Gradients. With u = p^(2-alpha), dp_j = dO . v_j and delta = sum u dp / sum u:
//     ds_j = slope u_j (dp_j - delta), the gradient of q . k_j,
//     dQ = sum_j ds_j k_j,  dK_j = sum_i ds_ij q_i,  dV_j = sum_i p_ij dO_i
// (Correia, Niculae, Martins 2019). Rows own dQ, keys own dK and dV, so nothing is shared and
// the order of summation is fixed. Both differentiate first, then gather. Flat rows recompute
// their scores, and their probabilities from their thresholds.
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
  const Scores<K, T> scores;
  T *grad_out, *grad_query, *list, *query_packed, *grad_out_packed, *grad_scores,
      *grad_probabilities;
  int64_t score_stride, bytes;

  ADASPLASH2_INLINE BackwardRows(const BackwardRowsTask<T>& t, const AttentionProblem& p,
                                 bool any_flat)
      : task(t), problem(p), power(power_of<T>(p.alpha)), scores(p.score, p.alpha) {
    Arena arena{static_cast<char*>(t.workspace)};
    score_stride = score_stride_of<T>(p.length_k);
    grad_out = arena.take<T>(p.head_dim_v);
    grad_query = arena.take<T>(kTileRows * p.head_dim);
    list = arena.take<T>(2 * kListStride<T>);
    if (any_flat) {
      query_packed = arena.take<T>(kTileRows * p.head_dim);
      grad_out_packed = arena.take<T>(kTileRows * p.head_dim_v);
      grad_scores = arena.take<T>(kTileRows * score_stride);
      grad_probabilities = arena.take<T>(kTileRows * score_stride);
    }
    bytes = arena.used;
  }

  ADASPLASH2_INLINE void run() {
    for (int64_t t = 0; t < parts(task.rows, kTileRows); ++t) {
      const Part rows = part_of(task.rows, kTileRows, t);
      bool any_flat = false;
      for (int64_t i = rows.first; i < rows.first + rows.count; ++i) {
        any_flat |= is_flat(i);
        if (!is_flat(i)) run_list(i);
      }
      if (any_flat) run_flat(rows);
    }
  }

  ADASPLASH2_INLINE bool is_flat(int64_t i) const { return task.support[i] < 0; }

  // --- rows with a list ----------------------------------------------------------------------

  ADASPLASH2_INLINE void run_list(int64_t i) {
    const int64_t begin = task.offsets[i], n = task.offsets[i + 1] - begin;
    T* ds = list;
    differentiate_list(i, begin, n, ds);
    const T unit = into_range(ds, n);
    gather_rows<false, S>(ds, task.keys + begin, n, task.key, problem.head_dim, grad_query);
    write(i, grad_query, unit);
  }

  ADASPLASH2_INLINE void differentiate_list(int64_t i, int64_t begin, int64_t n, T* ds) {
    const int32_t* keys = task.keys + begin;
    T* dp = ds + kListStride<T>;
    __builtin_memcpy(ds, task.probabilities + begin, size_t(n) * sizeof(T));
    const S* dout = row_of<const S>(task.grad_out, i);
    for (int64_t k = 0; k < problem.head_dim_v; ++k) grad_out[k] = to_compute(dout[k]);
    for (int64_t j = 0; j < n; ++j)
      dp[j] = dot(grad_out, row_of<const S>(task.value, keys[j]), problem.head_dim_v);
    store(ds + n, Vec<T>{});
    store(dp + n, Vec<T>{});
    score_gradients<K>(ds, dp, n, scores.slope(), power);
    __builtin_memcpy(task.grad_scores + begin, ds, size_t(n) * sizeof(T));
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
    store_storage(row_of<S>(task.grad_query, i), row, problem.head_dim);
  }

  // --- rows without a list -------------------------------------------------------------------

  __attribute__((noinline)) void run_flat(Part rows) {
    const KeyRange keys = scores.score.seen_by_any(task.row_begin + rows.first, rows.count);
    const KeyRange panels = keys.in_units_of(kKeys);
    const KeyRange stored = {panels.begin * kKeys, panels.end * kKeys};
    scan_flat(rows, panels);
    T units[kTileRows];
    for (int64_t r = 0; r < kTileRows; ++r) {
      T* ds = grad_scores + r * score_stride;
      if (r < rows.count && is_flat(rows.first + r))
        differentiate_flat(rows.first + r, stored, ds, grad_probabilities + r * score_stride);
      else
        for (int64_t j = 0; j < stored.size(); j += kLanes<T>) store(ds + j, Vec<T>{});
      units[r] = into_range(ds, stored.size());
    }
    gather_flat(rows, {stored.begin, keys.end}, units);
  }

  // q . k and dp of the keys in some panels.
  ADASPLASH2_INLINE void scan_flat(Part rows, KeyRange panels) {
    pack_transposed<S, T>(task.query, rows, kTileRows, problem.head_dim, query_packed);
    pack_transposed<S, T>(task.grad_out, rows, kTileRows, problem.head_dim_v, grad_out_packed);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const T* keys = task.packed_keys + panel * kKeys * problem.head_dim;
      const T* values = task.packed_values + panel * kKeys * problem.head_dim_v;
      const Tile<T> dots = dot_tile(query_packed, keys, problem.head_dim);
      const Tile<T> dp = dot_tile(grad_out_packed, values, problem.head_dim_v);
      for (int r = 0; r < kTileRows; ++r)
        for (int v = 0; v < kTileVectors; ++v) {
          const int64_t lane = v * kLanes<T>;
          const int64_t at = r * score_stride + (panel - panels.begin) * kKeys + lane;
          store(grad_scores + at, dots.rows[r][v]);
          store(grad_probabilities + at, dp.rows[r][v]);
        }
    }
  }

  // q . k of the keys in `stored` -> ds in place.
  ADASPLASH2_INLINE void differentiate_flat(int64_t i, KeyRange stored, T* x, const T* dp) {
    for (int64_t j = 0; j < stored.size(); j += kLanes<T>) {
      const Vec<T> values = scores.values(load(x + j), task.row_begin + i, stored.begin + j);
      store(x + j, probability<K>(values, task.thresholds[i], power));
    }
    task.delta[i] = score_gradients<K>(x, dp, stored.size(), scores.slope(), power);
  }

  ADASPLASH2_INLINE void gather_flat(Part rows, KeyRange keys, const T* units) {
    for (int64_t k = 0; k < kTileRows * problem.head_dim; ++k) grad_query[k] = T(0);
    for (int64_t r = 0; r < kTileRows; r += kWeightedRows)
      add_weighted_rows<kWeightedRows, S>(grad_scores + r * score_stride, score_stride, 1, task.key,
                                          {keys.begin, keys.size()}, problem.head_dim,
                                          grad_query + r * problem.head_dim, problem.head_dim);
    for (int64_t r = 0; r < rows.count; ++r)
      if (is_flat(rows.first + r))
        write(rows.first + r, grad_query + r * problem.head_dim, units[r]);
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
  const Scores<K, T> scores;
  T *grad_keys, *grad_values, *query_packed, *grad_out_packed, *probabilities, *grad_scores;
  int64_t bytes;

  ADASPLASH2_INLINE BackwardKeys(const BackwardKeysTask<T>& t, const AttentionProblem& p)
      : task(t), problem(p), power(power_of<T>(p.alpha)), scores(p.score, p.alpha) {
    Arena arena{static_cast<char*>(t.workspace)};
    grad_keys = arena.take<T>(kTaskKeys<T> * p.head_dim);
    grad_values = arena.take<T>(kTaskKeys<T> * p.head_dim_v);
    query_packed = arena.take<T>(kBlockRows * p.head_dim);
    grad_out_packed = arena.take<T>(kBlockRows * p.head_dim_v);
    probabilities = arena.take<T>(kBlockRows * kKeys);
    grad_scores = arena.take<T>(kBlockRows * kKeys);
    bytes = arena.used;
  }

  ADASPLASH2_INLINE void run() {
    for (int64_t k = 0; k < task.keys * problem.head_dim; ++k) grad_keys[k] = T(0);
    for (int64_t k = 0; k < task.keys * problem.head_dim_v; ++k) grad_values[k] = T(0);
    for (int64_t j = 0; j < task.keys; ++j) gather_lists(j);
    if (task.flat_blocks) add_flat_blocks();
    for (int64_t j = 0; j < task.keys; ++j) {
      store_storage(row_of<S>(task.grad_key, j), grad_keys + j * problem.head_dim,
                    problem.head_dim);
      store_storage(row_of<S>(task.grad_value, j), grad_values + j * problem.head_dim_v,
                    problem.head_dim_v);
    }
  }

  // --- rows with a list ----------------------------------------------------------------------

  ADASPLASH2_INLINE void gather_lists(int64_t j) {
    // Entries are ordered by head, then row: one gather per query head of the group.
    int64_t at = task.offsets[j];
    const int64_t end = task.offsets[j + 1];
    while (at < end) {
      const int64_t head = task.rows[at] / problem.length_q;
      const int64_t limit = problem.group_row(head + 1, 0);
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
    const HeadRef base = matrix.from(-problem.group_row(head, 0), sizeof(S));
    gather_rows<true, S>(weights + begin, task.rows + begin, end - begin, base, width, out);
  }

  // --- rows without a list -------------------------------------------------------------------

  ADASPLASH2_INLINE void add_flat_blocks() {
    const int64_t blocks = problem.row_blocks_per_head();
    for (int64_t head = 0; head < problem.gqa_group(); ++head)
      for (int64_t block = 0; block < blocks; ++block)
        if (task.flat_blocks[head * blocks + block])
          add_flat_block(head, part_of(problem.length_q, kBlockRows, block));
  }

  // Scores, p and ds of one row block against each panel of this task's keys.
  __attribute__((noinline)) void add_flat_block(int64_t head, Part rows) {
    const KeyRange seen = scores.score.seen_by_any(rows.first, rows.count);
    if (!seen.overlaps({task.key_begin, task.key_begin + task.keys})) return;
    pack_flat_block(head, rows);
    for (int64_t key = 0; key < task.keys; key += kKeys) {
      const int64_t first_key = task.key_begin + key;
      if (!seen.overlaps({first_key, first_key + kKeys})) continue;
      for (int64_t t = 0; t < parts(rows.count, kTileRows); ++t)
        differentiate_flat(head, rows, t * kTileRows, first_key);
      gather_flat(head, rows, key);
    }
  }

  ADASPLASH2_INLINE void pack_flat_block(int64_t head, Part rows) {
    for (int64_t t = 0; t < parts(rows.count, kTileRows); ++t) {
      const Part tile = part_of(rows.count, kTileRows, t);
      const Part packed = {rows.first + tile.first, tile.count};
      pack_transposed<S, T>(task.queries[head], packed, kTileRows, problem.head_dim,
                            query_packed + tile.first * problem.head_dim);
      pack_transposed<S, T>(task.grad_outs[head], packed, kTileRows, problem.head_dim_v,
                            grad_out_packed + tile.first * problem.head_dim_v);
    }
  }

  // p and ds of a tile: rows [at, at + kTileRows) of the block, the panel from first_key on.
  ADASPLASH2_INLINE void differentiate_flat(int64_t head, Part rows, int64_t at,
                                            int64_t first_key) {
    const Tile<T> dots =
        dot_tile(query_packed + at * problem.head_dim,
                 task.packed_keys + first_key * problem.head_dim, problem.head_dim);
    const Tile<T> dp =
        dot_tile(grad_out_packed + at * problem.head_dim_v,
                 task.packed_values + first_key * problem.head_dim_v, problem.head_dim_v);
    for (int64_t r = 0; r < kTileRows; ++r) {
      const int64_t row = rows.first + at + r, i = problem.group_row(head, row);
      const bool is_flat = at + r < rows.count && task.support[i] < 0;
      for (int v = 0; v < kTileVectors; ++v) {
        const int64_t lane = v * kLanes<T>;
        Vec<T> p = {}, ds = {};
        if (is_flat) {
          p = probability<K>(scores.values(dots.rows[r][v]), task.thresholds[i], power);
          const Vec<T> u = sensitivity<K>(p, power);
          ds = score_gradient<K>(p, u, dp.rows[r][v] - task.delta[i], scores.slope(), power);
          const Ints<T> allowed = scores.allowed(row, first_key + lane);
          p = allowed ? p : Vec<T>{};
          ds = allowed ? ds : Vec<T>{};
        }
        store(probabilities + (at + r) * kKeys + lane, p);
        store(grad_scores + (at + r) * kKeys + lane, ds);
      }
    }
  }

  // Adds what the rows of a block give to the panel of keys from this task's `key` on. Weights are
  // read down their columns; padding keys of the last panel have none.
  ADASPLASH2_INLINE void gather_flat(int64_t head, Part rows, int64_t key) {
    const int64_t end = key + kKeys < task.keys ? key + kKeys : task.keys;
    int64_t j = key;
    for (; j + kWeightedRows <= end; j += kWeightedRows)
      add_columns<kWeightedRows>(head, rows, j - key, j);
    for (; j < end; ++j) add_columns<1>(head, rows, j - key, j);
  }

  // Columns [column, column + R) of the panel, to this task's keys from j on.
  template <int R>
  ADASPLASH2_INLINE void add_columns(int64_t head, Part rows, int64_t column, int64_t j) {
    add_weighted_rows<R, S>(probabilities + column, 1, kKeys, task.grad_outs[head], rows,
                            problem.head_dim_v, grad_values + j * problem.head_dim_v,
                            problem.head_dim_v);
    add_weighted_rows<R, S>(grad_scores + column, 1, kKeys, task.queries[head], rows,
                            problem.head_dim, grad_keys + j * problem.head_dim, problem.head_dim);
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
