// What a block of threads works on: heads, blocks of their queries or keys, and where these are in
// memory.
#pragma once

#include "score.cuh"

namespace adasplash2 {

// --- addresses -----------------------------------------------------------------------------

// Row number `row` of those that stand `stride` elements apart, of which the first is at `first`.
template <class T>
__device__ __forceinline__ T* row_in(T* first, i64 stride, i64 row) {
  return first + row * stride;
}
__device__ __forceinline__ Scalar* row_of(const View& view, int batch, int head, int row) {
  return static_cast<Scalar*>(view.data) + batch * view.batch + head * view.head + row * view.row;
}

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

// A row by its place in the arena, which has room for whole row blocks, head by head.
struct ArenaRow : Head {
  int at, row;
  bool inside;

  __device__ __forceinline__ ArenaRow(const Params& p, int at)
      : Head(p, at / (p.row_blocks * kRowBlock)),
        at(at),
        row(at % (p.row_blocks * kRowBlock)),
        inside(head_row < p.batch * p.heads_q && row < p.length_q) {}
};

// Unsigned numbers of blocks: a signed division takes registers that some kernels do not have.

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

// Rows of decoded calls are numbered head by head: those that share a key head follow each other.
struct SharedRows : KeyHead {
  int first_row;

  __device__ __forceinline__ SharedRows(const DecodeParams& p, int kv_row)
      : KeyHead(p, kv_row), first_row(kv_row * rows_of(p)) {}
  static __device__ __forceinline__ int rows_of(const DecodeParams& p) {
    return p.gqa_group * p.length_q;
  }
};

// One of them by its number.
struct QueryRow : Head {
  int at, query;

  __device__ __forceinline__ QueryRow(const DecodeParams& p, int at)
      : Head(p, at / p.length_q), at(at), query(at % p.length_q) {}
  __device__ __forceinline__ Range seen(const DecodeParams& p) const {
    return range_of(p, batch, query);
  }
  __device__ __forceinline__ Scalar* output(const DecodeParams& p) const {
    return row_of(p.o, batch, head, query);
  }
};

// A tile of rows that share keys, and one of the splits of these keys.
struct RowTile : SharedRows {
  int first, rows, split;  // first row, and how many there are

  // Number `blockIdx.x` of those of `splits` splits. Blocks that read the same keys have
  // neighbouring numbers: the keys come from memory once, then from the L2.
  template <int tile>
  static __device__ __forceinline__ RowTile of(const DecodeParams& p, int splits) {
    const int tiles = (rows_of(p) + tile - 1) / tile;
    const int keys = blockIdx.x / tiles, number = blockIdx.x % tiles * tile;
    RowTile b{SharedRows(p, keys / splits)};
    b.first = b.first_row + number;
    b.rows = min(tile, rows_of(p) - number);
    b.split = keys % splits;
    return b;
  }
  // The number, among the tiles of all, of the one with row `row` of those that share keys.
  template <int tile>
  static __device__ __forceinline__ int number(const DecodeParams& p, int kv_row, int row) {
    return kv_row * ((rows_of(p) + tile - 1) / tile) + row / tile;
  }

 private:
  __device__ __forceinline__ explicit RowTile(const SharedRows& of) : SharedRows(of) {}
};

// Part `number` of so many, which differ by one at most.
__device__ __forceinline__ Range share_of(const Range& all, int number, int parts) {
  const int count = all.end - all.begin, each = count / parts, longer = count % parts;
  const int begin = all.begin + number * each + min(number, longer);
  return {begin, begin + each + (number < longer)};
}

// A query of those that share keys, as columns keep it in one number.
struct GroupRow {
  int member, row;  // of the query heads, and the head's query

