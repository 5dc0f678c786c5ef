// Attention over whole tensors: tasks, threads, memory.
#pragma once

#include <memory>

#include "kernels.h"

namespace adasplash2 {

struct ForwardArguments {
  AttentionProblem problem;
  const KernelTable* kernels;
  TensorRef query, key, value, out;
  BlockTable pages;     // of key and value, whose batch strides are those of pages then
  void* tau;            // (batch, heads_q, length_q), compute dtype
  int32_t* iterations;  // likewise, or null
  int32_t* support;     // likewise, or null
  uint8_t* tiles;       // TileState (batch, heads_q, row blocks, key blocks), zeroed, or null
  Work* work;           // added to, or null
  bool keep;            // keep what the backward needs
  int64_t scan_rows;    // query rows that share a pass over the keys: fewer keep to a smaller cache
  int threads;
};

// What a forward keeps until its owner has room for it: `bytes()` long, copied by `save`.
class Kept {
 public:
  virtual ~Kept() = default;
  virtual int64_t bytes() const = 0;
  virtual void save(void* to) = 0;
};

// Of the address of what is kept: it begins with 64-bit numbers.
constexpr int64_t kSavedAlignment = sizeof(int64_t);
// Bytes of what is kept of `rows` rows whose lists hold `entries` together: linear in both. No list
// is longer than kListCapacity.
int64_t saved_bytes(Dtype dtype, int64_t rows, int64_t entries);

// Null where nothing is kept.
std::unique_ptr<Kept> attention_forward(const ForwardArguments& arguments);

struct BackwardArguments {
  AttentionProblem problem;
  const KernelTable* kernels;
  TensorRef query, key, value, grad_out, grad_query, grad_key, grad_value;
  // Compute dtype, null where not wanted. Of each row, (batch, heads_q, length_q):
  void *grad_slopes, *grad_sinks, *grad_scales, *grad_alphas;
  Operand grad_mask;    // zeroed, in the shape of the mask
  const void* saved;    // on kSavedAlignment bytes
  int64_t saved_bytes;  // may be more than were saved
  int threads;
};

// In how many turns, of some key heads each, it was done. Throws std::invalid_argument where
// `saved` is not what a forward of this problem kept.
int64_t attention_backward(const BackwardArguments& arguments);

}  // namespace adasplash2
