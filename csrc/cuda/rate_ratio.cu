// rate_ratio: one read of the model's row and one of the base's. Contract: dam/ops/rate_ratio.py.
#include "rows.h"

namespace dam {
namespace cuda {

constexpr int BLOCKS_PER_MULTIPROCESSOR = 4;

template <class Element, int WARPS>
__global__ void __launch_bounds__(THREADS_PER_BLOCK, BLOCKS_PER_MULTIPROCESSOR)
    rate_ratio_kernel(const __grid_constant__ RateRatioArgs a, const __grid_constant__ RowPlan plan, Unit scale,
                      bool sums, bool finishes) {
  Team<WARPS> team;
  const Part part = part_of<WARPS>(plan);
  if (part.row >= plan.rows) return;
  const int64_t exclude = load_exclude(a.exclude, a.shape, part.row);
  const Row<Element> row = row_of<Element>(a, a.logits, exclude, part.row);
  const Row<Element> base = row_of<Element>(a, a.base, exclude, part.row);
  const Summaries tiles = summaries_of(a.summaries, 0, plan, part.row);
  const Summaries base_tiles = summaries_of(a.summaries, ROW_SUMMARIES, plan, part.row);
  if (sums) {
    sum_tiles<WARPS, true>(row, part, tiles, scale, team);
    sum_tiles<WARPS, true>(base, part, base_tiles, scale, team);
    if (!finishes) return;
    sync_row(plan, team);
  }
  if (part.split > 0) return;
  const double rate = escape_rate(merge_tiles(tiles, 1.0, team));
  const double base_rate = escape_rate(merge_tiles(base_tiles, 1.0, team));
  if (team.thread == 0) a.escape_gap[part.row] = static_cast<float>(difference(rate, base_rate));
  for (int64_t j = team.thread; j < a.target.count; j += Team<WARPS>::THREADS) {
    const int64_t v = load_target(a.target, a.shape, part.row, j);
    const double ratio = v < 0 ? 0.0 : static_cast<double>(base.at(v)) - static_cast<double>(row.at(v));
    a.log_ratio[part.row * a.target.count + j] = static_cast<float>(ratio);
  }
}

void rate_ratio(const RateRatioArgs& a, Queue queue) {
  const OnDevice guard(queue.device);
  const RowPlan plan = plan_rows(a.shape.rows, a.shape.columns, 2 * a.shape.columns * element_bytes(a.shape.dtype),
                                 false, BLOCKS_PER_MULTIPROCESSOR, chip_of(queue.device));
  with_types(a.shape, plan, [&](auto element, auto warps) {
    launch_rows(rate_ratio_kernel<decltype(element), decltype(warps)::value>, plan, queue, a, Unit{});
  });
}

}  // namespace cuda
}  // namespace dam
