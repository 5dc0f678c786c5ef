// Attention of few queries on long caches: tasks, threads, memory.
#pragma once

#include "attention.h"

namespace adasplash2 {

// Whether `decode` takes a forward. Throws std::invalid_argument where no other does and it cannot.
bool is_decoding(const ForwardArguments& arguments);

// Needs no memory but what may be in the support of some rows at a time.
void decode(const ForwardArguments& arguments);

}  // namespace adasplash2
