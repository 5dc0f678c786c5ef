#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "decoding.h"
#include "isa.h"
#include "parallel.h"

namespace adasplash2 {
namespace {

// The rows of all heads of a key or value tensor as panels. Those that no query sees are left as
// they are: nobody reads them.
template <class T>
struct Panels {
  Buffer<T> data;
  int64_t head_stride = 0;

  Panels(const Kernels<T>& k, const AttentionProblem& p, const TensorRef& tensor, int64_t depth,
         int threads) {
    constexpr int64_t kChunk = 32;  // panels a task packs
    const int64_t panels = parts(p.length_k, k.panel_keys), chunks = parts(panels, kChunk);
    head_stride = panels * k.panel_keys * depth;
    data = Buffer<T>(p.key_heads() * head_stride);
    parallel_for(p.key_heads() * chunks, threads, [&](int64_t i, int) {
      const int64_t head = i / chunks;
      const Part some = part_of(panels, kChunk, i % chunks);
      const KeyRange seen = seen_by_any(p.score_of(head * p.gqa_group()), 0, p.length_q);
      const KeyRange packed =
          seen.in_units_of(k.panel_keys).intersection({some.first, some.first + some.count});
      k.pack_panels(p.key_head(tensor, head), p.length_k, depth, packed.begin, packed.end,
                    data.data() + head * head_stride);
    });
  }
  const T* head(int64_t head_kv) const { return data.data() + head_kv * head_stride; }
};

// One workspace a thread.
class Workspaces {
 public:
  Workspaces(int64_t bytes, int threads) {
    for (int t = 0; t < (threads < 1 ? 1 : threads); ++t) buffers_.emplace_back(bytes);
  }
  void* of(int thread) { return buffers_[size_t(thread)].data(); }

 private:
  std::vector<Buffer<char>> buffers_;
};

// HeadScore::reach_of of all row blocks, where some head has slopes that bound it; else none.
template <class T>
Buffer<KeyRange> reaches(const Kernels<T>& k, const AttentionProblem& p, const TensorRef& query,
                         const TensorRef& key, int threads) {
  bool any = false;
  for (int64_t head = 0; p.score.has_slopes() && head < p.query_heads(); ++head)
    any |= p.score_of(head).has_reach();
  if (!any) return {};
  Buffer<double> longest(p.key_heads());  // NaN where a key has one
  parallel_for(p.key_heads(), threads, [&](int64_t head, int) {
    const KeyRange seen = seen_by_any(p.score_of(head * p.gqa_group()), 0, p.length_q);
    std::vector<double> norms(size_t(seen.size() > 0 ? seen.size() : 0));
    k.norms(p.key_head(key, head).from(seen.begin, p.element_size()), int64_t(norms.size()),
            p.head_dim, norms.data());
    longest[head] = 0.0;
    for (const double norm : norms)
      if (!(norm <= longest[head])) longest[head] = longest[head] == longest[head] ? norm : NAN;
  });
  Buffer<KeyRange> reach(p.row_blocks());
  parallel_for(p.row_blocks(), threads, [&](int64_t number, int) {
    const RowBlock of = row_block(p, number);
    const HeadScore score = p.score_of(of.head_q);
    reach[number] = seen_by_any(score, of.row_begin, of.rows);
    if (!score.has_reach()) return;
    double norms[kBlockRows];
    k.norms(p.query_head(query, of.head_q).from(of.row_begin, p.element_size()), of.rows,
            p.head_dim, norms);
    KeyRange all = {p.length_k, 0};
    for (int64_t i = 0; i < of.rows; ++i) {
      const KeyRange one = score.reach_of(of.row_begin + i, norms[i] * longest[of.head_kv],
                                          1.0 / (p.alpha_of(of.head_q).value - 1.0));
      if (one.size() <= 0) continue;
      all = {std::min(all.begin, one.begin), std::max(all.end, one.end)};
    }
    reach[number] = all.size() > 0 ? all : KeyRange{0, 0};
  });
  return reach;
}

// What the backward needs, in one block of memory:
//   int64 offsets[rows + 1] | Threshold<T> thresholds[rows] | T probabilities[entries]
//   | int32 support[rows] | int32 keys[entries]
template <class T>
struct Saved {
  int64_t* offsets;
  Threshold<T>* thresholds;
  T* probabilities;
  int32_t *support, *keys;

