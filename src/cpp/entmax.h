// Entmax of dense rows, and its gradient.
#pragma once

#include "forward.h"

namespace adasplash2::ADASPLASH2_ISA {

template <class T>
struct EntmaxWorkspace {
  T *values, *candidates;
  int64_t bytes;

  ADASPLASH2_INLINE EntmaxWorkspace(int64_t length, void* base) {
    Allocator memory{static_cast<char*>(base)};
    values = memory.take<T>(length + 2 * kLanes<T>);
    candidates = memory.take<T>(length + 2 * kLanes<T>);
    bytes = memory.used;
  }
};

template <class T>
static int64_t entmax_workspace(int64_t length) {
  return EntmaxWorkspace<T>(length, nullptr).bytes;
}

template <class S, AlphaKind K>
ADASPLASH2_INLINE void entmax_rows(const EntmaxTask<ComputeOf<S>>& task) {
  using T = ComputeOf<S>;
  constexpr int L = kLanes<T>;
  const EntmaxWorkspace<T> ws(task.length, task.workspace);
  const Power<T> power = power_of<T>(*task.alpha);
  const T factor = T(value_factor<K>(*task.alpha));
  const int64_t n = task.length, whole = n / L * L;
  for (int64_t i = 0; i < task.rows; ++i) {
    const S* x = static_cast<const S*>(task.x) + i * task.stride_x;
    S* y = static_cast<S*>(task.y) + i * n;
    for (int64_t j = 0; j < whole; j += L) store(ws.values + j, load_compute(x + j) * factor);
    if (whole < n) store(ws.values + whole, load_partial(x + whole, int(n - whole)) * factor);
    const DenseRow<T> row = solve_dense<K, T>(ws.values, n, ws.candidates, power);
    for (int64_t j = 0; j < n; j += L) {
      T p[L];
      store(p, load(ws.values + j) * row.norm);
      store_storage(y + j, p, j < whole ? L : n - whole);
    }
  }
}

template <class S>
static void entmax(const EntmaxTask<ComputeOf<S>>& task) {
  with_kind(task.alpha->kind, [&](auto kind) { entmax_rows<S, decltype(kind)::value>(task); });
}

// dx = u (dy - sum u dy / sum u), u = y^(2-alpha).
template <class S, AlphaKind K>
ADASPLASH2_INLINE void entmax_backward_rows(const EntmaxBackwardTask& task) {
  using T = ComputeOf<S>;
  constexpr int L = kLanes<T>;
  const EntmaxWorkspace<T> ws(task.length, task.workspace);
  const Power<T> power = power_of<T>(*task.alpha);
  const int64_t n = task.length, whole = n / L * L;
  for (int64_t i = 0; i < task.rows; ++i) {
    const S* y = static_cast<const S*>(task.y) + i * n;
    const S* dy = static_cast<const S*>(task.grad_y) + i * task.stride_grad_y;
    S* dx = static_cast<S*>(task.grad_x) + i * n;
    for (int64_t j = 0; j < n; j += L) {
      const bool full = j < whole;
      store(ws.values + j, full ? load_compute(y + j) : load_partial(y + j, int(n - whole)));
      store(ws.candidates + j, full ? load_compute(dy + j) : load_partial(dy + j, int(n - whole)));
    }
    score_gradients<K>(ws.values, ws.candidates, n, T(1), power);
    store_storage(dx, ws.values, n);
  }
}

template <class S>
static void entmax_backward(const EntmaxBackwardTask& task) {
  with_kind(task.alpha->kind,
            [&](auto kind) { entmax_backward_rows<S, decltype(kind)::value>(task); });
}

}  // namespace adasplash2::ADASPLASH2_ISA
