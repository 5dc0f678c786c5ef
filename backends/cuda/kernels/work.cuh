// What a block of threads works on: heads, blocks of their queries or keys, and where these are in
// memory. Numbers of blocks are unsigned: a signed division takes registers that some kernels do
// not have.
#pragma once

#include "score.cuh"

namespace adasplash2 {

// --- heads and blocks ----------------------------------------------------------------------

// A query head, of `batch * heads_q` in all.
struct Head {
  int head_row, batch, head, kv_head;

  template <class P>
  __device__ __forceinline__ Head(const P& p, int head_row)
      : head_row(head_row),
        batch(head_row / p.heads_q),
        head(head_row % p.heads_q),
        kv_head(head / p.gqa_group) {}
  // The number of its key head.
  template <class P>
  __device__ __forceinline__ int kv_row(const P& p) const {
    return batch * p.heads_kv + kv_head;
  }
};

// A key head, of `batch * heads_kv` in all.
struct KeyHead {
  int kv_row, batch, kv_head;

  template <class P>
  __device__ __forceinline__ KeyHead(const P& p, int kv_row)
      : kv_row(kv_row), batch(kv_row / p.heads_kv), kv_head(kv_row % p.heads_kv) {}
  // The first of the query heads that share the keys: in its sequence, and of all.
  template <class P>
  __device__ __forceinline__ int first_head(const P& p) const {
    return kv_head * p.gqa_group;
  }
  template <class P>
  __device__ __forceinline__ int head_row(const P& p) const {
    return batch * p.heads_q + first_head(p);
  }
};

// A key, of `batch * heads_kv * length_k` in all.
struct Key : KeyHead {
  int key;

  __device__ __forceinline__ Key(const Params& p, int number)
      : KeyHead(p, number / p.length_k), key(number % p.length_k) {}
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
struct KeyBlock : KeyHead {
  int first;  // key

  __device__ __forceinline__ KeyBlock(const Params& p, u32 number)
      : KeyBlock(p, number, (p.length_k + rows - 1) / rows) {}

 private:
  __device__ __forceinline__ KeyBlock(const Params& p, u32 number, int blocks)
      : KeyHead(p, number / blocks), first(number % blocks * rows) {}
};

// --- addresses -----------------------------------------------------------------------------

// Row number `row` of those that stand `stride` elements apart, of which the first is at `first`.
template <class T>
__device__ __forceinline__ T* row_in(T* first, i64 stride, i64 row) {
  return first + row * stride;
}
template <class T = Scalar>
__device__ __forceinline__ T* row_of(const View& view, int batch, int head, int row) {
  return static_cast<T*>(view.data) + batch * view.batch + head * view.head + row * view.row;
}

// Start copying rows [first, first + rows) of one head into a tile; rows from `length` on and
// columns from `width` on become zeros. Visible after cp_async_wait() and a barrier.
template <int rows, int width, int threads>
__device__ __forceinline__ void load_tile(char* tile, const Scalar* head, i64 row_stride, int first,
                                          int length) {
  constexpr int dim = padded<width>;
  constexpr int per_chunk = 16 / int(sizeof(Scalar));
  constexpr int chunks = dim / per_chunk;
  for (int i = threadIdx.x; i < rows * chunks; i += threads) {
    const int row = i / chunks, at = i % chunks * per_chunk;
    char* to = tile + row * tile_stride<dim> + i % chunks * 16;
    const bool inside = first + row < length;
    const Scalar* from = row_in(head, row_stride, inside ? first + row : 0);
    if constexpr (kAligned) {
      const int bytes = inside && at < width ? 16 : 0;
      cp_async16(shared_address(to), from + (at < width ? at : 0), bytes);
    } else {
#pragma unroll
      for (int j = 0; j < per_chunk; ++j)
        reinterpret_cast<Scalar*>(to)[j] = inside && at + j < width ? from[at + j] : Scalar{};
    }
  }
}

// --- what dense tiles leave -----------------------------------------------------------------

// The marks in Params::flat are read as bool: whether rows are not listed.
static_assert(kListed == 0 && kToRetry && kFlat && kUnsafe);

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
