// Everything after the scan that works on single survivors: the output, and the backward as
// gathers. Query rows read the columns in the arena as they are (CSR); key columns read the rows of
// theirs (CSC), put there by counting.
//
// Backward, per row: dp_j = dO . v_j, delta = sum u dp / sum u, ds_j = u_j (dp_j - delta),
// dQ = scale sum ds_j k_j; per column: dK = scale sum ds_i q_i, dV = sum p_i dO_i.
//
// Rows and columns of survivors are all the memory that it takes: rows of q, k, v and dO are read
// anyway, so that both sides find dp and, where alpha has a closed form, x = z - tau from them.
#include "score.cuh"
#include "work.cuh"

namespace adasplash2 {

constexpr int kThreads = kElementThreads;
// Survivors whose rows a lane loads at once. Their products are 2 * kBatch sums, as many as a row
// has lanes at least: each lane ends with one.
constexpr int kBatch = 4;
constexpr bool kKeepsWeights = ADASPLASH2_KEEPS_WEIGHTS;

// body(item) for each of a block's items that is wanted; all `items` are distributed evenly over
// blocks. Mostly none is wanted. So one lane asks for each, all at once: a block for each item,
// which only asks and ends, took longer than all else. (Float32 leaves no registers for this: there
// a block has one item.)
template <class Wanted, class Body>
__device__ __forceinline__ void for_items(int items, const Wanted& wanted, const Body& body) {
  if constexpr (!kHalf) {
    if (wanted(blockIdx.x)) body(blockIdx.x);
    return;
  }
  static_assert(kMostItems <= 32);
  const int each = (items + gridDim.x - 1) / gridDim.x, first = blockIdx.x * each;
  const int mine = first + lane_id();
  u32 left = __ballot_sync(kAllLanes, lane_id() < each && mine < items && wanted(mine));
#pragma unroll 1
  for (; left; left &= left - 1) body(first + __ffs(left) - 1);
}

// body(row) for each listed row: an item has one for each team of `lanes` lanes, and the last item
// may have fewer. A warp's rows are all of one row block; flat ones are skipped.
template <int lanes, class Body>
__device__ __forceinline__ void for_listed_rows(const Params& p, const Body& body) {
  constexpr int kRows = kThreads / lanes;
  static_assert(kRowBlock % (32 / lanes) == 0);
  const int row_blocks = all_row_blocks(p), of_warp = warp_id() * (32 / lanes);
  const auto wanted = [&](int item) {
    const int row_block = row_block_at(item * kRows + of_warp);
    return row_block < row_blocks && !p.flat[row_block];
  };
  for_items((row_blocks * kRowBlock + kRows - 1) / kRows, wanted,
            [&](int item) { body(ArenaRow(p, item * kRows + int(threadIdx.x) / lanes)); });
}

// The column of a saved survivor, in its range whatever became of it.
__device__ __forceinline__ int column_of(const Params& p, KeyNumber saved) {
  return int(min(u32(saved), u32(p.length_k - 1)));
}

// The first of the rows of one (batch, key head)'s columns.
__device__ __forceinline__ RowNumber* rows_of(const Params& p, int kv_row) {
  return static_cast<RowNumber*>(p.rows) +
         i64(kv_row) * group_row_blocks(p) * (kRowBlock * kArenaRow);
}

// Where no scan comes first all row blocks start as flat ones, of which nothing is known. Heads
// whose queries, keys or values are not all finite are to be scanned after all: dense tiles may not
// see that a query is infinite, and what they spread a NaN to has to be done again.

template <int width>
__device__ __forceinline__ bool has_infinite(const Scalar* rows, i64 stride, int first,
                                             int length) {
  constexpr int kChunks = (width + 7) / 8;
  bool found = false;
#pragma unroll 4
  for (int i = threadIdx.x; i < kCheckRows * kChunks; i += kThreads) {
    float x[8] = {};
    if (const int row = first + i / kChunks; row < length)
      load8<width>(row_in(rows, stride, row), i % kChunks * 8, x);
#pragma unroll
    for (float value : x) found |= !is_finite(value);
  }
  return found;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    check_finite(const __grid_constant__ Params p) {
  start_next_and_await();
  const int blocks_of_keys = key_blocks<kCheckRows>(p);
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.unsafe_output = 0;
  int first_head, heads;  // whose scores what is looked at has a part in
  bool found;
  if (int(blockIdx.x) < blocks_of_keys) {
    const KeyBlock<kCheckRows> b(p, blockIdx.x);
    first_head = b.head_row(p), heads = p.gqa_group;
    if (b.first == 0 && threadIdx.x == 0) poison_no_keys(p, b.kv_row);
    const Scalar *keys = row_of(p.k, b.batch, b.kv_head, 0),
                 *values = row_of(p.v, b.batch, b.kv_head, 0);
    found = has_infinite<kHeadDim>(keys, p.k.row, b.first, p.length_k) ||
            has_infinite<kHeadDimV>(values, p.v.row, b.first, p.length_k);
  } else {
    const QueryBlock<kCheckRows> b(p, blockIdx.x - blocks_of_keys);
    first_head = b.head_row, heads = 1;
    const int row = b.first + threadIdx.x;
    if (threadIdx.x < kCheckRows && row < p.row_blocks * kRowBlock) {
      const i64 at = slot_number(p, first_head, row);
      p.row_start[at].top = -kInf, p.row_count[at].bound = -kInf;
    }
    found = has_infinite<kHeadDim>(row_of(p.q, b.batch, b.head, 0), p.q.row, b.first, p.length_q);
  }
  if (!__syncthreads_or(found)) return;
  u8* flat = of_row_blocks(p, p.flat, first_head);
  for (int i = threadIdx.x; i < heads * p.row_blocks; i += kThreads) flat[i] = kToRetry;
}

constexpr int kOutputLanes = ADASPLASH2_OUTPUT_LANES;

__device__ __forceinline__ void output_row(const Params& p, const ArenaRow& r) {
  if (!r.inside) return;
  const int count = p.row_count[r.at].survivors;
  const int first_entry = p.row_start[r.at].entry;
  const KeyNumber* columns = columns_of(p, row_block_at(r.at)) + first_entry;
  const float* weights = weights_of(p, row_block_at(r.at)) + first_entry;
  const Scalar* values = row_of(p.v, r.batch, r.kv_head, 0);
  const int at = threadIdx.x % kOutputLanes * 8;
  float out[8];
#pragma unroll
  for (float& x : out) x = count < 0 ? kNaN : 0.f;
  float mass = 0.f;
  for (int first = 0; first < count; first += kBatch) {
    int column[kBatch];
    float x[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      column[i] = first + i < count ? int(columns[first + i]) : -1;
      x[i] = first + i < count ? weights[first + i] : 0.f;
    }
    float value[kBatch][8];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      load8<kHeadDimV>(row_in(values, p.v.row, column[i]), at, value[i], column[i] >= 0);
    if constexpr (!kKeepsWeights)
      if (first == 0 && at == 0) p.first_weight[r.at] = x[0];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float prob = column[i] >= 0 ? probability(x[i], p.r) : 0.f;
      if (prob == 0.f) continue;  // a power may underflow: nothing is taken, not even a NaN
      mass += prob;
#pragma unroll
      for (int j = 0; j < 8; ++j) out[j] = fmaf(prob, value[i][j], out[j]);
    }
  }
  if (count > 0) {
    const float factor = 1.f / mass;
#pragma unroll
    for (float& x : out) x *= factor;
  }
  store8<kHeadDimV>(row_of(p.o, r.batch, r.head, r.row), at, out);
}

extern "C" __global__ void __launch_bounds__(kThreads) output(const __grid_constant__ Params p) {
  start_next_and_await();
  for_listed_rows<kOutputLanes>(p, [&](const ArenaRow& r) { output_row(p, r); });
}

// Count the survivors of each column.
//
// What the forward saved may have been written over meanwhile: the rows of a row block whose lists
// do not follow each other are taken for poisoned, and columns are kept in their range.
__device__ __forceinline__ void count_columns_of(const Params& p, int row_block) {
  bool broken = false;
  if (threadIdx.x < kRowBlock) {
    const int at = place_of(row_block, threadIdx.x), count = p.row_count[at].survivors;
    const bool last = threadIdx.x == kRowBlock - 1;
    const int next = last ? p.row_start[at].entry + max(count, 0) : p.row_start[at + 1].entry;
    broken = count < kPoisoned || count > kRowBlock * kArenaRow ||
             next != p.row_start[at].entry + max(count, 0) ||
             (threadIdx.x == 0 && p.row_start[at].entry != 0) ||
             (last && next > kRowBlock * kArenaRow);
  }
  if (__syncthreads_or(broken)) {
    if (threadIdx.x < kRowBlock)
      p.row_count[place_of(row_block, threadIdx.x)].survivors = kPoisoned;
    return;
  }
  const int last = place_of(row_block, kRowBlock - 1);
  const int total = p.row_start[last].entry + max(p.row_count[last].survivors, 0);
  const int kv_row = head_of_row_block(p, row_block).kv_row(p);
  int* counts = of_keys(p, p.column_count, kv_row);
  const KeyNumber* columns = columns_of(p, row_block);
  for (int first = 0; first < total; first += kThreads) {
    const int i = first + threadIdx.x;
    const u32 inside = __ballot_sync(kAllLanes, i < total);
    if (i >= total) break;
    // One atomic for all lanes with the same column: every row has a sink's.
    const int column = column_of(p, columns[i]);
    const u32 peers = __match_any_sync(inside, column);
    if (lane_id() == __ffs(peers) - 1) atomicAdd(counts + column, __popc(peers));
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    count_columns(const __grid_constant__ Params p) {
  start_next_and_await();
  for_items(
      all_row_blocks(p), [&](int row_block) { return !p.flat[row_block]; },
      [&](int row_block) { count_columns_of(p, row_block); });
}

// Sum of `mine` over the threads before this one, and over all of them. `sums` is shared memory.
template <int threads>
__device__ __forceinline__ int preceding(int mine, int (&sums)[threads / 32], int& all) {
  constexpr int kWarps = threads / 32;
  const int before = sum_upto(mine);
  __syncthreads();  // sums of the call before are read
  if (lane_id() == 31) sums[warp_id()] = before;
  __syncthreads();
  const int warp = lane_id() < kWarps ? sums[lane_id()] : 0;
  const int warps = sum_upto<kWarps>(warp);
  all = __shfl_sync(kAllLanes, warps, kWarps - 1);
  return __shfl_sync(kAllLanes, warps - warp, warp_id()) + before - mine;
}

// Exclusive prefix of the counts of one (batch, key head), and the list of long columns; or that
// there are none.
extern "C" __global__ void __launch_bounds__(kPrefixThreads)
    prefix_columns(const __grid_constant__ Params p) {
  start_next_and_await();
  __shared__ int sums[kPrefixThreads / 32];
  if (p.all_flat) {
    const int row_blocks = group_row_blocks(p);
    bool listed = is_any_poisoned(p, blockIdx.x), flat = false;
    for (int i = threadIdx.x; i < row_blocks; i += kPrefixThreads) {
      const bool here = p.flat[i64(blockIdx.x) * row_blocks + i] != kListed;
      flat |= here, listed |= !here;
    }
    listed = __syncthreads_or(listed), flat = __syncthreads_or(flat);
    if (threadIdx.x == 0) p.all_flat[blockIdx.x] = !listed ? kAllFlat : flat ? kMixed : kAllListed;
    if (!listed) return;
  }
  const i64 base = i64(blockIdx.x) * p.length_k;
  int running = 0;
  for (int first = 0; first < p.length_k; first += kPrefixThreads * 4) {
    const int at = first + threadIdx.x * 4;
    int count[4], mine = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      count[i] = at + i < p.length_k ? p.column_count[base + at + i] : 0;
      mine += count[i];
    }
    int all;
    int start = running + preceding<kPrefixThreads>(mine, sums, all);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (at + i < p.length_k) {
        p.column_start[base + at + i] = start;
        if (count[i] > p.long_limit)
          p.long_columns[1 + atomicAdd(p.long_columns, 1)] = int(base + at + i);
      }
      start += count[i];
    }
    running += all;
  }
}

constexpr int kRowLanes = ADASPLASH2_GRAD_LANES;
// Blocks of a multiprocessor at least: 128 registers a thread. Rows that are loaded one element at
// a time take more.
constexpr int kGradBlocks = kAligned ? 2 : 1;

// The products of a batch of survivors with the vectors of their row or column: score = q . k and
// dp = dO . v. Lanes whose slot() is i have those of survivor i. They are summed in the same order
// for a row as for a column, so that both find the same bits, and from these the same x.
struct Products {
  float score, dp;

