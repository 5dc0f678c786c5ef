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
  for (int64_t head = 0; p.score.slopes.data && head < p.query_heads(); ++head)
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

// The lists of the blocks that one thread worked on, in the order in which it did.
template <class T>
struct ThreadLists {
  std::vector<T> probabilities;
  std::vector<int32_t> keys;
};

template <class T>
class KeptLists final : public Kept {
 public:
  explicit KeptLists(const AttentionProblem& problem, int threads)
      : rows(problem.rows()),
        thresholds(rows),
        support(rows),
        lists(size_t(threads < 1 ? 1 : threads)),
        blocks(problem.row_blocks()),
        problem_(problem),
        threads_(threads) {}

  struct Block {
    int thread;
    int64_t at, entries;
  };

  // The lists that a block's forward has left in its workspace.
  void add(const RowBlock& of, int thread, const ForwardTask<T>& task) {
    ThreadLists<T>& list = lists[size_t(thread)];
    const int64_t at = int64_t(list.keys.size());
    for (int64_t r = 0; r < task.rows; ++r) {
      const int32_t n = task.results.support[r];
      if (n <= 0) continue;
      const T* values = task.list_values + r * task.list_stride;
      const int32_t* keys = task.list_keys + r * task.list_stride;
      list.probabilities.insert(list.probabilities.end(), values, values + n);
      list.keys.insert(list.keys.end(), keys, keys + n);
    }
    blocks[of.number] = {thread, at, int64_t(list.keys.size()) - at};
  }

  int64_t bytes() const override {
    int64_t entries = 0;
    for (const auto& list : lists) entries += int64_t(list.keys.size());
    return Saved<T>::bytes(rows, entries);
  }