  static int64_t bytes(int64_t rows, int64_t entries) {
    return (rows + 1) * 8 + (3 * rows + entries) * int64_t(sizeof(T)) + (rows + entries) * 4;
  }
  Saved(void* base, int64_t rows, int64_t entries) {
    offsets = static_cast<int64_t*>(base);
    thresholds = reinterpret_cast<Threshold<T>*>(offsets + rows + 1);
    probabilities = reinterpret_cast<T*>(thresholds + rows);
    support = reinterpret_cast<int32_t*>(probabilities + entries);
    keys = support + rows;
  }
};

// The lists of a row block, one behind another.
template <class T>
struct BlockLists {
  T* probabilities;
  int32_t* keys;
  int64_t entries;
};

// Room for those of the blocks that one thread works on, in pieces that stay where they are.
template <class T>
class ThreadLists {
 public:
  BlockLists<T> room(int64_t entries) {
    constexpr int64_t kFirst = int64_t(1) << 12, kMost = int64_t(1) << 23;
    if (pieces_.empty() || used_ + entries > pieces_.back().keys.size()) {
      const int64_t next = pieces_.empty() ? kFirst : 2 * pieces_.back().keys.size();
      const int64_t size = std::max(std::min(next, kMost), entries);
      pieces_.push_back({Buffer<T>(size), Buffer<int32_t>(size)});
      used_ = 0;
    }
    Piece& piece = pieces_.back();
    const int64_t at = used_;
    used_ += entries;
    return {piece.probabilities.data() + at, piece.keys.data() + at, entries};
  }

 private:
  struct Piece {
    Buffer<T> probabilities;
    Buffer<int32_t> keys;
  };
  std::vector<Piece> pieces_;
  int64_t used_ = 0;  // of the last piece
};

template <class T>
class KeptLists final : public Kept {
 public:
  explicit KeptLists(const AttentionProblem& problem, int threads)
      : rows(problem.rows()),
        thresholds(rows),
        support(rows),
        blocks(problem.row_blocks()),
        lists_(size_t(threads < 1 ? 1 : threads)),
        problem_(problem),
        threads_(threads) {}

  // The lists that a block's forward has left in its workspace.
  void add(const RowBlock& of, int thread, const ForwardTask<T>& task) {
    int64_t entries = 0;
    const auto each = [&](auto f) {
      for (int64_t r = 0; r < task.rows; ++r)
        if (task.results.support[r] > 0) f(r * task.list_stride, task.results.support[r]);
    };
    each([&](int64_t, int32_t n) { entries += n; });
    BlockLists<T> at = blocks[of.number] = lists_[size_t(thread)].room(entries);
    each([&](int64_t row, int32_t n) {
      std::memcpy(at.probabilities, task.list_values + row, size_t(n) * sizeof(T));
      std::memcpy(at.keys, task.list_keys + row, size_t(n) * sizeof(int32_t));
      at.probabilities += n;
      at.keys += n;
    });
  }

  int64_t bytes() const override {
    int64_t entries = 0;
    for (int64_t b = 0; b < blocks.size(); ++b) entries += blocks[b].entries;
    return Saved<T>::bytes(rows, entries);
  }

  void save(void* to) override {
    Buffer<int64_t> begins(blocks.size());
    int64_t before = 0;
    for (int64_t b = 0; b < blocks.size(); ++b) {
      begins[b] = before;
      before += blocks[b].entries;
    }
    use_huge_pages(to, size_t(Saved<T>::bytes(rows, before)));
    Saved<T> saved(to, rows, before);
    saved.offsets[rows] = before;
    parallel_for(blocks.size(), threads_, [&](int64_t b, int) {
      const BlockLists<T>& lists = blocks[b];
      const size_t n = size_t(lists.entries);
      if (n > 0) {
        std::memcpy(saved.probabilities + begins[b], lists.probabilities, n * sizeof(T));
        std::memcpy(saved.keys + begins[b], lists.keys, n * sizeof(int32_t));
      }
      const RowBlock of = row_block(problem_, b);
      int64_t offset = begins[b];
      for (int64_t i = of.first_row; i < of.first_row + of.rows; ++i) {
        saved.offsets[i] = offset;
        saved.thresholds[i] = thresholds[i];
        saved.support[i] = support[i];
        offset += support[i] > 0 ? support[i] : 0;
      }
    });
  }