  static __device__ __forceinline__ int slot() { return lane_id() % 8 / 2; }

  template <class Vector>
  __device__ __forceinline__ Products(const Vector& own_score, const Vector (&scores)[kBatch],
                                      const Vector& own_dp, const Vector (&dps)[kBatch]) {
    constexpr int kSums = 2 * kBatch;
    static_assert(kSums == 8 && kRowLanes % kSums == 0);
    float sum[kSums] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sum[2 * i] = fmaf(own_score[j], scores[i][j], sum[2 * i]);
        sum[2 * i + 1] = fmaf(own_dp[j], dps[i][j], sum[2 * i + 1]);
      }
    // Halve the sums that a lane holds with each step, until lane l has number l % 8.
#pragma unroll
    for (int step = kSums / 2; step; step /= 2)
#pragma unroll
      for (int i = 0; i < step; ++i) {
        const bool upper = lane_id() & step;
        const float given = upper ? sum[i] : sum[i + step], kept = upper ? sum[i + step] : sum[i];
        sum[i] = kept + __shfl_xor_sync(kAllLanes, given, step);
      }
    const float mine = sum_over<kRowLanes / kSums, kSums>(sum[0]);
    const float other = __shfl_xor_sync(kAllLanes, mine, 1);
    score = lane_id() % 2 ? other : mine;
    dp = lane_id() % 2 ? mine : other;
  }
};

