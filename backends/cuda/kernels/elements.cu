// Everything after the scan that works on single survivors: the output, and the backward as
// gathers. Query rows read the arena as it is (CSR); key columns read a copy of it sorted by
// column (CSC), built by counting.
//
// Backward, per row: dp_j = dO . v_j, delta = sum u dp / sum u, ds_j = u_j (dp_j - delta),
// dQ = scale sum ds_j k_j; per column: dK = scale sum ds_i q_i, dV = sum p_i dO_i.
#include "score.cuh"
#include "work.cuh"

namespace adasplash2 {

constexpr int kThreads = kElementThreads;
constexpr int kBatch = 4;  // gathers in flight per lane

// A row in the order of the arena: row blocks, head by head.
struct Row : Head {
  int at, row;
  bool inside;
};

__device__ __forceinline__ Row row_at(const Params& p, int at) {
  const int per_head = p.row_blocks * kRowBlock;
  Row r{Head(p, at / per_head), at, at % per_head};
  r.inside = r.head_row < p.batch * p.heads_q && r.row < p.length_q;
  return r;
}

// The column of a saved survivor, in its range whatever became of it.
__device__ __forceinline__ int column_of(const Params& p, const Entry& entry) {
  return int(min(u32(entry.column), u32(p.length_k - 1)));
}

__device__ __forceinline__ Entry entry_at(const Params& p, const Entry* saved) {
  return {column_of(p, *saved), saved->x};
}

// The first record of one (batch, key head).
__device__ __forceinline__ i64 records_of(const Params& p, int kv_row) {
  return arena_of(kv_row * p.gqa_group * p.row_blocks);
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
      load8<width>(rows + row * stride, i % kChunks * 8, x);
#pragma unroll
    for (float value : x) found |= !is_finite(value);
  }
  return found;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    check_finite(const __grid_constant__ Params p) {
  start_next_and_await();
  const int of_keys = (p.length_k + kCheckRows - 1) / kCheckRows;
  const int key_blocks = p.batch * p.heads_kv * of_keys;
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.unsafe_output = 0;
  int first_head, heads;  // whose scores what is looked at has a part in
  bool found;
  if (int(blockIdx.x) < key_blocks) {
    const int kv_row = blockIdx.x / of_keys, first = blockIdx.x % of_keys * kCheckRows;
    const int batch = kv_row / p.heads_kv, kv_head = kv_row % p.heads_kv;
    first_head = kv_row * p.gqa_group, heads = p.gqa_group;
    if (first == 0 && threadIdx.x == 0) p.poison[kv_row] = 0;
    found = has_infinite<kHeadDim>(row_of(p.k, batch, kv_head, 0), p.k.row, first, p.length_k) ||
            has_infinite<kHeadDimV>(row_of(p.v, batch, kv_head, 0), p.v.row, first, p.length_k);
  } else {
    const int block = blockIdx.x - key_blocks;
    const int of_queries = (p.length_q + kCheckRows - 1) / kCheckRows;
    first_head = block / of_queries, heads = 1;
    const Head of(p, first_head);
    const Scalar* rows = row_of(p.q, of.batch, of.head, 0);
    const int first = block % of_queries * kCheckRows, row = first + threadIdx.x;
    if (threadIdx.x < kCheckRows && row < p.row_blocks * kRowBlock) {
      const i64 at = i64(first_head) * p.row_blocks * kRowBlock + row;
      p.row_start[at].top = -kInf, p.row_count[at].bound = -kInf;
    }
    found = has_infinite<kHeadDim>(rows, p.q.row, first, p.length_q);
  }
  if (!__syncthreads_or(found)) return;
  u8* flat = p.flat + i64(first_head) * p.row_blocks;
  for (int i = threadIdx.x; i < heads * p.row_blocks; i += kThreads) flat[i] = kToRetry;
}

extern "C" __global__ void __launch_bounds__(kThreads) output(const __grid_constant__ Params p) {
  start_next_and_await();
  constexpr int kLanes = ADASPLASH2_OUTPUT_LANES;
  const Row r = row_at(p, blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes);
  if (!r.inside || p.flat[r.at / kRowBlock]) return;
  const int count = p.row_count[r.at].survivors;
  const Entry* entries = p.entries + arena_of(r.at / kRowBlock) + p.row_start[r.at].entry;
  const Scalar* values = row_of(p.v, r.batch, r.kv_head, 0);
  const int at = threadIdx.x % kLanes * 8;
  float out[8];
#pragma unroll
  for (float& x : out) x = count < 0 ? kNaN : 0.f;
  float mass = 0.f;
  for (int first = 0; first < count; first += kBatch) {
    Entry entry[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      entry[i] = first + i < count ? entries[first + i] : Entry{-1, 0.f};
    float value[kBatch][8] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (entry[i].column >= 0) load8<kHeadDimV>(values + entry[i].column * p.v.row, at, value[i]);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float prob = entry[i].column >= 0 ? probability(entry[i].x, p.r) : 0.f;
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

// Count the survivors of each column; the order of arrival becomes an entry's rank. Ranks
// differ from run to run, but the columns are sorted by row before anything is summed.
//
// What the forward saved may have been written over meanwhile: the rows of a row block whose lists
// do not follow each other are taken for poisoned, and columns are kept in their range.
extern "C" __global__ void __launch_bounds__(kThreads)
    count_columns(const __grid_constant__ Params p) {
  start_next_and_await();
  const int row_block = blockIdx.x;
  if (p.flat[row_block]) return;
  bool broken = false;
  if (threadIdx.x < kRowBlock) {
    const int at = row_block * kRowBlock + threadIdx.x, count = p.row_count[at].survivors;
    const bool last = threadIdx.x == kRowBlock - 1;
    const int next = last ? p.row_start[at].entry + max(count, 0) : p.row_start[at + 1].entry;
    broken =
        count < kPoisoned || count > kMaxRow || next != p.row_start[at].entry + max(count, 0) ||
        (threadIdx.x == 0 && p.row_start[at].entry != 0) || (last && next > kRowBlock * kArenaRow);
  }
  if (__syncthreads_or(broken)) {
    if (threadIdx.x < kRowBlock)
      p.row_count[row_block * kRowBlock + threadIdx.x].survivors = kPoisoned;
    return;
  }
  const int last = row_block * kRowBlock + kRowBlock - 1;
  const int total = p.row_start[last].entry + max(p.row_count[last].survivors, 0);
  const Head of(p, row_block / p.row_blocks);
  const int kv_row = of.batch * p.heads_kv + of.kv_head;
  int* counts = p.column_count + i64(kv_row) * p.length_k;
  const i64 arena = arena_of(row_block);
  for (int first = 0; first < total; first += kThreads) {
    const int i = first + threadIdx.x;
    const u32 inside = __ballot_sync(kAllLanes, i < total);
    if (i >= total) break;
    // One atomic for all lanes with the same column: every row has a sink's.
    const int column = column_of(p, p.entries[arena + i]);
    const u32 peers = __match_any_sync(inside, column);
    const int leader = __ffs(peers) - 1;
    int arrived = 0;
    if (lane_id() == leader) arrived = atomicAdd(counts + column, __popc(peers));
    arrived = __shfl_sync(peers, arrived, leader);
    p.rank[arena + i] = arrived + __popc(peers & ((1u << lane_id()) - 1u));
  }
}

// Sum of `mine` over the threads before this one, and over all of them. `sums` is shared memory.
template <int threads>
__device__ __forceinline__ int preceding(int mine, int (&sums)[threads / 32], int& all) {
  constexpr int kWarps = threads / 32;
  int before = mine;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, before, step);
    if (lane_id() >= step) before += other;
  }
  __syncthreads();  // sums of the call before are read
  if (lane_id() == 31) sums[warp_id()] = before;
  __syncthreads();
  const int warp = lane_id() < kWarps ? sums[lane_id()] : 0;
  int warps = warp;
#pragma unroll
  for (int step = 1; step < kWarps; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, warps, step);
    if (lane_id() >= step) warps += other;
  }
  all = __shfl_sync(kAllLanes, warps, kWarps - 1);
  return __shfl_sync(kAllLanes, warps - warp, warp_id()) + before - mine;
}

// Exclusive prefix of the counts of one (batch, key head), and the list of long columns.
extern "C" __global__ void __launch_bounds__(kPrefixThreads)
    prefix_columns(const __grid_constant__ Params p) {
  start_next_and_await();
  __shared__ int sums[kPrefixThreads / 32];
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

// dQ of element rows, and their survivors with ds and p put into the columns.
constexpr int kRowLanes = ADASPLASH2_GRAD_LANES;

extern "C" __global__ void __launch_bounds__(kThreads) grad_rows(const __grid_constant__ Params p) {
  start_next_and_await();
  constexpr int kRows = kThreads / kRowLanes;
  __shared__ float products[kRows][kMaxRow];
  static_assert(kMaxRow == kListLanes * kMaxList && sizeof(products) <= kStaticShared);
  const Row r = row_at(p, blockIdx.x * (kThreads / kRowLanes) + threadIdx.x / kRowLanes);
  const bool active = r.inside && !p.flat[r.at / kRowBlock];
  const int kept = active ? p.row_count[r.at].survivors : 0;
  const int count = max(kept, 0);
  int longest = count;  // the lanes of a warp stay together for the shuffles
#pragma unroll
  for (int step = 1; step < 32; step *= 2)
    longest = max(longest, __shfl_xor_sync(kAllLanes, longest, step));
  const i64 first_entry = active ? arena_of(r.at / kRowBlock) + p.row_start[r.at].entry : 0;
  const Entry* entries = p.entries + first_entry;
  const int lane = threadIdx.x % kRowLanes, at = lane * 8;
  float (&dp)[kMaxRow] = products[threadIdx.x / kRowLanes];

  float grad_o[8] = {};
  if (count) load8<kHeadDimV>(row_of(p.grad_o, r.batch, r.head, r.row), at, grad_o);
  const Scalar* values = active ? row_of(p.v, r.batch, r.kv_head, 0) : nullptr;
  float sum_u = 0.f, sum_udp = 0.f, mass = 0.f;
  for (int first = 0; first < longest; first += kBatch) {
    Entry entry[kBatch];
    float value[kBatch][8] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      entry[i] = first + i < count ? entry_at(p, entries + first + i) : Entry{-1, 0.f};
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (entry[i].column >= 0) load8<kHeadDimV>(values + entry[i].column * p.v.row, at, value[i]);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      float dot = 0.f;
#pragma unroll
      for (int j = 0; j < 8; ++j) dot = fmaf(grad_o[j], value[i][j], dot);
      dot = sum_over<kRowLanes>(dot);
      if (entry[i].column >= 0) {
        const float u = weight(entry[i].x, p.r);
        mass += probability(entry[i].x, p.r);
        sum_u += u;
        if (u != 0.f) sum_udp = fmaf(u, dot, sum_udp);  // off the support nothing is felt
        if (lane == 0) dp[first + i] = dot;
      }
    }
  }
  __syncwarp();
  const float delta = sum_udp / sum_u, factor = 1.f / mass;

  const Scalar* keys = active ? row_of(p.k, r.batch, r.kv_head, 0) : nullptr;
  const int kv_row = r.batch * p.heads_kv + r.kv_head;
  const int* starts = p.column_start + i64(kv_row) * p.length_k;
  Record* records = p.records + records_of(p, kv_row);
  float grad_q[8];
#pragma unroll
  for (float& x : grad_q) x = kept < 0 ? kNaN : 0.f;
  for (int first = 0; first < count; first += kBatch) {
    Entry entry[kBatch];
    float key[kBatch][8] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      entry[i] = first + i < count ? entry_at(p, entries + first + i) : Entry{-1, 0.f};
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (entry[i].column >= 0) load8<kHeadDim>(keys + entry[i].column * p.k.row, at, key[i]);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (entry[i].column < 0) continue;
      const float u = weight(entry[i].x, p.r);
      const float ds = u == 0.f ? 0.f : u * (dp[first + i] - delta);
#pragma unroll
      for (int j = 0; j < 8; ++j) grad_q[j] = fmaf(ds, key[i][j], grad_q[j]);
      if (lane == i)
        records[starts[entry[i].column] + p.rank[first_entry + first + i]] = {
            r.head % p.gqa_group * p.length_q + r.row, ds, factor * probability(entry[i].x, p.r),
            r.head % p.gqa_group};
    }
  }
  if (!active) return;
#pragma unroll
  for (float& x : grad_q) x *= p.scale;
  store8<kHeadDim>(row_of(p.grad_q, r.batch, r.head, r.row), at, grad_q);
}

