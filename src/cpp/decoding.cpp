#include "decoding.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace adasplash2 {
namespace {

// More queries than these earn the packing of the keys that the other forward does. So do several
// of fewer keys than one chunk, and rows so short that sums over lanes are most of a product:
// unless there are so many keys that what is packed would leave the cache.
constexpr int64_t kMostQueries = 16, kLeastKeys = 64, kManyKeys = 8192;
constexpr int64_t kLeastDepth = 16, kDepthPerQuery = 4;

// Parts that a call is cut into, where there are fewer heads and keys enough. Every part has to
// find a bound of its own, so that short ones cost more; long ones need room for as many
// candidates of each row.
constexpr int64_t kParts = 128;
constexpr int64_t kLeastPartKeys = 8192, kMostPartKeys = 65536, kMostPartEntries = int64_t(1) << 20;
// Bytes of the lists that blocks scanned together may fill, unless those of one row are more.
constexpr int64_t kListBytes = int64_t(16) << 20;

// Rows of one group that read their keys together.
struct Block {
  int64_t head_kv;  // among the key heads of all batches
  Part rows;        // of the group
  KeyRange seen;    // keys outside of which none sees any
};

Block block_of(const AttentionProblem& p, int64_t number) {
  const int64_t per_group = parts(p.group_rows(), kBlockRows), head_kv = number / per_group;
  const Part rows = part_of(p.group_rows(), kBlockRows, number % per_group);
  KeyRange all = {p.length_k, 0};
  for (int64_t i = rows.first, end = rows.first + rows.count; i < end;) {
    const QueryRow first = p.query_of(head_kv, i);
    const int64_t n = std::min(p.length_q - first.row, end - i);
    const KeyRange seen = seen_by_any(p.score_of(first.head_q), first.row, n);
    if (seen.size() > 0) all = {std::min(all.begin, seen.begin), std::max(all.end, seen.end)};
    i += n;
  }
  return {head_kv, rows, all.size() > 0 ? all : KeyRange{0, 0}};
}

// How the keys of all blocks are cut into parts: by the problem alone, whatever the threads.
struct Cut {
  int64_t chunk, parts_per_block, part_keys;

  Cut(const std::vector<Block>& blocks, int64_t rows, int64_t chunk_keys) : chunk(chunk_keys) {
    int64_t longest = 1;
    for (const Block& block : blocks)
      longest = std::max(longest, block.seen.in_units_of(chunk).size());
    const int64_t wanted = kParts / std::max<int64_t>(int64_t(blocks.size()), 1);
    const int64_t least = parts(longest * chunk, std::min(kMostPartKeys, kMostPartEntries / rows));
    const int64_t most = parts(longest * chunk, kLeastPartKeys);
    part_keys = parts(longest, std::max(std::min(wanted, most), least)) * chunk;
    parts_per_block = parts(longest * chunk, part_keys);
  }
  KeyRange part(const Block& block, int64_t number) const {
    const int64_t begin = block.seen.begin / chunk * chunk + number * part_keys;
    return KeyRange{begin, begin + part_keys}.intersection({0, block.seen.end});
  }
};

template <class T>
struct Decoding {
  static constexpr int64_t kEntryBytes = int64_t(sizeof(T) + sizeof(int32_t));
  static constexpr int64_t kAnyBytes = std::numeric_limits<int64_t>::max();

  const ForwardArguments& arguments;
  const AttentionProblem& problem;
  const Kernels<T>& kernels;
  std::vector<Block> blocks;
  const Cut cut;
  std::vector<Work> work;

  explicit Decoding(const ForwardArguments& a)
      : arguments(a),
        problem(a.problem),
        kernels(kernels_for<T>(*a.kernels, a.problem.dtype)),
        blocks(all_blocks(a.problem)),
        cut(blocks, std::max<int64_t>(most_rows(), 1), kernels.chunk_keys),
        work(size_t(std::max(a.threads, 1))) {}

  static std::vector<Block> all_blocks(const AttentionProblem& p) {
    std::vector<Block> blocks;
    for (int64_t i = 0; i < p.key_heads() * parts(p.group_rows(), kBlockRows); ++i)
      blocks.push_back(block_of(p, i));
    return blocks;
  }

