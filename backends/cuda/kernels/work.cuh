// What a block of threads works on: heads, and blocks of their queries or keys. Numbers of blocks
// are unsigned: a signed division takes registers that some kernels do not have.
#pragma once

#include "common.cuh"

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
// in the L2, and within it the longest rows of a causal problem first.
template <int rows>
struct QueryBlock : Head {
  int first;  // query

  __device__ __forceinline__ QueryBlock(const Params& p, u32 number)
      : QueryBlock(p, number, (p.length_q + rows - 1) / rows) {}

 private:
  __device__ __forceinline__ QueryBlock(const Params& p, u32 number, int blocks)
      : Head(p, number / blocks), first((blocks - 1 - number % blocks) * rows) {}
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

}  // namespace adasplash2
