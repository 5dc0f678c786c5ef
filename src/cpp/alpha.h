// What the kernels know of an alpha, made of its value.
#pragma once

#include "types.h"

namespace adasplash2 {

// Throws std::invalid_argument where `value` is not above 1.
Alpha alpha_of(double value);

// Of an entry of a tensor: one that is not in (1, 2] makes scores NaN, and so their rows.
Alpha alpha_or_nan(double value);

}  // namespace adasplash2
