// entropy: of the distribution of a row's next jump, in one read of it, and its gradient. Contract: dam/ops/entropy.py.
#include "rows.h"

namespace dam {
namespace cuda {

constexpr int BLOCKS_PER_MULTIPROCESSOR = 2;  // a tile and its exponentials at once in a warp's registers
constexpr int MOMENT = 2;  // array of the work memory: of each tile, sum of exp(scale (x - max)) (x - max)

template <class Element, class Scale, int WARPS>
__global__ void __launch_bounds__(THREADS_PER_BLOCK, BLOCKS_PER_MULTIPROCESSOR)
    entropy_kernel(const __grid_constant__ EntropyArgs a, const __grid_constant__ RowPlan plan, Scale scale, bool sums,
                   bool finishes) {
  Team<WARPS> team;
  const Part part = part_of<WARPS>(plan);
  if (part.row >= plan.rows) return;
  const Row<Element> row = row_of<Element>(a, a.logits, load_exclude(a.exclude, a.shape, part.row), part.row);
  const Summaries tiles = summaries_of(a.summaries, 0, plan, part.row);
  float* const moments = summary_array(a.summaries, MOMENT, plan, part.row);
  if (sums) {
#pragma unroll 1
    for (int tile = part.begin + team.warp(); tile < part.end; tile += WARPS) {
      float x[PER_LANE], e[PER_LANE];
      row.template load_tile<true>(tile, team.lane(), x);
#pragma unroll
      for (int i = 0; i < PER_LANE; ++i) e[i] = x[i];
      const float max = max_of_tile(x), p = pivot(max);
      const TileSummary summary = summarize(e, max, scale);
      float moment = 0.0f;
#pragma unroll
      for (int i = 0; i < PER_LANE; ++i) moment += e[i] == 0.0f ? 0.0f : e[i] * (x[i] - p);  // not 0 * -inf
      moment = reduce_warp(moment, Sum{});
      if (team.lane() == 0) {
        tiles.max[tile] = summary.max;
        tiles.excess[tile] = summary.excess;
        moments[tile] = moment;
      }
    }
    if (!finishes) return;
    sync_row(plan, team);
  }
  if (part.split > 0) return;
  float max = -HUGE_VALF;
#pragma unroll 1
  for (int k = team.thread; k < tiles.count; k += Team<WARPS>::THREADS) max = larger(tiles.max[k], max);
  max = team.largest(max);
  const double p = pivot(max);
  double totals[2] = {0.0, 0.0};
#pragma unroll 1
  for (int k = team.thread; k < tiles.count; k += Team<WARPS>::THREADS) {
    const double mass = exp(a.scale * (tiles.max[k] - p)), sum = 1.0 + tiles.excess[k];
    totals[0] += mass * sum;
    if (mass != 0.0) totals[1] += mass * (moments[k] + sum * (tiles.max[k] - p));
  }
  team.reduce_each(totals, Sum{});
  if (team.thread == 0) {
    const double log_sum = log(totals[0]);
    a.log_escape[part.row] = a.scale * p + log_sum;
    // Two terms of one sign: the entropy of a row that is nearly certain keeps its digits.
    a.entropy[part.row] = static_cast<float>(log_sum - a.scale * totals[1] / totals[0]);
  }
}

void entropy(const EntropyArgs& a, Queue queue) {
  const OnDevice guard(queue.device);
  const RowPlan plan = plan_rows(a.shape.rows, a.shape.columns, a.shape.columns * element_bytes(a.shape.dtype), false,
                                 BLOCKS_PER_MULTIPROCESSOR, chip_of(queue.device));
  with_types(a.shape, plan, a.scale, [&](auto element, auto warps, auto scale) {
    launch_rows(entropy_kernel<decltype(element), decltype(scale), decltype(warps)::value>, plan, queue, a, scale);
  });
}

// gradient[v] = -p(v) (total + slope (entropy + log p(v))) scale, over the tiles of a split.
template <class Element, class Scale, int WARPS>
__global__ void __launch_bounds__(THREADS_PER_BLOCK, BLOCKS_PER_MULTIPROCESSOR)
    entropy_backward_kernel(const __grid_constant__ EntropyBackwardArgs a, const __grid_constant__ RowPlan plan,
                            Scale scale) {
  Team<WARPS> team;
  const Part part = part_of<WARPS>(plan);
  const int64_t t = part.row;
  if (t >= plan.rows) return;
  const Row<Element> row = row_of<Element>(a, a.logits, load_exclude(a.exclude, a.shape, t), t);
  Element* const gradient = static_cast<Element*>(const_cast<void*>(a.gradient.data)) + t * a.gradient.row_stride;
  const Share share = share_of(1.0, 0.0, a.log_escape[t] / a.scale, a.scale);  // p(v)
  const float constant = static_cast<float>(-a.scale * (a.total[t] + a.slope[t] * a.entropy[t]));
  const float linear = static_cast<float>(-a.scale * a.scale * a.slope[t]);
#pragma unroll 1
  for (int tile = part.begin + team.warp(); tile < part.end; tile += WARPS) {
    float x[PER_LANE];
    row.template load_tile<true>(tile, team.lane(), x);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      const float probability = share_at(share, x[i], scale);
      const float relative = (x[i] - share.high) - share.low;  // log p(v) / scale
      x[i] = probability == 0.0f ? 0.0f : probability * (constant + linear * relative);
    }
    store_tile<Element>(gradient, row.columns, tile, team.lane(), x);
  }
}

void entropy_backward(const EntropyBackwardArgs& a, Queue queue) {
  const OnDevice guard(queue.device);
  const RowPlan plan =
      plan_rows(a.shape.rows, a.shape.columns, 0, false, BLOCKS_PER_MULTIPROCESSOR, chip_of(queue.device));
  const Grid grid{plan.blocks};  // its splits do not wait for each other
  with_types(a.shape, plan, a.scale, [&](auto element, auto warps, auto scale) {
    const auto kernel = entropy_backward_kernel<decltype(element), decltype(scale), decltype(warps)::value>;
    launch(kernel, grid, queue, a, plan, scale);
  });
}

}  // namespace cuda
}  // namespace dam
