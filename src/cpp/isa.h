// The kernels of the instruction set in use.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace adasplash2 {

// Names built in and usable on this processor, best first.
std::vector<std::string> usable_isas();

// The table in use: the best one, or the one that ADASPLASH2_ISA names. Throws
// std::invalid_argument where that one is unknown or this processor cannot run it.
const KernelTable& kernels();

// The table of one of `usable_isas()`. Throws std::invalid_argument for any other name.
const KernelTable& kernels(const std::string& isa);

template <class T>
const Kernels<T>& kernels_for(const KernelTable& table, Dtype dtype);

template <>
inline const Kernels<double>& kernels_for(const KernelTable& table, Dtype) {
  return table.float64;
}
template <>
inline const Kernels<float>& kernels_for(const KernelTable& table, Dtype dtype) {
  return dtype == Dtype::kBfloat16  ? table.bfloat16
         : dtype == Dtype::kFloat16 ? table.float16
                                    : table.float32;
}

}  // namespace adasplash2