// What the lanes of a row or column know of survivor i, of what lanes know where slot() is i.
__device__ __forceinline__ float from_slot(float x, int i) {
  return __shfl_sync(kAllLanes, x, 2 * i, 8);
}

// x of a survivor from its row's first one; as good as none where rounding puts it below zero.
__device__ __forceinline__ float weight_from(const Params& p, float score, float first_score,
                                             float first_x) {
  return fmaxf(fmaf(p.c, score - first_score, first_x), 0.f);
}

// dQ of element rows; they are put into the columns of their survivors, in any order.
//
// delta is known after the last survivor only. So dQ is summed in two parts, of which neither is
// much larger than dQ: sum u (dp - dp_0) k, and sum u k times delta - dp_0.
__device__ __forceinline__ void grad_row(const Params& p, const ArenaRow& r) {
  const bool active = r.inside;
  const int kept = active ? p.row_count[r.at].survivors : 0;
  const int count = max(kept, 0);
  // The lanes of a warp stay together for the shuffles.
  const int longest = uniform(__reduce_max_sync(kAllLanes, count));
  const int row_block = active ? row_block_at(r.at) : 0;
  const int first_entry = active ? p.row_start[r.at].entry : 0;
  const KeyNumber* columns = columns_of(p, row_block) + first_entry;
  const int lane = threadIdx.x % kRowLanes, at = lane * 8;

  float query[8] = {}, grad_o[8] = {}, first_x = 0.f;
  if (count) {
    load8<kHeadDim>(row_of(p.q, r.batch, r.head, r.row), at, query);
    load8<kHeadDimV>(row_of(p.grad_o, r.batch, r.head, r.row), at, grad_o);
    if constexpr (!kKeepsWeights) first_x = p.first_weight[r.at];
#pragma unroll
    for (float& x : query) x = signed_value(p, x);
  }
  const Scalar* keys = active ? row_of(p.k, r.batch, r.kv_head, 0) : nullptr;
  const Scalar* values = active ? row_of(p.v, r.batch, r.kv_head, 0) : nullptr;
  const int kv_row = r.kv_row(p), mine = Products::slot();
  RowNumber* rows = rows_of(p, kv_row);  // made where it is used, it would make float32 spill
  const int my_row = GroupRow::pack(p, r.head % p.gqa_group, r.row);
  const bool puts = lane < 8 && lane % 2 == 0;  // one lane a survivor
  float first_score = 0.f, first_dp = 0.f, sum_u = 0.f, sum_udp = 0.f, mass = 0.f;
  float sum_uk[8] = {}, grad_q[8] = {};
#pragma unroll 1
  for (int first = 0; first < longest; first += kBatch) {
    const bool inside = first + mine < count;
    int column[kBatch], my_column = 0, place = 0;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      column[i] = first + i < count ? column_of(p, columns[first + i]) : -1;
      if (i == mine) my_column = column[i];
    }
    float key[kBatch][8], value[kBatch][8];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      load8<kHeadDim>(row_in(keys, p.k.row, column[i]), at, key[i], column[i] >= 0);
      load8<kHeadDimV>(row_in(values, p.v.row, column[i]), at, value[i], column[i] >= 0);
    }
    if (inside && puts) place = atomicAdd(of_keys(p, p.column_start, kv_row) + my_column, 1);
    const Products found(query, key, grad_o, value);
    if (first == 0) first_score = from_slot(found.score, 0), first_dp = from_slot(found.dp, 0);
    float u = 0.f, felt = 0.f;
    if (inside) {
      float x;
      if constexpr (kKeepsWeights)
        x = weights_of(p, row_block)[first_entry + first + mine];
      else
        x = weight_from(p, found.score, first_score, first_x);
      u = weight(x, p.r);
      mass += probability(x, p.r);
      sum_u += u;
      // Off the support nothing is felt.
      if (u != 0.f) sum_udp = fmaf(u, found.dp, sum_udp), felt = u * (found.dp - first_dp);
      if (puts) rows[place] = RowNumber(my_row);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float of_key = from_slot(u, i), of_dp = from_slot(felt, i);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sum_uk[j] = fmaf(of_key, key[i][j], sum_uk[j]);
        grad_q[j] = fmaf(of_dp, key[i][j], grad_q[j]);
      }
    }
  }
  sum_u = sum_over<kBatch, 2>(sum_u);
  const float delta = sum_over<kBatch, 2>(sum_udp) / sum_u;
  const float factor = 1.f / sum_over<kBatch, 2>(mass);
  if (!active) return;
  if (count && lane == 0)
    reinterpret_cast<float4*>(p.terms)[r.at] = {first_score, first_x, delta, factor};
  // A row that keeps an infinite value has no gradient either.
  const float rest = kept < 0 || !is_finite(delta) ? kNaN : delta - first_dp;
