// One block of query rows: scan every key once, keep survivors, solve, gather the values.
#pragma once

#include "micro.h"
#include "solve.h"

namespace adasplash2::ADASPLASH2_ISA {

// A list is tightened when it passes its trigger, which then moves to kRegrowth times what is
// left: often enough to keep the bound sharp, seldom enough not to count.
constexpr int64_t kFirstTrigger = 32;
constexpr int64_t kRegrowth = 2;

ADASPLASH2_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Bump allocation from a workspace; with a null base it only measures.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class U>
  ADASPLASH2_INLINE U* take(int64_t n) {
    const int64_t at = used;
    used += round_up(n * int64_t(sizeof(U)), 64);
    return base ? reinterpret_cast<U*>(base + at) : nullptr;
  }
};

// Lists hold the capacity, the panel that overfills it and a vector of slack; the odd vector
// keeps the stride off powers of two, which would map all rows to the same cache sets.
template <class T>
constexpr int64_t kListStride = kListCapacity + kPanelKeys<T> + 2 * kLanes<T>;

template <class T>
ADASPLASH2_INLINE int64_t panels(int64_t keys) {
  return (keys + kPanelKeys<T> - 1) / kPanelKeys<T>;
}

template <class T>
struct ForwardWorkspace {
  T *query, *list_values, *scores, *candidates, *out;
  int32_t* list_keys;
  int64_t score_stride, bytes;

  ADASPLASH2_INLINE ForwardWorkspace(const AttentionProblem& p, void* base) {
    Arena arena{static_cast<char*>(base)};
    score_stride = panels<T>(p.length_k) * kPanelKeys<T> + kLanes<T>;
    query = arena.take<T>(kBlockRows * p.head_dim);
    list_values = arena.take<T>(kBlockRows * kListStride<T>);
    list_keys = arena.take<int32_t>(kBlockRows * kListStride<T>);
    out = arena.take<T>(kTileRows * p.head_dim_v);
    // Flat rows only; not touched, so not resident, without them.
    scores = arena.take<T>(kTileRows * score_stride);
    candidates = arena.take<T>(score_stride);
    bytes = arena.used;
  }
};

template <class T>
ADASPLASH2_INLINE int clamp_lane(int64_t lane) {
  return lane < 0 ? 0 : (lane > kLanes<T> ? kLanes<T> : int(lane));
}

// The values where the key may be seen, -inf elsewhere.
template <class T>
ADASPLASH2_INLINE Vec<T> mask_keys(Vec<T> values, int64_t first_key, KeyRange visible) {
  const Keys<T> keys = iota<T>();
  const Ints<T> lane = __builtin_convertvector(keys, Ints<T>);
  const int64_t begin = visible.begin - first_key, end = visible.end - first_key;
  const Ints<T> out =
      (lane < Ints<T>{} + clamp_lane<T>(begin)) | (lane >= Ints<T>{} + clamp_lane<T>(end));
  return out ? broadcast(-kInfinity<T>) : values;
}

template <class S, AlphaKind K>
struct ForwardBlock {
  using T = ComputeOf<S>;
  static constexpr int64_t kKeys = kPanelKeys<T>;

  const ForwardTask<T>& task;
  const AttentionProblem& problem;
  const ForwardWorkspace<T> ws;
  const Power<T> power;
  const T multiplier;
  T lo[kBlockRows];
  int64_t count[kBlockRows], trigger[kBlockRows];
  bool flat[kBlockRows];
  Work work;

  ADASPLASH2_INLINE explicit ForwardBlock(const ForwardTask<T>& t)
      : task(t),
        problem(*t.problem),
        ws(*t.problem, t.workspace),
        power(power_of<T>(t.problem->alpha)),
        multiplier(T(multiplier_of<K>(t.problem->alpha, t.problem->scores.scale))) {}

  ADASPLASH2_INLINE KeyRange visible(int64_t i) const {
    return problem.scores.visible(task.row_begin + i);
  }
  ADASPLASH2_INLINE int64_t groups() const { return (task.rows + kTileRows - 1) / kTileRows; }
  ADASPLASH2_INLINE int64_t rows_in(int64_t g) const {
    const int64_t left = task.rows - g * kTileRows;
    return left < kTileRows ? left : kTileRows;
  }
  // Keys that some row, and that every row, of [first, last] may see.
  ADASPLASH2_INLINE KeyRange any_visible(int64_t first, int64_t last) const {
    return {visible(first).begin, visible(last).end};
  }
  ADASPLASH2_INLINE KeyRange all_visible(int64_t first, int64_t last) const {
    return {visible(last).begin, visible(first).end};
  }

