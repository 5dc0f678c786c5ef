// Gradients. With u = p^(2-alpha), dp_j = dO . v_j and delta = sum u dp / sum u:
//     ds_j = slope u_j (dp_j - delta), the gradient of q . k_j,
//     dQ = sum_j ds_j k_j,  dK_j = sum_i ds_ij q_i,  dV_j = sum_i p_ij dO_i
// (Correia, Niculae, Martins 2019). Rows own dQ, keys own dK and dV, so nothing is shared and
// the order of summation is fixed. Rows differentiate first; then rows and keys gather what lists
// hold. Flat rows recompute their scores, and their probabilities from their thresholds, once: a
// band of row blocks adds up their dK and dV, and keys add up those of the bands. A sink is one
// more entry of its row, with a dp of 0. Dropout multiplies dp_j, and p_ij in dV, by what it
// multiplies p_ij by.
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
  int64_t score_stride, together, bytes;

  ADASPLASH2_INLINE BackwardRows(const BackwardRowsTask<T>& t, const AttentionProblem& p,
                                 bool any_flat)
      : task(t),
        problem(p),
        alpha(p.alpha_of(t.head)),
        power(power_of<T>(alpha)),
        scores(p.score_of(t.head), alpha),
        dropout(scores.score) {
    Allocator memory{static_cast<char*>(t.workspace)};
    score_stride = score_stride_of<T>(p);
    together = rows_together<T>(p, 2);
    const int64_t longest =
        any_flat && score_stride > kListStride<T> ? score_stride : kListStride<T>;
    grad_out = memory.take<T>(p.head_dim_v);
    grad_query = memory.take<T>(kBlockRows * p.head_dim);
    list = memory.take<T>(2 * kListStride<T>);
    row_probabilities = memory.take<T>(longest);  // of a row, whose places ds takes
    if (any_flat) {
      query_packed = memory.take<T>(together * p.head_dim);
      grad_out_packed = memory.take<T>(together * p.head_dim_v);
      grad_scores = memory.take<T>(together * score_stride);
      grad_probabilities = memory.take<T>(together * score_stride);
    }
    if (!p.score.is_plain) {
      query = memory.take<T>(p.head_dim);
      row_dots = memory.take<T>(longest);  // q . k, likewise
      list_keys = memory.take<int32_t>(kListStride<T>);
    }
    bytes = memory.used;
  }

  ADASPLASH2_INLINE void run() {
    const int64_t turns = turns_of_lists();
    if (turns > 1)
      run_lists(turns);
    else
      for (int64_t i = 0; i < task.rows; ++i)
        if (!is_flat(i)) run_list(i);
    for (int64_t g = 0; g < parts(task.rows, together); ++g) {
      const Part rows = part_of(task.rows, together, g);
      if (any_flat(rows)) run_flat(rows);
    }
  }

  ADASPLASH2_INLINE bool is_flat(int64_t i) const { return task.support[i] < 0; }
  ADASPLASH2_INLINE bool any_flat(Part rows) const {
    for (int64_t i = rows.first; i < rows.first + rows.count; ++i)
      if (is_flat(i)) return true;
    return false;
  }

  // --- rows with a list ----------------------------------------------------------------------

  // One for steep rows: they are gathered divided, and what is held between turns is not.
  ADASPLASH2_INLINE int64_t turns_of_lists() const {
    if (is_steep<K>(power)) return 1;
    const int64_t entries = task.offsets[task.rows] - task.offsets[0];
    const int64_t keys = needed_by_any({0, task.rows}).size();
    const int64_t width =
        problem.head_dim > problem.head_dim_v ? problem.head_dim : problem.head_dim_v;
    return gather_turns(task.rows, entries, keys, keys * width * int64_t(sizeof(S)));
  }

  ADASPLASH2_INLINE void run_list(int64_t i) {
    const Part entries = entries_of(i);
    make_dp(i, entries, list_dp());
    const T divisor = differentiate_list(i, entries);
    gather_keys(entries, list, false, grad_query);
    write(i, grad_query, divisor);
  }

  // All rows. Between turns dp, and then ds, is held where ds is to be.
  __attribute__((noinline)) void run_lists(int64_t turns) {
    each_part(turns,
              [&](int64_t i, int64_t, Part some) { make_dp(i, some, scores_of(some.first)); });
    each_part(1, [&](int64_t i, int64_t, Part all) {
      __builtin_memcpy(list_dp(), scores_of(all.first), size_t(all.count) * sizeof(T));
      differentiate_list(i, all);
    });
    each_part(turns, [&](int64_t i, int64_t turn, Part some) {
      T* out = grad_query + i * problem.head_dim;
      gather_keys(some, scores_of(some.first), turn > 0, out);
      if (turn == turns - 1) write(i, out, T(1));
    });
  }

  template <class F>
  ADASPLASH2_INLINE void each_part(int64_t turns, F f) {
    for (int64_t turn = 0; turn < turns; ++turn)
      for (int64_t i = 0; i < task.rows; ++i) {
        if (is_flat(i)) continue;
        const Part all = entries_of(i), part = part_at(turn, turns, all.count);
        f(i, turn, Part{all.first + part.first, part.count});
      }
  }
  ADASPLASH2_INLINE Part entries_of(int64_t i) const {
    return {task.offsets[i], task.offsets[i + 1] - task.offsets[i]};
  }

  // Of the lists' entries, from one on; where there are none there is no place for them either.
  ADASPLASH2_INLINE T* scores_of(int64_t entry) const {
    return task.grad_scores + (entry - task.first_entry);
  }
  ADASPLASH2_INLINE T* list_dp() const { return list + kListStride<T>; }

  ADASPLASH2_INLINE void make_dp(int64_t i, Part entries, T* dp) {
    const S* dout = row_of<const S>(task.grad_out, i);
    for (int64_t k = 0; k < problem.head_dim_v; ++k) grad_out[k] = to_compute(dout[k]);
    const int32_t* keys = task.keys + entries.first;
    for (int64_t j = 0; j < entries.count; ++j)
      dp[j] = dot(grad_out, row_of<const S>(task.value, keys[j]), problem.head_dim_v);
  }

  ADASPLASH2_INLINE void gather_keys(Part entries, const T* ds, bool add, T* out) {
    gather_rows<S>(ListEntries<T>{ds, task.keys + entries.first}, entries.count, task.key,
                   problem.head_dim, add, out);
  }

  // list_dp() -> row i's ds where it is to be, and in `list` divided by what is returned.
  ADASPLASH2_INLINE T differentiate_list(int64_t i, Part entries) {
    const int64_t begin = entries.first, n = entries.count;
    const int32_t* keys = task.keys + begin;
    T *ds = list, *dp = list_dp();
    if (n > 0) __builtin_memcpy(ds, task.probabilities + begin, size_t(n) * sizeof(T));
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
    if (n > 0) __builtin_memcpy(scores_of(begin), ds, size_t(n) * sizeof(T));
    return into_range(ds, n);
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
        task.weights[begin - task.first_entry + j + lane] = weights[lane];
    }
  }

  ADASPLASH2_INLINE bool needs_dots() const { return scores.needs_dots(task.others.scales); }

  // p of n keys of row i, zeros behind them to the end of a vector -> ds in place, the gradient of
  // q . k, and the row's other gradients. `dp` is likewise, and so is `row_dots` where that is
  // needed. There is room for the sink.
  template <class KeyAt, class SeenAt>
  ADASPLASH2_INLINE void differentiate(int64_t i, T* x, T* dp, int64_t n, KeyAt key_at,
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
  }

  // Keys that are not seen may be none: behind a row's last key lies what another task adds to.
  ADASPLASH2_INLINE void add_to_mask(int64_t i, Vec<T> ds, Ints<T> seen, Keys<T> keys,
                                     int64_t count) {
    T* row = task.others.mask + i * task.others.mask_stride_row;
    for (int64_t lane = 0; lane < kLanes<T> && lane < count; ++lane)
      if (seen[lane]) row[keys[lane] * task.others.mask_stride_key] += ds[lane];
  }

  // Steep ds may be so large that their products with keys overflow with both signs, whose sum is
  // NaN: such a row is divided by what is returned. It is the root of T's range, which products of
  // what was divided with keys smaller than it do not leave.
  ADASPLASH2_INLINE T into_range(T* ds, int64_t n) const {
    const T divisor = sizeof(T) == 4 ? T(0x1p64) : T(0x1p512);
    if (!is_steep<K>(power)) return T(1);
    T most = 0;
    for (int64_t j = 0; j < n; ++j) most = magnitude(ds[j]) > most ? magnitude(ds[j]) : most;
    if (!(most > divisor)) return T(1);
    for (int64_t j = 0; j < n; ++j) ds[j] /= divisor;
    return divisor;
  }

  ADASPLASH2_INLINE void write(int64_t i, T* row, T divisor) {
    if (divisor != T(1))
      for (int64_t k = 0; k < problem.head_dim; ++k) row[k] *= divisor;
    store_storage(row_of<S>(task.grad_query, i), row, problem.head_dim);
  }

  // --- rows without a list -------------------------------------------------------------------

  __attribute__((noinline)) void run_flat(Part rows) {
    const KeyRange keys = needed_by_any(rows), panels = keys.in_units_of(kKeys);
    const int64_t padded = round_up(rows.count, kTileRows), first_key = panels.begin * kKeys;
    scan_flat(rows, panels);
    for (int64_t r = 0; r < padded; ++r)
      if (r < rows.count && is_flat(rows.first + r))
        differentiate_flat(rows, r, first_key);
      else
        clear(r, 0, panels.size() * kKeys);
    add_to_keys(rows, panels);
    T divisors[kBlockRows];
    for (int64_t r = 0; r < rows.count; ++r)
      divisors[r] = into_range(grad_scores + r * score_stride, panels.size() * kKeys);
    weighted_sums<S>(grad_scores, score_stride, padded, task.key, {first_key, keys.end - first_key},
                     problem.head_dim, grad_query);
    for (int64_t r = 0; r < rows.count; ++r)
      if (is_flat(rows.first + r))
        write(rows.first + r, grad_query + r * problem.head_dim, divisors[r]);
  }

  ADASPLASH2_INLINE KeyRange needed_by_any(Part rows) const {
    return scores.needed_by_any(task.row_begin + rows.first, rows.count);
  }
  ADASPLASH2_INLINE void clear(int64_t r, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += kLanes<T>) {
      store(grad_scores + r * score_stride + j, Vec<T>{});
      store(grad_probabilities + r * score_stride + j, Vec<T>{});
    }
  }

  // q . k and dp of the keys in some panels; zeros where a tile has no flat row, or none of its
  // rows needs a key of the panel.
  __attribute__((noinline)) void scan_flat(Part rows, KeyRange panels) {
    KeyRange needed[kBlockRows / kTileRows];
    for (int64_t r = 0; r < rows.count; r += kTileRows) {
      const Part tile = tile_of(rows, r);
      needed[r / kTileRows] = any_flat(tile) ? needed_by_any(tile) : KeyRange{0, 0};
      pack_transposed<S, T>(task.query, tile, kTileRows, problem.head_dim,
                            query_packed + r * problem.head_dim);
      pack_transposed<S, T>(task.grad_out, tile, kTileRows, problem.head_dim_v,
                            grad_out_packed + r * problem.head_dim_v);
    }
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const T* keys = task.packed_keys + panel * kKeys * problem.head_dim;
      const T* values = task.packed_values + panel * kKeys * problem.head_dim_v;
      const KeyRange of_panel = {panel * kKeys, (panel + 1) * kKeys};
      for (int64_t r = 0; r < rows.count; r += kTileRows) {
        const Part tile = tile_of(rows, r);
        const bool any = of_panel.overlaps(needed[r / kTileRows]) &&
                         scores.any_allowed(task.row_begin + tile.first, tile.count, of_panel);
        const int64_t at = r * score_stride + (panel - panels.begin) * kKeys;
        // One after another: registers hold one tile.
        const auto make = [&](const T* rows_packed, const T* packed, int64_t depth, T* to) {
          store_tile(any ? dot_tile(rows_packed + r * depth, packed, depth) : Tile<T>{}, to + at,
                     score_stride);
        };
        make(query_packed, keys, problem.head_dim, grad_scores);
        make(grad_out_packed, values, problem.head_dim_v, grad_probabilities);
      }
    }
  }

  // Row r of some rows, of the keys from first_key on: q . k -> ds, dp -> what dO has in dV.
  __attribute__((noinline)) void differentiate_flat(Part rows, int64_t r, int64_t first_key) {
    const KeyRange panels = needed_by_any(tile_of(rows, r)).in_units_of(kKeys);
    const int64_t begin = panels.begin * kKeys, n = panels.size() * kKeys;
    const int64_t i = rows.first + r, row = task.row_begin + i;
    T* x = grad_scores + r * score_stride + (begin - first_key);
    T* dp = grad_probabilities + r * score_stride + (begin - first_key);
    if constexpr (!IsPlain)
      if (needs_dots()) __builtin_memcpy(row_dots, x, size_t(n) * sizeof(T));
    const KeyRange scaled = scores.is_scaled ? scores.visible(row) : KeyRange{0, 0};
    const auto values_at = [&](int64_t j) {
      const int64_t key = begin + j;
      const Vec<T> dots = load(x + j);
      return scaled.contains({key, key + kLanes<T>}) ? scores.values(dots)
                                                     : scores.values(dots, row, key);
    };
    if constexpr (IsPlain && K != AlphaKind::kGeneral) {
      differentiate_values<K>(values_at, x, dp, n, task.thresholds[i], scores.slope(), power);
      return hide_poison(i, x, dp, begin, n);
    }
    for (int64_t j = 0; j < n; j += kLanes<T>) {
      const Vec<T> p = probability<K>(values_at(j), task.thresholds[i], power);
      store(x + j, p);
      store(row_probabilities + j, p);
    }
    const auto key_at = [&](int64_t j) { return scores.keys_from(begin + j); };
    if constexpr (IsPlain) {
      score_gradients<K>(x, dp, n, scores.slope(), power);
    } else {
      const auto seen_at = [&](int64_t j) { return scores.allowed(row, begin + j); };
      if (dropout.is_on())
        for (int64_t j = 0; j < n; j += kLanes<T>)
          store(dp + j, dropout.applied(load(dp + j), row, key_at(j)));
      differentiate(i, x, dp, n, key_at, seen_at);
    }
    __builtin_memcpy(dp, row_probabilities, size_t(n) * sizeof(T));
    if (!IsPlain && dropout.is_on())
      for (int64_t j = 0; j < n; j += kLanes<T>)
        store(dp + j, dropout.weights(load(dp + j), row, key_at(j)));
    hide_poison(i, x, dp, begin, n);
  }

  // The NaN of a poisoned row must not reach keys that it does not see.
  ADASPLASH2_INLINE void hide_poison(int64_t i, T* x, T* dp, int64_t begin, int64_t n) const {
    const T tau = task.thresholds[i].tau;
    if (tau == tau) return;
    for (int64_t j = 0; j < n; j += kLanes<T>) {
      const Ints<T> allowed = scores.allowed(task.row_begin + i, begin + j);
      store(x + j, allowed ? load(x + j) : Vec<T>{});
      store(dp + j, allowed ? load(dp + j) : Vec<T>{});
    }
  }

  // What the rows give to the keys of some panels.
  ADASPLASH2_INLINE void add_to_keys(Part rows, KeyRange panels) {
    add_to_keys(grad_scores, rows, panels, task.query, problem.head_dim, task.of_band.keys);
    add_to_keys(grad_probabilities, rows, panels, task.grad_out, problem.head_dim_v,
                task.of_band.values);
  }
  __attribute__((noinline)) void add_to_keys(const T* weights, Part rows, KeyRange panels,
                                             HeadRef matrix, int64_t width, T* out) {
    const bool finite = all_finite<S>(matrix, rows, width);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const T* of_panel = weights + (panel - panels.begin) * kKeys;
      // Where rows see more and more keys, the first see none of the last.
      int64_t begin = 0, end = round_up(rows.count, kWeightedRows);
      const auto is_zero = [&](int64_t r) {
        return all_zero<kWeightedRows>(of_panel + r * score_stride, score_stride);
      };
      while (begin < end && is_zero(begin)) begin += kWeightedRows;
      while (begin < end && is_zero(end - kWeightedRows)) end -= kWeightedRows;
      if (begin == end) continue;
      if (end > rows.count) end = rows.count;
      const Part some = {rows.first + begin, end - begin};
      T* to = out + (panel * kKeys - task.of_band.range.begin) * width;
      if (finite)
        add_to_panel<Zeros::kMultiply, S>(of_panel + begin * score_stride, score_stride, matrix,
                                          some, width, to);
      else
        add_to_panel<Zeros::kTakeNothing, S>(of_panel + begin * score_stride, score_stride, matrix,
                                             some, width, to);
    }
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

  const BackwardKeysTask<T>& task;
  const AttentionProblem& problem;
  T *grad_keys, *grad_values;
  int64_t bytes;

  ADASPLASH2_INLINE BackwardKeys(const BackwardKeysTask<T>& t, const AttentionProblem& p)
      : task(t), problem(p) {
    Allocator memory{static_cast<char*>(t.workspace)};
    grad_keys = memory.take<T>(kTaskKeys<T> * p.head_dim);
    grad_values = memory.take<T>(kTaskKeys<T> * p.head_dim_v);
    bytes = memory.used;
  }

  ADASPLASH2_INLINE void run() {
    for (int64_t k = 0; k < task.keys * problem.head_dim; ++k) grad_keys[k] = T(0);
    for (int64_t k = 0; k < task.keys * problem.head_dim_v; ++k) grad_values[k] = T(0);
    const int64_t turns = turns_of_lists();
    for (int64_t turn = 0; turn < turns; ++turn)
      for (int64_t j = 0; j < task.keys; ++j) gather_list(j, turn, turns);
    for (int64_t s = 0; s < task.bands; ++s) {
      const KeyGradients<T>& band = task.of_bands[s];
      add_band(band.keys, band.range, problem.head_dim, grad_keys);
      add_band(band.values, band.range, problem.head_dim_v, grad_values);
    }
    for (int64_t j = 0; j < task.keys; ++j) {
      store_storage(row_of<S>(task.grad_key, j), grad_keys + j * problem.head_dim,
                    problem.head_dim);
      store_storage(row_of<S>(task.grad_value, j), grad_values + j * problem.head_dim_v,
                    problem.head_dim_v);
    }
  }

  // What the flat rows of a band, if it has any, give to the keys in `range`.
  ADASPLASH2_INLINE void add_band(const T* of_band, KeyRange range, int64_t width, T* out) {
    if (!of_band) return;
    const KeyRange some = range.intersection({task.key_begin, task.key_begin + task.keys});
    if (some.size() <= 0) return;
    of_band += (some.begin - range.begin) * width;
    out += (some.begin - task.key_begin) * width;
    for (int64_t k = 0; k < some.size() * width; ++k) out[k] += of_band[k];
  }

  ADASPLASH2_INLINE int64_t turns_of_lists() const {
    const int64_t entries = task.offsets[task.keys] - task.offsets[0], rows = problem.group_rows();
    const int64_t widths = problem.head_dim + problem.head_dim_v;
    return gather_turns(task.keys, entries, rows, rows * widths * int64_t(sizeof(S)));
  }

  ADASPLASH2_INLINE void gather_list(int64_t j, int64_t turn, int64_t turns) {
    // Entries are ordered by head, then row: one gather per query head of the group.
    const int64_t first = task.offsets[j];
    const Part part = part_at(turn, turns, task.offsets[j + 1] - first);
    const ColumnEntry<T>* at = task.entries + first + part.first;
    const ColumnEntry<T>* const end = at + part.count;
    while (at < end) {
      const int64_t head = at->row / problem.length_q;
      const int64_t limit = problem.group_row(head + 1, 0);
      const ColumnEntry<T>* const begin = at;
      if (end[-1].row < limit)
        at = end;
      else
        while (at->row < limit) ++at;
      const auto add = [&](auto weights, HeadRef matrix, int64_t width, T* out) {
        // Rows carry the head in front: step the base back instead of subtracting it each time.
        const HeadRef base = matrix.from(-problem.group_row(head, 0), sizeof(S));
        gather_rows<S>(weights, at - begin, base, width, true, out + j * width);
      };
      using Entry = ColumnEntry<T>;
      add(Weights<&Entry::key_weight>{begin}, task.queries[head], problem.head_dim, grad_keys);
      add(Weights<&Entry::value_weight>{begin}, task.grad_outs[head], problem.head_dim_v,
          grad_values);
    }
  }

  template <T ColumnEntry<T>::* Weight>
  struct Weights {
    const ColumnEntry<T>* entries;
    ADASPLASH2_INLINE T weight(int64_t j) const { return entries[j].*Weight; }
    ADASPLASH2_INLINE int32_t row(int64_t j) const { return entries[j].row; }
  };
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
