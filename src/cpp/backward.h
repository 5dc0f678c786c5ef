// Gradients. With u = p^(2-alpha), dp_j = dO . v_j and delta = sum u dp / sum u:
//     ds_j = slope u_j (dp_j - delta), the gradient of q . k_j,
//     dQ = sum_j ds_j k_j,  dK_j = sum_i ds_ij q_i,  dV_j = sum_i p_ij dO_i
// (Correia, Niculae, Martins 2019). Rows own dQ, keys own dK and dV, so nothing is shared and
// the order of summation is fixed. Both differentiate first, then gather. Flat rows recompute
// their scores, and their probabilities from their thresholds. A sink is one more entry of its row,
// with a dp of 0. Dropout multiplies dp_j, and p_ij in dV, by what it multiplies p_ij by.
#pragma once

#include "forward.h"

namespace adasplash2::ADASPLASH2_ISA {

// dL/dalpha of a row, sum_j dp_j dp_j/dalpha. With e = alpha - 1, L = -log p, w = u / sum u, they
// are
//     dp/dalpha = (p - w) / e^2 + p L / e - w sum_k p_k L_k / e
// (Correia, Niculae, Martins 2019), in which two terms that grow without bound as alpha -> 1
// cancel. With E = (exp(e L) - 1) / e and M = sum p E, so that u = p (1 + e E) and sum u = 1 + e M,
// and because sum w (dp - delta) = 0, it is the sum of
//     p (M L - Q + M (M - E) / sum u) (dp - delta) / sum u,   Q = (E - L) / e,
// where none of them grows.
template <class T>
__attribute__((noinline)) static T alpha_gradient(const T* p, const T* dp, int64_t width, T delta,
                                                  double alpha) {
  const double e = alpha - 1.0;
  const auto excess = [&](double x) {  // (exp(x) - 1 - x) / x^2
    if (!(x < 0.5)) return (__builtin_expm1(x) - x) / (x * x);
    double series = 0.0;
    for (int k = 16; k >= 2; --k) series = (series * x + 1.0) / double(k);
    return series;
  };
  double mean = 0.0;
  for (int64_t j = 0; j < width; ++j)
    if (!(p[j] <= T(0))) {
      const double x = -e * __builtin_log(double(p[j]));
      mean += double(p[j]) * __builtin_expm1(x) / e;
    }
  const double mass = 1.0 + e * mean;
  double total = 0.0;
  for (int64_t j = 0; j < width; ++j)
    if (!(p[j] <= T(0))) {
      const double log = -__builtin_log(double(p[j])), x = e * log;
      const double weight =
          mean * log - log * log * excess(x) + mean * (mean - __builtin_expm1(x) / e) / mass;
      total += double(p[j]) * weight / mass * double(dp[j] - delta);
    }
  return T(total);
}

template <class S, AlphaKind K, bool IsPlain>
struct BackwardRows {
  using T = ComputeOf<S>;
  static constexpr int64_t kKeys = kPanelKeys<T>;

  const BackwardRowsTask<T>& task;
  const AttentionProblem& problem;
  const Alpha& alpha;
  const Power<T> power;
  const Scores<K, T, IsPlain> scores;
  const Dropout<T> dropout;
  T *grad_out, *grad_query, *list, *query_packed, *grad_out_packed, *grad_scores,
      *grad_probabilities, *query, *row_dots, *row_probabilities;
  int32_t* list_keys;
  int64_t score_stride, bytes;

