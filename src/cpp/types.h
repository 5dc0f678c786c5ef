// Plain data that crosses between the drivers and the per-ISA kernels. No functions with
// external linkage and no standard templates: this is included by units compiled for
// different instruction sets, whose out-of-line copies must never meet in the linker.
#pragma once

#include <cstddef>
#include <cstdint>

#include "adasplash2/threshold.h"

// Never out of line, see above.
#define ADASPLASH2_INLINE inline __attribute__((always_inline))

namespace adasplash2 {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kBfloat16 = 2, kFloat16 = 3 };
constexpr int kDtypes = 4;

// Storage of the 16-bit floats; arithmetic happens in float.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Query rows a task owns, and the side of the tiles that statistics count.
constexpr int64_t kBlockRows = 64;

// Survivors a row may keep as a list; above it the row is flat and takes the dense path. At
// float32 that bounds what a row saves for the backward to 4 KiB. A list this long costs about
// what dense work on 2,000 keys costs.
constexpr int64_t kListCapacity = 512;

struct KeyRange {
  int64_t begin, end;
};

// s = scale * (q . k) over visible(i). The one place where a mask or a bias enters.
struct ScoreTransform {
  double scale;
  bool is_causal;
  int64_t length_k;

  ADASPLASH2_INLINE KeyRange visible(int64_t row) const {
    return {0, is_causal && row + 1 < length_k ? row + 1 : length_k};
  }
};

struct Alpha {
  AlphaKind kind;
  double value;              // alpha
  double exponent;           // r = 1 / (alpha-1)
  double powers[kBins + 1];  // (k / kBins)^r
};

// Base pointer and strides (in elements) of (batch, heads, length, head_dim); head_dim is dense.
struct TensorRef {
  void* data;
  int64_t stride_batch, stride_head, stride_length;
};

// The rows of one head.
struct HeadRef {
  void* data;
  int64_t stride;  // elements between rows
};

struct AttentionProblem {
  int64_t batch, heads_q, heads_kv, length_q, length_k, head_dim, head_dim_v;
  ScoreTransform scores;
  Alpha alpha;
  Dtype dtype;

  ADASPLASH2_INLINE int64_t group() const { return heads_q / heads_kv; }
  ADASPLASH2_INLINE int64_t rows() const { return batch * heads_q * length_q; }
  ADASPLASH2_INLINE int64_t blocks_per_head() const {
    return (length_q + kBlockRows - 1) / kBlockRows;
  }
};

// alpha 1.5 and 2: the threshold of a row's scores z is max + tau + rest. The three are kept
// apart: z - max is nearly exact, and `rest` holds what tau loses to rounding.
// Other alphas: max is a score s of the support, see power.h for all three.
template <class T>
struct Threshold {
  T max, tau, rest;
};

// What a forward did, counted for tests: time shows too late that the bound no longer works.
struct Work {
  int64_t tiles = 0;        // tiles of scores computed by the scan
  int64_t appended = 0;     // entries put into lists
  int64_t tightenings = 0;  // of lists during the scan
  int64_t solved = 0;       // entries that the thresholds of lists were found on
  int64_t steps = 0;        // passes over those, and over flat rows
  int64_t flat_rows = 0;

  ADASPLASH2_INLINE void add(const Work& other) {
    tiles += other.tiles;
    appended += other.appended;
    tightenings += other.tightenings;
    solved += other.solved;
    steps += other.steps;
    flat_rows += other.flat_rows;
  }
};

// What the forward knows of each query row (arrays over all rows, in T = float or double).
// support < 0 marks a flat or poisoned row: -1 - support keys, no list.
template <class T>
struct RowResults {
  Threshold<T>* thresholds;
  T* tau;  // max + tau + rest
  int32_t* support;
  int32_t* iterations;  // may be null
  uint8_t* tiles;       // may be null; 1 where a 64x64 tile of this head has a probability > 0
};

template <class T>
struct ForwardTask {
  const AttentionProblem* problem;
  HeadRef query, value, out;
  const T* packed_keys;
  int64_t row_begin, rows;  // within the head
  int64_t scan_rows;        // rows that share a pass over the keys
  RowResults<T> results;    // at the first row of the task; tiles at the block's first tile
  void* workspace;
  // Out, in the workspace: row i has its probabilities and keys at + i * list_stride.
  T* list_values;
  int32_t* list_keys;
  int64_t list_stride;
  Work work;
};

template <class T>
struct BackwardRowsTask {
  const AttentionProblem* problem;
  HeadRef query, key, value, grad_out, grad_query;
  const T* packed_keys;    // null unless some row is flat
  const T* packed_values;  // likewise
  int64_t row_begin, rows;
  const Threshold<T>* thresholds;
  const int32_t* support;
  const int64_t* offsets;  // of each row's list, at the first row of the task
  const int32_t* keys;     // all lists
  const T* probabilities;
  T* grad_scores;  // out, beside probabilities: dL/d(q.k)
  T* delta;        // out, for flat rows, at the first row of the task
  void* workspace;
};

// Entries of the transposed lists: for key j, entries [offsets[j], offsets[j+1]).
template <class T>
struct BackwardKeysTask {
  const AttentionProblem* problem;
  const HeadRef* queries;    // one per query head of the group
  const HeadRef* grad_outs;  // likewise
  HeadRef grad_key, grad_value;
  int64_t key_begin, keys;
  const int64_t* offsets;  // at key_begin
  const int32_t* rows;     // head_in_group * length_q + row
  const T *probabilities, *grad_scores;
  // Flat rows of the group, or null where there are none: arrays of group * length_q.
  const T *packed_keys, *packed_values;
  const Threshold<T>* thresholds;
  const T* delta;
  const int32_t* support;
  const uint8_t* flat_blocks;  // per (head in group, row block)
  void* workspace;
};

template <class T>
struct EntmaxTask {
  const void* x;
  void* y;
  int64_t rows, length, stride_x;  // y is dense
  const Alpha* alpha;
  void* workspace;
};

struct EntmaxBackwardTask {
  const void *y, *grad_y;
  void* grad_x;
  int64_t rows, length, stride_grad_y;  // y and grad_x are dense
  const Alpha* alpha;
  void* workspace;
};

// Kernels of one storage dtype, computing in T.
template <class T>
struct Kernels {
  int64_t panel_keys;  // keys per packed panel
  int64_t task_keys;   // keys of a BackwardKeysTask, a multiple of panel_keys
  // Rows [first panel's first key ...) of `rows` packed as [panel][depth][panel_keys].
  void (*pack_panels)(HeadRef rows, int64_t length, int64_t depth, int64_t panel_begin,
                      int64_t panel_end, T* packed);
  int64_t (*forward_workspace)(const AttentionProblem&);  // bytes, a thread
  void (*forward)(ForwardTask<T>&);
  int64_t (*backward_rows_workspace)(const AttentionProblem&, bool any_flat);
  void (*backward_rows)(const BackwardRowsTask<T>&);
  int64_t (*backward_keys_workspace)(const AttentionProblem&);
  void (*backward_keys)(const BackwardKeysTask<T>&);
  int64_t (*entmax_workspace)(int64_t length);
  void (*entmax)(const EntmaxTask<T>&);
  void (*entmax_backward)(const EntmaxBackwardTask&);
};

struct KernelTable {
  const char* isa;
  Kernels<float> float32, bfloat16, float16;
  Kernels<double> float64;
};

}  // namespace adasplash2
