// All kernels of one instruction set: this file is compiled once per set, with
// ADASPLASH2_ISA its name. Nothing here may have external linkage but the table.
#include "backward.h"
#include "decode.h"
#include "entmax.h"
#include "forward.h"

namespace adasplash2::ADASPLASH2_ISA {
namespace {

template <class S>
void pack_panels(HeadRef rows, int64_t length, int64_t depth, int64_t panel_begin,
                 int64_t panel_end, ComputeOf<S>* packed) {
  using T = ComputeOf<S>;
  constexpr int64_t keys = kPanelKeys<T>;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const Part part = part_of(length, keys, panel);
    pack_transposed<S, T>(rows, part, keys, depth, packed + part.first * depth);
  }
}

template <class S>
void norms(HeadRef rows, int64_t count, int64_t depth, double* norms) {
  for (int64_t i = 0; i < count; ++i) {
    double total = 0;
    for (int64_t k = 0; k < depth; ++k) {
      const double x = double(to_compute(row_of<const S>(rows, i)[k]));
      total += x * x;
    }
    norms[i] = __builtin_sqrt(total);
  }
}

template <class S>
int64_t forward_workspace(const AttentionProblem& problem) {
  return ForwardWorkspace<ComputeOf<S>>(problem, nullptr).bytes;
}

template <class S>
int64_t decode_scan_workspace(const AttentionProblem& problem, int64_t rows, int64_t keys) {
  return DecodeWorkspace<ComputeOf<S>>(problem, rows, keys, nullptr).bytes;
}

template <class S>
int64_t decode_row_workspace(const AttentionProblem& problem, int64_t entries) {
  return DecodeRowWorkspace<ComputeOf<S>>(problem, entries, nullptr).bytes;
}

template <class S>
constexpr Kernels<ComputeOf<S>> kernels_of() {
  using T = ComputeOf<S>;
  Kernels<T> k = {};
  k.panel_keys = kPanelKeys<T>;
  k.task_keys = kTaskKeys<T>;
  k.pack_panels = pack_panels<S>;
  k.norms = norms<S>;
  k.forward_workspace = forward_workspace<S>;
  k.forward = forward<S>;
  k.chunk_keys = kChunkKeys;
  k.decode_scan_workspace = decode_scan_workspace<S>;
  k.decode_scan = decode_scan<S>;
  k.decode_row_workspace = decode_row_workspace<S>;
  k.decode_row = decode_row<S>;
  k.backward_rows_workspace = backward_rows_workspace<S>;
  k.backward_rows = backward_rows<S>;
  k.backward_keys_workspace = backward_keys_workspace<S>;
  k.backward_keys = backward_keys<S>;
  k.entmax_workspace = entmax_workspace<T>;
  k.entmax = entmax<S>;
  k.entmax_backward = entmax_backward<S>;
  return k;
}

#define ADASPLASH2_STRING_(x) #x
#define ADASPLASH2_STRING(x) ADASPLASH2_STRING_(x)

}  // namespace

extern const KernelTable table;
const KernelTable table = {ADASPLASH2_STRING(ADASPLASH2_ISA), kernels_of<float>(),
                           kernels_of<Bfloat16>(), kernels_of<Float16>(), kernels_of<double>()};

}  // namespace adasplash2::ADASPLASH2_ISA
