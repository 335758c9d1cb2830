// adjoint_weights: sums backward along each trajectory in one read, then the weights of each group, in doubles.
// Contract: dam/ops/adjoint_weights.py.
#include "rows.h"

namespace dam {
namespace cuda {

constexpr int CHUNK = 4;  // steps that a lane takes at once, a warp apart from each other, so that loads coalesce

// x plus those of all lanes after this one.
__device__ __forceinline__ double sum_from_here(double x, int lane) {
#pragma unroll
  for (int distance = 1; distance < WARP; distance *= 2) {
    const double other = shuffle_down(x, distance);
    if (lane + distance < WARP) x += other;
  }
  return x;
}

// A warp for a trajectory: log_path, and the log weight; NaN where the path or the cost is.
template <class Element>
__global__ void __launch_bounds__(THREADS_PER_BLOCK) sum_paths_kernel(const __grid_constant__ AdjointWeightsArgs a) {
  const Team<1> team;
  const int64_t trajectory = block_of_grid() * WARPS_PER_BLOCK + thread_of_block() / WARP;
  if (trajectory >= a.groups * a.size) return;
  const int64_t group = trajectory / a.size, k = trajectory % a.size;
  const auto row_of_cube = [&](const Cube& cube) {
    return static_cast<const Element*>(cube.data) + group * cube.group_stride + k * cube.row_stride;
  };
  const Element* const gain = row_of_cube(a.log_ratio);
  const Element* const gap = a.escape_gap.data ? row_of_cube(a.escape_gap) : nullptr;
  float* const path = a.log_path + trajectory * (a.steps + 1);
  double after = 0.0;  // of all later steps
  constexpr int64_t STEPS = CHUNK * WARP;
  for (int64_t start = (divided_up(a.steps, STEPS) - 1) * STEPS; start >= 0; start -= STEPS) {
    double x[CHUNK];
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      const int64_t s = start + i * WARP + team.lane();
      x[i] = s < a.steps ? load_one(gain + s) : 0.0f;
      if (gap && s < a.steps) x[i] += load_one(gap + s);
    }
#pragma unroll
    for (int i = CHUNK - 1; i >= 0; --i) {
      const int64_t s = start + i * WARP + team.lane();
      const double sum = sum_from_here(x[i], team.lane());
      if (s < a.steps) path[s] = static_cast<float>(sum + after);
      after += shuffle(sum, 0);
    }
  }
  if (team.lane() == 0) {
    path[a.steps] = 0.0f;
    const double cost = load_value(a.terminal_cost, group, k);
    // An outcome of cost +inf is forbidden whatever its path weight, so inf - inf cannot arise.
    a.log_weight[trajectory] = cost == HUGE_VAL && after == after ? -HUGE_VAL : after - cost;
  }
}

template <int WARPS>
__global__ void __launch_bounds__(THREADS_PER_BLOCK) weigh_groups_kernel(const __grid_constant__ AdjointWeightsArgs a) {
  Team<WARPS> team;
  constexpr int TEAMS = WARPS_PER_BLOCK / WARPS;
  const int64_t group = block_of_grid() * TEAMS + thread_of_block() / Team<WARPS>::THREADS;
  if (group >= a.groups) return;
  const double* const log_weight = a.log_weight + group * a.size;
  double top = -HUGE_VAL;
  for (int64_t k = team.thread; k < a.size; k += Team<WARPS>::THREADS) {
    const double l = log_weight[k];
    top = larger(l, top);
    if (!(l < HUGE_VAL)) atomic_min(a.first_bad, group * a.size + k);
  }
  top = team.largest(top);
  // Relative to the largest first: at log weights of 10^16 and more, log K would be lost beside them.
  const double p = pivot(top);
  double total = 0.0;
  for (int64_t k = team.thread; k < a.size; k += Team<WARPS>::THREADS) total += exp(log_weight[k] - p);
  total = team.sum(total);
  // A group without a feasible trajectory has weights exp(-inf) whatever is subtracted, so anything finite will do.
  const double excess = log((total > 0.0 ? total : 1.0) / static_cast<double>(a.size));
  double sum = 0.0, square = 0.0, clipped = 0.0;
  for (int64_t k = team.thread; k < a.size; k += Team<WARPS>::THREADS) {
    const double relative = log_weight[k] - p - excess;
    const bool over = relative > a.clip;
    const double weight = exp(over ? a.clip : relative);
    a.weight[group * a.size + k] = static_cast<float>(weight);
    sum += weight;
    square += weight * weight;
    clipped += over ? 1.0 : 0.0;
  }
  sum = team.sum(sum);
  square = team.sum(square);
  clipped = team.sum(clipped);
  if (team.thread == 0) {
    a.log_normalizer[group] = static_cast<float>(top + excess);
    a.ess[group] = static_cast<float>(square > 0.0 ? sum * sum / square : 0.0);
    a.clipped[group] = static_cast<float>(clipped / static_cast<double>(a.size));
  }
}

void adjoint_weights(const AdjointWeightsArgs& a, Queue queue) {
  const OnDevice guard(queue.device);
  const Grid paths{divided_up(a.groups * a.size, WARPS_PER_BLOCK)};
  with_element(a.dtype, [&](auto element) { launch(sum_paths_kernel<decltype(element)>, paths, queue, a); });
  if (a.size <= 8 * WARP) {
    launch(weigh_groups_kernel<1>, Grid{divided_up(a.groups, WARPS_PER_BLOCK)}, queue, a);
  } else {
    launch(weigh_groups_kernel<WARPS_PER_BLOCK>, Grid{a.groups}, queue, a);
  }
}

}  // namespace cuda
}  // namespace dam