  void run() {
    const int64_t row_bytes = cut.parts_per_block * cut.part_keys * kEntryBytes;
    const int64_t rows_together =
        std::max<int64_t>(kListBytes / std::max<int64_t>(row_bytes, 1), 1);
    const int64_t rows = std::max<int64_t>(most_rows(), 1);
    const int64_t together = std::max<int64_t>(rows_together / rows, 1);
    for (int64_t first = 0; first < int64_t(blocks.size()); first += together) {
      const Part some = part_of(int64_t(blocks.size()), together, first / together);
      const auto begin = blocks.begin() + some.first;
      if (!run({begin, begin + some.count}, rows > rows_together ? kListBytes : kAnyBytes))
        run_in_turn(*begin, rows_together);
    }
    if (arguments.work)
      for (const Work& one : work) arguments.work->add(one);
  }

  int64_t most_rows() const { return std::min(problem.group_rows(), kBlockRows); }

  // A block whose rows keep too many keys for all of them at once: a row finds what it would among
  // the others, and keys are read once for every few rows.
  void run_in_turn(const Block& block, int64_t rows_together) {
    for (int64_t i = 0; i < block.rows.count; i += rows_together) {
      const int64_t count = std::min(rows_together, block.rows.count - i);
      run({{block.head_kv, {block.rows.first + i, count}, block.seen}}, kAnyBytes);
    }
  }

  // Neighbours among the blocks that one task scans, for their keys lie side by side: each block
  // finds what it would alone.
  std::vector<Part> bundles_of(const std::vector<Block>& some) const {
    const int64_t most = most_in_bundle(int64_t(some.size()));
    std::vector<Part> bundles;
    for (int64_t i = 0; i < int64_t(some.size()); ++i) {
      if (!bundles.empty() && bundles.back().count < most &&
          lie_together(some[size_t(bundles.back().first)], some[size_t(i)]))
        ++bundles.back().count;
      else
        bundles.push_back({i, 1});
    }
    return bundles;
  }
  bool lie_together(const Block& a, const Block& b) const {
    return problem.batch_of_keys(a.head_kv) == problem.batch_of_keys(b.head_kv) &&
           a.seen.begin == b.seen.begin && a.seen.end == b.seen.end;
  }
  // No more than leave a task for each thread.
  int64_t most_in_bundle(int64_t count) const {
    if (arguments.key.stride_head >= arguments.key.stride_length) return 1;
    const int64_t a_thread = count * cut.parts_per_block / std::max(arguments.threads, 1);
    return std::max<int64_t>(std::min(kBlockRows / most_rows(), a_thread), 1);
  }

  // Whether the lists were no more than `most_bytes`; where they are, nothing has been done.
  bool run(const std::vector<Block>& some, int64_t most_bytes) {
    const int64_t n = cut.parts_per_block, count = int64_t(some.size());
    int64_t rows = 0;
    for (const Block& block : some) rows = std::max(rows, block.rows.count);
    const std::vector<Part> bundles = bundles_of(some);
    int64_t task_rows = 0;
    for (const Part& bundle : bundles) task_rows = std::max(task_rows, bundle.count * rows);
    std::vector<PartList<T>> lists(size_t(count * rows * n));  // of block, row, part
    std::vector<Buffer<T>> values(size_t(count * n));
    std::vector<Buffer<int32_t>> keys(values.size());
    std::atomic<int64_t> bytes{0};
    const std::vector<Work> before = work;
    {
      std::vector<Buffer<char>> workspaces =
          a_thread(kernels.decode_scan_workspace(problem, task_rows, cut.part_keys));
      parallel_for(int64_t(bundles.size()) * n, arguments.threads, [&](int64_t i, int thread) {
        if (bytes > most_bytes) return;
        const Part bundle = bundles[size_t(i / n)];
        const Block& block = some[size_t(bundle.first)];
        DecodeScanTask<T> task = scan_task(block, cut.part(block, i % n));
        task.rows.count *= bundle.count;
        if (task.keys.size() <= 0) return;
        task.workspace = workspaces[size_t(thread)].data();
        kernels.decode_scan(task);
        work[size_t(thread)].add(task.work);
        if ((bytes += entries_of(task) * kEntryBytes) > most_bytes) return;
        keep(task, values[size_t(i)], keys[size_t(i)],
             &lists[size_t(bundle.first * rows * n + i % n)], n);
      });
    }
    if (bytes > most_bytes) {
      work = before;
      return false;
    }
    int64_t most = 0;
    for (int64_t row = 0; row < count * rows; ++row)
      most = std::max(most, entries_of(&lists[size_t(row * n)]));
    std::vector<Buffer<char>> workspaces = a_thread(kernels.decode_row_workspace(problem, most));
    parallel_for(count * rows, arguments.threads, [&](int64_t i, int thread) {
      const Block& block = some[size_t(i / rows)];
      if (i % rows >= block.rows.count) return;
      DecodeRowTask<T> task = row_task(block, block.rows.first + i % rows);
      task.lists = &lists[size_t(i * n)];
      task.parts = n;
      task.entries = entries_of(task.lists);
      task.workspace = workspaces[size_t(thread)].data();
      kernels.decode_row(task);
      work[size_t(thread)].add(task.work);
      const int64_t row = problem.row_number(task.head, task.row);
      if (arguments.support) arguments.support[row] = task.support;
      if (arguments.iterations) arguments.iterations[row] = task.steps;
    });
    return true;
  }