  int64_t rows;
  Buffer<Threshold<T>> thresholds;
  Buffer<int32_t> support;
  Buffer<BlockLists<T>> blocks;

 private:
  std::vector<ThreadLists<T>> lists_;
  AttentionProblem problem_;
  int threads_;
};

template <class T>
ForwardTask<T> forward_task(const ForwardArguments& a, const AttentionProblem& p,
                            const RowBlock& of, const Panels<T>& packed_keys, KeptLists<T>& kept) {
  const int64_t element = p.element_size(), row = of.first_row;
  ForwardTask<T> task = {};
  task.problem = &p;
  task.query = p.query_head(a.query, of.head_q).from(of.row_begin, element);
  task.value = p.key_head(a.value, of.head_kv);
  task.out = p.query_head(a.out, of.head_q).from(of.row_begin, element);
  task.packed_keys = packed_keys.head(of.head_kv);
  task.head = of.head_q;
  task.row_begin = of.row_begin;
  task.rows = of.rows;
  task.scan_rows = a.scan_rows;
  task.results.thresholds = kept.thresholds.data() + row;
  task.results.tau = static_cast<T*>(a.tau) + row;
  task.results.support = kept.support.data() + row;
  task.results.iterations = a.iterations ? a.iterations + row : nullptr;
  task.results.tiles = a.tiles ? a.tiles + of.number * parts(p.length_k, kBlockRows) : nullptr;
  return task;
}

template <class T>
std::unique_ptr<Kept> forward(const ForwardArguments& a) {
  AttentionProblem p = a.problem;
  const Kernels<T>& k = kernels_for<T>(*a.kernels, p.dtype);
  const Buffer<KeyRange> reach = reaches(k, p, a.query, a.key, a.threads);
  p.score.reach = reach.data();
  const Panels<T> packed_keys(k, p, a.key, p.head_dim, a.threads);
  Workspaces workspaces(k.forward_workspace(p), a.threads);
  auto kept = std::make_unique<KeptLists<T>>(p, a.threads);
  std::vector<Work> work(size_t(a.threads < 1 ? 1 : a.threads));

  parallel_for(p.row_blocks(), a.threads, [&](int64_t turn, int thread) {
    const RowBlock of = row_block_at(p, turn);
    ForwardTask<T> task = forward_task(a, p, of, packed_keys, *kept);
    task.workspace = workspaces.of(thread);
    k.forward(task);
    work[size_t(thread)].add(task.work);
    if (a.support)
      for (int64_t r = 0; r < task.rows; ++r) {
        const int32_t n = task.results.support[r];
        a.support[of.first_row + r] = n < 0 ? -1 - n : n;
      }
    if (a.keep) kept->add(of, thread, task);
  });
  if (a.work)
    for (const Work& one : work) a.work->add(one);
  if (!a.keep) return nullptr;
  return kept;
}

// Memory that is used again, and grows.
template <class T>
T* room_for(Buffer<T>& buffer, int64_t n) {
  if (buffer.size() < n) {
    buffer = Buffer<T>();  // free before there is more
    buffer = Buffer<T>(n);
  }
  return buffer.data();
}

// The lists of some key heads turned round: for each key, who keeps it, ordered by query head and
// row. Row chunks are counted and filled in parallel; their number is fixed, so the order never
// depends on the threads.
template <class T>
class Columns {
 public:
  static constexpr int64_t kChunks = 8;

  // Of each key head, length_k + 1 offsets into the entries.
  const int64_t* offsets(int64_t head) const { return offsets_.data() + head * stride_; }
  const ColumnEntry<T>* entries() const { return entries_.data(); }