#pragma unroll
  for (int j = 0; j < 8; ++j)
    grad_q[j] = kept == 0 ? 0.f : score_slope(p) * fmaf(-rest, sum_uk[j], grad_q[j]);
  store8<kHeadDim>(row_of(p.grad_q, r.batch, r.head, r.row), at, grad_q);
}

extern "C" __global__ void __launch_bounds__(kThreads, kGradBlocks)
    grad_rows(const __grid_constant__ Params p) {
  start_next_and_await();
  for_listed_rows<kRowLanes>(p, [&](const ArenaRow& r) { grad_row(p, r); });
}

// A key and the sums over the rows that keep it, as a warp gathers them.
struct Column {
  int number;                     // of all
  int at;                         // the lane's first element of each vector
  int first_row;                  // of those that may keep it, as in p.terms
  const Scalar *queries, *grads;  // theirs
  float key[8] = {}, value[8] = {};
  float grad_k[8] = {}, grad_v[8] = {};

  __device__ __forceinline__ Column(const Params& p, int number, int lane, bool wanted)
      : number(number), at(lane % kRowLanes * 8) {
    const Key of(p, number);
    first_row = place_of(of.kv_row * group_row_blocks(p), 0);
    queries = row_of(p.q, of.batch, of.first_head(p), 0);
    grads = row_of(p.grad_o, of.batch, of.first_head(p), 0);
    load8<kHeadDim>(row_of(p.k, of.batch, of.kv_head, of.key), at, key, wanted);
    load8<kHeadDimV>(row_of(p.v, of.batch, of.kv_head, of.key), at, value, wanted);
#pragma unroll
    for (float& x : key) x = signed_value(p, x);
  }

