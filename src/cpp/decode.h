// Few query rows against many keys, without gradients. The rows of all query heads that share keys
// are read together, and keys where they lie: each is read once and nothing is packed. Keys are cut
// into parts, and each part is scanned alone for what may be in the support. Then every row is
// solved once, on what its parts have left: the threshold of some of a row's scores is at most that
// of all, so that what a part drops cannot be in the row's support.
#pragma once

#include "forward.h"

namespace adasplash2::ADASPLASH2_ISA {

// Keys whose products with all rows of a task are made at once.
constexpr int64_t kChunkKeys = 64;
// A key is prefetched when the key so many before it is read; when the one kProducts before it is,
// where so many keys of all heads that are read together would be more than kBytesAhead.
constexpr int64_t kKeysAhead = 64, kBytesAhead = int64_t(128) << 10;
constexpr int64_t kShortRowBytes = 128;

// Products of rows and keys that are summed at once, a vector along the depth each.
constexpr int kProducts = kVectorRegisters == 32 ? 16 : 8;
constexpr int64_t kRowsTogether = 4;
static_assert(kChunkKeys % kProducts == 0);

template <int... I>
struct Indices {};
template <int N, int... I>
struct IndicesBelow : IndicesBelow<N - 1, N - 1, I...> {};
template <int... I>
struct IndicesBelow<0, I...> {
  using type = Indices<I...>;
};

// Of the blocks of B lanes of a and, behind them, of b: each even one plus the one behind it.
template <int B, class V, int... I>
ADASPLASH2_INLINE V add_neighbours(V a, V b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (I / B * 2 * B + I % B)...) +
         __builtin_shufflevector(a, b, (I / B * 2 * B + I % B + B)...);
}

// The sums over the lanes of N vectors, as many as they have lanes.
template <class T, int N = kLanes<T>>
ADASPLASH2_INLINE Vec<T> sums_of(const Vec<T>* v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    using All = typename IndicesBelow<kLanes<T>>::type;
    Vec<T> halves[N / 2];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i)
      halves[i] = add_neighbours<N / 2>(v[2 * i], v[2 * i + 1], All{});
    return sums_of<T, N / 2>(halves);
  }
}

// Of a row's last numbers, fewer than a vector has: those, and zeros. `depth` is the whole row's.
template <class S>
ADASPLASH2_INLINE auto load_tail(const S* row, int64_t depth, int64_t at) {
  using T = ComputeOf<S>;
  constexpr int L = kLanes<T>;
  if (depth < L) return load_partial(row, int(depth));
  const Ints<T> lane = __builtin_convertvector(iota<T>(), Ints<T>);
  const Vec<T> last = load_compute(row + depth - L);
  return lane >= Ints<T>{} + int(L - (depth - at)) ? last : Vec<T>{};
}
// Where load_tail has the number `k` of a row.
template <class T>
ADASPLASH2_INLINE int64_t place_in_tail(int64_t k, int64_t depth) {
  return depth < kLanes<T> ? k : k - (depth - kLanes<T>);
}

// R rows of `query`, `stride` apart, by kProducts / R keys: dots[r * kChunkKeys + key]. Few keys at
// a time: those are read from one end to the other. `offset` is added to
// each key's address.
template <int R, class S, class T>
ADASPLASH2_INLINE void dot_rows(const T* query, int64_t stride, const void* const* keys,
                                int64_t offset, int64_t depth, T* dots) {
  constexpr int L = kLanes<T>, C = kProducts / R, B = C < kRowsTogether ? C : kRowsTogether;
  Vec<T> products[C][R];
#pragma GCC unroll 16
  for (int first = 0; first < C; first += B) {
    Vec<T> some[B][R] = {};
    const auto add = [&](int64_t at, auto load_key) {
      Vec<T> k[B];
#pragma GCC unroll 4
      for (int c = 0; c < B; ++c) k[c] = load_key(static_cast<const S*>(keys[first + c]) + offset);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<T> q = load(query + r * stride + at);
#pragma GCC unroll 4
        for (int c = 0; c < B; ++c) some[c][r] += q * k[c];
      }
    };
    int64_t at = 0;
    for (; at + L <= depth; at += L) add(at, [&](const S* key) { return load_compute(key + at); });
    if (at < depth) add(at, [&](const S* key) { return load_tail(key, depth, at); });
#pragma GCC unroll 4
    for (int c = 0; c < B; ++c)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) products[first + c][r] = some[c][r];
  }
  T sums[kProducts];
  Vec<T> in_order[kProducts];
