// log_prob: log-probabilities of given destinations, and their gradient in the logits. Contract: dam/ops/log_prob.py.
#include "rows.h"

namespace dam {
namespace cuda {

constexpr int BLOCKS_PER_MULTIPROCESSOR = 4;
constexpr int BACKWARD_BLOCKS_PER_MULTIPROCESSOR = 3;

template <class Element, class Scale, int WARPS>
__global__ void __launch_bounds__(THREADS_PER_BLOCK, BLOCKS_PER_MULTIPROCESSOR)
    log_prob_kernel(const __grid_constant__ LogProbArgs a, const __grid_constant__ RowPlan plan, Scale scale, bool sums,
                    bool finishes) {
  Team<WARPS> team;
  const Part part = part_of<WARPS>(plan);
  if (part.row >= plan.rows) return;
  const Row<Element> row = row_of<Element>(a, a.logits, load_exclude(a.exclude, a.shape, part.row), part.row);
  const Summaries tiles = summaries_of(a.summaries, 0, plan, part.row);
  if (sums) {
    sum_tiles<WARPS, true>(row, part, tiles, scale, team);
    if (!finishes) return;
    sync_row(plan, team);
  }
  if (part.split > 0) return;
  const Total total = merge_tiles(tiles, a.scale, team);
  const double log_sum = log(total.sum);
  if (team.thread == 0) a.log_escape[part.row] = a.scale * pivot(total.max) + log_sum;
  for (int64_t j = team.thread; j < a.target.count; j += Team<WARPS>::THREADS) {
    const int64_t v = load_target(a.target, a.shape, part.row, j);
    // Differences to the maximum first: at logits of 1e4 the small result would otherwise be rounded with the large.
    const double value = v < 0 ? 0.0 : a.scale * (static_cast<double>(row.at(v)) - pivot(total.max)) - log_sum;
    a.log_prob[part.row * a.target.count + j] = static_cast<float>(value);
  }
}

void log_prob(const LogProbArgs& a, Queue queue) {
  const OnDevice guard(queue.device);
  const RowPlan plan = plan_rows(a.shape.rows, a.shape.columns, a.shape.columns * element_bytes(a.shape.dtype), false,
                                 BLOCKS_PER_MULTIPROCESSOR, chip_of(queue.device));
  with_types(a.shape, plan, a.scale, [&](auto element, auto warps, auto scale) {
    launch_rows(log_prob_kernel<decltype(element), decltype(scale), decltype(warps)::value>, plan, queue, a, scale);
  });
}

// gradient[v] = sum_j upstream_j (1[v = target_j] - p(v)) / temperature, over the tiles of a split. It may take the
// place of the logits, so what the targets get is worked out before anything is written.
template <class Element, class Gradient, class Scale, int WARPS>
__global__ void __launch_bounds__(THREADS_PER_BLOCK, BACKWARD_BLOCKS_PER_MULTIPROCESSOR)
    log_prob_backward_kernel(const __grid_constant__ LogProbBackwardArgs a, const __grid_constant__ RowPlan plan,
                             Scale scale) {
  Team<WARPS> team;
  const Part part = part_of<WARPS>(plan);
  const int64_t t = part.row;
  if (t >= plan.rows) return;
  const int64_t exclude = load_exclude(a.exclude, a.shape, t);
  const Row<Element> row = row_of<Element>(a, a.logits, exclude, t);
  Gradient* const gradient = static_cast<Gradient*>(const_cast<void*>(a.gradient.data)) + t * a.gradient.row_stride;

  double asked = 0.0;
  for (int64_t j = team.thread; j < a.target.count; j += Team<WARPS>::THREADS) {
    const int64_t v = load_target(a.target, a.shape, t, j);
    if (v >= 0 && v != exclude) asked += load_value(a.upstream, t, j);
  }
  asked = a.scale * team.sum(asked);
  const Share share = share_of(asked, 0.0, a.log_escape[t] * a.temperature, a.scale);

  const auto is_here = [&](int64_t v) {
    return v >= 0 && v != exclude && v >= int64_t{part.begin} * TILE && v < int64_t{part.end} * TILE;
  };
  for (int64_t j = team.thread; j < a.target.count; j += Team<WARPS>::THREADS) {
    const int64_t v = load_target(a.target, a.shape, t, j);
    if (!is_here(v)) continue;
    const double pulled = a.scale * weight_at(v, a.target, a.upstream, t);
    a.target_gradient[t * a.target.count + j] = static_cast<float>(pulled - exact_share_at(share, row.at(v), a.scale));
  }
  team.sync();
#pragma unroll 1
  for (int tile = part.begin + team.warp(); tile < part.end; tile += WARPS) {
    float x[PER_LANE];
    row.template load_tile<true>(tile, team.lane(), x);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) x[i] = -share_at(share, x[i], scale);
    store_tile<Element>(gradient, row.columns, tile, team.lane(), x);
  }
  team.sync();
  for (int64_t j = team.thread; j < a.target.count; j += Team<WARPS>::THREADS) {
    const int64_t v = load_target(a.target, a.shape, t, j);
    if (is_here(v)) store_one(gradient + v, a.target_gradient[t * a.target.count + j]);
  }
}

void log_prob_backward(const LogProbBackwardArgs& a, Queue queue) {
  const OnDevice guard(queue.device);
  const RowPlan plan =
      plan_rows(a.shape.rows, a.shape.columns, 0, false, BACKWARD_BLOCKS_PER_MULTIPROCESSOR, chip_of(queue.device));
  // Its splits do not wait for each other.
  const Grid grid{plan.blocks};
  with_types(a.shape, plan, a.scale, [&](auto element, auto warps, auto scale) {
    using Element = decltype(element);
    with_gradient<Element>(a.gradient_dtype, [&](auto gradient) {
      const auto kernel =
          log_prob_backward_kernel<Element, decltype(gradient), decltype(scale), decltype(warps)::value>;
      launch(kernel, grid, queue, a, plan, scale);
    });
  });
}

}  // namespace cuda
}  // namespace dam
