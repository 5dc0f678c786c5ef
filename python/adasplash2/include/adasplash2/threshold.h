// The mathematics of the entmax threshold, shared by the CPU core and the CUDA kernels.
//
// Notation: z = (alpha-1) * s are a row's scores, y = z - max z <= 0 the shifted scores and
// tau in [-1, 0) the threshold of y, the one root of
//     f(t) = sum_j [y_j - t]_+^r - 1,    r = 1 / (alpha-1).
// All that can matter lies in the window [-1, 0], which is cut into kBins bins.
//
// No standard headers: NVRTC compiles this file too.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define ADASPLASH2_HD __host__ __device__ __forceinline__
#else
#define ADASPLASH2_HD static inline __attribute__((always_inline))
#endif

namespace adasplash2 {

// alpha = 1.5 and alpha = 2 have closed forms; every other alpha > 1 goes through powers.
enum class AlphaKind : int { k15 = 0, k2 = 1, kGeneral = 2 };

// Bins of the coarse histogram. 16 leave 40 survivors of 16,384 Gaussian scores whose support
// is 28 and start the refinement close enough for 1 to 2 steps; 8 keep a fifth more.
constexpr int kBins = 16;

template <class T>
struct Bracket {
  T lo, hi, start;  // lo <= tau <= hi; start is the refinement's first guess
};

// Sums over the scores above t, with x = y - t:
//   k15: s0 = count, s1 = sum x, s2 = sum x^2;  k2: s0 = count, s1 = sum x;
//   general: s0 = sum x^(r-2), s1 = sum x^(r-1), s2 = sum x^r.
template <class T>
struct Moments {
  T s0, s1, s2;
};

// Bin of a shifted score y <= 0; scores at or below -1 share bin 0 with the lowest.
template <class T>
ADASPLASH2_HD int bin_of(T y) {
  const int bin = static_cast<int>((y + T(1)) * T(kBins));
  return bin < 0 ? 0 : (bin >= kBins ? kBins - 1 : bin);
}

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
ADASPLASH2_HD float square_root(float x) { return sqrtf(x); }
ADASPLASH2_HD double square_root(double x) { return sqrt(x); }
#else
ADASPLASH2_HD float square_root(float x) { return __builtin_sqrtf(x); }
ADASPLASH2_HD double square_root(double x) { return __builtin_sqrt(x); }
#endif

// Bracket of tau from counts per bin. Scores rounded down to bin edges have a threshold below
// tau; rounded up, the same threshold one bin higher: so one root gives both ends, and the
// middle is the threshold of scores at bin centres.
// `powers[k] = (k / kBins)^r` is read for kGeneral only.
template <AlphaKind K, class T>
ADASPLASH2_HD Bracket<T> histogram_bracket(const int* counts, const T* powers) {
  const T width = T(1) / T(kBins);
  T root = T(-1);
  if constexpr (K == AlphaKind::kGeneral) {
    int edge = kBins - 1;
    for (; edge > 0; --edge) {
      T mass = 0;
      for (int b = edge + 1; b < kBins; ++b) mass += T(counts[b]) * powers[b - edge];
      if (mass >= T(1)) break;
    }
    root = T(-1) + T(edge) * width;
    const T hi = root + T(2) * width;  // the rounded-up root lies within the next bin
    return {root, hi < T(0) ? hi : T(0), root + width};
  } else {
    // Moments about the present edge, in bins, are whole numbers: f = 0 reads s2 = kBins^2 (k15)
    // or s1 = kBins (k2), and the loop ends before any of them can grow large.
    int n = 0, s1 = 0, s2 = 0, b = kBins - 1;
    for (; b >= 0; --b) {
      const int next_s1 = s1 + n, next_s2 = s2 + 2 * s1 + n;
      if (K == AlphaKind::k15 ? next_s2 >= kBins * kBins : next_s1 >= kBins) break;
      s1 = next_s1;
      s2 = next_s2;
      n += counts[b];
    }
    if (b >= 0) {  // the root lies below the upper edge of bin b; else below the window
      const T missing = T(K == AlphaKind::k15 ? kBins * kBins - s2 : kBins - s1);
      const T down = K == AlphaKind::k15
                         ? missing / (T(s1) + square_root(T(s1) * T(s1) + T(n) * missing))
                         : missing / T(n);
      root = T(-1) + (T(b + 1) - down) * width;
    }
    const T hi = root + width;
    return {root, hi < T(0) ? hi : T(0), root + width / T(2)};
  }
}

// f(t) from the moments at t: positive left of the root.
template <AlphaKind K, class T>
ADASPLASH2_HD T excess(const Moments<T>& m) {
  return (K == AlphaKind::k2 ? m.s1 : m.s2) - T(1);
}

// Distance from t to the next guess. k15 and k2 solve exactly on the present support (the
// quadratic, the line); the general step is Halley's. Callers keep it inside their bracket.
template <AlphaKind K, class T>
ADASPLASH2_HD T refinement_step(const Moments<T>& m, T r) {
  const T f = excess<K>(m);
  if constexpr (K == AlphaKind::k2) {
    return f / m.s0;
  } else if constexpr (K == AlphaKind::k15) {
    const T d = m.s1 * m.s1 - m.s0 * f;
    return f / (m.s1 + square_root(d > T(0) ? d : T(0)));
  } else {
    const T slope = r * m.s1;  // -f'
    return T(2) * f * slope / (T(2) * slope * slope - f * r * (r - T(1)) * m.s0);
  }
}

}  // namespace adasplash2
