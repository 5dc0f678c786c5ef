// What the drivers ask of the kernels of one instruction set: the tasks, and the table of functions
// that do them.
#pragma once

#include "work.h"

namespace adasplash2 {

// Bytes of a core's second cache, by which kernels choose how much to hold at a time.
int64_t second_cache();

// What the forward knows of each query row (arrays over all rows, in T = float or double).
// support < 0 marks a flat or poisoned row: -1 - support keys, no list.
template <class T>
struct RowResults {
  Threshold<T>* thresholds;
  T* tau;  // max + tau + rest
  int32_t* support;
  int32_t* iterations;  // may be null
  uint8_t* tiles;       // TileState of each tile of keys; may be null
};

template <class T>
struct ForwardTask {
  const AttentionProblem* problem;
  HeadRef query, value, out;
  const T* packed_keys;
  int64_t head;             // among the query heads of all batches
  int64_t row_begin, rows;  // within the head
  int64_t scan_rows;        // rows that share a pass over the keys
  RowResults<T> results;    // at the first row of the task; tiles at the block's first
  void* workspace;
  // Out, in the workspace: row i has its probabilities and keys at + i * list_stride.
  T* list_values;
  int32_t* list_keys;
  int64_t list_stride;
  Work work;
};

// The scan of some keys for some rows of a group of query heads that share them; or, where rows
// reach beyond the group, for all rows of neighbouring groups, each with the keys of its own head.
template <class T>
struct DecodeScanTask {
  const AttentionProblem* problem;
  TensorRef query;
  CacheRef key;             // of the first group
  int64_t key_stride_head;  // elements to the next group's
  int64_t head_kv;          // of the first group
  Part rows;                // numbered from the first group's on; kBlockRows at most
  KeyRange keys;            // from a multiple of chunk_keys on
  KeyRange readable;        // keys that some row may see: no other is read
  void* workspace;
  // Out, in the workspace: of row i, what may be in its support, at + i * list_stride.
  T* list_values;
  int32_t* list_keys;
  int64_t list_stride;
  int64_t counts[kBlockRows];  // or kPoisonedPart
  Work work;
};

// What a part of the keys has left of a row.
constexpr int64_t kPoisonedPart = -1;
template <class T>
struct PartList {
  const T* values;
  const int32_t* keys;
  int64_t count;  // or kPoisonedPart
};

// One row: its output of what its parts have left.
template <class T>
struct DecodeRowTask {
  const AttentionProblem* problem;
  CacheRef value;
  HeadRef out;
  int64_t head;  // among the query heads of all batches
  int64_t row;   // within the head
  const PartList<T>* lists;
  int64_t parts, entries;  // of all lists together
  void* workspace;
  // Out.
  T* tau;
  int32_t support, steps;
  Work work;
};

// Gradients that rows have beside dQ, null where they are not wanted.
template <class T>
struct RowGradients {
  // Of each row, at the first row of the task.
  T *slopes, *sinks, *scales, *alphas;
  T* mask;  // added to: of the first row of the task and key 0
  int64_t mask_stride_row, mask_stride_key;
};

// Gradients of a range of a head's keys and values.
template <class T>
struct KeyGradients {
  T *keys, *values;  // null where there are none
  KeyRange range;    // whole panels of the keys that they are of
};

template <class T>
struct BackwardRowsTask {
  const AttentionProblem* problem;
  HeadRef query, key, value, grad_out, grad_query;
  const T* packed_keys;    // null unless some row is flat
  const T* packed_values;  // likewise
  int64_t head;            // among the query heads of all batches
  int64_t row_begin, rows;
  const Threshold<T>* thresholds;
  const int32_t* support;
  const int64_t* offsets;  // of each row's list, at the first row of the task
  const int32_t* keys;     // all lists
  const T* probabilities;
  int64_t first_entry;      // of what is held for the gradients
  T* grad_scores;           // out, beside probabilities from there on: dL/d(q.k)
  T* weights;               // out, likewise: of dO in dV; null where they are the probabilities
  KeyGradients<T> of_band;  // added to by flat rows
  RowGradients<T> others;
  void* workspace;
};

// An entry of a row's list as the key has it: the row, and what its dO has in dV and its Q in dK.
// In one place, since entries come by rows and go to keys all over the memory.
template <class T>
struct ColumnEntry {
  int32_t row;  // head_in_group * length_q + row
  T value_weight, key_weight;
};

// For key j, entries [offsets[j], offsets[j+1]).
template <class T>
struct BackwardKeysTask {
  const AttentionProblem* problem;
  const HeadRef* queries;    // one per query head of the group
  const HeadRef* grad_outs;  // likewise
  HeadRef grad_key, grad_value;
  int64_t key_begin, keys;
  const int64_t* offsets;  // at key_begin
  const ColumnEntry<T>* entries;
  const KeyGradients<T>* of_bands;  // of the flat rows of the group; null where there are none
  int64_t bands;
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
  // Panels [panel_begin, panel_end) of the `length` rows, packed as [panel][depth][panel_keys].
  void (*pack_panels)(HeadRef rows, int64_t length, int64_t depth, int64_t panel_begin,
                      int64_t panel_end, T* packed);
  void (*norms)(HeadRef rows, int64_t count, int64_t depth, double* norms);
  int64_t (*forward_workspace)(const AttentionProblem&);  // bytes, a thread
  void (*forward)(ForwardTask<T>&);
  int64_t chunk_keys;  // keys of a DecodeScanTask begin at a multiple of this
  int64_t (*decode_scan_workspace)(const AttentionProblem&, int64_t rows, int64_t keys);
  void (*decode_scan)(DecodeScanTask<T>&);
  int64_t (*decode_row_workspace)(const AttentionProblem&, int64_t entries);
  void (*decode_row)(DecodeRowTask<T>&);
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