  // From the weights that the entries of these lists have in the gradients.
  void turn(const AttentionProblem& p, const Saved<T>& saved, Part heads, const T* value_weights,
            const T* key_weights, int threads) {
    const int64_t rows = p.group_rows(), first_row = heads.first * rows, keys = p.length_k;
    const int64_t first = saved.offsets[first_row];
    stride_ = keys + 1;
    int64_t* const offsets = room_for(offsets_, heads.count * stride_);
    int64_t* const cursors = room_for(cursors_, heads.count * kChunks * keys);
    ColumnEntry<T>* const entries =
        room_for(entries_, saved.offsets[first_row + heads.count * rows] - first);

    const auto chunk = [&](int64_t i, auto each) {
      const int64_t head = i / kChunks, c = i % kChunks;
      const int64_t* const of_rows = saved.offsets + first_row + head * rows;
      int64_t* at = cursors + i * keys;
      for (int64_t r = c * rows / kChunks; r < (c + 1) * rows / kChunks; ++r)
        for (int64_t e = of_rows[r]; e < of_rows[r + 1]; ++e) each(at[saved.keys[e]], r, e);
    };
    parallel_for(heads.count * kChunks, threads, [&](int64_t i, int) {
      std::memset(cursors + i * keys, 0, size_t(keys) * sizeof(int64_t));
      chunk(i, [](int64_t& count, int64_t, int64_t) { ++count; });
    });
    parallel_for(heads.count, threads, [&](int64_t head, int) {
      int64_t at = saved.offsets[first_row + head * rows] - first;
      for (int64_t key = 0; key < keys; ++key) {
        offsets[head * stride_ + key] = at;
        for (int64_t c = 0; c < kChunks; ++c) {
          int64_t& slot = cursors[(head * kChunks + c) * keys + key];
          const int64_t count = slot;
          slot = at;
          at += count;
        }
      }
      offsets[head * stride_ + keys] = at;
    });
    parallel_for(heads.count * kChunks, threads, [&](int64_t i, int) {
      chunk(i, [&](int64_t& slot, int64_t row, int64_t e) {
        entries[slot++] = {int32_t(row), value_weights[e - first], key_weights[e - first]};
      });
    });
  }

 private:
  Buffer<int64_t> offsets_, cursors_;
  Buffer<ColumnEntry<T>> entries_;
  int64_t stride_ = 0;
};

[[noreturn]] void refuse_saved() {
  throw std::invalid_argument(
      "saved must be what attention_forward of these arguments saved, unchanged");
}

// `saved` comes by way of others, who may have changed it: nothing is read or written where it
// points before it is known to point into the arrays. It may be longer than what is in it.
template <class T>
Saved<T> saved_of(const BackwardArguments& a) {
  const AttentionProblem& p = a.problem;
  const int64_t rows = p.rows();
  if (Saved<T>::bytes(rows, 0) > a.saved_bytes) refuse_saved();
  const int64_t entries = static_cast<const int64_t*>(a.saved)[rows];
  const int64_t most = rows * (p.length_k < kListCapacity ? p.length_k : kListCapacity);
  if (entries < 0 || entries > most || Saved<T>::bytes(rows, entries) > a.saved_bytes)
    refuse_saved();
  return Saved<T>(const_cast<void*>(a.saved), rows, entries);
}

// Of a row block: lists lie one behind another, are as long as the row's support says, and hold
// keys that it may see. Whether a row is flat.
template <class T>
bool check_lists(const Saved<T>& saved, const AttentionProblem& p, const RowBlock& block) {
  bool flat = false;
  const HeadScore score = p.score_of(block.head_q);
  for (int64_t i = 0; i < block.rows; ++i) {
    const int64_t row = block.first_row + i, support = saved.support[row];
    const int64_t n = support > 0 ? support : 0, begin = saved.offsets[row];
    const KeyRange visible = score.visible(block.row_begin + i);
    if ((row == 0 && begin != 0) || begin < 0 || begin > saved.offsets[p.rows()] - n ||
        saved.offsets[row + 1] != begin + n || n > kListCapacity || support > visible.size() ||
        -1 - support > visible.size())
      refuse_saved();
    uint32_t last = 0;  // of the keys, counted from visible.begin; unsigned: one before it is large
    for (int64_t e = begin; e < begin + n; ++e) {
      const uint32_t key = uint32_t(saved.keys[e]) - uint32_t(visible.begin);
      last = key > last ? key : last;
    }
    if (int64_t(last) >= visible.size() && n > 0) refuse_saved();
    flat |= support < 0;
  }
  return flat;
}

// What all tasks of a backward read. It works on some key heads and their query heads at a time, so
// that what is held for these alone stays in the cache and takes little memory.
template <class T>
struct BackwardState {
  const BackwardArguments& arguments;
  AttentionProblem problem;
  const Kernels<T>& kernels;
  const Saved<T> saved;
  Buffer<KeyRange> reach;
  Buffer<uint8_t> flat_blocks;  // whether a row block holds a flat row
  bool any_flat = false;
  std::unique_ptr<Panels<T>> packed_keys, packed_values;  // only where a row is flat
  int64_t band_blocks = 1, bands_per_head = 0;
  // Of the key heads at work:
  Part heads = {0, 0};
  int64_t first_entry = 0;  // of their lists, of which those below are
  T* grad_scores = nullptr;
  T* weights = nullptr;  // of dO in dV, where dropout makes them others than the probabilities
  Columns<T> columns;
  std::vector<KeyGradients<T>> of_bands;  // head by head; null where no row is flat

