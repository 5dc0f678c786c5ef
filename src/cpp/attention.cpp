#include "attention.h"

#include <cstring>
#include <stdexcept>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace adasplash2 {
namespace {

HeadRef head_of(const TensorRef& tensor, int64_t batch, int64_t head, int64_t element_size) {
  const int64_t offset = batch * tensor.stride_batch + head * tensor.stride_head;
  return {static_cast<char*>(tensor.data) + offset * element_size, tensor.stride_length};
}

HeadRef at_row(HeadRef head, int64_t row, int64_t element_size) {
  return {static_cast<char*>(head.data) + row * head.stride * element_size, head.stride};
}

int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// All rows of all heads of a key or value tensor as panels.
template <class T>
struct Panels {
  Buffer<T> data;
  int64_t head_stride = 0;

  Panels(const Kernels<T>& k, const AttentionProblem& p, const TensorRef& tensor, int64_t depth,
         int threads) {
    constexpr int64_t kChunk = 32;  // panels a task packs
    const int64_t panels = (p.length_k + k.panel_keys - 1) / k.panel_keys;
    const int64_t chunks = (panels + kChunk - 1) / kChunk;
    head_stride = panels * k.panel_keys * depth;
    data = Buffer<T>(p.batch * p.heads_kv * head_stride);
    parallel_for(p.batch * p.heads_kv * chunks, threads, [&](int64_t i, int) {
      const int64_t head = i / chunks, begin = i % chunks * kChunk;
      const int64_t end = begin + kChunk < panels ? begin + kChunk : panels;
      k.pack_panels(head_of(tensor, head / p.heads_kv, head % p.heads_kv, size_of(p.dtype)),
                    p.length_k, depth, begin, end, data.data() + head * head_stride);
    });
  }
  const T* head(int64_t kv_head) const { return data.data() + kv_head * head_stride; }
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
        blocks(problem.batch * problem.heads_q * problem.blocks_per_head()),
        length_q(problem.length_q),
        blocks_per_head(problem.blocks_per_head()),
        threads_(threads) {}

