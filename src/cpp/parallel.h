// Parallel loops whose result does not depend on the number of threads: every index is one
// task with its own outputs, handed out in order as threads get free.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>

#include "guard.h"

namespace adasplash2 {

// body(index, thread); an exception thrown in it is rethrown here once all threads are back. With
// one thread the indices behind it are not run.
template <class F>
void parallel_for(int64_t n, int threads, F body) {
  if (n < 1) return;
  if (n < threads) threads = int(n);
  if (threads <= 1) {  // also a team of one is woken by system calls, a microsecond of a small call
    for (int64_t i = 0; i < n; ++i) body(i, 0);
    return;
  }
  std::exception_ptr error;
  std::mutex mutex;
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
#endif
  {
#if defined(_OPENMP)
    const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
#else
    const int thread = 0;
#endif
    for (int64_t i = 0; i < n; ++i) {
      try {
        body(i, thread);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!error) error = std::current_exception();
      }
    }
  }
  if (error) std::rethrow_exception(error);
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// More than malloc ever keeps (32 MiB in glibc) is new in each call: huge pages, a hint, have it
// resident sooner.
constexpr size_t kHugePage = size_t(2) << 20, kLarge = size_t(32) << 20;
inline void use_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t at = uintptr_t(memory), begin = (at + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (at + bytes) / kHugePage * kHugePage;
  if (bytes >= kLarge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Uninitialised memory, aligned to a cache line; pages become resident when touched.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n) : size_(n) {
    constexpr size_t kLine = 64;
    const size_t wanted = size_t(n) * sizeof(T), alignment = wanted < kLarge ? kLine : kHugePage;
    const size_t bytes = (wanted + alignment - 1) / alignment * alignment;
    data_.reset(static_cast<T*>(std::aligned_alloc(alignment, bytes ? bytes : alignment)));
    if (!data_) throw std::bad_alloc();
    char* const begin = reinterpret_cast<char*>(data_.get());
    guard(begin, begin + wanted, begin + bytes);
    use_huge_pages(data_.get(), bytes);
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  T& operator[](int64_t i) { return data_.get()[i]; }
  const T& operator[](int64_t i) const { return data_.get()[i]; }
  int64_t size() const { return size_; }

 private:
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

}  // namespace adasplash2