  // x of a row that keeps the key.
  __device__ __forceinline__ float weight_of(const Params& p, const Terms& terms, float score,
                                             bool inside, int row_at) const {
    if constexpr (!kKeepsWeights) return weight_from(p, score, terms.score, terms.x);
    const int column = number % p.length_k;
    float found = 0.f;
    if (inside) {  // two lanes look through its survivors
      const int first = p.row_start[row_at].entry, count = p.row_count[row_at].survivors;
      const KeyNumber* columns = columns_of(p, row_block_at(row_at)) + first;
      const float* weights = weights_of(p, row_block_at(row_at)) + first;
#pragma unroll 2
      for (int i = lane_id() % 2; i < count; i += 2)
        if (column_of(p, columns[i]) == column) found = weights[i];
    }
    return sum_over<2>(found);
  }

  // Add some rows, -1 where there are none. All lanes of the warp come together.
  __device__ __forceinline__ void add(const Params& p, const int (&row)[kBatch]) {
    float q[kBatch][8], grad_o[kBatch][8];
    int my_row = -1;  // the lane's survivor
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const bool wanted = row[i] >= 0;
      const GroupRow of(p, row[i]);
      const Scalar* query = row_in(row_in(queries, p.q.head, of.member), p.q.row, of.row);
      const Scalar* grad = row_in(row_in(grads, p.grad_o.head, of.member), p.grad_o.row, of.row);
      load8<kHeadDim>(query, at, q[i], wanted);
      load8<kHeadDimV>(grad, at, grad_o[i], wanted);
      if (i == Products::slot()) my_row = row[i];
    }
    const bool inside = my_row >= 0;
    const GroupRow mine(p, my_row);
    const int row_at = first_row + place_of(mine.member * p.row_blocks, mine.row);
    float4 raw = {};
    if (inside) raw = reinterpret_cast<const float4*>(p.terms)[row_at];
    const Terms terms = {raw.x, raw.y, raw.z, raw.w};
    const Products found(key, q, value, grad_o);
    const float x = weight_of(p, terms, found.score, inside, row_at);
    float ds = 0.f, prob = 0.f;
    if (inside) {
      const float u = weight(x, p.r);
      if (u != 0.f) ds = u * (found.dp - terms.delta);
      prob = terms.factor * probability(x, p.r);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float of_q = from_slot(ds, i), of_grad = from_slot(prob, i);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        grad_k[j] = fmaf(of_q, q[i][j], grad_k[j]);
        grad_v[j] = fmaf(of_grad, grad_o[i][j], grad_v[j]);
      }
    }
  }

  // To and from memory that other lanes read.
  template <int lanes>
  __device__ __forceinline__ void put(float (&to)[2][8][lanes], int lane) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) to[0][j][lane] = grad_k[j], to[1][j][lane] = grad_v[j];
  }
  template <int lanes>
  __device__ __forceinline__ void get(const float (&from)[2][8][lanes], int lane) {
#pragma unroll
    for (int j = 0; j < 8; ++j) grad_k[j] = from[0][j][lane], grad_v[j] = from[1][j][lane];
  }

  template <int parts>
  __device__ __forceinline__ void sum_over_parts() {  // lanes that hold the same elements
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      grad_k[j] = sum_over<parts, kRowLanes>(grad_k[j]);
      grad_v[j] = sum_over<parts, kRowLanes>(grad_v[j]);
    }
  }

  __device__ __forceinline__ void write(const Params& p) {
    const Key of(p, number);
    const bool poisoned = is_poisoned(p, of.kv_row, of.key);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      grad_k[j] = poisoned ? kNaN : grad_k[j] * score_slope(p);
      grad_v[j] = poisoned ? kNaN : grad_v[j];
    }
    store8<kHeadDim>(row_of(p.grad_k, of.batch, of.kv_head, of.key), at, grad_k);
    store8<kHeadDimV>(row_of(p.grad_v, of.batch, of.kv_head, of.key), at, grad_v);
  }
};

