// Entmax of the rows of a matrix: tasks and threads.
#pragma once

#include "kernels.h"

namespace adasplash2 {

struct EntmaxArguments {
  int64_t rows, length;
  Alpha alpha;
  const void* alphas;  // of each row, in the compute dtype; null where `alpha` holds for all
  Dtype dtype;
  int threads;
  const KernelTable* kernels;
};

// y (dense) = entmax(x), row by row; strides count elements between rows.
void entmax_forward(const EntmaxArguments& arguments, const void* x, int64_t stride_x, void* y);

void entmax_backward(const EntmaxArguments& arguments, const void* y, const void* grad_y,
                     int64_t stride_grad_y, void* grad_x);

}  // namespace adasplash2
