// One block of query rows, in phases: scan every key once and keep survivors, solve, gather the
// values.
#pragma once

#include "dropout.h"
#include "guard.h"
#include "kernels.h"
#include "micro.h"
#include "solve.h"

namespace adasplash2::ADASPLASH2_ISA {

// A list is tightened when it passes its trigger, which then moves to kRegrowth times what is
// left: often enough to keep the bound sharp, seldom enough not to count (WORK in
// tests/test_core.py says how often that is).
constexpr int64_t kFirstTrigger = 32;
constexpr int64_t kRegrowth = 2;

// Rows are flat, and dense work is done on all their keys, where most rows of their tile keep more
// of them than lists are good for: a part of those that they see, and no more than a list holds
// with room to grow. A row that is the only one keeps its list as long as that has room for a few
// more panels.
//
// Lists of up to kShortList are good for any row: no shorter one is ever tightened.
constexpr int64_t kShortList = kFirstTrigger;
// What a row may keep at the end, and what its list may hold after its bound was raised: beside
// that there is room for a few panels, so that it is not raised after each. Neither part was tuned.
constexpr int64_t kLongList = kListCapacity * 5 / 8;
constexpr int64_t kFullList = kListCapacity * 7 / 8;
// The part whose lists take a training step as long as dense work does. An entry takes some time
// whatever the head_dim; of 32, 64 and 128 an eighth, a fifth and two sevenths were measured, which
// is what these two numbers give.
ADASPLASH2_INLINE double share_of_list(const AttentionProblem& p) {
  constexpr double kOfEntry = 192.0, kOfDepth = 2.0;
  const double depth = double(p.head_dim + p.head_dim_v) / 2.0;
  return depth / (kOfEntry + kOfDepth * depth);
}

// Once this part of the keys is scanned, what a row will keep of all is foretold: a power of their
// number, the greater the more of them it keeps so far. Fitted to Gaussian scores, whose mean it
// meets within an eighth unless nearly all are kept so far, where it is too little.
constexpr int64_t kShareOfScan = 16;
ADASPLASH2_INLINE double foretold(int64_t kept, int64_t scanned, int64_t all) {
  const double share = double(kept) / double(scanned);
  return double(kept) * __builtin_pow(double(all) / double(scanned), 0.12 + 0.5 * share);
}

// Rows that see no more keys than these need no scan that keeps few: all their scores are held at
// once, and what is a list is seen from their probabilities. A few panels of any instruction set;
// no measurement of other limits is kept.
constexpr int64_t kShortRow = 192;

ADASPLASH2_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The rows that share tiles of scores with row r of some rows.
ADASPLASH2_INLINE Part tile_of(Part rows, int64_t r) {
  const Part tile = part_of(rows.count, kTileRows, r / kTileRows);
  return {rows.first + tile.first, tile.count};
}

// Bump allocation from a workspace; with a null base it only measures.
struct Allocator {
  char* base;
  int64_t used = 0;
  template <class U>
  ADASPLASH2_INLINE U* take(int64_t n) {
    const int64_t at = used, end = at + n * int64_t(sizeof(U));
    used = round_up(end + kGuardBytes, 64);
    if (!base) return nullptr;
    guard(base + at, base + end, base + used);
    return reinterpret_cast<U*>(base + at);
  }
};

// Lists hold the capacity, the panel that overfills it and two vectors of slack.
template <class T>
constexpr int64_t kListStride = kListCapacity + kPanelKeys<T> + 2 * kLanes<T>;
// Of a problem, where no list holds more than all keys and the sink. For short rows it matters:
// with kListStride a thread took 1.1 MiB of each call, which malloc gave back to the system after
// it, so that four to eight pages were new in the next: a microsecond each. A stride that large
// powers of two divide would map all rows to the same cache sets.
template <class T>
ADASPLASH2_INLINE int64_t list_stride_of(const AttentionProblem& p) {
  const int64_t keys = round_up(p.length_k + 1, kPanelKeys<T>);
  const int64_t stride = kListStride<T> - (keys < kListCapacity ? kListCapacity - keys : 0);
  return stride % 256 ? stride : stride + kLanes<T>;
}

// What lists and gathers call the sink, which is no key.
constexpr int32_t kSinkKey = -1;

// The first candidate, so that it sharpens the bound from the beginning.
template <class T>
ADASPLASH2_INLINE void add_sink(Candidates<T>& list, T value) {
  list.values[0] = value;
  list.keys[0] = kSinkKey;
  list.count = 1;
}
// Its probability is nobody's weight. It came first, and stays there as long as it is kept.
template <class T>
ADASPLASH2_INLINE void drop_sink(Candidates<T>& list) {
  if (list.count == 0 || list.keys[0] != kSinkKey) return;
  list.values[0] = list.values[list.count - 1];
  list.keys[0] = list.keys[list.count - 1];
  --list.count;
}

// The keys of a row's list that dropout leaves, and their weights, in `kept`.
template <class T>
ADASPLASH2_INLINE Candidates<T> after_dropout(const Dropout<T>& dropout, int64_t row,
                                              Candidates<T> list, Candidates<T> kept) {
  for (int64_t j = 0; j < list.count; j += kLanes<T>) {
    Keys<T> keys;
    __builtin_memcpy(&keys, list.keys + j, sizeof(keys));
    T weights[kLanes<T>];
    store(weights, dropout.applied(load(list.values + j), row, keys));
    for (int64_t lane = 0; lane < kLanes<T> && j + lane < list.count; ++lane) {
      kept.values[kept.count] = weights[lane];
      kept.keys[kept.count] = keys[lane];
      kept.count += weights[lane] != T(0);
    }
  }
  return kept;
}

// Scores of one row of a tile against all keys, panel by panel, a vector of slack, and one for the
// sink.
template <class T>
ADASPLASH2_INLINE int64_t score_stride_of(const AttentionProblem& p) {
  const int64_t sink = p.score.has_sinks() ? kLanes<T> : 0;
  return round_up(p.length_k, kPanelKeys<T>) + sink + kLanes<T>;
}

// How many rows, whole tiles of them, have their dense work done together, where that holds
// `arrays` numbers for each of their keys: more rows read keys and values, and add to their
// gradients, less often, as long as what is held stays in the second cache: half of it, beside what
// comes by. kWorthIt rows are worth leaving that for the next one, up to kFar bytes: of 8,192 keys
// (head_dim 128) a step with 16 rows took 1,818 ms, with eight 2,187. Results do not depend on it.
template <class T>
ADASPLASH2_INLINE int64_t rows_together(const AttentionProblem& p, int64_t arrays) {
  constexpr int64_t kFar = int64_t(1) << 21, kWorthIt = 16;
  const int64_t near = second_cache() / 2;
  const int64_t a_tile = kTileRows * arrays * score_stride_of<T>(p) * int64_t(sizeof(T));
  const int64_t most = kBlockRows / kTileRows, worth_it = kWorthIt / kTileRows;
  int64_t tiles = kFar / a_tile < worth_it ? kFar / a_tile : worth_it;
  if (near / a_tile > tiles) tiles = near / a_tile;
  return (tiles < 1 ? 1 : tiles < most ? tiles : most) * kTileRows;
}

// In how many turns some lists are gathered, which hold `entries` together of `rows` rows of a
// matrix, `bytes` of it. Where those are more than the second cache keeps, each list would have it
// all come anew from behind that. So all lists take a first part of the matrix, then all the next,
// as long as its rows are in more than one list, and a list has more than a few entries a turn. Of
// 4,096 keys (head_dim 128, 783 in a list) gradients took 224 ms instead of 548. Results do not
// depend on it.
ADASPLASH2_INLINE int64_t gather_turns(int64_t lists, int64_t entries, int64_t rows,
                                       int64_t bytes) {
  // Parts of half and of an eighth were no faster; 16 to 48 entries the same.
  constexpr int64_t kOfCache = 4, kInLists = 2, kEntries = 32;
  const int64_t by_bytes = bytes / (second_cache() / kOfCache);
  if (by_bytes <= 1 || entries < kInLists * rows) return 1;
  const int64_t by_length = entries / (kEntries * lists);
  const int64_t turns = by_length < by_bytes ? by_length : by_bytes;
  return turns < 1 ? 1 : turns;
}
// What a list of n entries, which are about in the order of the rows, gives at one of them.
ADASPLASH2_INLINE Part part_at(int64_t turn, int64_t turns, int64_t n) {
  if (turns == 1) return {0, n};  // short lists would feel the division
  const int64_t first = turn * n / turns;
  return {first, (turn + 1) * n / turns - first};
}

// Calls f with what is known of a head's scores at compile time: their alpha's kind, and whether
// they are plain.
template <bool B>
struct Flag {
  static constexpr bool value = B;
};
template <class F>
ADASPLASH2_INLINE void with_scores(const AttentionProblem& p, int64_t head, F f) {
  with_kind(p.alpha_of(head).kind, [&](auto kind) {
    if (p.score.is_plain) return f(kind, Flag<true>{});
    f(kind, Flag<false>{});
  });
}

template <class T>
struct ForwardWorkspace {
  T *query, *list_values, *scores, *candidates, *out, *kept_values;
  int32_t *list_keys, *kept_keys;
  int64_t list_stride, score_stride, together, bytes;

