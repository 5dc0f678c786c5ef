// Attention of few queries on long caches: tasks, threads, memory.
#pragma once

#include "attention.h"

namespace adasplash2 {

// Whether so many queries of so many keys, which are in no pages, are decoded where nothing is kept
// of them.
bool are_decoded(int64_t queries, int64_t keys, int64_t head_dim);

// Whether `decode` takes a forward. Throws std::invalid_argument where no other does and it cannot.
bool is_decoding(const ForwardArguments& arguments);

// Needs no memory but what may be in the support of some rows at a time.
void decode(const ForwardArguments& arguments);

}  // namespace adasplash2