// Where the rows of a column are; grad_rows has moved its start to its end.
__device__ __forceinline__ RowNumber* rows_of_column(const Params& p, int column_at, int count) {
  return rows_of(p, column_at / p.length_k) + (p.column_start[column_at] - count);
}

constexpr int kParts = 32 / kRowLanes;  // rows that a warp gathers side by side

// dK and dV of columns of at most kShortColumn survivors: sort by row, gather. A team of
// kRowLanes lanes sums a column of up to kTeamColumn, a warp the others.
constexpr int kColumns = kThreads / kRowLanes;  // of a block
constexpr int kTeamColumn = kShortColumn / kParts;

template <int parts>
__device__ __forceinline__ void sum_column(const Params& p, int column_at, int count, int* rows,
                                           int* sorted) {
  constexpr int kLanes = parts * kRowLanes;
  const int lane = lane_id() % kLanes;
  Column sums(p, column_at, lane, count > 0);
  const RowNumber* unsorted = count > 0 ? rows_of_column(p, column_at, count) : nullptr;

  const int rounded = (count + 3) / 4 * 4;
  // Rows differ, unless what was saved was written over. Ranks may be equal then: `sorted` is set
  // first, so that each place has a row.
  for (int i = lane; i < rounded; i += kLanes)
    rows[i] = sorted[i] = i < count ? int(unsorted[i]) : 0x7fffffff;
  __syncwarp();
  for (int i = lane; i < count; i += kLanes) {
    const int row = rows[i];
    int rank = 0;
    for (int j = 0; j < rounded; j += 4) {
      const int4 other = *reinterpret_cast<const int4*>(rows + j);
      rank += (other.x < row) + (other.y < row) + (other.z < row) + (other.w < row);
    }
    sorted[rank] = row;
  }
  __syncwarp();

  const int longest = uniform(__reduce_max_sync(kAllLanes, count));
#pragma unroll 1
  for (int first = 0; first < longest; first += parts * kBatch) {
    int row[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int number = first + lane / kRowLanes + i * parts;
      row[i] = number < count ? sorted[number] : -1;
    }
    sums.add(p, row);
  }
  __syncwarp();
  sums.sum_over_parts<parts>();
  if (count >= 0 && lane < kRowLanes) sums.write(p);
}