  explicit BackwardState(const BackwardArguments& a)
      : arguments(a),
        problem(a.problem),
        kernels(kernels_for<T>(*a.kernels, a.problem.dtype)),
        saved(saved_of<T>(a)),
        flat_blocks(a.problem.row_blocks()) {
    const AttentionProblem& p = problem;
    reach = reaches(kernels, p, a.query, a.key, a.threads);
    problem.score.reach = reach.data();
    parallel_for(p.row_blocks(), a.threads,
                 [&](int64_t i, int) { flat_blocks[i] = check_lists(saved, p, row_block(p, i)); });
    for (int64_t i = 0; i < flat_blocks.size(); ++i) any_flat |= flat_blocks[i] != 0;
    if (any_flat) {
      packed_keys = std::make_unique<Panels<T>>(kernels, p, a.key, p.head_dim, a.threads);
      packed_values = std::make_unique<Panels<T>>(kernels, p, a.value, p.head_dim_v, a.threads);
    }
    choose_bands();
  }

  Part query_heads() const {
    return {heads.first * problem.gqa_group(), heads.count * problem.gqa_group()};
  }
  // The row blocks of a band of a head.
  Part band(int64_t number) const {
    const int64_t blocks = problem.row_blocks_per_head();
    return part_of(blocks, band_blocks, number);
  }
  // Of a query head at work.
  KeyGradients<T>* bands_of(int64_t head) {
    if (!any_flat) return nullptr;
    return of_bands.data() + (head - query_heads().first) * bands_per_head;
  }

  // Goes on to the next key heads, as many as the threads need and the cache holds. False where
  // there are none left.
  bool next_heads() {
    // Bytes that the last cache is expected to keep from when they are written to when they are
    // read, and tasks that leave no thread waiting for long. Neither was tuned.
    constexpr int64_t kInCache = int64_t(8) << 20, kTasksOfThread = 2;
    const AttentionProblem& p = problem;
    const int64_t tasks = std::min(p.gqa_group() * bands_per_head, Columns<T>::kChunks);
    heads = {heads.first + heads.count, 0};
    for (int64_t bytes = 0; heads.first + heads.count < p.key_heads(); ++heads.count) {
      bytes += bytes_held_for(heads.first + heads.count);
      const bool busy = heads.count * tasks >= kTasksOfThread * arguments.threads;
      if (heads.count > 0 && busy && bytes > kInCache) break;
    }
    if (heads.count == 0) return false;
    make_bands();
    first_entry = entries_before(heads.first);
    const int64_t entries = entries_before(heads.first + heads.count) - first_entry;
    grad_scores = room_for(grad_scores_, entries);
    if (p.score.has_dropout()) weights = room_for(weights_, entries);
    return true;
  }

 private:
  Buffer<T> grad_scores_, weights_, band_gradients_;

  int64_t entries_before(int64_t key_head) const {
    return saved.offsets[key_head * problem.group_rows()];
  }

