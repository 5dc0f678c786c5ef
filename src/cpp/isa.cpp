#include "isa.h"

#if defined(__linux__)
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace adasplash2 {

#define ADASPLASH2_DECLARE(name)  \
  namespace name {                \
  extern const KernelTable table; \
  }
ADASPLASH2_DECLARE(baseline)
#if defined(ADASPLASH2_HAVE_avx2)
ADASPLASH2_DECLARE(avx2)
#endif
#if defined(ADASPLASH2_HAVE_avx512)
ADASPLASH2_DECLARE(avx512)
#endif

namespace {

// Every flag that CMakeLists.txt compiles the unit with is asked for here.
std::vector<const KernelTable*> usable_tables() {
  std::vector<const KernelTable*> tables;
#if defined(ADASPLASH2_HAVE_avx2) || defined(ADASPLASH2_HAVE_avx512)
  __builtin_cpu_init();
  [[maybe_unused]] const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("lzcnt") && __builtin_cpu_supports("popcnt") &&
      __builtin_cpu_supports("f16c");
#endif
#if defined(ADASPLASH2_HAVE_avx512)
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512cd"))
    tables.push_back(&avx512::table);
#endif
#if defined(ADASPLASH2_HAVE_avx2)
  if (has_avx2) tables.push_back(&avx2::table);
#endif
  tables.push_back(&baseline::table);
  return tables;
}

// `what` names the source of `isa` in the error.
const KernelTable& table_of(const std::string& isa, const char* what) {
  static const auto tables = usable_tables();
  std::string allowed;
  for (const KernelTable* table : tables) {
    if (table->isa == isa) return *table;
    allowed += (allowed.empty() ? "" : ", ") + std::string(table->isa);
  }
  throw std::invalid_argument(std::string(what) + " must be one of " + allowed +
                              " on this processor, got '" + isa + "'");
}

const KernelTable& choose() {
  const char* forced = std::getenv("ADASPLASH2_ISA");
  if (forced == nullptr || *forced == '\0') return *usable_tables().front();
  return table_of(forced, "ADASPLASH2_ISA");
}

}  // namespace

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : usable_tables()) names.emplace_back(table->isa);
  return names;
}

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

const KernelTable& kernels(const std::string& isa) { return table_of(isa, "isa"); }

int64_t second_cache() {
  static const int64_t bytes = [] {
    constexpr int64_t kUsual = int64_t(1) << 20;
    int64_t said = kUsual;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    said = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    // What is larger is shared by several cores; smaller ones were not measured.
    return std::clamp(said, kUsual, 2 * kUsual);
  }();
  return bytes;
}

}  // namespace adasplash2
