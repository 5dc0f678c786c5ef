// Plain data that drivers and per-ISA kernels share. No functions with external linkage and no
// standard templates, here and in score.h, work.h and kernels.h: they are included by units
// compiled for different instruction sets, whose out-of-line copies must never meet in the linker.
#pragma once

#include <cstddef>
#include <cstdint>

#include "adasplash2/threshold.h"

// Never out of line, see above.
#define ADASPLASH2_INLINE inline __attribute__((always_inline))

namespace adasplash2 {

// Of tensors; the last three of operands alone.
enum class Dtype : int {
  kFloat32 = 0,
  kFloat64 = 1,
  kBfloat16 = 2,
  kFloat16 = 3,
  kBool = 4,
  kInt32 = 5,
  kInt64 = 6
};

ADASPLASH2_INLINE int64_t bytes_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
    case Dtype::kInt64:
      return 8;
    case Dtype::kFloat32:
    case Dtype::kInt32:
      return 4;
    case Dtype::kBool:
      return 1;
    default:
      return 2;
  }
}

// Storage of the 16-bit floats; arithmetic happens in float.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Query rows a task owns, and the side of the tiles that statistics count.
constexpr int64_t kBlockRows = 64;

// Entries of a row's list at most, before its bound is raised. At float32 that bounds what a row
// saves for the backward to 16 KiB. Of 8,192 keys, rows that keep 1,000 take 0.6 of dense work's
// step so (head_dim 64; 0.5 with 128).
constexpr int64_t kListCapacity = 2048;

struct Alpha {
  AlphaKind kind;
  double value;              // alpha
  double exponent;           // r = 1 / (alpha-1)
  double powers[kBins + 1];  // (k / kBins)^r
};

// alpha 1.5 and 2: the threshold of a row's scores z is max + tau + rest. The three are kept
// apart: z - max is nearly exact, and `rest` holds what tau loses to rounding.
// Other alphas: max is a score s of the support, see power.h for all three.
template <class T>
struct Threshold {
  T max, tau, rest;
};

// What a forward did, counted for tests: time shows too late that the bound no longer works.
struct Work {
  int64_t tiles = 0;        // tiles of scores computed
  int64_t appended = 0;     // entries put into lists
  int64_t tightenings = 0;  // of lists during the scan
  int64_t solved = 0;       // entries that the thresholds of lists were found on
  int64_t steps = 0;        // passes over those, and over flat rows
  int64_t flat_rows = 0;

  ADASPLASH2_INLINE void add(const Work& other) {
    tiles += other.tiles;
    appended += other.appended;
    tightenings += other.tightenings;
    solved += other.solved;
    steps += other.steps;
    flat_rows += other.flat_rows;
  }
};

// What a forward says of a tile of kBlockRows query rows by kBlockRows keys of one head: whether
// some of its pairs may have a probability, and whether one has.
enum TileState : uint8_t { kUnseenTile = 0, kEmptyTile = 1, kLiveTile = 2 };

}  // namespace adasplash2