  int64_t bytes_held_for(int64_t key_head) {
    const int64_t entries = entries_before(key_head + 1) - entries_before(key_head);
    int64_t keys = 0;
    each_flat_band({key_head, 1}, [&](int64_t, KeyRange seen) { keys += seen.size(); });
    return entries * int64_t(sizeof(T) + sizeof(ColumnEntry<T>)) +
           keys * (problem.head_dim + problem.head_dim_v) * int64_t(sizeof(T));
  }

  // In whole panels.
  KeyRange seen_by_band(int64_t head, Part blocks) const {
    const RowBlock first = row_block_of(problem, head, blocks.first);
    const int64_t rows = std::min(blocks.count * kBlockRows, problem.length_q - first.row_begin);
    const int64_t size = kernels.panel_keys;
    const KeyRange panels =
        seen_by_any(problem.score_of(first.head_q), first.row_begin, rows).in_units_of(size);
    return {panels.begin * size, panels.end * size};
  }

  // Calls f with the number of each band of some key heads that holds a flat row, and its keys.
  template <class F>
  void each_flat_band(Part key_heads, F f) const {
    if (!any_flat) return;
    const int64_t blocks = problem.row_blocks_per_head(), group = problem.gqa_group();
    for (int64_t i = 0; i < key_heads.count * group * bands_per_head; ++i) {
      const int64_t head = key_heads.first * group + i / bands_per_head;
      const Part of = band(i % bands_per_head);
      const uint8_t* first = flat_blocks.data() + head * blocks + of.first;
      if (std::any_of(first, first + of.count, [](uint8_t is_flat) { return is_flat != 0; }))
        f(i, seen_by_band(head, of));
    }
  }

  // A task works on a band of row blocks of a head. Where a row is flat each band has gradients
  // of the keys that it sees, which must be little work beside its own, and take no more memory
  // than a few times the tensors: then there are no more bands than many threads can share, few of
  // a head, and none is short. A shared mask leaves fewer tasks than heads.
  void choose_bands() {
    // By the problem alone, since the order of sums follows from it. kTasks are enough for 16
    // threads, kTasksOfMask for a few; a band of kBandBlocks adds up 512 rows before keys add its
    // sums. None of these was tuned. Without kMostBands the sums took twice the memory of the
    // lists.
    constexpr int64_t kTasks = 32, kTasksOfMask = 4, kMostBands = 8, kBandBlocks = 8;
    const AttentionProblem& p = problem;
    const Operand& mask = arguments.grad_mask;
    const int64_t heads = p.query_heads(), blocks = p.row_blocks_per_head();
    const int64_t masks =
        !mask.data ? heads : (mask.stride_batch ? p.batch : 1) * (mask.stride_head ? p.heads_q : 1);
    const int64_t wanted =
        std::max(std::min(parts(kTasks, heads), kMostBands), parts(kTasksOfMask, masks));
    band_blocks = any_flat ? std::max(parts(blocks, wanted), kBandBlocks) : 1;
    bands_per_head = parts(blocks, band_blocks);
  }

  void make_bands() {
    if (!any_flat) return;
    const AttentionProblem& p = problem;
    of_bands.assign(size_t(query_heads().count * bands_per_head), {});
    int64_t keys = 0;
    each_flat_band(heads, [&](int64_t, KeyRange seen) { keys += seen.size(); });
    T* at = room_for(band_gradients_, keys * (p.head_dim + p.head_dim_v));
    each_flat_band(heads, [&](int64_t i, KeyRange seen) {
      of_bands[size_t(i)] = {at, at + seen.size() * p.head_dim, seen};
      at += seen.size() * (p.head_dim + p.head_dim_v);
    });
  }
};

// The gradient of a mask, to which all rows that share one of its rows add. One task adds for all
// heads and batches that share rows of it, one after another, so that the order of
// summation is fixed. Where all rows of a head share one, each block has a row of its own first.
template <class T>
struct MaskGradient {
  int64_t batches = 1, heads = 1, keys = 0;  // of the mask
  int64_t blocks;                            // row blocks of a head
  const Operand& mask;
  Buffer<T> partial;  // (batches, heads, blocks, keys), where rows share

