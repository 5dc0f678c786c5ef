// Where work is: a problem's sizes, the rows or keys that a block's number stands for, and the
// address of a row.
#pragma once

#include "score.h"

namespace adasplash2 {

// Numbers [first, first + count).
struct Part {
  int64_t first, count;
};

ADASPLASH2_INLINE int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Part `number` of n things cut into parts of `size`, of which the last may have fewer.
ADASPLASH2_INLINE Part part_of(int64_t n, int64_t size, int64_t number) {
  const int64_t first = number * size;
  return {first, first + size < n ? size : n - first};
}

// Base pointer and strides (in elements) of (batch, heads, length, head_dim); head_dim is dense.
struct TensorRef {
  void* data;
  int64_t stride_batch, stride_head, stride_length;
};

// The rows of one head.
struct HeadRef {
  void* data;
  int64_t stride;  // elements between rows

  // The same rows, numbered from row `first` on. That need not be a row: only what is read from
  // there must be one.
  ADASPLASH2_INLINE HeadRef from(int64_t first, int64_t element_size) const {
    const uintptr_t offset = uintptr_t(first * stride * element_size);
    return {reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(data) + offset), stride};
  }
};

template <class S>
ADASPLASH2_INLINE S* row_of(HeadRef head, int64_t i) {
  return static_cast<S*>(head.data) + i * head.stride;
}

// Where the rows of a cache lie in pages of `page_size` rows: row i of sequence b is row
// i % page_size of page data[b * stride + i / page_size], of `pages` that there are. Numbers of no
// page stand for the nearest one. Null where rows lie one behind another.
struct BlockTable {
  const int32_t* data;
  int64_t stride, page_size, pages;
};

// The rows of one head of a cache.
struct CacheRef {
  HeadRef rows;      // of page 0, where there are pages
  BlockTable table;  // of the sequence
  int64_t page_stride;
};

template <class S>
ADASPLASH2_INLINE S* row_of(const CacheRef& head, int64_t i) {
  const BlockTable& table = head.table;
  if (!table.data) return row_of<S>(head.rows, i);
  const uint32_t row = uint32_t(i), size = uint32_t(table.page_size);
  const int64_t number = table.data[row / size], last = table.pages - 1;
  const int64_t page = number < 0 ? 0 : number < last ? number : last;
  return row_of<S>(head.rows, row % size) + page * head.page_stride;
}

// How many rows from row i on surely lie one stride apart.
ADASPLASH2_INLINE int64_t run_from(const CacheRef& head, int64_t i) {
  const BlockTable& table = head.table;
  return table.data ? table.page_size - i % table.page_size : INT64_MAX;
}

// A query: its head among those of all batches, and its number in it.
struct QueryRow {
  int64_t head_q, row;
};

struct AttentionProblem {
  int64_t batch, heads_q, heads_kv, length_q, length_k, head_dim, head_dim_v;
  Score score;
  const Alpha* alphas;  // of the heads, strides as those of an Operand
  int64_t alpha_stride_batch, alpha_stride_head;
  Dtype dtype;

  // Heads of all batches are numbered through: query heads and, apart, key heads.
  ADASPLASH2_INLINE int64_t query_heads() const { return batch * heads_q; }
  ADASPLASH2_INLINE int64_t key_heads() const { return batch * heads_kv; }
  ADASPLASH2_INLINE int64_t batch_of_keys(int64_t head_kv) const { return head_kv / heads_kv; }
  // Query heads that share a key head, which are neighbours.
  ADASPLASH2_INLINE int64_t gqa_group() const { return heads_q / heads_kv; }

  // The rows of such a group are numbered through too.
  ADASPLASH2_INLINE int64_t group_rows() const { return gqa_group() * length_q; }
  ADASPLASH2_INLINE int64_t group_row(int64_t head_in_group, int64_t row) const {
    return head_in_group * length_q + row;
  }
  // Rows behind the last of a group are of the next one.
  ADASPLASH2_INLINE QueryRow query_of(int64_t head_kv, int64_t group_row) const {
    return {head_kv * gqa_group() + group_row / length_q, group_row % length_q};
  }

