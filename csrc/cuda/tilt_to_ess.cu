// tilt_to_ess: bisection on the tilt of each group. Contract: dam/ops/tilt_to_ess.py.
#include "rows.h"

namespace dam {
namespace cuda {

template <int WARPS>
__global__ void __launch_bounds__(THREADS_PER_BLOCK) tilt_to_ess_kernel(const __grid_constant__ TiltToEssArgs a) {
  Team<WARPS> team;
  constexpr int TEAMS = WARPS_PER_BLOCK / WARPS;
  const int64_t group = block_of_grid() * TEAMS + thread_of_block() / Team<WARPS>::THREADS;
  if (group >= a.groups) return;
  double best = -HUGE_VAL;
#pragma unroll 1
  for (int64_t k = team.thread; k < a.size; k += Team<WARPS>::THREADS) {
    const double x = load_value(a.reward, group, k);
    best = larger(x, best);
    if (!(x < HUGE_VAL)) atomic_min(a.first_bad, group * a.size + k);
  }
  best = team.largest(best);
  const auto shifted = [&](int64_t k) {
    const double x = load_value(a.reward, group, k);
    return x == -HUGE_VAL ? -HUGE_VAL : x - best;
  };
  // Whether softmax(tilt * shifted) keeps the effective sample size.
  const auto keeps = [&](double tilt) {
    double sum = 0.0, square = 0.0;
#pragma unroll 1
    for (int64_t k = team.thread; k < a.size; k += Team<WARPS>::THREADS) {
      const double x = shifted(k);
      // -inf stays infeasible at tilt 0, the limit of small tilts.
      const double weight = x == -HUGE_VAL ? 0.0 : exp(tilt * x);
      sum += weight;
      square += weight * weight;
    }
    sum = team.sum(sum);
    square = team.sum(square);
    // Rounding must not cost a group of equal rewards its full tilt.
    return sum * sum >= a.ess * (1 - 1e-12) * square;
  };
  double tilt = 0.0;
  if (best > -HUGE_VAL && keeps(0.0)) {
    if (keeps(a.max_tilt)) {
      tilt = a.max_tilt;
    } else {
      double gap = HUGE_VAL;
#pragma unroll 1
      for (int64_t k = team.thread; k < a.size; k += Team<WARPS>::THREADS) {
        const double x = shifted(k);
        if (x < 0.0 && -x < gap) gap = -x;
      }
      gap = team.smallest(gap);
      // From this tilt on only the best trajectories have weight at all in a double, and the ESS stays.
      double high = a.max_tilt < 800.0 / gap ? a.max_tilt : 800.0 / gap;
      for (;;) {
        const double middle = tilt + (high - tilt) / 2;
        if (!(tilt < middle && middle < high)) break;  // neighbours
        (keeps(middle) ? tilt : high) = middle;
      }
    }
  }
  if (team.thread == 0) a.tilt[group] = tilt;
}

void tilt_to_ess(const TiltToEssArgs& a, Queue queue) {
  const OnDevice guard(queue.device);
  if (a.size <= 4 * WARP) {
    launch(tilt_to_ess_kernel<1>, Grid{divided_up(a.groups, WARPS_PER_BLOCK)}, queue, a);
  } else {
    launch(tilt_to_ess_kernel<WARPS_PER_BLOCK>, Grid{a.groups}, queue, a);
  }
}

}  // namespace cuda
}  // namespace dam