  MaskGradient(const AttentionProblem& p, const Operand& grad)
      : blocks(p.row_blocks_per_head()), mask(grad) {
    batches = !grad.data || grad.stride_batch ? p.batch : 1;
    heads = !grad.data || grad.stride_head ? p.heads_q : 1;
    keys = grad.stride_key ? p.length_k : 1;
    if (!grad.data || grad.stride_row) return;
    partial = Buffer<T>(batches * heads * blocks * keys);
    std::memset(partial.data(), 0, size_t(partial.size()) * sizeof(T));
  }

  // Some query heads by the mask that they share, in order.
  std::vector<std::vector<int64_t>> shared_by(const AttentionProblem& p, Part some) const {
    std::vector<std::vector<int64_t>> found(size_t(batches * heads));
    for (int64_t head = some.first; head < some.first + some.count; ++head)
      found[size_t(p.batch_of_queries(head) % batches * heads + p.head_in_batch(head) % heads)]
          .push_back(head);
    found.erase(std::remove_if(found.begin(), found.end(), [](auto& of) { return of.empty(); }),
                found.end());
    return found;
  }

  void hand_to(RowGradients<T>& task, const AttentionProblem& p, const RowBlock& of) {
    if (!mask.data) return;
    const int64_t batch = p.batch_of_queries(of.head_q) % batches;
    const int64_t head = p.head_in_batch(of.head_q) % heads;
    const int64_t block = of.row_begin / kBlockRows;
    task.mask_stride_row = mask.stride_row;
    task.mask_stride_key = mask.stride_key;
    task.mask = partial.size() ? partial.data() + ((batch * heads + head) * blocks + block) * keys
                               : at(batch, head) + of.row_begin * mask.stride_row;
  }

  void finish() {
    if (!partial.size()) return;
    const T* from = partial.data();
    for (int64_t i = 0; i < batches * heads; ++i)
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t key = 0; key < keys; ++key)
          at(i / heads, i % heads)[key * mask.stride_key] += *from++;
  }