#pragma GCC unroll 16
  for (int i = 0; i < kProducts; ++i) in_order[i] = products[i % C][i / C];
#pragma GCC unroll 8
  for (int i = 0; i < kProducts; i += L) store(sums + i, sums_of<T>(in_order + i));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) __builtin_memcpy(dots + r * kChunkKeys, sums + r * C, C * sizeof(T));
}

// A query head with rows in a task: those are `rows` of the task, from `row_begin` of the head on.
template <class T>
struct DecodedHead {
  int64_t number;  // among the query heads of all batches
  Part rows;
  int64_t row_begin;
  HeadScore score;
  KeyRange seen_by_any, seen_by_all;  // see score.h
  Power<T> power;
};

// A key head of a task: the query heads and the rows of the task that read it.
struct DecodedKeys {
  Part heads, rows;
  int64_t offset;   // elements from the task's first key head
  bool is_skipped;  // of a chunk: no row sees a key
};

template <class T>
constexpr int kChunkVectors = int(kChunkKeys) / kLanes<T>;
template <class T>
using ChunkRow = Vec<T>[kChunkVectors<T>];

template <class T>
struct DecodeWorkspace {
  T *query, *list_values;
  ChunkRow<T>* chunk;  // q . k, then values, of each row
  int32_t* list_keys;
  DecodedHead<T>* heads;
  DecodedKeys* key_heads;
  const void** chunk_keys;
  int64_t depth, list_stride, bytes;

  // For `rows` query rows and `keys` keys at most.
  ADASPLASH2_INLINE DecodeWorkspace(const AttentionProblem& p, int64_t rows, int64_t keys,
                                    void* base) {
    Allocator memory{static_cast<char*>(base)};
    depth = round_up(p.head_dim, kLanes<T>);
    // Whatever a chunk may add, and a vector; two more keep it off powers of two, see
    // list_stride_of.
    list_stride = round_up(keys, kChunkKeys) + kChunkKeys + 3 * kLanes<T>;
    query = memory.take<T>((rows + 1) * depth);  // see multiply
    chunk = memory.take<ChunkRow<T>>(rows + 1);
    heads = memory.take<DecodedHead<T>>(rows);
    key_heads = memory.take<DecodedKeys>(rows);
    chunk_keys = memory.take<const void*>(kChunkKeys + kKeysAhead);
    list_values = memory.take<T>(rows * list_stride);
    list_keys = memory.take<int32_t>(rows * list_stride);
    bytes = memory.used;
  }
};

// The scan of one part.
template <class S>
struct DecodeScan {
  using T = ComputeOf<S>;
  struct Chunk {
    ChunkRow<T>* rows;
  };

  DecodeScanTask<T>& task;
  const AttentionProblem& problem;
  const DecodeWorkspace<T> ws;
  int64_t heads = 0, key_heads = 0, keys_ahead = kKeysAhead;
  T lo[kBlockRows];
  int64_t trigger[kBlockRows];

  ADASPLASH2_INLINE explicit DecodeScan(DecodeScanTask<T>& t)
      : task(t), problem(*t.problem), ws(problem, t.rows.count, t.keys.size(), t.workspace) {}

  ADASPLASH2_INLINE void run() {
    find_heads();
    copy_query();
    for (int64_t i = 0; i < task.rows.count; ++i) {
      task.counts[i] = 0;
      lo[i] = -kInfinity<T>;
      trigger[i] = kFirstTrigger;
    }
    task.list_values = ws.list_values;
    task.list_keys = ws.list_keys;
    task.list_stride = ws.list_stride;
    for (int64_t first = task.keys.begin; first < task.keys.end; first += kChunkKeys)
      scan({first, first + kChunkKeys});
  }

