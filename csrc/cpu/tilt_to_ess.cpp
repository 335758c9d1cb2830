// tilt_to_ess: bisection on the tilt of each group. Contract: dam/ops/tilt_to_ess.py.
#include "rows.h"

DAM_BEGIN

// Whether softmax(tilt * shifted) keeps the effective sample size; shifted [length], -inf past the group's end.
static bool keeps(const double* shifted, int64_t length, double tilt, double ess) {
  f64 sum{}, square{};
  for (int64_t k = 0; k < length; k += WIDE) {
    const f64 x = load<f64>(shifted + k);
    // -inf stays infeasible at tilt 0, the limit of small tilts.
    const f64 weight = x == -HUGE_VAL ? f64{} : exp(tilt * x);
    sum += weight;
    square += weight * weight;
  }
  const double total = sum_lanes(sum);
  // Rounding must not cost a group of equal rewards its full tilt.
  return total * total >= ess * (1 - 1e-12) * sum_lanes(square);
}

static double tilt_of_group(const double* shifted, int64_t length, double ess, double max_tilt) {
  if (!keeps(shifted, length, 0.0, ess)) return 0.0;
  if (keeps(shifted, length, max_tilt, ess)) return max_tilt;
  double gap = HUGE_VAL;
  for (int64_t k = 0; k < length; ++k) gap = shifted[k] < 0.0 && -shifted[k] < gap ? -shifted[k] : gap;
  // From this tilt on only the best trajectories have weight at all in a double, and the ESS stays.
  double low = 0.0, high = max_tilt < 800.0 / gap ? max_tilt : 800.0 / gap;
  for (;;) {
    const double middle = low + (high - low) / 2;
    if (!(low < middle && middle < high)) return low;  // neighbours
    (keeps(shifted, length, middle, ess) ? low : high) = middle;
  }
}

int64_t tilt_to_ess(const TiltToEssArgs& a) {
  FirstBad first_bad;
  parallel_for(a.groups, a.threads, 1, [&](int64_t group, int worker) {
    const double* reward = a.reward + group * a.size;
    double* const shifted = a.scratch + worker * a.length;
    double best = -HUGE_VAL;
    for (int64_t k = 0; k < a.size; ++k) {
      if (!(reward[k] < HUGE_VAL)) return first_bad.enter(group * a.size + k);
      best = reward[k] > best ? reward[k] : best;
    }
    for (int64_t k = 0; k < a.length; ++k) shifted[k] = k < a.size ? reward[k] - pivot(best) : -HUGE_VAL;
    a.tilt[group] = best == -HUGE_VAL ? 0.0 : tilt_of_group(shifted, a.length, a.ess, a.max_tilt);
  });
  return first_bad.index();
}

DAM_END