  void save(void* to) override {
    int64_t entries = 0;
    Buffer<int64_t> begins(blocks.size());
    for (int64_t b = 0; b < blocks.size(); ++b) {
      begins[b] = entries;
      entries += blocks[b].entries;
    }
    Saved<T> saved(to, rows, entries);
    saved.offsets[rows] = entries;
    parallel_for(blocks.size(), threads_, [&](int64_t b, int) {
      const Block block = blocks[b];
      const ThreadLists<T>& list = lists[size_t(block.thread)];
      const size_t at = size_t(block.at), n = size_t(block.entries);
      if (n > 0) {
        std::memcpy(saved.probabilities + begins[b], list.probabilities.data() + at, n * sizeof(T));
        std::memcpy(saved.keys + begins[b], list.keys.data() + at, n * sizeof(int32_t));
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
  std::vector<ThreadLists<T>> lists;
  Buffer<Block> blocks;

 private:
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

// The lists of one (batch, key head) turned round: for each key, who keeps it, ordered by query
// head and row. Row chunks are counted and filled in parallel; their number is fixed, so the
// order never depends on the threads.
template <class T>
struct Columns {
  static constexpr int64_t kChunks = 8;
  Buffer<int64_t> offsets;         // length_k + 1 per key head, into the arrays below
  Buffer<int32_t> rows;            // head in group * length_q + row
  Buffer<T> weights, grad_scores;  // of dO in dV and of Q in dK

  Columns(const AttentionProblem& p, const Saved<T>& saved, const T* of_values, const T* of_keys,
          int threads) {
    const int64_t heads = p.key_heads(), group_rows = p.group_rows();
    const int64_t entries = saved.offsets[p.rows()];
    offsets = Buffer<int64_t>(heads * (p.length_k + 1));
    rows = Buffer<int32_t>(entries);
    weights = Buffer<T>(entries);
    grad_scores = Buffer<T>(entries);
    Buffer<int64_t> cursor(heads * kChunks * p.length_k);

    const auto chunk = [&](int64_t i, auto each) {
      const int64_t first = i / kChunks * group_rows, c = i % kChunks;
      const int64_t begin = c * group_rows / kChunks, end = (c + 1) * group_rows / kChunks;
      int64_t* at = cursor.data() + i * p.length_k;
      for (int64_t r = begin; r < end; ++r)
        for (int64_t e = saved.offsets[first + r]; e < saved.offsets[first + r + 1]; ++e)
          each(at[saved.keys[e]], r, e);
    };
    parallel_for(heads * kChunks, threads, [&](int64_t i, int) {
      std::memset(cursor.data() + i * p.length_k, 0, size_t(p.length_k) * sizeof(int64_t));
      chunk(i, [](int64_t& count, int64_t, int64_t) { ++count; });
    });
    parallel_for(heads, threads, [&](int64_t head, int) {
      int64_t at = saved.offsets[head * group_rows];
      for (int64_t key = 0; key < p.length_k; ++key) {
        offsets[head * (p.length_k + 1) + key] = at;
        for (int64_t c = 0; c < kChunks; ++c) {
          int64_t& slot = cursor[(head * kChunks + c) * p.length_k + key];
          const int64_t count = slot;
          slot = at;
          at += count;
        }
      }
      offsets[head * (p.length_k + 1) + p.length_k] = at;
    });
    parallel_for(heads * kChunks, threads, [&](int64_t i, int) {
      chunk(i, [&](int64_t& slot, int64_t row, int64_t entry) {
        rows[slot] = int32_t(row);
        weights[slot] = of_values[entry];
        grad_scores[slot] = of_keys[entry];
        ++slot;
      });
    });
  }
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

// What all tasks of a backward read.
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
  // Of each strip, head by head; null where no row is flat.
  int64_t strip_blocks, strips_per_head;
  std::vector<KeyGradients<T>> of_strips;
  Buffer<T> strip_gradients;
  Buffer<T> grad_scores;
  Buffer<T> weights;  // of dO in dV, where dropout makes them others than the probabilities

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
    grad_scores = Buffer<T>(saved.offsets[p.rows()]);
    make_strips();
    if (p.score.seeds.data) weights = Buffer<T>(saved.offsets[p.rows()]);
  }

  // The row blocks of a strip of a head.
  Part strip(int64_t number) const {
    const int64_t blocks = problem.row_blocks_per_head();
    return part_of(blocks, strip_blocks, number);
  }

 private:
  // In whole panels.
  KeyRange seen_by_strip(int64_t head, Part blocks) const {
    const RowBlock first = row_block(problem, head * problem.row_blocks_per_head() + blocks.first);
    const int64_t rows = std::min(blocks.count * kBlockRows, problem.length_q - first.row_begin);
    const int64_t size = kernels.panel_keys;
    const KeyRange panels =
        seen_by_any(problem.score_of(first.head_q), first.row_begin, rows).in_units_of(size);
    return {panels.begin * size, panels.end * size};
  }

  // A task works on a strip of row blocks of a head. Where a row is flat each strip has gradients
  // of the keys that it sees, which must be little work beside its own, and take no more memory
  // than a few times the tensors: then there are no more strips than many threads can share, few of
  // a head, and none is short. A shared mask leaves fewer tasks than heads.
  void make_strips() {
    constexpr int64_t kTasks = 32, kTasksOfMask = 4, kMostStrips = 8, kStripBlocks = 8;
    const AttentionProblem& p = problem;
    const Operand& mask = arguments.grad_mask;
    const int64_t heads = p.query_heads(), blocks = p.row_blocks_per_head();
    const int64_t masks =
        !mask.data ? heads : (mask.stride_batch ? p.batch : 1) * (mask.stride_head ? p.heads_q : 1);
    const int64_t wanted =
        std::max(std::min(parts(kTasks, heads), kMostStrips), parts(kTasksOfMask, masks));
    strip_blocks = any_flat ? std::max(parts(blocks, wanted), kStripBlocks) : 1;
    strips_per_head = parts(blocks, strip_blocks);
    of_strips.resize(size_t(any_flat ? heads * strips_per_head : 0));
    if (!any_flat) return;
    const auto each_flat_strip = [&](auto f) {
      for (int64_t i = 0; i < heads * strips_per_head; ++i) {
        const Part of = strip(i % strips_per_head);
        const uint8_t* first = flat_blocks.data() + i / strips_per_head * blocks + of.first;
        if (std::any_of(first, first + of.count, [](uint8_t is_flat) { return is_flat != 0; }))
          f(of_strips[size_t(i)], seen_by_strip(i / strips_per_head, of));
      }
    };
    int64_t keys = 0;
    each_flat_strip([&](KeyGradients<T>&, KeyRange seen) { keys += seen.size(); });
    strip_gradients = Buffer<T>(keys * (p.head_dim + p.head_dim_v));
    T* at = strip_gradients.data();
    each_flat_strip([&](KeyGradients<T>& of_strip, KeyRange seen) {
      of_strip = {at, at + seen.size() * p.head_dim, seen};
      at += seen.size() * (p.head_dim + p.head_dim_v);
    });
  }
};

// The gradient of a mask, to which all rows that share one of its rows add. One task adds for all
// heads and batches that share a strip of it, one after another, so that the order of
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

  // Calls f with the heads that share a mask of `batches * heads`, in a fixed order.
  template <class F>
  void for_heads(const AttentionProblem& p, int64_t shared, F f) const {
    const int64_t batch = shared / heads, head = shared % heads;
    for (int64_t b = batch; b < p.batch; b += batches)
      for (int64_t h = head; h < p.heads_q; h += heads) f(b * p.heads_q + h);
  }

  void hand_to(RowGradients<T>& task, const AttentionProblem& p, const RowBlock& of) {
    if (!mask.data) return;
    const int64_t batch = of.head_q / p.heads_q % batches, head = of.head_q % p.heads_q % heads;
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
void backward_rows(BackwardState<T>& state) {
  const BackwardArguments& a = state.arguments;
  const AttentionProblem& p = state.problem;
  const Saved<T>& saved = state.saved;
  const int64_t element = p.element_size();
  Workspaces workspaces(state.kernels.backward_rows_workspace(p, state.any_flat), a.threads);
  MaskGradient<T> mask(p, a.grad_mask);
  const auto run = [&](const RowBlock& of, const KeyGradients<T>& of_strip, int thread) {
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
      task.of_strip = of_strip;
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
    task.grad_scores = state.grad_scores.data();
    task.weights = state.weights.data();
    task.workspace = workspaces.of(thread);
    state.kernels.backward_rows(task);
  };
  // The last strips of a head first, as row_block_at says.
  const int64_t strips = state.strips_per_head;
  parallel_for(mask.batches * mask.heads * strips, a.threads, [&](int64_t turn, int thread) {
    const int64_t number = strips - 1 - turn % strips;
    const Part blocks = state.strip(number);
    mask.for_heads(p, turn / strips, [&](int64_t head) {
      const KeyGradients<T> of_strip =
          state.any_flat ? state.of_strips[size_t(head * strips + number)] : KeyGradients<T>{};
      if (of_strip.keys)
        std::fill(of_strip.keys, of_strip.values + of_strip.range.size() * p.head_dim_v, T(0));
      for (int64_t b = blocks.first; b < blocks.first + blocks.count; ++b)
        run(row_block(p, head * p.row_blocks_per_head() + b), of_strip, thread);
    });
  });
  mask.finish();
}

// The gradients of the keys and values.
template <class T>
void backward_keys(BackwardState<T>& state) {
  const BackwardArguments& a = state.arguments;
  const AttentionProblem& p = state.problem;
  const Kernels<T>& k = state.kernels;
  const int64_t element = p.element_size();
  const T* weights = p.score.seeds.data ? state.weights.data() : state.saved.probabilities;
  const Columns<T> columns(p, state.saved, weights, state.grad_scores.data(), a.threads);
  state.grad_scores = Buffer<T>();
  state.weights = Buffer<T>();
  Workspaces workspaces(k.backward_keys_workspace(p), a.threads);
  // The query heads of every group, side by side.
  std::vector<HeadRef> queries, grad_outs;
  for (int64_t head = 0; head < p.query_heads(); ++head) {
    queries.push_back(p.query_head(a.query, head));
    grad_outs.push_back(p.query_head(a.grad_out, head));
  }
  parallel_for(
      p.key_heads() * parts(p.length_k, k.task_keys), a.threads, [&](int64_t turn, int thread) {
        const KeyBlock of = key_block_at(p, k.task_keys, turn);
        BackwardKeysTask<T> task = {};
        task.problem = &p;
        task.queries = queries.data() + of.first_head_q;
        task.grad_outs = grad_outs.data() + of.first_head_q;
        task.grad_key = p.key_head(a.grad_key, of.head_kv).from(of.key_begin, element);
        task.grad_value = p.key_head(a.grad_value, of.head_kv).from(of.key_begin, element);
        task.first_head = of.first_head_q;
        task.key_begin = of.key_begin;
        task.keys = of.keys;
        task.offsets = columns.offsets.data() + of.head_kv * (p.length_k + 1) + of.key_begin;
        task.rows = columns.rows.data();
        task.weights = columns.weights.data();
        task.grad_scores = columns.grad_scores.data();
        if (state.any_flat) {
          task.of_strips = state.of_strips.data() + of.first_head_q * state.strips_per_head;
          task.strips = p.gqa_group() * state.strips_per_head;
        }
        task.workspace = workspaces.of(thread);
        k.backward_keys(task);
      });
}

template <class T>
void backward(const BackwardArguments& a) {
  BackwardState<T> state(a);
  backward_rows(state);
  backward_keys(state);
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

void attention_backward(const BackwardArguments& arguments) {
  arguments.problem.dtype == Dtype::kFloat64 ? backward<double>(arguments)
                                             : backward<float>(arguments);
}

}  // namespace adasplash2
