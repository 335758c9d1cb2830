// Sums of exponentials that neither overflow nor lose the tail.
#pragma once

#include <cmath>

#include "config.h"
#include "math.h"

DAM_BEGIN

// sum = total of exp(scale * (x - max)) over some x; max = -inf and sum = 0 for none. A NaN or +inf among the x
// shows as a NaN sum.
struct Summary {
  double max;
  double sum;
};

// What differences are taken to: the maximum, or 0 where there is none to subtract (-inf - -inf is NaN).
DAM_HD double pivot(double max) { return max == -HUGE_VAL ? 0.0 : max; }
DAM_HD float pivot(float max) { return max == -HUGE_VALF ? 0.0f : max; }

// Summary of both sets; associative and commutative up to rounding.
DAM_HD Summary merge(Summary a, Summary b, double scale) {
  const double max = a.max > b.max ? a.max : b.max;
  const double p = pivot(max);
  return {max, a.sum * exp(scale * (a.max - p)) + b.sum * exp(scale * (b.max - p))};
}

// log of the total of exp(scale * x).
DAM_HD double log_total(Summary s, double scale) { return scale * pivot(s.max) + std::log(s.sum); }

DAM_END