  ADASPLASH2_INLINE ForwardWorkspace(const AttentionProblem& p, void* base) {
    Allocator memory{static_cast<char*>(base)};
    list_stride = list_stride_of<T>(p);
    score_stride = score_stride_of<T>(p);
    query = memory.take<T>(kBlockRows * p.head_dim);
    list_values = memory.take<T>(kBlockRows * list_stride);
    list_keys = memory.take<int32_t>(kBlockRows * list_stride);
    together = rows_together<T>(p, 1);
    out = memory.take<T>(kBlockRows * p.head_dim_v);
    // What dropout leaves of a list.
    kept_values = memory.take<T>(p.score.has_dropout() ? list_stride : 0);
    kept_keys = memory.take<int32_t>(p.score.has_dropout() ? list_stride : 0);
    // Flat rows only; not touched, so not resident, without them.
    scores = memory.take<T>(together * score_stride);
    candidates = memory.take<T>(score_stride);
    bytes = memory.used;
  }
};

template <class S, AlphaKind K, bool IsPlain>
struct ForwardBlock {
  using T = ComputeOf<S>;
  static constexpr int64_t kKeys = kPanelKeys<T>, kRowTiles = kBlockRows / kTileRows;

  const ForwardTask<T>& task;
  const AttentionProblem& problem;
  const ForwardWorkspace<T> ws;
  const Alpha& alpha;
  const Power<T> power;
  const Scores<K, T, IsPlain> scores;
  T lo[kBlockRows];
  int64_t count[kBlockRows], trigger[kBlockRows], longest[kBlockRows];
  bool flat[kBlockRows];     // has no list, or none yet
  bool is_long[kBlockRows];  // is expected to keep more than a list is good for
  Work work;

