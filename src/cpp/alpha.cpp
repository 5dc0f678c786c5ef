#include "alpha.h"

#include <cmath>
#include <stdexcept>

namespace adasplash2 {

Alpha alpha_of(double value) {
  if (!(value > 1.0)) throw std::invalid_argument("alpha must be greater than 1");
  Alpha alpha = {};
  alpha.kind = value == 1.5 ? AlphaKind::k15 : value == 2.0 ? AlphaKind::k2 : AlphaKind::kGeneral;
  alpha.value = value;
  alpha.exponent = 1.0 / (value - 1.0);
  for (int k = 0; k <= kBins; ++k) alpha.powers[k] = std::pow(double(k) / kBins, alpha.exponent);
  return alpha;
}

Alpha alpha_or_nan(double value) {
  const bool is_allowed = value > 1.0 && value <= 2.0;
  Alpha alpha = alpha_of(is_allowed ? value : 1.5);
  if (!is_allowed) alpha.value = NAN;
  return alpha;
}

}  // namespace adasplash2