  ADASPLASH2_INLINE BackwardRows(const BackwardRowsTask<T>& t, const AttentionProblem& p,
                                 bool any_flat)
      : task(t),
        problem(p),
        alpha(p.alpha_of(t.head)),
        power(power_of<T>(alpha)),
        scores(p.score_of(t.head), alpha),
        dropout(scores.score) {
    Arena arena{static_cast<char*>(t.workspace)};
    score_stride = score_stride_of<T>(p);
    grad_out = arena.take<T>(p.head_dim_v);
    grad_query = arena.take<T>(kTileRows * p.head_dim);
    list = arena.take<T>(2 * kListStride<T>);
    if (any_flat) {
      query_packed = arena.take<T>(kTileRows * p.head_dim);
      grad_out_packed = arena.take<T>(kTileRows * p.head_dim_v);
      grad_scores = arena.take<T>(kTileRows * score_stride);
      grad_probabilities = arena.take<T>(kTileRows * score_stride);
    }
    if (!p.score.is_plain) {  // q . k and p of a row, whose places ds takes
      const int64_t longest =
          any_flat && score_stride > kListStride<T> ? score_stride : kListStride<T>;
      query = arena.take<T>(p.head_dim);
      row_dots = arena.take<T>(longest);
      row_probabilities = arena.take<T>(longest);
      list_keys = arena.take<int32_t>(kListStride<T>);
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
    if constexpr (IsPlain) {
      score_gradients<K>(ds, dp, n, scores.slope(), power);
    } else {
      __builtin_memcpy(list_keys, keys, size_t(n) * sizeof(int32_t));
      __builtin_memset(list_keys + n, 0, kLanes<T> * sizeof(int32_t));
      apply_dropout(i, begin, n, ds, dp);
      if (needs_dots()) {
        const S* q = row_of<const S>(task.query, i);
        for (int64_t k = 0; k < problem.head_dim; ++k) query[k] = to_compute(q[k]);
        for (int64_t j = 0; j < n; ++j)
          row_dots[j] = dot(query, row_of<const S>(task.key, keys[j]), problem.head_dim);
        store(row_dots + n, Vec<T>{});
      }
      const auto key_at = [&](int64_t j) {
        Keys<T> some;
        __builtin_memcpy(&some, list_keys + j, sizeof(some));
        return some;
      };
      differentiate(i, ds, dp, n, key_at, [](int64_t) { return Ints<T>{} == Ints<T>{}; });
    }
    __builtin_memcpy(task.grad_scores + begin, ds, size_t(n) * sizeof(T));
  }

  ADASPLASH2_INLINE void apply_dropout(int64_t i, int64_t begin, int64_t n, const T* p, T* dp) {
    if (!dropout.is_on()) return;
    for (int64_t j = 0; j < n; j += kLanes<T>) {
      Keys<T> keys;
      __builtin_memcpy(&keys, list_keys + j, sizeof(keys));
      T weights[kLanes<T>];
      store(weights, dropout.weights(load(p + j), task.row_begin + i, keys));
      store(dp + j, dropout.applied(load(dp + j), task.row_begin + i, keys));
      for (int64_t lane = 0; lane < kLanes<T> && j + lane < n; ++lane)
        task.weights[begin + j + lane] = weights[lane];
    }
  }

  ADASPLASH2_INLINE bool needs_dots() const {
    return scores.score.softcap != 0.0 || task.others.scales;
  }

  // p of n keys of row i, zeros behind them to the end of a vector -> ds in place, the gradient of
  // q . k, and the row's other gradients; returns delta. `dp` is likewise, and so is `row_dots`
  // where that is needed. There is room for the sink.
  template <class KeyAt, class SeenAt>
  ADASPLASH2_INLINE T differentiate(int64_t i, T* x, T* dp, int64_t n, KeyAt key_at,
                                    SeenAt seen_at) {
    const RowGradients<T>& others = task.others;
    const int64_t row = task.row_begin + i, width = n + scores.has_sink();
    if (scores.has_sink()) {
      const Vec<T> sink = broadcast(scores.sink_value());
      x[n] = probability<K>(sink, task.thresholds[i], power)[0];
      store(x + width, Vec<T>{});
      dp[n] = T(0);
      store(dp + width, Vec<T>{});
    }
    if (others.alphas) __builtin_memcpy(row_probabilities, x, size_t(width) * sizeof(T));
    const T delta = score_gradients<K>(x, dp, width, scores.slope(), power);
    if (others.alphas)
      others.alphas[i] = alpha_gradient(row_probabilities, dp, width, delta, alpha.value);
    if (others.sinks) others.sinks[i] = scores.has_sink() ? x[n] : T(0);
    if (scores.has_sink()) x[n] = T(0);
    Sum<T> slopes, scales;
    for (int64_t j = 0; j < n; j += kLanes<T>) {
      const Vec<T> of_score = load(x + j), dots = needs_dots() ? load(row_dots + j) : Vec<T>{};
      if (others.mask) add_to_mask(i, of_score, seen_at(j), key_at(j), n - j);
      if (others.slopes) slopes.add_any(of_score * scores.distances(row, key_at(j)));
      const Vec<T> of_scaled = scores.through_cap(of_score, dots, row);
      if (others.scales) scales.add_any(of_scaled == T(0) ? Vec<T>{} : of_scaled * dots);
      store(x + j, scores.through_scale(of_scaled, row, power));
    }
    if (others.slopes) others.slopes[i] = -slopes.total();
    if (others.scales) others.scales[i] = scales.total();
    return delta;
  }

  // Keys that are not seen may be none: behind a row's last key lies what another task adds to.
  ADASPLASH2_INLINE void add_to_mask(int64_t i, Vec<T> ds, Ints<T> seen, Keys<T> keys,
                                     int64_t count) {
    T* row = task.others.mask + i * task.others.mask_stride_row;
    for (int64_t lane = 0; lane < kLanes<T> && lane < count; ++lane)
      if (seen[lane]) row[keys[lane] * task.others.mask_stride_key] += ds[lane];
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
    const KeyRange keys = scores.needed_by_any(task.row_begin + rows.first, rows.count);
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
      const KeyRange of_panel = {panel * kKeys, (panel + 1) * kKeys};
      Tile<T> dots = {}, dp = {};
      if (scores.any_allowed(task.row_begin + rows.first, rows.count, of_panel)) {
        dots = dot_tile(query_packed, keys, problem.head_dim);
        dp = dot_tile(grad_out_packed, values, problem.head_dim_v);
      }
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
  ADASPLASH2_INLINE void differentiate_flat(int64_t i, KeyRange stored, T* x, T* dp) {
    const int64_t n = stored.size(), row = task.row_begin + i;
    if constexpr (!IsPlain)
      if (needs_dots()) __builtin_memcpy(row_dots, x, size_t(n) * sizeof(T));
    for (int64_t j = 0; j < n; j += kLanes<T>) {
      const Vec<T> values = scores.values(load(x + j), row, stored.begin + j);
      store(x + j, probability<K>(values, task.thresholds[i], power));
    }
    if constexpr (IsPlain) {
      task.delta[i] = score_gradients<K>(x, dp, n, scores.slope(), power);
    } else {
      const auto key_at = [&](int64_t j) { return scores.keys_from(stored.begin + j); };
      const auto seen_at = [&](int64_t j) { return scores.allowed(row, stored.begin + j); };
      if (dropout.is_on())
        for (int64_t j = 0; j < n; j += kLanes<T>)
          store(dp + j, dropout.applied(load(dp + j), row, key_at(j)));
      task.delta[i] = differentiate(i, x, dp, n, key_at, seen_at);
    }
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
  return BackwardRows<S, AlphaKind::k15, false>(task, problem, any_flat).bytes;
}

template <class S>
static void backward_rows(const BackwardRowsTask<ComputeOf<S>>& task) {
  with_scores(*task.problem, task.head, [&](auto kind, auto plain) {
    BackwardRows<S, decltype(kind)::value, decltype(plain)::value> rows(
        task, *task.problem, task.packed_keys != nullptr);
    rows.run();
  });
}

template <class T>
constexpr int64_t kTaskKeys = (kBlockRows + kPanelKeys<T> - 1) / kPanelKeys<T> * kPanelKeys<T>;

template <class S>
struct BackwardKeys {
  using T = ComputeOf<S>;
  static constexpr int64_t kKeys = kPanelKeys<T>;

  const BackwardKeysTask<T>& task;
  const AttentionProblem& problem;
  T *grad_keys, *grad_values, *query_packed, *grad_out_packed, *weights, *grad_scores;
  int64_t bytes;

  ADASPLASH2_INLINE BackwardKeys(const BackwardKeysTask<T>& t, const AttentionProblem& p)
      : task(t), problem(p) {
    Arena arena{static_cast<char*>(t.workspace)};
    grad_keys = arena.take<T>(kTaskKeys<T> * p.head_dim);
    grad_values = arena.take<T>(kTaskKeys<T> * p.head_dim_v);
    query_packed = arena.take<T>(kBlockRows * p.head_dim);
    grad_out_packed = arena.take<T>(kBlockRows * p.head_dim_v);
    weights = arena.take<T>(kBlockRows * kKeys);
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
      add_gathered(task.weights, at, stop, head, task.grad_outs[head], problem.head_dim_v,
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
      with_scores(problem, task.first_head + head, [&](auto kind, auto plain) {
        constexpr AlphaKind K = decltype(kind)::value;
        const Alpha& alpha = problem.alpha_of(task.first_head + head);
        const Scores<K, T, decltype(plain)::value> scores(problem.score_of(task.first_head + head),
                                                          alpha);
        const Power<T> power = power_of<T>(alpha);
        for (int64_t block = 0; block < blocks; ++block)
          if (task.flat_blocks[head * blocks + block])
            add_flat_block(head, part_of(problem.length_q, kBlockRows, block), scores, power);
      });
  }

  // Scores, p and ds of one row block against each panel of this task's keys.
  template <AlphaKind K, bool IsPlain>
  __attribute__((noinline)) void add_flat_block(int64_t head, Part rows,
                                                const Scores<K, T, IsPlain>& scores,
                                                const Power<T>& power) {
    const KeyRange seen = scores.needed_by_any(rows.first, rows.count);
    if (!seen.overlaps({task.key_begin, task.key_begin + task.keys})) return;
    pack_flat_block(head, rows);
    for (int64_t key = 0; key < task.keys; key += kKeys) {
      const int64_t first_key = task.key_begin + key;
      if (!seen.overlaps({first_key, first_key + kKeys})) continue;
      for (int64_t t = 0; t < parts(rows.count, kTileRows); ++t)
        differentiate_flat(head, rows, t * kTileRows, first_key, scores, power);
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
  template <AlphaKind K, bool IsPlain>
  ADASPLASH2_INLINE void differentiate_flat(int64_t head, Part rows, int64_t at, int64_t first_key,
                                            const Scores<K, T, IsPlain>& scores,
                                            const Power<T>& power) {
    const Part tile = part_of(rows.count, kTileRows, at / kTileRows);
    Tile<T> dots = {}, products = {};
    if (scores.any_allowed(rows.first + at, tile.count, {first_key, first_key + kKeys})) {
      dots = dot_tile(query_packed + at * problem.head_dim,
                      task.packed_keys + first_key * problem.head_dim, problem.head_dim);
      products = dot_tile(grad_out_packed + at * problem.head_dim_v,
                          task.packed_values + first_key * problem.head_dim_v, problem.head_dim_v);
    }
    const Dropout<T> dropout(scores.score);
    for (int64_t r = 0; r < kTileRows; ++r) {
      const int64_t row = rows.first + at + r, i = problem.group_row(head, row);
      const bool is_flat = at + r < rows.count && task.support[i] < 0;
      for (int v = 0; v < kTileVectors; ++v) {
        const int64_t lane = v * kLanes<T>;
        Vec<T> p = {}, ds = {};
        if (is_flat) {
          const Vec<T> product = dots.rows[r][v];
          const Vec<T> values =
              IsPlain ? scores.values(product) : scores.values(product, row, first_key + lane);
          const Keys<T> keys = scores.keys_from(first_key + lane);
          Vec<T> dp = products.rows[r][v];
          if (!IsPlain && dropout.is_on()) dp = dropout.applied(dp, row, keys);
          p = probability<K>(values, task.thresholds[i], power);
          const Vec<T> u = sensitivity<K>(p, power);
          ds = score_gradient<K>(p, u, dp - task.delta[i], scores.slope(), power);
          ds = scores.through_scale(scores.through_cap(ds, product, row), row, power);
          const Ints<T> allowed = scores.allowed(row, first_key + lane);
          if (!IsPlain && dropout.is_on()) p = dropout.weights(p, row, keys);
          p = allowed ? p : Vec<T>{};
          ds = allowed ? ds : Vec<T>{};
        }
        store(weights + (at + r) * kKeys + lane, p);
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
    add_weighted_rows<R, S>(weights + column, 1, kKeys, task.grad_outs[head], rows,
                            problem.head_dim_v, grad_values + j * problem.head_dim_v,
                            problem.head_dim_v);
    add_weighted_rows<R, S>(grad_scores + column, 1, kKeys, task.queries[head], rows,
                            problem.head_dim, grad_keys + j * problem.head_dim, problem.head_dim);
  }
};

template <class S>
static int64_t backward_keys_workspace(const AttentionProblem& problem) {
  const BackwardKeysTask<ComputeOf<S>> task = {};
  return BackwardKeys<S>(task, problem).bytes;
}

template <class S>
static void backward_keys(const BackwardKeysTask<ComputeOf<S>>& task) {
  BackwardKeys<S>(task, *task.problem).run();
}

}  // namespace adasplash2::ADASPLASH2_ISA