  ADASPLASH2_INLINE explicit ForwardBlock(const ForwardTask<T>& t)
      : task(t),
        problem(*t.problem),
        ws(*t.problem, t.workspace),
        alpha(problem.alpha_of(t.head)),
        power(power_of<T>(alpha)),
        scores(problem.score_of(t.head), alpha) {}

  ADASPLASH2_INLINE void run() {
    prepare();
    scan();
    solve();
    for (int64_t g = 0; g < parts(task.rows, ws.together); ++g) {
      const Part rows = part_of(task.rows, ws.together, g);
      if (any_flat(rows)) run_flat(rows);
    }
    gather();
  }

  // The rows that share a tile of scores.
  ADASPLASH2_INLINE int64_t row_tiles() const { return parts(task.rows, kTileRows); }
  ADASPLASH2_INLINE Part row_tile(int64_t t) const { return part_of(task.rows, kTileRows, t); }
  ADASPLASH2_INLINE const T* packed_query(Part rows) const {
    return ws.query + rows.first * problem.head_dim;
  }
  ADASPLASH2_INLINE KeyRange needed_by_any(Part rows) const {
    return scores.needed_by_any(task.row_begin + rows.first, rows.count);
  }
  ADASPLASH2_INLINE KeyRange seen_by_all(Part rows) const {
    return adasplash2::seen_by_all(scores, task.row_begin + rows.first, rows.count);
  }
  ADASPLASH2_INLINE bool any_flat(Part rows) const {
    for (int64_t i = rows.first; i < rows.first + rows.count; ++i)
      if (flat[i]) return true;
    return false;
  }
  // Whether a tile has its dense work, or is expected to, for most of its rows: then it has it for
  // all. A row that is expected to keep many among few such rows costs less as a long list.
  ADASPLASH2_INLINE bool is_flat(Part rows) {
    int64_t number = 0;
    for (int64_t i = rows.first; i < rows.first + rows.count; ++i) number += flat[i] || is_long[i];
    if (number * 2 <= rows.count) return false;
    for (int64_t i = rows.first; i < rows.first + rows.count; ++i) flat[i] = true;
    return true;
  }
  ADASPLASH2_INLINE Candidates<T> candidates(int64_t i) const {
    const int64_t at = i * ws.list_stride;
    return {ws.list_values + at, ws.list_keys + at, count[i]};
  }
  ADASPLASH2_INLINE bool any_allowed(Part rows, KeyRange keys) const {
    return scores.any_allowed(task.row_begin + rows.first, rows.count, keys);
  }
  ADASPLASH2_INLINE Tile<T> dots(Part rows, int64_t panel) const {
    return dot_tile(packed_query(rows), task.packed_keys + panel * kKeys * problem.head_dim,
                    problem.head_dim);
  }