  ADASPLASH2_INLINE void find_heads() {
    for (int64_t i = 0; i < task.rows.count; ++heads) {
      const int64_t row = task.rows.first + i;
      const QueryRow first = problem.query_of(task.head_kv, row);
      const int64_t left = problem.length_q - first.row, room = task.rows.count - i;
      DecodedHead<T>& head = ws.heads[heads];
      head.number = first.head_q;
      head.rows = {i, left < room ? left : room};
      head.row_begin = first.row;
      head.score = problem.score_of(head.number);
      head.seen_by_any = seen_by_any(head.score, first.row, head.rows.count);
      head.seen_by_all = seen_by_all(head.score, first.row, head.rows.count);
      head.power = power_of<T>(problem.alpha_of(head.number));
      const int64_t key_head = row / problem.group_rows();
      if (key_head == key_heads)
        ws.key_heads[key_heads++] = {{heads, 0}, {i, 0}, key_head * task.key_stride_head, false};
      DecodedKeys& keys = ws.key_heads[key_head];
      keys.heads.count += 1;
      keys.rows.count += head.rows.count;
      i += head.rows.count;
    }
    const int64_t row_bytes = problem.head_dim * int64_t(sizeof(S));
    if (key_heads * row_bytes * kKeysAhead > kBytesAhead) keys_ahead = kProducts;
  }

  // [row][depth], as dot_rows reads it, and a row of zeros.
  ADASPLASH2_INLINE void copy_query() {
    const int64_t depth = problem.head_dim, whole = depth / kLanes<T> * kLanes<T>;
    for (int64_t i = 0; i < (task.rows.count + 1) * ws.depth; ++i) ws.query[i] = T(0);
    for (int64_t h = 0; h < heads; ++h) {
      const DecodedHead<T>& head = ws.heads[h];
      const HeadRef query = problem.query_head(task.query, head.number);
      for (int64_t i = 0; i < head.rows.count; ++i) {
        const S* from = row_of<const S>(query, head.row_begin + i);
        T* to = ws.query + (head.rows.first + i) * ws.depth;
        for (int64_t k = 0; k < whole; ++k) to[k] = to_compute(from[k]);
        for (int64_t k = whole; k < depth; ++k)
          to[whole + place_in_tail<T>(k, depth)] = to_compute(from[k]);
      }
    }
  }

  ADASPLASH2_INLINE bool any_allowed(Part of, KeyRange keys) const {
    for (int64_t h = of.first; h < of.first + of.count; ++h)
      if (any_allowed(ws.heads[h], keys)) return true;
    return false;
  }
  ADASPLASH2_INLINE bool any_allowed(const DecodedHead<T>& head, KeyRange keys) const {
    if (!keys.overlaps(head.seen_by_any)) return false;
    if (!head.score.is_masked()) return true;
    // Any kind: which keys are seen does not depend on it.
    const Scores<AlphaKind::k15, T, false> scores(head.score, problem.alpha_of(head.number));
    return scores.any_allowed(head.row_begin, head.rows.count, keys);
  }

  ADASPLASH2_INLINE void scan(KeyRange keys) {
    bool is_skipped = true;
    for (int64_t k = 0; k < key_heads; ++k) {
      ws.key_heads[k].is_skipped = !any_allowed(ws.key_heads[k].heads, keys);
      is_skipped &= ws.key_heads[k].is_skipped;
    }
    if (is_skipped) return;
    multiply(keys);
    for (int64_t k = 0; k < key_heads; ++k) {
      if (ws.key_heads[k].is_skipped) continue;
      const Part of = ws.key_heads[k].heads;
      for (int64_t h = of.first; h < of.first + of.count; ++h)
        with_scores(problem, ws.heads[h].number, [&](auto kind, auto plain) {
          collect<decltype(kind)::value, decltype(plain)::value>(ws.heads[h], keys);
        });
    }
  }

