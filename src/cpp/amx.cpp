#include "amx.h"

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace adasplash2 {
namespace {

// Tiles 0 to 2 are sums, 3 is a part of rows, 4 to 6 are the same part of keys: each of kScreenRows
// rows of 64 bytes. A constant: GCC 12 takes the instruction for one that reads eight bytes, and
// leaves out what a variable's others are set to.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, unused[14];
  uint16_t bytes_of_row[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64 && kScreenRows == 16 && kScreenDepth * 2 == 64);
const TileConfig kConfig = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16}};

void begin() { _tile_loadconfig(&kConfig); }

void end() { _tile_release(); }

void dots(const uint16_t* rows, const uint16_t* keys, int64_t steps, float* out) {
  static_assert(kScreenKeys == 3 * kScreenRows);
  const uint16_t* const second = keys + steps * kScreenTile;
  const uint16_t* const third = second + steps * kScreenTile;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  for (int64_t at = 0; at < steps * kScreenTile; at += kScreenTile) {
    _tile_loadd(3, rows + at, 64);
    _tile_loadd(4, keys + at, 64);
    _tile_dpbf16ps(0, 3, 4);
    _tile_loadd(5, second + at, 64);
    _tile_dpbf16ps(1, 3, 5);
    _tile_loadd(6, third + at, 64);
    _tile_dpbf16ps(2, 3, 6);
  }
  constexpr int kStride = kScreenKeys * sizeof(float);
  _tile_stored(0, out, kStride);
  _tile_stored(1, out + kScreenRows, kStride);
  _tile_stored(2, out + 2 * kScreenRows, kStride);
}

bool processor_has_it() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // of leaf 7
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTile);
}

// Linux keeps room for a thread's tiles only where its process has asked (since 5.16).
bool system_lets_us() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace

const MatrixUnit* amx() {
  static const MatrixUnit unit = {begin, end, dots};
  static const bool is_usable = processor_has_it() && system_lets_us();
  return is_usable ? &unit : nullptr;
}

}  // namespace adasplash2