  ADASPLASH2_INLINE int64_t rows() const { return query_heads() * length_q; }
  ADASPLASH2_INLINE int64_t row_number(int64_t head_q, int64_t row) const {
    return head_q * length_q + row;
  }
  ADASPLASH2_INLINE int64_t row_blocks_per_head() const { return parts(length_q, kBlockRows); }
  ADASPLASH2_INLINE int64_t row_blocks() const { return query_heads() * row_blocks_per_head(); }

  // Of a query head among those of all batches.
  ADASPLASH2_INLINE int64_t batch_of_queries(int64_t number) const { return number / heads_q; }
  ADASPLASH2_INLINE int64_t head_in_batch(int64_t number) const { return number % heads_q; }
  ADASPLASH2_INLINE HeadScore score_of(int64_t number) const {
    return score.of_head(batch_of_queries(number), head_in_batch(number), number);
  }
  ADASPLASH2_INLINE const Alpha& alpha_of(int64_t number) const {
    return alphas[batch_of_queries(number) * alpha_stride_batch +
                  head_in_batch(number) * alpha_stride_head];
  }

  ADASPLASH2_INLINE int64_t element_size() const { return bytes_of(dtype); }
  ADASPLASH2_INLINE HeadRef query_head(const TensorRef& tensor, int64_t number) const {
    return head_of(tensor, batch_of_queries(number), head_in_batch(number));
  }
  ADASPLASH2_INLINE HeadRef key_head(const TensorRef& tensor, int64_t number) const {
    return head_of(tensor, batch_of_keys(number), number % heads_kv);
  }
  // Of a cache, whose batch stride is that of its pages where there are any.
  ADASPLASH2_INLINE CacheRef cached_head(const TensorRef& tensor, BlockTable table,
                                         int64_t number) const {
    if (!table.data) return {key_head(tensor, number), table, 0};
    table.data += batch_of_keys(number) * table.stride;
    return {head_of(tensor, 0, number % heads_kv), table, tensor.stride_batch};
  }

 private:
  ADASPLASH2_INLINE HeadRef head_of(const TensorRef& tensor, int64_t b, int64_t head) const {
    const int64_t offset = b * tensor.stride_batch + head * tensor.stride_head;
    return {static_cast<char*>(tensor.data) + offset * element_size(), tensor.stride_length};
  }
};

// The rows of a task that query rows own.
struct RowBlock {
  int64_t number;           // among the row blocks of all heads
  int64_t head_q, head_kv;  // among the heads of all batches
  int64_t row_begin, rows;  // within the head
  int64_t first_row;        // row_begin among the rows of all heads
};

ADASPLASH2_INLINE RowBlock row_block(const AttentionProblem& p, int64_t number) {
  const int64_t head = number / p.row_blocks_per_head();
  const Part rows = part_of(p.length_q, kBlockRows, number % p.row_blocks_per_head());
  return {number,     head,       head / p.gqa_group(),
          rows.first, rows.count, p.row_number(head, rows.first)};
}
// By its number among those of a query head.
ADASPLASH2_INLINE RowBlock row_block_of(const AttentionProblem& p, int64_t head_q, int64_t number) {
  return row_block(p, head_q * p.row_blocks_per_head() + number);
}

// The row block that comes at `turn`. Head by head, so that one head's keys and values stay in the
// cache; within it the last rows first: where rows see more and more keys, no thread starts on a
// long one last.
ADASPLASH2_INLINE RowBlock row_block_at(const AttentionProblem& p, int64_t turn) {
  const int64_t blocks = p.row_blocks_per_head(), block = turn % blocks;
  return row_block(p, turn - block + (blocks - 1 - block));
}

// The keys of a task that keys own, and the query heads that see them.
struct KeyBlock {
  int64_t head_kv, first_head_q;  // among the heads of all batches
  int64_t key_begin, keys;        // within the head
};

// Blocks of `size` keys. The first keys of a head come first: where rows see more and more keys,
// these are the ones that most rows see.
ADASPLASH2_INLINE KeyBlock key_block_at(const AttentionProblem& p, int64_t size, int64_t turn) {
  const int64_t blocks = parts(p.length_k, size), head = turn / blocks;
  const Part keys = part_of(p.length_k, size, turn % blocks);
  return {head, head * p.gqa_group(), keys.first, keys.count};
}

}  // namespace adasplash2