extern "C" __global__ void __launch_bounds__(kThreads, kGradBlocks)
    grad_columns(const __grid_constant__ Params p) {
  start_next_and_await();
  __shared__ __align__(16) int rows[kThreads / 32 * kShortColumn];
  __shared__ int sorted[kThreads / 32 * kShortColumn];
  __shared__ int later[kColumns], later_count;
  const int mine = threadIdx.x / kRowLanes;
  const int column_at = blockIdx.x * kColumns + mine;
  const bool inside = column_at < key_blocks<1>(p) && !is_all_flat(p, column_at / p.length_k);
  if (threadIdx.x == 0) later_count = 0;
  if (!__syncthreads_or(inside)) return;
  const int count = inside ? p.column_count[column_at] : -1;
  const bool fits = count <= kTeamColumn;
  if (!fits && count <= p.long_limit && threadIdx.x % kRowLanes == 0)
    later[atomicAdd(&later_count, 1)] = mine;  // in any order: each column is summed alone
  sum_column<1>(p, inside && fits ? column_at : 0, fits ? count : -1, rows + mine * kTeamColumn,
                sorted + mine * kTeamColumn);
  __syncthreads();
  for (int i = warp_id(); i < later_count; i += kThreads / 32) {
    const int at = blockIdx.x * kColumns + later[i];
    sum_column<kParts>(p, at, p.column_count[at], rows + warp_id() * kShortColumn,
                       sorted + warp_id() * kShortColumn);
  }
}

// A long column (a sink that every query keeps): where its rows are.
struct LongColumn {
  int at, count;
  RowNumber* rows;

  __device__ __forceinline__ LongColumn(const Params& p, int number)
      : at(p.long_columns[1 + number]),
        count(p.column_count[at]),
        rows(rows_of_column(p, at, count)) {}
};

// The most words, by powers of two, that fit the shared memory twice.
constexpr int kSortWords = 4096;
static_assert(2 * 4 * kSortWords + kSortThreads / 32 * 4 <= kStaticShared &&
              2 * 4 * 2 * kSortWords > kStaticShared);

// Sorts the rows of long columns: a bit for each row, and the number of bits before it. Where there
// are more rows than bits, it takes turns: the rows that have bits in this turn are put in order
// behind those of the turns before, and the others are moved to the end.
extern "C" __global__ void __launch_bounds__(kSortThreads)
    sort_long_columns(const __grid_constant__ Params p) {
  start_next_and_await();
  __shared__ u32 bits[kSortWords];
  __shared__ int before[kSortWords];
  __shared__ int sums[kSortThreads / 32];
  const int columns = p.long_columns[0], all_rows = GroupRow::pack(p, p.gqa_group, 0);
  for (int number = blockIdx.x; number < columns; number += gridDim.x) {
    const LongColumn column(p, number);
    int sorted = 0;  // rows that are in their places
    for (int base = 0; base < all_rows; base += kSortWords * 32) {
      const int words = min(kSortWords, (all_rows - base + 31) / 32);
      const bool last = base + words * 32 >= all_rows;
      __syncthreads();
      for (int i = threadIdx.x; i < words; i += kSortThreads) bits[i] = 0;
      __syncthreads();
      int end = column.count;  // of what is not moved yet; behind it are the rows of later turns
      for (int upto = column.count; upto > sorted; upto -= kSortThreads) {
        const int i = upto - 1 - int(threadIdx.x);
        const int row = i >= sorted ? int(column.rows[i]) - base : -1;
        const bool later = row >= words * 32;
        if (row >= 0 && !later) atomicOr(bits + row / 32, 1u << row % 32);
        if (last) continue;
        int all;
        const int place = preceding<kSortThreads>(later, sums, all);  // and all have read theirs
        if (later) column.rows[end - 1 - place] = RowNumber(row + base);
        end -= all;
      }
      __syncthreads();
      const int share = (words + kSortThreads - 1) / kSortThreads, mine = threadIdx.x * share;
      int kept = 0, all;
      for (int i = mine; i < min(words, mine + share); ++i) kept += __popc(bits[i]);
      int rank = sorted + preceding<kSortThreads>(kept, sums, all);
      for (int i = mine; i < min(words, mine + share); ++i) {
        before[i] = rank;
        rank += __popc(bits[i]);
      }
      sorted += all;
      __syncthreads();
      for (int i = warp_id(); i < words; i += kSortThreads / 32) {
        const u32 word = bits[i], lower = (1u << lane_id()) - 1u;
        if (word >> lane_id() & 1u)
          column.rows[before[i] + __popc(word & lower)] = RowNumber(base + i * 32 + lane_id());
      }
    }
  }
}