// Sums over the records of one column, as a warp gathers them.
struct Column {
  float k[8] = {}, v[8] = {};

  __device__ __forceinline__ void add(const Params& p, int batch, int kv_head,
                                      const Record (&record)[kBatch], int at) {
    float q[kBatch][8] = {}, grad_o[kBatch][8] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (record[i].row >= 0) {
        const int head = kv_head * p.gqa_group + record[i].member;
        const int row = record[i].row - record[i].member * p.length_q;
        load8<kHeadDim>(row_of(p.q, batch, head, row), at, q[i]);
        load8<kHeadDimV>(row_of(p.grad_o, batch, head, row), at, grad_o[i]);
      }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        k[j] = fmaf(record[i].ds, q[i][j], k[j]);
        v[j] = fmaf(record[i].p, grad_o[i][j], v[j]);
      }
  }

  // To and from memory that other lanes read.
  template <int lanes>
  __device__ __forceinline__ void put(float (&to)[2][8][lanes], int lane) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) to[0][j][lane] = k[j], to[1][j][lane] = v[j];
  }
  template <int lanes>
  __device__ __forceinline__ void get(const float (&from)[2][8][lanes], int lane) {
#pragma unroll
    for (int j = 0; j < 8; ++j) k[j] = from[0][j][lane], v[j] = from[1][j][lane];
  }

  template <int parts>
  __device__ __forceinline__ void sum_over_parts() {  // lanes that hold the same elements
#pragma unroll
    for (int step = kRowLanes; step < kRowLanes * parts; step *= 2)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        k[j] += __shfl_xor_sync(kAllLanes, k[j], step);
        v[j] += __shfl_xor_sync(kAllLanes, v[j], step);
      }
  }

  __device__ __forceinline__ void write(const Params& p, int batch, int kv_head, int column,
                                        int at) {
#pragma unroll
    for (float& x : k) x *= p.scale;
    if (column < p.poison[batch * p.heads_kv + kv_head])
#pragma unroll
      for (int j = 0; j < 8; ++j) k[j] = v[j] = kNaN;
    store8<kHeadDim>(row_of(p.grad_k, batch, kv_head, column), at, k);
    store8<kHeadDimV>(row_of(p.grad_v, batch, kv_head, column), at, v);
  }
};