  __device__ __forceinline__ GroupRow(const Params& p, int packed)
      : member(packed >> p.row_bits), row(packed & ((1 << p.row_bits) - 1)) {}
  static __device__ __forceinline__ int pack(const Params& p, int member, int row) {
    return member << p.row_bits | row;
  }
};

// --- numbers -------------------------------------------------------------------------------

// Of blocks of `rows` queries, or keys, of all heads.
template <int rows>
__device__ __forceinline__ int query_blocks(const Params& p) {
  return p.batch * p.heads_q * ((p.length_q + rows - 1) / rows);
}
template <int rows>
__device__ __forceinline__ int key_blocks(const Params& p) {
  return p.batch * p.heads_kv * ((p.length_k + rows - 1) / rows);
}

// Numbers of a query of a head among all: where a head has only its queries, and where its last row
// block is full too. And that of its row block.
__device__ __forceinline__ i64 row_number(const Params& p, int head_row, int row) {
  return i64(head_row) * p.length_q + row;
}
__device__ __forceinline__ i64 slot_number(const Params& p, int head_row, int row) {
  return i64(head_row) * p.row_blocks * kRowBlock + row;
}
__device__ __forceinline__ int row_block_of(const Params& p, int head_row, int row) {
  return head_row * p.row_blocks + int(u32(row) / kRowBlock);
}
// The place in the arena of row `i` of a row block, and the row block of a place.
__device__ __forceinline__ int place_of(int row_block, int i) { return row_block * kRowBlock + i; }
__device__ __forceinline__ int row_block_at(int place) { return place / kRowBlock; }
__device__ __forceinline__ Head head_of_row_block(const Params& p, int row_block) {
  return Head(p, row_block / p.row_blocks);
}
__device__ __forceinline__ int all_row_blocks(const Params& p) {
  return p.batch * p.heads_q * p.row_blocks;
}
// Row blocks of the heads that share keys; they are neighbours, also of several sequences.
__device__ __forceinline__ int group_row_blocks(const Params& p) {
  return p.gqa_group * p.row_blocks;
}
// Where those of a head, or what is kept of them, begin.
__device__ __forceinline__ u8* of_row_blocks(const Params& p, u8* array, int head_row) {
  return array + i64(head_row) * p.row_blocks;
}
// Likewise of a key head's keys.
__device__ __forceinline__ int* of_keys(const Params& p, int* array, int kv_row) {
  return array + i64(kv_row) * p.length_k;
}

// --- where rows, survivors and tiles are kept ----------------------------------------------

// Survivors of a listed row block, row after row: their columns, and their weights.
__device__ __forceinline__ KeyNumber* columns_of(const Params& p, int row_block) {
  char* arena = static_cast<char*>(p.columns) + i64(row_block) * kRowBlock * kArenaBytes;
  return reinterpret_cast<KeyNumber*>(arena);
}
__device__ __forceinline__ float* weights_of(const Params& p, int row_block) {
  return p.weights + i64(row_block) * kRowBlock * kArenaRow;
}
// A flat row block has none: its dense kernels keep `count` numbers of each row in their place.
template <class T, int count>
__device__ __forceinline__ T* kept_of_flat_row(const Params& p, int head_row, int row) {
  static_assert(count * int(sizeof(T)) <= kArenaBytes);
  KeyNumber* arena = columns_of(p, row_block_of(p, head_row, row));
  return reinterpret_cast<T*>(arena) + row % kRowBlock * count;
}

// Tell stats() of a pair in the support.
template <class P>
__device__ __forceinline__ void mark_tile(const P& p, int head_row, int row, int column) {
  constexpr int side = kStatsTile;
  const int down = (p.length_q + side - 1) / side, across = (p.length_k + side - 1) / side;
  p.tiles[(i64(head_row) * down + row / side) * across + column / side] = 1;
}

// --- caches and tiles ----------------------------------------------------------------------

// Keys or values of a sequence and head, in pages or not.
template <bool paged>
struct Cache {
  const Scalar* head;
  i64 row, page;
  const int* table;
  int page_size, last_page;

  __device__ __forceinline__ Cache(const DecodeParams& p, const View& view, int batch, int kv_head)
      : head(row_of(view, paged ? 0 : batch, kv_head, 0)),
        row(view.row),
        page(view.batch),
        table(paged ? p.table + batch * p.table_batch : nullptr),
        page_size(p.page_size),
        last_page(int(p.pages) - 1) {}
  __device__ __forceinline__ const Scalar* at(int key) const {
    if constexpr (!paged) return row_in(head, row, key);
    const u32 number = u32(key) / u32(page_size), place = u32(key) - number * u32(page_size);
    const int held = max(0, min(table[number], last_page));
    return row_in(row_in(head, page, held), row, place);
  }
};

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

// Whether of the query heads from `head_row` on that share keys a row block is not listed which has
// a query from `start` on. `parts` threads ask together, and each looks at some.
__device__ __forceinline__ bool is_any_flat(const Params& p, int head_row, int start, int part,
                                            int parts) {
  const u8* flat = of_row_blocks(p, p.flat, head_row);
  bool any = false;
  for (int i = part; i < group_row_blocks(p); i += parts)
    any |= i % p.row_blocks * kRowBlock + kRowBlock > start && flat[i];
  return any;
}

// What comes out of dense tiles and is not finite is marked, by the warp that owns its 16 rows or
// keys, and done again by exact.cu. Each function returns whether some lane of the warp says so.

__device__ __forceinline__ bool mark_if(bool mine, u8* mark, int* any) {
  const bool unsafe = __any_sync(kAllLanes, mine);
  if (unsafe && lane_id() == 0) *mark = kUnsafe, *any = 1;
  return unsafe;
}
__device__ __forceinline__ bool mark_output_if(bool mine, const Params& p, int head_row, int row) {
  return mark_if(mine, p.flat + row_block_of(p, head_row, row), p.unsafe_output);
}
__device__ __forceinline__ bool mark_rows_if(bool mine, const Params& p, int head_row, int row) {
  u8* mark = p.unsafe_rows + row_block_of(p, head_row, row);
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
