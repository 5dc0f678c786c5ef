// What a block of threads works on: heads, and blocks of their queries or keys. Numbers of blocks
// are unsigned: a signed division takes registers that some kernels do not have.
#pragma once

#include "score.cuh"

namespace adasplash2 {

// A query head, of `batch * heads_q` in all.
struct Head {
  int head_row, batch, head, kv_head;

  __device__ __forceinline__ Head(const Params& p, int head_row)
      : head_row(head_row),
        batch(head_row / p.heads_q),
        head(head_row % p.heads_q),
        kv_head(head / p.gqa_group) {}
};

// Number `number` of the blocks of `rows` queries: head by head, so that the keys of one head stay
// in the L2, and within it in the order of nth_row_block().
template <int rows>
struct QueryBlock : Head {
  int first;  // query

  __device__ __forceinline__ QueryBlock(const Params& p, u32 number)
      : QueryBlock(p, number, (p.length_q + rows - 1) / rows) {}

 private:
  __device__ __forceinline__ QueryBlock(const Params& p, u32 number, int blocks)
      : Head(p, number / blocks), first(nth_row_block(number % blocks, blocks) * rows) {}
};

// Number `number` of the blocks of `rows` keys.
template <int rows>
struct KeyBlock {
  int kv_row, batch, kv_head, first;  // key

  __device__ __forceinline__ KeyBlock(const Params& p, u32 number) {
    const int blocks = (p.length_k + rows - 1) / rows;
    kv_row = number / blocks;
    batch = kv_row / p.heads_kv, kv_head = kv_row % p.heads_kv;
    first = number % blocks * rows;
  }
  // The first of the query heads that share the keys.
  __device__ __forceinline__ int head_row(const Params& p) const {
    return batch * p.heads_q + kv_head * p.gqa_group;
  }
};

// Whether dense tiles write the gradients of a key head's keys, and no list has a part in them.
__device__ __forceinline__ bool is_all_flat(const Params& p, int kv_row) {
  return p.all_flat && p.all_flat[kv_row] == kAllFlat;
}

// What comes out of dense tiles and is not finite is marked, by the warp that owns its 16 rows or
// keys, and done again by exact.cu. Each function returns whether some lane of the warp says so.

__device__ __forceinline__ bool mark_if(bool mine, u8* mark, int* any) {
  const bool unsafe = __any_sync(kAllLanes, mine);
  if (unsafe && lane_id() == 0) *mark = kUnsafe, *any = 1;
  return unsafe;
}
__device__ __forceinline__ bool mark_output_if(bool mine, const Params& p, int head_row, int row) {
  return mark_if(mine, p.flat + i64(head_row) * p.row_blocks + row / kRowBlock, p.unsafe_output);
}
__device__ __forceinline__ bool mark_rows_if(bool mine, const Params& p, int head_row, int row) {
  u8* mark = p.unsafe_rows + i64(head_row) * p.row_blocks + row / kRowBlock;
  return mark_if(mine, mark, p.unsafe_grads);
}
__device__ __forceinline__ u8* mark_of_keys(const Params& p, int kv_row, int key, bool of_values) {
  const int blocks = (p.length_k + kRowBlock - 1) / kRowBlock;
  return p.unsafe_keys + 2 * (i64(kv_row) * blocks + key / kRowBlock) + of_values;
}
__device__ __forceinline__ bool mark_keys_if(bool mine, const Params& p, int kv_row, int key,
                                             bool of_values) {
  return mark_if(mine && key < p.length_k, mark_of_keys(p, kv_row, key, of_values),
                 p.unsafe_grads + 1);
}

}  // namespace adasplash2