  ADASPLASH2_INLINE void run() {
    pack_query();
    for (int64_t i = 0; i < task.rows; ++i) {
      lo[i] = -kInfinity<T>;
      count[i] = 0;
      trigger[i] = kFirstTrigger;
      flat[i] = false;
    }
    const int64_t together = task.scan_rows < kTileRows ? 1 : task.scan_rows / kTileRows;
    for (int64_t g = 0; g < groups(); g += together)
      scan(g, g + together < groups() ? g + together : groups());
    for (int64_t i = 0; i < task.rows; ++i)
      if (!flat[i]) solve_row(i);
    for (int64_t g = 0; g < groups(); ++g) {
      bool any = false;
      for (int64_t r = 0; r < rows_in(g); ++r) any |= flat[g * kTileRows + r];
      if (any) solve_flat_group(g);
    }
  }

  ADASPLASH2_INLINE void pack_query() {
    const S* rows = static_cast<const S*>(task.query.data);
    for (int64_t g = 0; g < groups(); ++g)
      pack_transposed<S, T>(rows + g * kTileRows * task.query.stride, task.query.stride, rows_in(g),
                            kTileRows, problem.head_dim,
                            ws.query + g * kTileRows * problem.head_dim);
  }

  // The one dense pass of some groups, nearest keys first: with causal order they fill the lists
  // with likely large scores, and the bound is sharp before the far keys come.
  ADASPLASH2_INLINE void scan(int64_t group_begin, int64_t group_end) {
    const KeyRange keys = any_visible(group_begin * kTileRows,
                                      (group_end - 1) * kTileRows + rows_in(group_end - 1) - 1);
    for (int64_t panel = panels<T>(keys.end) - 1; panel >= keys.begin / kKeys; --panel) {
      const T* packed = task.packed_keys + panel * kKeys * problem.head_dim;
      const int64_t key = panel * kKeys;
      for (int64_t g = group_begin; g < group_end; ++g) {
        const int64_t first = g * kTileRows, last = first + rows_in(g) - 1;
        const KeyRange any = any_visible(first, last), all = all_visible(first, last);
        if (key >= any.end || key + kKeys <= any.begin || all_flat(first, last)) continue;
        const Tile<T> tile =
            scores_tile(ws.query + first * problem.head_dim, packed, problem.head_dim);
        ++work.tiles;
        if (key >= all.begin && key + kKeys <= all.end && last - first + 1 == kTileRows)
          collect<false>(tile, first, kTileRows, key);
        else
          collect<true>(tile, first, last - first + 1, key);
      }
    }
  }

  ADASPLASH2_INLINE bool all_flat(int64_t first, int64_t last) const {
    for (int64_t i = first; i <= last; ++i)
      if (!flat[i]) return false;
    return true;
  }

