// Which probabilities dropout drops: drawn anew from the place of each wherever it is needed, so
// that nothing is kept of it.
#pragma once

#include "score.h"

namespace adasplash2::ADASPLASH2_ISA {

// The first word of Philox-4x32 with 10 rounds (Salmon et al. 2011) of the counter (c0, c1, c2, 0),
// for as many c0 as there are lanes; a 32-bit word in each.
typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));

ADASPLASH2_INLINE Words random_words(Words c0, uint64_t row, uint64_t head, uint64_t seed) {
  constexpr uint64_t kWord = 0xffffffffu;
  Words c1 = Words{} + (row & kWord), c2 = Words{} + (head & kWord), c3 = {};
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Words first = c0 * 0xD2511F53u, second = c2 * 0xCD9E8D57u;
    c0 = (second >> 32) ^ c1 ^ uint64_t(key0);
    c2 = (first >> 32) ^ c3 ^ uint64_t(key1);
    c1 = second & kWord;
    c3 = first & kWord;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c0;
}

template <class T>
struct Dropout {
  const uint64_t dropped_below, seed, head;
  const T factor;

  ADASPLASH2_INLINE explicit Dropout(const HeadScore& score)
      : dropped_below(score.dropped_below),
        seed(score.seed),
        head(uint64_t(score.number)),
        factor(T(score.kept_factor)) {}

  ADASPLASH2_INLINE bool is_on() const { return factor != T(0); }

  // What is left of the x of some keys: 0, or x / (1 - dropout_p).
  __attribute__((noinline)) Vec<T> applied(Vec<T> x, int64_t row, Keys<T> keys) const {
    constexpr int kWords = kLanes<double>;
    int32_t number[kLanes<T>];
    T kept[kLanes<T>];
    __builtin_memcpy(number, &keys, sizeof(keys));
    for (int lane = 0; lane < kLanes<T>; lane += kWords) {
      Words c0 = {};
      for (int i = 0; i < kWords; ++i) c0[i] = uint32_t(number[lane + i]);
      const Words words = random_words(c0, uint64_t(row), head, seed);
      for (int i = 0; i < kWords; ++i) kept[lane + i] = words[i] < dropped_below ? T(0) : T(1);
    }
    return load(kept) != T(0) ? x * factor : Vec<T>{};
  }
  // The same of probabilities: those of a poisoned row stay NaN.
  ADASPLASH2_INLINE Vec<T> weights(Vec<T> p, int64_t row, Keys<T> keys) const {
    return p == p ? applied(p, row, keys) : p;
  }
};

}  // namespace adasplash2::ADASPLASH2_ISA