  // The products of all rows with the keys of a chunk: a few keys of all key heads, then the next.
  // Where heads of a key lie side by side, memory is read from one end to the other so, and each
  // of its pages once.
  ADASPLASH2_INLINE void multiply(KeyRange keys) {
    find_rows(keys.begin);
    for (int64_t j = 0; j < kChunkKeys; j += kProducts)
      for (int64_t k = 0; k < key_heads; ++k)
        if (!ws.key_heads[k].is_skipped) multiply(ws.key_heads[k], j);
  }
  // Where the keys from `begin` on lie, of the first key head. A page is looked up once.
  ADASPLASH2_INLINE void find_rows(int64_t begin) {
    const KeyRange readable = task.readable;
    int64_t j = 0;
    while (j < kChunkKeys + kKeysAhead) {
      // Nobody sees a key outside of `readable`: another is read in its place.
      const int64_t key = begin + j < readable.begin ? readable.begin
                          : begin + j < readable.end ? begin + j
                                                     : readable.end - 1;
      int64_t run = 1;
      if (key == begin + j) {
        run = run_from(task.key, key);
        if (run > readable.end - key) run = readable.end - key;
        if (run > kChunkKeys + kKeysAhead - j) run = kChunkKeys + kKeysAhead - j;
      }
      const S* row = row_of<const S>(task.key, key);
      for (const int64_t end = j + run; j < end; ++j, row += task.key.rows.stride)
        ws.chunk_keys[j] = row;
    }
  }
  // Of the kProducts keys from number `j` of the chunk on.
  ADASPLASH2_INLINE void multiply(const DecodedKeys& of, int64_t j) {
    if (is_asked_ahead(of)) prefetch(of, j + keys_ahead);
    task.work.tiles += j == 0 ? parts(of.rows.count, kRowsTogether) : 0;
    int64_t i = of.rows.first;
    const int64_t end = i + of.rows.count;
    // Three rows as four: the fourth is the one of zeros, or the next key head's first, which is
    // made again after this with the keys of its own.
    for (; i + 2 < end; i += 4) multiply<4>(i, of.offset, j);
    if (i + 1 < end) return multiply<2>(i, of.offset, j);
    if (i < end) multiply<1>(i, of.offset, j);
  }
  template <int R>
  ADASPLASH2_INLINE void multiply(int64_t i, int64_t offset, int64_t j) {
    constexpr int C = kProducts / R;
    for (int64_t c = j; c < j + kProducts; c += C)
      dot_rows<R, S>(ws.query + i * ws.depth, ws.depth, ws.chunk_keys + c, offset, problem.head_dim,
                     reinterpret_cast<T*>(ws.chunk[i]) + c);
  }
  // Not where it takes longer than it saves: short rows one behind another, that the processor
  // finds by itself while several query rows keep it busy.
  ADASPLASH2_INLINE bool is_asked_ahead(const DecodedKeys& of) const {
    const bool is_dense = !task.key.table.data && task.key.rows.stride == problem.head_dim;
    const bool is_short = problem.head_dim * int64_t(sizeof(S)) <= kShortRowBytes;
    return !(is_dense && is_short && of.rows.count > 1 && of.rows.count <= kRowsTogether);
  }
  // Into the second cache: the first is small, and rows as far apart as a power of two share few
  // places of it. The processor alone does not look beyond a page of memory, of which the keys of
  // some heads fill several.
  ADASPLASH2_INLINE void prefetch(const DecodedKeys& of, int64_t j) const {
    for (int64_t c = j; c < j + kProducts; ++c) {
      const S* row = static_cast<const S*>(ws.chunk_keys[c]) + of.offset;
      for (int64_t at = 0; at < problem.head_dim; at += 64 / int64_t(sizeof(S)))
        __builtin_prefetch(row + at, 0, 2);
    }
  }

  // Appends what lies above each row's bound.
  template <AlphaKind K, bool IsPlain>
  __attribute__((noinline)) void collect(const DecodedHead<T>& head, KeyRange keys) {
    const Scores<K, T, IsPlain> scores(head.score, problem.alpha_of(head.number));
    const int64_t row = head.row_begin, rows = head.rows.count;
    Chunk chunk = {ws.chunk + head.rows.first};
    const bool is_whole = scores.is_scaled && head.seen_by_all.contains(keys);
    if (!is_whole) {
      scores.to_values(chunk, row, rows, keys.begin);
      if (keys.end < task.keys.end) scores.prefetch(row, rows, keys.end, kChunkKeys);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = head.rows.first + r;
      if (task.counts[i] < 0) continue;
      if (is_whole)
        append(i, keys.begin, [&](Vec<T> dots) { return scores.values(dots); });
      else
        append(i, keys.begin, [](Vec<T> values) { return values; });
      if (task.counts[i] >= trigger[i]) tighten_row<K>(i, head.power);
    }
  }

  template <class F>
  ADASPLASH2_INLINE void append(int64_t i, int64_t first_key, F value_of) {
    T* const values = ws.list_values + i * ws.list_stride;
    int32_t* const list_keys = ws.list_keys + i * ws.list_stride;
    const Vec<T> bound = broadcast(lo[i]);
    int64_t n = task.counts[i];
    for (int v = 0; v < kChunkVectors<T>; ++v) {
      const Vec<T> x = value_of(ws.chunk[i][v]);
      const unsigned above = not_below(x, bound);
      if (above)
        n += compress<T>(x, iota<T>() + int32_t(first_key + v * kLanes<T>), above, values + n,
                         list_keys + n);
    }
    task.work.appended += n - task.counts[i];
    task.counts[i] = n;
  }