 private:
  T* at(int64_t batch, int64_t head) const {
    return static_cast<T*>(const_cast<void*>(mask.at(batch, head)));
  }
};

// The gradients of the queries, and of the scores.
template <class T>
void backward_rows(BackwardState<T>& state, MaskGradient<T>& mask, Workspaces& workspaces) {
  const BackwardArguments& a = state.arguments;
  const AttentionProblem& p = state.problem;
  const Saved<T>& saved = state.saved;
  const int64_t element = p.element_size();
  const auto run = [&](const RowBlock& of, const KeyGradients<T>& of_band, int thread) {
    const auto own = [&](const TensorRef& tensor) {
      return p.query_head(tensor, of.head_q).from(of.row_begin, element);
    };
    BackwardRowsTask<T> task = {};
    task.problem = &p;
    task.query = own(a.query);
    task.key = p.key_head(a.key, of.head_kv);
    task.value = p.key_head(a.value, of.head_kv);
    task.grad_out = own(a.grad_out);
    task.grad_query = own(a.grad_query);
    if (state.any_flat) {
      task.packed_keys = state.packed_keys->head(of.head_kv);
      task.packed_values = state.packed_values->head(of.head_kv);
      task.of_band = of_band;
    }
    const auto of_rows = [&](void* grad) {
      return grad ? static_cast<T*>(grad) + of.first_row : nullptr;
    };
    task.others.slopes = of_rows(a.grad_slopes);
    task.others.sinks = of_rows(a.grad_sinks);
    task.others.scales = of_rows(a.grad_scales);
    task.others.alphas = of_rows(a.grad_alphas);
    mask.hand_to(task.others, p, of);
    task.head = of.head_q;
    task.row_begin = of.row_begin;
    task.rows = of.rows;
    task.thresholds = saved.thresholds + of.first_row;
    task.support = saved.support + of.first_row;
    task.offsets = saved.offsets + of.first_row;
    task.keys = saved.keys;
    task.probabilities = saved.probabilities;
    task.first_entry = state.first_entry;
    task.grad_scores = state.grad_scores;
    task.weights = state.weights;
    task.workspace = workspaces.of(thread);
    state.kernels.backward_rows(task);
  };
  // The last bands of a head first, as row_block_at says.
  const auto tasks = mask.shared_by(p, state.query_heads());
  const int64_t bands = state.bands_per_head;
  parallel_for(int64_t(tasks.size()) * bands, a.threads, [&](int64_t turn, int thread) {
    const int64_t number = bands - 1 - turn % bands;
    const Part blocks = state.band(number);
    for (const int64_t head : tasks[size_t(turn / bands)]) {
      const KeyGradients<T> of_band =
          state.any_flat ? state.bands_of(head)[number] : KeyGradients<T>{};
      if (of_band.keys)
        std::fill(of_band.keys, of_band.values + of_band.range.size() * p.head_dim_v, T(0));
      for (int64_t b = blocks.first; b < blocks.first + blocks.count; ++b)
        run(row_block_of(p, head, b), of_band, thread);
    }
  });
}

// The gradients of the keys and values.
template <class T>
void backward_keys(BackwardState<T>& state, Workspaces& workspaces) {
  const BackwardArguments& a = state.arguments;
  const AttentionProblem& p = state.problem;
  const Kernels<T>& k = state.kernels;
  const int64_t element = p.element_size();
  const T* weights =
      p.score.has_dropout() ? state.weights : state.saved.probabilities + state.first_entry;
  state.columns.turn(p, state.saved, state.heads, weights, state.grad_scores, a.threads);
  // The query heads of every group, side by side.
  const Part heads_q = state.query_heads();
  std::vector<HeadRef> queries, grad_outs;
  for (int64_t head = heads_q.first; head < heads_q.first + heads_q.count; ++head) {
    queries.push_back(p.query_head(a.query, head));
    grad_outs.push_back(p.query_head(a.grad_out, head));
  }
  const int64_t blocks = parts(p.length_k, k.task_keys), first = state.heads.first * blocks;
  parallel_for(state.heads.count * blocks, a.threads, [&](int64_t turn, int thread) {
    const KeyBlock of = key_block_at(p, k.task_keys, first + turn);
    BackwardKeysTask<T> task = {};
    task.problem = &p;
    task.queries = queries.data() + (of.first_head_q - heads_q.first);
    task.grad_outs = grad_outs.data() + (of.first_head_q - heads_q.first);
    task.grad_key = p.key_head(a.grad_key, of.head_kv).from(of.key_begin, element);
    task.grad_value = p.key_head(a.grad_value, of.head_kv).from(of.key_begin, element);
    task.key_begin = of.key_begin;
    task.keys = of.keys;
    task.offsets = state.columns.offsets(of.head_kv - state.heads.first) + of.key_begin;
    task.entries = state.columns.entries();
    if (state.any_flat) {
      task.of_bands = state.bands_of(of.first_head_q);
      task.bands = p.gqa_group() * state.bands_per_head;
    }
    task.workspace = workspaces.of(thread);
    k.backward_keys(task);
  });
}

template <class T>
int64_t backward(const BackwardArguments& a) {
  BackwardState<T> state(a);
  const AttentionProblem& p = state.problem;
  MaskGradient<T> mask(p, a.grad_mask);
  Workspaces of_rows(state.kernels.backward_rows_workspace(p, state.any_flat), a.threads);
  Workspaces of_keys(state.kernels.backward_keys_workspace(p), a.threads);
  int64_t turns = 0;
  for (; state.next_heads(); ++turns) {
    backward_rows(state, mask, of_rows);
    backward_keys(state, of_keys);
  }
  mask.finish();
  return turns;
}

}  // namespace

int64_t saved_bytes(Dtype dtype, int64_t rows, int64_t entries) {
  return dtype == Dtype::kFloat64 ? Saved<double>::bytes(rows, entries)
                                  : Saved<float>::bytes(rows, entries);
}

std::unique_ptr<Kept> attention_forward(const ForwardArguments& arguments) {
  if (is_decoding(arguments)) {
    decode(arguments);
    return nullptr;
  }
  return arguments.problem.dtype == Dtype::kFloat64 ? forward<double>(arguments)
                                                    : forward<float>(arguments);
}

int64_t attention_backward(const BackwardArguments& arguments) {
  return arguments.problem.dtype == Dtype::kFloat64 ? backward<double>(arguments)
                                                    : backward<float>(arguments);
}

}  // namespace adasplash2