  struct Block {
    int thread;
    int64_t at, entries;
  };

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
      const int64_t head = b / blocks_per_head, first = b % blocks_per_head * kBlockRows;
      const int64_t end = first + kBlockRows < length_q ? first + kBlockRows : length_q;
      int64_t offset = begins[b];
      for (int64_t i = head * length_q + first; i < head * length_q + end; ++i) {
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
  int64_t length_q, blocks_per_head;
  int threads_;
};

template <class T>
std::unique_ptr<Kept> forward(const ForwardArguments& a) {
  const AttentionProblem& p = a.problem;
  const Kernels<T>& k = kernels_for<T>(*a.kernels, p.dtype);
  const int64_t element = size_of(p.dtype), blocks = p.blocks_per_head();
  const int64_t key_tiles = (p.length_k + kBlockRows - 1) / kBlockRows;

  const Panels<T> packed_keys(k, p, a.key, p.head_dim, a.threads);
  Workspaces workspaces(k.forward_workspace(p), a.threads);
  auto kept = std::make_unique<KeptLists<T>>(p, a.threads);
  std::vector<Work> work(size_t(a.threads < 1 ? 1 : a.threads));

  parallel_for(p.batch * p.heads_q * blocks, a.threads, [&](int64_t i, int thread) {
    // Head by head, so that one head's keys and values stay in the cache; within it the long
    // rows of a causal problem first, so that no thread starts on one last.
    const int64_t head = i / blocks, block = blocks - 1 - i % blocks;
    const int64_t batch = head / p.heads_q, head_q = head % p.heads_q;
    const int64_t head_kv = head_q / p.group(), first = block * kBlockRows;
    const int64_t row = head * p.length_q + first;

    ForwardTask<T> task = {};
    task.problem = &p;
    task.query = at_row(head_of(a.query, batch, head_q, element), first, element);
    task.value = head_of(a.value, batch, head_kv, element);
    task.out = at_row(head_of(a.out, batch, head_q, element), first, element);
    task.packed_keys = packed_keys.head(batch * p.heads_kv + head_kv);
    task.row_begin = first;
    task.rows = first + kBlockRows < p.length_q ? kBlockRows : p.length_q - first;
    task.scan_rows = a.scan_rows;
    task.results.thresholds = kept->thresholds.data() + row;
    task.results.tau = static_cast<T*>(a.tau) + row;
    task.results.support = kept->support.data() + row;
    task.results.iterations = a.iterations ? a.iterations + row : nullptr;
    task.results.tiles = a.tiles ? a.tiles + (head * blocks + block) * key_tiles : nullptr;
    task.workspace = workspaces.of(thread);
    k.forward(task);
    work[size_t(thread)].add(task.work);

    if (a.support)
      for (int64_t r = 0; r < task.rows; ++r) {
        const int32_t n = task.results.support[r];
        a.support[row + r] = n < 0 ? -1 - n : n;
      }
    if (!a.keep) return;
    ThreadLists<T>& list = kept->lists[size_t(thread)];
    const int64_t at = int64_t(list.keys.size());
    for (int64_t r = 0; r < task.rows; ++r) {
      const int32_t n = task.results.support[r];
      if (n <= 0) continue;
      const T* values = task.list_values + r * task.list_stride;
      const int32_t* keys = task.list_keys + r * task.list_stride;
      list.probabilities.insert(list.probabilities.end(), values, values + n);
      list.keys.insert(list.keys.end(), keys, keys + n);
    }
    kept->blocks[head * blocks + block] = {thread, at, int64_t(list.keys.size()) - at};
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
  Buffer<int64_t> offsets;  // length_k + 1 per key head, into the arrays below
  Buffer<int32_t> rows;     // head in group * length_q + row
  Buffer<T> probabilities, grad_scores;

  Columns(const AttentionProblem& p, const Saved<T>& saved, const T* grads, int threads) {
    const int64_t heads = p.batch * p.heads_kv, group_rows = p.group() * p.length_q;
    const int64_t entries = saved.offsets[p.rows()];
    offsets = Buffer<int64_t>(heads * (p.length_k + 1));
    rows = Buffer<int32_t>(entries);
    probabilities = Buffer<T>(entries);
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
        probabilities[slot] = saved.probabilities[entry];
        grad_scores[slot] = grads[entry];
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

// Rows [first, end) of the head that starts at row `head`: lists lie one behind another, are as
// long as the row's support says, and hold keys that it may see. Whether a row is flat.
template <class T>
bool check_lists(const Saved<T>& saved, const AttentionProblem& p, int64_t head, int64_t first,
                 int64_t end) {
  bool flat = false;
  for (int64_t i = first; i < end; ++i) {
    const int64_t row = head + i, support = saved.support[row], n = support > 0 ? support : 0;
    const int64_t begin = saved.offsets[row], visible = p.scores.visible(i).end;
    if ((row == 0 && begin != 0) || begin < 0 || begin > saved.offsets[p.rows()] - n ||
        saved.offsets[row + 1] != begin + n || n > kListCapacity || support > visible ||
        -1 - support > visible)
      refuse_saved();
    uint32_t last = 0;  // unsigned: a negative key is a large one
    for (int64_t e = begin; e < begin + n; ++e) {
      const uint32_t key = uint32_t(saved.keys[e]);
      last = key > last ? key : last;
    }
    if (int64_t(last) >= visible && n > 0) refuse_saved();
    flat |= support < 0;
  }
  return flat;
}

template <class T>
void backward(const BackwardArguments& a) {
  const AttentionProblem& p = a.problem;
  const Kernels<T>& k = kernels_for<T>(*a.kernels, p.dtype);
  const int64_t element = size_of(p.dtype), rows = p.rows(), blocks = p.blocks_per_head();

  const Saved<T> saved = saved_of<T>(a);
  const int64_t entries = saved.offsets[rows];

  // Which row blocks hold a flat row.
  Buffer<uint8_t> flat_blocks(p.batch * p.heads_q * blocks);
  parallel_for(p.batch * p.heads_q * blocks, a.threads, [&](int64_t i, int) {
    const int64_t head = i / blocks, first = i % blocks * kBlockRows;
    const int64_t end = first + kBlockRows < p.length_q ? first + kBlockRows : p.length_q;
    flat_blocks[i] = check_lists(saved, p, head * p.length_q, first, end);
  });
  bool any_flat = false;
  for (int64_t i = 0; i < flat_blocks.size(); ++i) any_flat |= flat_blocks[i] != 0;
  std::unique_ptr<Panels<T>> packed_keys, packed_values;
  if (any_flat) {
    packed_keys = std::make_unique<Panels<T>>(k, p, a.key, p.head_dim, a.threads);
    packed_values = std::make_unique<Panels<T>>(k, p, a.value, p.head_dim_v, a.threads);
  }

  Buffer<T> grads(entries), delta(any_flat ? rows : 0);
  {
    Workspaces workspaces(k.backward_rows_workspace(p, any_flat), a.threads);
    parallel_for(p.batch * p.heads_q * blocks, a.threads, [&](int64_t i, int thread) {
      const int64_t head = i / blocks, block = blocks - 1 - i % blocks;
      const int64_t batch = head / p.heads_q, head_q = head % p.heads_q;
      const int64_t head_kv = head_q / p.group(), first = block * kBlockRows;
      const int64_t row = head * p.length_q + first;
      BackwardRowsTask<T> task = {};
      task.problem = &p;
      task.query = at_row(head_of(a.query, batch, head_q, element), first, element);
      task.key = head_of(a.key, batch, head_kv, element);
      task.value = head_of(a.value, batch, head_kv, element);
      task.grad_out = at_row(head_of(a.grad_out, batch, head_q, element), first, element);
      task.grad_query = at_row(head_of(a.grad_query, batch, head_q, element), first, element);
      if (any_flat) {
        task.packed_keys = packed_keys->head(batch * p.heads_kv + head_kv);
        task.packed_values = packed_values->head(batch * p.heads_kv + head_kv);
        task.delta = delta.data() + row;
      }
      task.row_begin = first;
      task.rows = first + kBlockRows < p.length_q ? kBlockRows : p.length_q - first;
      task.thresholds = saved.thresholds + row;
      task.support = saved.support + row;
      task.offsets = saved.offsets + row;
      task.keys = saved.keys;
      task.probabilities = saved.probabilities;
      task.grad_scores = grads.data();
      task.workspace = workspaces.of(thread);
      k.backward_rows(task);
    });
  }

  const Columns<T> columns(p, saved, grads.data(), a.threads);
  grads = Buffer<T>();
  const int64_t key_tasks = (p.length_k + k.task_keys - 1) / k.task_keys;
  Workspaces workspaces(k.backward_keys_workspace(p), a.threads);
  // The query heads of every group, side by side.
  std::vector<HeadRef> queries, grad_outs;
  for (int64_t head = 0; head < p.batch * p.heads_q; ++head) {
    queries.push_back(head_of(a.query, head / p.heads_q, head % p.heads_q, element));
    grad_outs.push_back(head_of(a.grad_out, head / p.heads_q, head % p.heads_q, element));
  }
  parallel_for(p.batch * p.heads_kv * key_tasks, a.threads, [&](int64_t i, int thread) {
    // Early keys are seen by most rows of a causal problem: they come first.
    const int64_t head = i / key_tasks, first = i % key_tasks * k.task_keys;
    const int64_t batch = head / p.heads_kv, head_kv = head % p.heads_kv;
    const int64_t head_q = head * p.group(), row = head_q * p.length_q;
    BackwardKeysTask<T> task = {};
    task.problem = &p;
    task.queries = queries.data() + head_q;
    task.grad_outs = grad_outs.data() + head_q;
    task.grad_key = at_row(head_of(a.grad_key, batch, head_kv, element), first, element);
    task.grad_value = at_row(head_of(a.grad_value, batch, head_kv, element), first, element);
    task.key_begin = first;
    task.keys = first + k.task_keys < p.length_k ? k.task_keys : p.length_k - first;
    task.offsets = columns.offsets.data() + head * (p.length_k + 1) + first;
    task.rows = columns.rows.data();
    task.probabilities = columns.probabilities.data();
    task.grad_scores = columns.grad_scores.data();
    if (any_flat) {
      task.packed_keys = packed_keys->head(head);
      task.packed_values = packed_values->head(head);
      task.thresholds = saved.thresholds + row;
      task.delta = delta.data() + row;
      task.support = saved.support + row;
      task.flat_blocks = flat_blocks.data() + head_q * blocks;
    }
    task.workspace = workspaces.of(thread);
    k.backward_keys(task);
  });
}

}  // namespace

int64_t saved_bytes(Dtype dtype, int64_t rows, int64_t entries) {
  return dtype == Dtype::kFloat64 ? Saved<double>::bytes(rows, entries)
                                  : Saved<float>::bytes(rows, entries);
}

std::unique_ptr<Kept> attention_forward(const ForwardArguments& arguments) {
  return arguments.problem.dtype == Dtype::kFloat64 ? forward<double>(arguments)
                                                    : forward<float>(arguments);
}

void attention_backward(const BackwardArguments& arguments) {
  arguments.problem.dtype == Dtype::kFloat64 ? backward<double>(arguments)
                                             : backward<float>(arguments);
}

}  // namespace adasplash2
