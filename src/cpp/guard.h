// What the address sanitizer cannot know by itself: that of a piece of memory only the beginning,
// or some arrays, belong to somebody. Without it nothing is done.
#pragma once

#include "types.h"

#if defined(__SANITIZE_ADDRESS__)
#define ADASPLASH2_GUARDS 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)  // as older Clangs say it
#define ADASPLASH2_GUARDS 1
#endif
#endif

#ifdef ADASPLASH2_GUARDS
#include <sanitizer/asan_interface.h>
#endif

namespace adasplash2 {

#ifdef ADASPLASH2_GUARDS
constexpr int64_t kGuardBytes = 64;  // at least, behind each array of a workspace
ADASPLASH2_INLINE void guard(char* begin, char* end, char* next) {
  __asan_unpoison_memory_region(begin, size_t(end - begin));  // a task before had other arrays
  __asan_poison_memory_region(end, size_t(next - end));
}
#else
constexpr int64_t kGuardBytes = 0;
ADASPLASH2_INLINE void guard(char*, char*, char*) {}
#endif

}  // namespace adasplash2