constexpr int kParts = 32 / kRowLanes;  // records that a warp gathers side by side
constexpr Record kNoRecord = {-1, 0.f, 0.f, 0};

// dK and dV of columns of at most kShortColumn survivors: sort by row, gather. A team of
// kRowLanes lanes sums a column of up to kTeamColumn, a warp the others.
constexpr int kColumns = kThreads / kRowLanes;  // of a block
constexpr int kTeamColumn = kShortColumn / kParts;

template <int parts>
__device__ __forceinline__ void sum_column(const Params& p, int column_at, int count, int* rows,
                                           u8* order) {
  constexpr int kLanes = parts * kRowLanes;
  const int lane = lane_id() % kLanes;
  const int kv_row = column_at / p.length_k, column = column_at % p.length_k;
  const int batch = kv_row / p.heads_kv, kv_head = kv_row % p.heads_kv;
  const Record* records =
      p.records + records_of(p, kv_row) + (count > 0 ? p.column_start[column_at] : 0);

  const int rounded = (count + 3) / 4 * 4;
  for (int i = lane; i < rounded; i += kLanes) rows[i] = i < count ? records[i].row : 0x7fffffff;
  __syncwarp();
  for (int i = lane; i < count; i += kLanes) {
    const int row = rows[i];
    int rank = 0;
    for (int j = 0; j < rounded; j += 4) {
      const int4 other = *reinterpret_cast<const int4*>(rows + j);
      rank += (other.x < row) + (other.y < row) + (other.z < row) + (other.w < row);
    }
    order[rank] = u8(i);
  }
  __syncwarp();

  Column sums;
  const int at = lane % kRowLanes * 8;
  for (int first = lane / kRowLanes; first < count; first += parts * kBatch) {
    Record record[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      record[i] = first + i * parts < count ? records[order[first + i * parts]] : kNoRecord;
    sums.add(p, batch, kv_head, record, at);
  }
  __syncwarp();
  sums.sum_over_parts<parts>();
  if (count >= 0 && lane < kRowLanes) sums.write(p, batch, kv_head, column, at);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    grad_columns(const __grid_constant__ Params p) {
  start_next_and_await();
  __shared__ __align__(16) int rows[kThreads / 32 * kShortColumn];
  __shared__ u8 order[kThreads / 32 * kShortColumn];
  __shared__ int later[kColumns], later_count;
  if (threadIdx.x == 0) later_count = 0;
  __syncthreads();
  const int mine = threadIdx.x / kRowLanes;
  const int column_at = blockIdx.x * kColumns + mine;
  const bool inside = column_at < p.batch * p.heads_kv * p.length_k;
  const int count = inside ? p.column_count[column_at] : -1;
  const bool fits = count <= kTeamColumn;
  if (!fits && count <= p.long_limit && threadIdx.x % kRowLanes == 0)
    later[atomicAdd(&later_count, 1)] = mine;  // in any order: each column is summed alone
  sum_column<1>(p, inside && fits ? column_at : 0, fits ? count : -1, rows + mine * kTeamColumn,
                order + mine * kTeamColumn);
  __syncthreads();
  for (int i = warp_id(); i < later_count; i += kThreads / 32) {
    const int at = blockIdx.x * kColumns + later[i];
    sum_column<kParts>(p, at, p.column_count[at], rows + warp_id() * kShortColumn,
                       order + warp_id() * kShortColumn);
  }
}

// A long column (a sink that every query keeps): where its records are.
struct LongColumn {
  int at, batch, kv_head, count;
  i64 first;  // in p.records, and of their order in p.rank

  __device__ __forceinline__ LongColumn(const Params& p, int number) {
    at = p.long_columns[1 + number];
    const int kv_row = at / p.length_k;
    batch = kv_row / p.heads_kv, kv_head = kv_row % p.heads_kv;
    count = p.column_count[at];
    first = records_of(p, kv_row) + p.column_start[at];
  }
};

// Sorts the records of long columns by row: a bit for each row, and the number of bits before it.
// Their order takes the place of the ranks, which have done their work.
constexpr int kSortWords = 4096;
extern "C" __global__ void __launch_bounds__(kSortThreads)
    sort_long_columns(const __grid_constant__ Params p) {
  start_next_and_await();
  __shared__ u32 bits[kSortWords];
  __shared__ int before[kSortWords];
  __shared__ int sums[kSortThreads / 32];
  const int columns = p.long_columns[0];
  for (int number = blockIdx.x; number < columns; number += gridDim.x) {
    const LongColumn column(p, number);
    const Record* records = p.records + column.first;
    int running = 0;
    for (int base = 0; base < p.gqa_group * p.length_q; base += kSortWords * 32) {
      const int words = min(kSortWords, (p.gqa_group * p.length_q - base + 31) / 32);
      __syncthreads();
      for (int i = threadIdx.x; i < words; i += kSortThreads) bits[i] = 0;
      __syncthreads();
#pragma unroll 4
      for (int i = threadIdx.x; i < column.count; i += kSortThreads) {
        const int row = records[i].row - base;
        if (row >= 0 && row < words * 32) atomicOr(bits + row / 32, 1u << row % 32);
      }
      __syncthreads();
      const int share = (words + kSortThreads - 1) / kSortThreads, mine = threadIdx.x * share;
      int kept = 0, all;
      for (int i = mine; i < min(words, mine + share); ++i) kept += __popc(bits[i]);
      int rank = running + preceding<kSortThreads>(kept, sums, all);
      for (int i = mine; i < min(words, mine + share); ++i) {
        before[i] = rank;
        rank += __popc(bits[i]);
      }
      running += all;
      __syncthreads();
#pragma unroll 4
      for (int i = threadIdx.x; i < column.count; i += kSortThreads) {
        const int row = records[i].row - base;
        if (row >= 0 && row < words * 32)
          p.rank[column.first + before[row / 32] +
                 __popc(bits[row / 32] & ((1u << row % 32) - 1u))] = i;
      }
    }
  }
}

// dK and dV of long columns. Each is split over several blocks by its sorted records, and the
// last block to finish adds the parts in order.
constexpr int kLongTeams = kLongThreads / kRowLanes;  // records that a block gathers side by side
constexpr int kLongLeast = 256;                       // records of a part, but for the last one
using LongSum = float[2][8][kRowLanes];               // of dK and dV
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
    const Record* records = p.records + column.first;
    const int* order = p.rank + column.first;
    const auto fetch = [&](int (&found)[kBatch], int at) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        found[i] = at + i * kLongTeams < end ? order[at + i * kLongTeams] : -1;
    };
    Column mine;
    int next[kBatch];
    fetch(next, part * share + team);
#pragma unroll 1
    for (int at = part * share + team; at < end; at += kLongTeams * kBatch) {
      Record record[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) record[i] = next[i] >= 0 ? records[next[i]] : kNoRecord;
      fetch(next, at + kLongTeams * kBatch);
      mine.add(p, column.batch, column.kv_head, record, lane * 8);
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
      mine.write(p, column.batch, column.kv_head, column.at % p.length_k, lane * 8);
    }
  }
}

}  // namespace adasplash2