  std::vector<Buffer<char>> a_thread(int64_t bytes) const {
    std::vector<Buffer<char>> workspaces;
    for (size_t t = 0; t < work.size(); ++t) workspaces.emplace_back(bytes);
    return workspaces;
  }

  DecodeScanTask<T> scan_task(const Block& block, KeyRange keys) const {
    DecodeScanTask<T> task = {};
    task.problem = &problem;
    task.query = arguments.query;
    task.key = problem.cached_head(arguments.key, arguments.pages, block.head_kv);
    task.key_stride_head = arguments.key.stride_head;
    task.head_kv = block.head_kv;
    task.rows = block.rows;
    task.keys = keys;
    task.readable = block.seen;
    return task;
  }

  DecodeRowTask<T> row_task(const Block& block, int64_t group_row) const {
    DecodeRowTask<T> task = {};
    task.problem = &problem;
    task.value = problem.cached_head(arguments.value, arguments.pages, block.head_kv);
    const QueryRow of = problem.query_of(block.head_kv, group_row);
    task.head = of.head_q;
    task.row = of.row;
    task.out = problem.query_head(arguments.out, task.head);
    task.tau = static_cast<T*>(arguments.tau) + problem.row_number(task.head, task.row);
    return task;
  }

  // The lists that a scan has left in its workspace; those of one row and another are `step` apart.
  static void keep(const DecodeScanTask<T>& task, Buffer<T>& values, Buffer<int32_t>& keys,
                   PartList<T>* lists, int64_t step) {
    const int64_t total = entries_of(task);
    values = Buffer<T>(total);
    keys = Buffer<int32_t>(total);
    int64_t at = 0;
    for (int64_t i = 0; i < task.rows.count; ++i) {
      const int64_t count = task.counts[i], from = i * task.list_stride;
      lists[i * step] = {values.data() + at, keys.data() + at, count};
      if (count <= 0) continue;
      std::memcpy(values.data() + at, task.list_values + from, size_t(count) * sizeof(T));
      std::memcpy(keys.data() + at, task.list_keys + from, size_t(count) * sizeof(int32_t));
      at += count;
    }
  }

  static int64_t entries_of(const DecodeScanTask<T>& task) {
    int64_t entries = 0;
    for (int64_t i = 0; i < task.rows.count; ++i) entries += std::max<int64_t>(task.counts[i], 0);
    return entries;
  }
  int64_t entries_of(const PartList<T>* lists) const {
    int64_t entries = 0;
    for (int64_t i = 0; i < cut.parts_per_block; ++i)
      entries += std::max<int64_t>(lists[i].count, 0);
    return entries;
  }
};

}  // namespace

bool are_decoded(int64_t queries, int64_t keys, int64_t head_dim) {
  if (queries > kMostQueries) return false;
  if (keys >= kManyKeys) return true;
  // A short sequence with itself rounds as it does where gradients are wanted.
  if (queries > 1 && queries >= keys) return false;
  const bool is_deep = head_dim >= std::max(kLeastDepth, kDepthPerQuery * queries);
  return is_deep && (queries == 1 || keys >= kLeastKeys);
}

bool is_decoding(const ForwardArguments& a) {
  if (a.pages.data && (a.keep || a.tiles))
    throw std::invalid_argument("a block_table is for calls without gradients or statistics");
  if (a.keep || a.tiles) return false;
  const AttentionProblem& p = a.problem;
  return a.pages.data || are_decoded(p.length_q, p.length_k, p.head_dim);
}

void decode(const ForwardArguments& arguments) {
  if (arguments.problem.dtype == Dtype::kFloat64)
    Decoding<double>(arguments).run();
  else
    Decoding<float>(arguments).run();
}

}  // namespace adasplash2
