#include "entmax_rows.h"

#include <vector>

#include "alpha.h"
#include "isa.h"
#include "parallel.h"

namespace adasplash2 {
namespace {

// Rows a task takes: enough to outweigh handing it out, few enough to balance.
int64_t rows_per_task(int64_t rows, int64_t length) {
  constexpr int64_t kElements = 1 << 15;
  const int64_t n = kElements / (length < 1 ? 1 : length) + 1;
  return n < rows ? n : (rows < 1 ? 1 : rows);
}

// Calls run(kernels, first row, rows, their alpha, workspace) for all rows.
template <class T, class F>
void for_rows(const EntmaxArguments& a, F run) {
  const Kernels<T>& k = kernels_for<T>(*a.kernels, a.dtype);
  const int64_t step = rows_per_task(a.rows, a.length);
  std::vector<Buffer<char>> workspaces;
  for (int t = 0; t < (a.threads < 1 ? 1 : a.threads); ++t)
    workspaces.emplace_back(k.entmax_workspace(a.length));
  parallel_for((a.rows + step - 1) / step, a.threads, [&](int64_t i, int thread) {
    const int64_t begin = i * step, end = a.rows - begin < step ? a.rows : begin + step;
    char* const workspace = workspaces[size_t(thread)].data();
    if (!a.alphas) return run(k, begin, end - begin, a.alpha, workspace);
    const T* const alphas = static_cast<const T*>(a.alphas);
    for (int64_t first = begin, next; first < end; first = next) {  // rows that share an alpha
      for (next = first + 1; next < end && alphas[next] == alphas[first];) ++next;
      run(k, first, next - first, alpha_or_nan(double(alphas[first])), workspace);
    }
  });
}

const char* row(const void* data, int64_t elements, Dtype dtype) {
  return static_cast<const char*>(data) + elements * (dtype == Dtype::kFloat64   ? 8
                                                      : dtype == Dtype::kFloat32 ? 4
                                                                                 : 2);
}
char* row(void* data, int64_t elements, Dtype dtype) {
  return const_cast<char*>(row(static_cast<const void*>(data), elements, dtype));
}

template <class T>
void forward(const EntmaxArguments& a, const void* x, int64_t stride_x, void* y) {
  for_rows<T>(a, [&](const Kernels<T>& k, int64_t first, int64_t rows, const Alpha& alpha,
                     void* workspace) {
    k.entmax({row(x, first * stride_x, a.dtype), row(y, first * a.length, a.dtype), rows, a.length,
              stride_x, &alpha, workspace});
  });
}

template <class T>
void backward(const EntmaxArguments& a, const void* y, const void* grad_y, int64_t stride_grad_y,
              void* grad_x) {
  for_rows<T>(a, [&](const Kernels<T>& k, int64_t first, int64_t rows, const Alpha& alpha,
                     void* workspace) {
    k.entmax_backward(
        {row(y, first * a.length, a.dtype), row(grad_y, first * stride_grad_y, a.dtype),
         row(grad_x, first * a.length, a.dtype), rows, a.length, stride_grad_y, &alpha, workspace});
  });
}

}  // namespace

void entmax_forward(const EntmaxArguments& a, const void* x, int64_t stride_x, void* y) {
  a.dtype == Dtype::kFloat64 ? forward<double>(a, x, stride_x, y)
                             : forward<float>(a, x, stride_x, y);
}

void entmax_backward(const EntmaxArguments& a, const void* y, const void* grad_y,
                     int64_t stride_grad_y, void* grad_x) {
  a.dtype == Dtype::kFloat64 ? backward<double>(a, y, grad_y, stride_grad_y, grad_x)
                             : backward<float>(a, y, grad_y, stride_grad_y, grad_x);
}

}  // namespace adasplash2