  template <AlphaKind K>
  __attribute__((noinline)) void tighten_row(int64_t i, const Power<T>& power) {
    const int64_t at = i * ws.list_stride;
    const RaisedBound<T> row =
        raise_bound<K, T>({ws.list_values + at, ws.list_keys + at, task.counts[i]}, lo[i], power);
    ++task.work.tightenings;
    task.counts[i] = row.state == RowState::kPoisoned ? kPoisonedPart : row.count;
    lo[i] = row.lo;
    trigger[i] = row.count * kRegrowth + kFirstTrigger / 2;
  }
};

template <class S>
static void decode_scan(DecodeScanTask<ComputeOf<S>>& task) {
  DecodeScan<S>(task).run();
}

template <class T>
struct DecodeRowWorkspace {
  T *values, *kept_values, *out;
  int32_t *keys, *kept_keys;
  int64_t bytes;

  // For a list of `entries` at most.
  ADASPLASH2_INLINE DecodeRowWorkspace(const AttentionProblem& p, int64_t entries, void* base) {
    Allocator memory{static_cast<char*>(base)};
    const int64_t room = entries + 1 + 2 * kLanes<T>;  // a sink, and slack
    values = memory.take<T>(room);
    keys = memory.take<int32_t>(room);
    kept_values = memory.take<T>(p.score.has_dropout() ? room : 0);
    kept_keys = memory.take<int32_t>(p.score.has_dropout() ? room : 0);
    out = memory.take<T>(p.head_dim_v);
    bytes = memory.used;
  }
};

// Solves one row, and gathers its output.
template <class S, AlphaKind K, bool IsPlain>
static void decode_row(DecodeRowTask<ComputeOf<S>>& task) {
  using T = ComputeOf<S>;
  const AttentionProblem& problem = *task.problem;
  const DecodeRowWorkspace<T> ws(problem, task.entries, task.workspace);
  const Alpha& alpha = problem.alpha_of(task.head);
  const Scores<K, T, IsPlain> scores(problem.score_of(task.head), alpha);
  Candidates<T> list = {ws.values, ws.keys, 0};
  if (scores.has_sink()) add_sink(list, scores.sink_value());
  bool is_poisoned = false;
  for (int64_t i = 0; i < task.parts; ++i) {
    const PartList<T>& part = task.lists[i];
    is_poisoned |= part.count == kPoisonedPart;
    if (part.count <= 0) continue;
    __builtin_memcpy(list.values + list.count, part.values, size_t(part.count) * sizeof(T));
    __builtin_memcpy(list.keys + list.count, part.keys, size_t(part.count) * sizeof(int32_t));
    list.count += part.count;
  }
  SolvedList<T> row = {RowState::kPoisoned, {kNan<T>, kNan<T>, kNan<T>}, 0, 0, 0};
  if (!is_poisoned) row = solve_list<K, T>(list, power_of<T>(alpha));
  S* const out = row_of<S>(task.out, task.row);
  if (row.state == RowState::kPoisoned) {
    // Nothing is seen through a sink alone.
    const T all = scores.visible(task.row).size() > 0 ? kNan<T> : T(0);
    for (int64_t k = 0; k < problem.head_dim_v; ++k) from_compute(all, out + k);
    *task.tau = kNan<T>;
    list.count = 0;
    ++task.work.flat_rows;
  } else {
    list.count = row.support;
    if (scores.has_sink()) drop_sink(list);
    *task.tau = row.state == RowState::kEmpty ? kInfinity<T> : tau_of<K>(row.threshold, alpha);
    const Dropout<T> dropout(scores.score);
    const Candidates<T> kept =
        dropout.is_on() ? after_dropout(dropout, task.row, list, {ws.kept_values, ws.kept_keys, 0})
                        : list;
    gather_rows<S>(ListEntries<T>{kept.values, kept.keys}, kept.count, task.value,
                   problem.head_dim_v, false, ws.out);
    store_storage(out, ws.out, problem.head_dim_v);
  }
  task.work.solved += row.examined;
  task.work.steps += row.steps;
  task.support = int32_t(list.count);
  task.steps = row.steps;
}

template <class S>
static void decode_row(DecodeRowTask<ComputeOf<S>>& task) {
  with_scores(*task.problem, task.head, [&](auto kind, auto plain) {
    decode_row<S, decltype(kind)::value, decltype(plain)::value>(task);
  });
}

}  // namespace adasplash2::ADASPLASH2_ISA