  // Appends what lies above each row's bound.
  template <bool Masked>
  ADASPLASH2_INLINE void collect(const Tile<T>& tile, int64_t first, int64_t rows, int64_t key) {
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      if (Masked && r >= rows) continue;
      const int64_t i = first + r;
      Vec<T> x[kTileVectors];
      unsigned above[kTileVectors], any = 0;
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        x[v] = tile.rows[r][v] * multiplier;
        if (Masked) x[v] = mask_keys<T>(x[v], key + v * kLanes<T>, visible(i));
        above[v] = not_below(x[v], broadcast(lo[i]));
        any |= above[v];
      }
      if (!any || flat[i]) continue;
      T* values = ws.list_values + i * kListStride<T>;
      int32_t* keys = ws.list_keys + i * kListStride<T>;
      int64_t n = count[i];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v)
        n += compress<T>(x[v], iota<T>() + int32_t(key + v * kLanes<T>), above[v], values + n,
                         keys + n);
      work.appended += n - count[i];
      count[i] = n;
      if (n >= trigger[i]) tighten_row(i);
    }
  }

  __attribute__((noinline)) void tighten_row(int64_t i) {
    const Tightened<T> row = tighten<K, T>(ws.list_values + i * kListStride<T>,
                                           ws.list_keys + i * kListStride<T>, count[i], power);
    ++work.tightenings;
    count[i] = row.count;
    // A poisoned row is flat too: its NaN has to reach every gradient it touches.
    flat[i] = row.state == RowState::kPoisoned || row.count > kListCapacity * 3 / 4;
    if (flat[i]) return;
    lo[i] = row.lo;
    const int64_t next = row.count * kRegrowth + kFirstTrigger / 2;
    trigger[i] = next < kListCapacity ? next : kListCapacity;
  }

  ADASPLASH2_INLINE void solve_row(int64_t i) {
    T* values = ws.list_values + i * kListStride<T>;
    int32_t* keys = ws.list_keys + i * kListStride<T>;
    const Tightened<T> row = tighten<K, T>(values, keys, count[i], power);
    if (row.state == RowState::kPoisoned) {
      flat[i] = true;
      return;
    }
    Threshold<T> threshold = {row.max, kInfinity<T>, T(0)};
    int32_t steps = 0;
    int64_t support = 0;
    if (row.state == RowState::kSolved)
      support = solve_list<K, T>(values, keys, row, power, &threshold, &steps);
    work.solved += row.count;
    record(i, row.state, threshold, int32_t(support), steps);
    gather_rows<false>(values, keys, support, static_cast<const S*>(task.value.data),
                       task.value.stride, problem.head_dim_v, ws.out);
    write_out(i, ws.out);
    if (task.results.tiles)
      for (int64_t j = 0; j < support; ++j) task.results.tiles[keys[j] / kBlockRows] = 1;
  }

  ADASPLASH2_INLINE void record(int64_t i, RowState state, const Threshold<T>& threshold,
                                int32_t support, int32_t steps) {
    work.steps += steps;
    work.flat_rows += flat[i];
    task.results.thresholds[i] = threshold;
    task.results.tau[i] =
        state == RowState::kEmpty ? kInfinity<T> : tau_of<K>(threshold, problem.alpha);
    task.results.support[i] = support;
    if (task.results.iterations) task.results.iterations[i] = steps;
  }

  ADASPLASH2_INLINE void write_out(int64_t i, const T* row) {
    store_storage(static_cast<S*>(task.out.data) + i * task.out.stride, row, problem.head_dim_v);
  }

  // Rows without a list: all their scores at once, kTileRows rows x length_k, linear in the
  // length however many keys they keep.
  __attribute__((noinline)) void solve_flat_group(int64_t g) {
    const int64_t first = g * kTileRows, rows = rows_in(g), last = first + rows - 1;
    const KeyRange any = any_visible(first, last);
    const int64_t panel_end = panels<T>(any.end), width = panel_end * kKeys;
    for (int64_t panel = 0; panel < panel_end; ++panel) {
      const Tile<T> tile =
          scores_tile(ws.query + first * problem.head_dim,
                      task.packed_keys + panel * kKeys * problem.head_dim, problem.head_dim);
      for (int r = 0; r < kTileRows; ++r)
        for (int v = 0; v < kTileVectors; ++v) {
          const int64_t key = panel * kKeys + v * kLanes<T>;
          const KeyRange seen = r < rows ? visible(first + r) : KeyRange{0, 0};
          store(ws.scores + r * ws.score_stride + key,
                mask_keys<T>(tile.rows[r][v] * multiplier, key, seen));
        }
    }
    for (int64_t r = 0; r < kTileRows; ++r) {
      T* scores = ws.scores + r * ws.score_stride;
      if (r < rows && flat[first + r])
        solve_flat_row(first + r, scores, width);
      else
        for (int64_t j = 0; j < width; j += kLanes<T>) store(scores + j, Vec<T>{});
    }
    for (int64_t k = 0; k < kTileRows * problem.head_dim_v; ++k) ws.out[k] = T(0);
    const int64_t keys = any.end;
    for (int64_t r = 0; r < kTileRows; r += kWeightedRows)
      add_weighted_rows<kWeightedRows>(ws.scores + r * ws.score_stride, ws.score_stride, 1, keys,
                                       static_cast<const S*>(task.value.data), task.value.stride,
                                       problem.head_dim_v, ws.out + r * problem.head_dim_v,
                                       problem.head_dim_v);
    for (int64_t r = 0; r < rows; ++r)
      if (flat[first + r]) write_out(first + r, ws.out + r * problem.head_dim_v);
  }

  // Scores -> probabilities in place.
  ADASPLASH2_INLINE void solve_flat_row(int64_t i, T* scores, int64_t width) {
    const DenseRow<T> row = solve_dense<K, T>(scores, width, ws.candidates, power);
    record(i, row.state, row.threshold, int32_t(-1 - row.support), row.steps);
    for (int64_t j = 0; j < width; j += kLanes<T>) {
      const Vec<T> p = probability<K>(load(scores + j), row.threshold, power) * row.scale;
      store(scores + j, p);
    }
    if (row.state == RowState::kPoisoned || !task.results.tiles) return;
    for (int64_t j = 0; j < width; ++j)
      if (scores[j] > T(0)) task.results.tiles[j / kBlockRows] = 1;
  }
};

template <class S>
static void forward(ForwardTask<ComputeOf<S>>& task) {
  with_kind(task.problem->alpha.kind, [&](auto kind) {
    ForwardBlock<S, decltype(kind)::value> block(task);
    block.run();
    task.list_values = block.ws.list_values;
    task.list_keys = block.ws.list_keys;
    task.list_stride = kListStride<ComputeOf<S>>;
    task.work = block.work;
  });
}

}  // namespace adasplash2::ADASPLASH2_ISA