// dK and dV of long columns. Each is split over several blocks by its sorted rows, and the
// last block to finish adds the parts in order.
constexpr int kLongTeams = kLongThreads / kRowLanes;  // rows that a block gathers side by side
// Rows of a part, but for the last one: each part costs its block one exchange of sums. Not tuned.
constexpr int kLongLeast = 256;
using LongSum = float[2][8][kRowLanes];  // of dK and dV
constexpr int kLongValues = sizeof(LongSum) / sizeof(float);
static_assert(sizeof(LongSum) <= kLongPartBytes);

extern "C" __global__ void __launch_bounds__(kLongThreads, kLongBlocks)
    grad_long_columns(const __grid_constant__ Params p) {
  start_next_and_await();
  __shared__ float sums[kLongTeams][kLongValues];
  __shared__ bool last;
  const int columns = p.long_columns[0];
  if (columns == 0) return;
  const int team = threadIdx.x / kRowLanes, lane = threadIdx.x % kRowLanes;
  const int wanted = max(1, int(gridDim.x) * kLongWaves / columns);
  for (int item = blockIdx.x; item < columns * wanted; item += gridDim.x) {
    const int number = item / wanted, part = item % wanted;
    const LongColumn column(p, number);
    const int share = max(kLongLeast, (column.count + wanted - 1) / wanted);
    const int parts = (column.count + share - 1) / share;
    if (part >= parts) continue;
    const int end = min(column.count, part * share + share);
    const auto fetch = [&](int (&found)[kBatch], int first) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = first + team + i * kLongTeams;
        found[i] = at < end ? int(column.rows[at]) : -1;
      }
    };
    Column mine(p, column.at, lane, true);
    int next[kBatch];
    fetch(next, part * share);
#pragma unroll 1
    for (int first = part * share; first < end; first += kLongTeams * kBatch) {
      int row[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) row[i] = next[i];
      fetch(next, first + kLongTeams * kBatch);
      mine.add(p, row);
    }
    __syncthreads();  // what the item before left is read
    mine.put(reinterpret_cast<LongSum&>(sums[team]), lane);
    __syncthreads();
    float* of_parts = reinterpret_cast<float*>(p.long_parts) + i64(number) * wanted * kLongValues;
    for (int i = threadIdx.x; i < kLongValues; i += kLongThreads) {
      float sum = 0.f;
#pragma unroll
      for (int from = 0; from < kLongTeams; ++from) sum += sums[from][i];
      sums[0][i] = sum;
      if (parts > 1) of_parts[part * kLongValues + i] = sum;
    }
    if (parts > 1) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) last = atomicAdd(p.long_done + number, 1) == parts - 1;
      __syncthreads();
      if (!last) continue;
      __threadfence();
      for (int i = threadIdx.x; i < kLongValues; i += kLongThreads) {
        float sum = 0.f;
#pragma unroll 8
        for (int from = 0; from < parts; ++from) sum += __ldcg(of_parts + from * kLongValues + i);
        sums[0][i] = sum;
      }
    }
    __syncthreads();
    if (team == 0) {
      mine.get(reinterpret_cast<LongSum&>(sums[0]), lane);
      mine.write(p);
    }
  }
}

}  // namespace adasplash2