  ADASPLASH2_INLINE void prepare() {
    for (int64_t t = 0; t < row_tiles(); ++t)
      pack_transposed<S, T>(task.query, row_tile(t), kTileRows, problem.head_dim,
                            ws.query + t * kTileRows * problem.head_dim);
    const double share = share_of_list(problem);
    for (int64_t i = 0; i < task.rows; ++i) {
      lo[i] = -kInfinity<T>;
      count[i] = 0;
      trigger[i] = kFirstTrigger;
      const int64_t seen = scores.visible(task.row_begin + i).size();
      const int64_t part = int64_t(share * double(seen));
      longest[i] = part < kShortList ? kShortList : part < kLongList ? part : kLongList;
      flat[i] = seen <= kShortRow;
      is_long[i] = false;
      if (scores.has_sink()) {
        Candidates<T> list = candidates(i);
        add_sink(list, scores.sink_value());
        count[i] = list.count;
      }
    }
    if (!task.results.tiles) return;
    const KeyRange keys = seen_by_any(scores, task.row_begin, task.rows);
    const KeyRange tiles = keys.in_units_of(kBlockRows);
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile)
      if (any_allowed({0, task.rows}, {tile * kBlockRows, (tile + 1) * kBlockRows}))
        task.results.tiles[tile] = kEmptyTile;
  }

  // --- scan: what may be in the support -----------------------------------------------------

  ADASPLASH2_INLINE void scan() {
    const int64_t together = task.scan_rows < kTileRows ? 1 : task.scan_rows / kTileRows;
    for (int64_t t = 0; t < row_tiles(); t += together)
      scan(t, t + together < row_tiles() ? t + together : row_tiles());
  }

  // The one dense pass of some row tiles, last keys first: where rows see the keys before them,
  // the nearest fill the lists with likely large scores, and the bound is sharp before the far
  // keys come.
  ADASPLASH2_INLINE void scan(int64_t tile_begin, int64_t tile_end) {
    const Part first = row_tile(tile_begin), last = row_tile(tile_end - 1);
    const Part together = {first.first, last.first + last.count - first.first};
    const KeyRange panels = needed_by_any(together).in_units_of(kKeys);
    KeyRange needed[kRowTiles], whole[kRowTiles];  // whole: keys whose scores are scaled alone
    for (int64_t t = tile_begin; t < tile_end; ++t) {
      const Part rows = row_tile(t);
      needed[t] = needed_by_any(rows);
      whole[t] = scores.is_scaled && rows.count == kTileRows ? seen_by_all(rows) : KeyRange{0, 0};
    }
    for (int64_t panel = panels.end - 1; panel >= panels.begin; --panel) {
      const KeyRange keys = {panel * kKeys, (panel + 1) * kKeys};
      for (int64_t t = tile_begin; t < tile_end; ++t) {
        const Part rows = row_tile(t);
        if (!keys.overlaps(needed[t]) || is_flat(rows)) continue;
        if (!any_allowed(rows, keys)) continue;
        scores.prefetch(task.row_begin + rows.first, rows.count, keys.begin - kKeys, kKeys);
        const Tile<T> tile = dots(rows, panel);
        ++work.tiles;
        if (whole[t].contains(keys)) {
          collect<true>(tile, rows, keys.begin);
        } else {
          Tile<T> values = tile;  // in memory, while `tile` is in registers
          scores.to_values(values, task.row_begin + rows.first, rows.count, keys.begin);
          collect<false>(values, rows, keys.begin);
        }
      }
    }
  }

  // Appends what lies above each row's bound. Whole: the tile holds q . k, and all rows see all
  // keys; else it holds the values of rows.count rows.
  template <bool Whole>
  ADASPLASH2_INLINE void collect(const Tile<T>& tile, Part rows, int64_t key) {
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      if (!Whole && r >= rows.count) continue;
      const int64_t i = rows.first + r;
      Vec<T> x[kTileVectors];
      unsigned above[kTileVectors], any = 0;
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        x[v] = Whole ? scores.values(tile.rows[r][v]) : tile.rows[r][v];
        above[v] = not_below(x[v], broadcast(lo[i]));
        any |= above[v];
      }
      if (any && !flat[i]) append(i, x, above, key);
    }
  }

  ADASPLASH2_INLINE void append(int64_t i, const Vec<T>* x, const unsigned* above, int64_t key) {
    const Candidates<T> list = candidates(i);
    int64_t n = list.count;
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v)
      n += compress<T>(x[v], iota<T>() + int32_t(key + v * kLanes<T>), above[v], list.values + n,
                       list.keys + n);
    work.appended += n - list.count;
    count[i] = n;
    if (n >= trigger[i]) tighten_row(i, key);
  }

  // The keys from `key` on have been scanned.
  __attribute__((noinline)) void tighten_row(int64_t i, int64_t key) {
    const RaisedBound<T> row = raise_bound<K, T>(candidates(i), lo[i], power);
    ++work.tightenings;
    count[i] = row.count;
    // A poisoned row is flat too: its NaN has to reach every gradient it touches.
    const KeyRange seen = scores.visible(task.row_begin + i);
    const int64_t scanned = seen.end - key;
    is_long[i] = scanned * kShareOfScan >= seen.size() &&
                 foretold(row.count, scanned, seen.size()) > double(longest[i]);
    flat[i] = row.state == RowState::kPoisoned || row.count > kFullList;
    if (flat[i]) return;
    lo[i] = row.lo;
    const int64_t next = row.count * kRegrowth + kFirstTrigger / 2;
    trigger[i] = next < kListCapacity ? next : kListCapacity;
  }

  // --- solve: candidates become probabilities -----------------------------------------------

  ADASPLASH2_INLINE void solve() {
    for (int64_t i = 0; i < task.rows; ++i)
      if (!flat[i]) solve_row(i);
  }

  ADASPLASH2_INLINE void solve_row(int64_t i) {
    const SolvedList<T> row = solve_list<K, T>(candidates(i), power);
    flat[i] = row.state == RowState::kPoisoned;
    if (flat[i]) return;
    count[i] = row.support;
    if (scores.has_sink()) {
      Candidates<T> list = candidates(i);
      drop_sink(list);
      count[i] = list.count;
    }
    work.solved += row.examined;
    store_results(i, row.state, row.threshold, int32_t(count[i]), row.steps);
  }

  ADASPLASH2_INLINE void store_results(int64_t i, RowState state, const Threshold<T>& threshold,
                                       int32_t support, int32_t steps) {
    work.steps += steps;
    work.flat_rows += flat[i];
    task.results.thresholds[i] = threshold;
    task.results.tau[i] = state == RowState::kEmpty ? kInfinity<T> : tau_of<K>(threshold, alpha);
    task.results.support[i] = support;
    if (task.results.iterations) task.results.iterations[i] = steps;
  }

  // --- gather: probabilities and values become the output -----------------------------------

  ADASPLASH2_INLINE void gather() {
    int64_t entries = 0;
    for (int64_t i = 0; i < task.rows; ++i) entries += flat[i] ? 0 : count[i];
    const int64_t keys = needed_by_any({0, task.rows}).size();
    const int64_t bytes = keys * problem.head_dim_v * int64_t(sizeof(S));
    const int64_t turns = gather_turns(task.rows, entries, keys, bytes);
    for (int64_t turn = 0; turn < turns; ++turn)
      for (int64_t i = 0; i < task.rows; ++i)
        if (!flat[i]) gather_row(i, turn, turns);
  }

  ADASPLASH2_INLINE void gather_row(int64_t i, int64_t turn, int64_t turns) {
    Candidates<T> list = candidates(i);
    const Part part = part_at(turn, turns, list.count);
    list = {list.values + part.first, list.keys + part.first, part.count};
    const Candidates<T> kept = kept_of(i, list);
    T* out = ws.out + (turns > 1 ? i * problem.head_dim_v : 0);
    gather_rows<S>(ListEntries<T>{kept.values, kept.keys}, kept.count, task.value,
                   problem.head_dim_v, turn > 0, out);
    if (turn == turns - 1) write_out(i, out);
    if (task.results.tiles)
      for (int64_t j = 0; j < list.count; ++j) mark_live(list.keys[j]);
  }

  ADASPLASH2_INLINE Candidates<T> kept_of(int64_t i, Candidates<T> list) const {
    const Dropout<T> dropout(scores.score);
    if (IsPlain || !dropout.is_on()) return list;
    return after_dropout(dropout, task.row_begin + i, list, {ws.kept_values, ws.kept_keys, 0});
  }

  ADASPLASH2_INLINE void write_out(int64_t i, const T* row) {
    store_storage(row_of<S>(task.out, i), row, problem.head_dim_v);
  }
  ADASPLASH2_INLINE void mark_live(int64_t key) {
    task.results.tiles[key / kBlockRows] = kLiveTile;
  }

  // --- rows without a list -------------------------------------------------------------------

  // The same phases for some rows, of which some are flat: all their scores at once, linear in the
  // length however many keys they keep. Those that keep few after all have lists from here on.
  __attribute__((noinline)) void run_flat(Part rows) {
    const KeyRange keys = needed_by_any(rows), panels = keys.in_units_of(kKeys);
    const KeyRange stored = {panels.begin * kKeys, panels.end * kKeys};
    scan_flat(rows, panels);
    T norms[kBlockRows];
    for (int64_t r = 0; r < rows.count; r += kTileRows)
      solve_flat(tile_of(rows, r), ws.scores + r * ws.score_stride, stored, norms + r);
    if (any_flat(rows)) gather_flat(rows, {stored.begin, keys.end - stored.begin}, norms);
  }

  ADASPLASH2_INLINE static void clear(T* x, int64_t n) {
    for (int64_t j = 0; j < n; j += kLanes<T>) store(x + j, Vec<T>{});
  }

  // Values of the keys that the rows of each tile need.
  __attribute__((noinline)) void scan_flat(Part rows, KeyRange panels) {
    KeyRange needed[kRowTiles], whole[kRowTiles];
    for (int64_t r = 0; r < rows.count; r += kTileRows) {
      const Part tile = tile_of(rows, r);
      needed[r / kTileRows] = any_flat(tile) ? needed_by_any(tile) : KeyRange{0, 0};
      whole[r / kTileRows] = scores.is_scaled ? seen_by_all(tile) : KeyRange{0, 0};
    }
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const KeyRange keys = {panel * kKeys, (panel + 1) * kKeys};
      for (int64_t r = 0; r < rows.count; r += kTileRows) {
        const Part tile = tile_of(rows, r);
        if (!keys.overlaps(needed[r / kTileRows])) continue;
        const bool any = any_allowed(tile, keys);
        Tile<T> values = any ? dots(tile, panel) : Tile<T>{};
        work.tiles += any;
        if (whole[r / kTileRows].contains(keys))
          for (auto& row : values.rows)
            for (Vec<T>& some : row) some = scores.values(some);
        else
          scores.to_values(values, task.row_begin + tile.first, tile.count, keys.begin);
        store_tile(values, ws.scores + r * ws.score_stride + (panel - panels.begin) * kKeys,
                   ws.score_stride);
      }
    }
  }

  // A tile's values of the keys in `stored`, the rows of `x` -> probabilities and what those are to
  // be multiplied by; zeros where a row has a list, and where the tile needs no key.
  __attribute__((noinline)) void solve_flat(Part tile, T* x, KeyRange stored, T* norms) {
    const KeyRange panels = needed_by_any(tile).in_units_of(kKeys);
    const KeyRange own = {panels.begin * kKeys, panels.end * kKeys};
    DenseRow<T> solved[kTileRows];
    int64_t kept = 0, kept_of_lists = 0;
    for (int64_t r = 0; r < tile.count; ++r, x += ws.score_stride) {
      const int64_t i = tile.first + r;
      if (!flat[i]) continue;
      T* row = x + (own.begin - stored.begin);
      solved[r] = solve_flat_row(i, row, own);
      clear(x, own.begin - stored.begin);
      clear(row + own.size(), stored.end - own.end);
      kept += solved[r].support;
      kept_of_lists += longest[i];
    }
    x -= tile.count * ws.score_stride;
    for (int64_t r = 0; r < kTileRows; ++r, x += ws.score_stride) {
      const int64_t i = tile.first + r;
      norms[r] = T(0);
      if (r < tile.count && flat[i]) {
        const DenseRow<T>& row = solved[r];
        norms[r] = row.norm;
        // The forward's dense work is done: what lists would spare is the backward's.
        const bool keeps_many = row.support > kLongList || kept * 4 > kept_of_lists * 3;
        flat[i] =
            row.state == RowState::kPoisoned || (row.state == RowState::kSolved && keeps_many);
        store_results(i, row.state, row.threshold,
                      int32_t(flat[i] ? -1 - row.support : row.support), row.steps);
        T* p = x + (own.begin - stored.begin);
        if (flat[i]) {
          finish_flat_row(i, p, own, row.state);
          continue;
        }
        make_list(i, p, own, row.norm);
      }
      clear(x, stored.size());
    }
  }

  // Values of `keys` -> probabilities; the support is that of keys. Those that the row does not see
  // are left out: a threshold is found in fewer passes where no value is infinite.
  ADASPLASH2_INLINE DenseRow<T> solve_flat_row(int64_t i, T* x, KeyRange keys) {
    const KeyRange seen = scores.visible(task.row_begin + i).intersection(keys);
    const int64_t n = seen.size(), before = n > 0 ? seen.begin - keys.begin : 0;
    T* const first = x + before;
    if (scores.has_sink()) first[n] = scores.sink_value();
    DenseRow<T> row = solve_dense<K, T>(first, n + scores.has_sink(), ws.candidates, power);
    row.support -= scores.has_sink() && first[n] > T(0);
    __builtin_memset(x, 0, size_t(before) * sizeof(T));
    __builtin_memset(first + n, 0, size_t(keys.size() - before - n) * sizeof(T));
    return row;
  }

  ADASPLASH2_INLINE void finish_flat_row(int64_t i, T* p, KeyRange keys, RowState state) {
    if (state != RowState::kPoisoned && task.results.tiles)
      for (int64_t j = 0; j < keys.size(); ++j)
        if (p[j] > T(0)) mark_live(keys.begin + j);
    if (!IsPlain) apply_dropout(i, keys, p);
  }

  ADASPLASH2_INLINE void make_list(int64_t i, const T* p, KeyRange stored, T norm) {
    Candidates<T> list = candidates(i);
    list.count = 0;
    for (int64_t j = 0; j < stored.size(); j += kLanes<T>) {
      const Vec<T> some = load(p + j);
      const unsigned kept = not_below(some, Vec<T>{});
      if (kept)
        list.count += compress<T>(some * norm, scores.keys_from(stored.begin + j), kept,
                                  list.values + list.count, list.keys + list.count);
    }
    count[i] = list.count;
  }

  ADASPLASH2_INLINE void apply_dropout(int64_t i, KeyRange stored, T* p) const {
    const Dropout<T> dropout(scores.score);
    if (!dropout.is_on()) return;
    for (int64_t j = 0; j < stored.size(); j += kLanes<T>)
      store(p + j,
            dropout.weights(load(p + j), task.row_begin + i, scores.keys_from(stored.begin + j)));
  }

  ADASPLASH2_INLINE void gather_flat(Part rows, Part keys, const T* norms) {
    weighted_sums<S>(ws.scores, ws.score_stride, round_up(rows.count, kTileRows), task.value, keys,
                     problem.head_dim_v, ws.out);
    for (int64_t r = 0; r < rows.count; ++r) {
      T* out = ws.out + r * problem.head_dim_v;
      for (int64_t k = 0; k < problem.head_dim_v; ++k) out[k] *= norms[r];
      if (flat[rows.first + r]) write_out(rows.first + r, out);
    }
  }
};

template <class S>
static void forward(ForwardTask<ComputeOf<S>>& task) {
  with_scores(*task.problem, task.head, [&](auto kind, auto plain) {
    ForwardBlock<S, decltype(kind)::value, decltype(plain)::value> block(task);
    block.run();
    task.list_values = block.ws.list_values;
    task.list_keys = block.ws.list_keys;
    task.list_stride = block.ws.list_stride;
    task.work = block.work;
  });
}

}  // namespace adasplash2::ADASPLASH2_ISA
