// The gradient of the logits of some columns, for the linear forms of log_prob and matching_loss with a trained head:
// by columns each row of the head gets its gradient in one product. Contract: `GradientArgs`.
#include "rows.h"

namespace dam {
namespace cuda {

constexpr int BLOCKS_PER_MULTIPROCESSOR = 3;
constexpr int BLOCKS_WITH_BASE = 2;  // two tiles at once in a warp's registers

// It may take the place of the logits, so what the targets get is worked out before anything is written.
template <class Element, class Gradient, class Scale, int WARPS, bool HAS_BASE>
__global__ void __launch_bounds__(THREADS_PER_BLOCK, HAS_BASE ? BLOCKS_WITH_BASE : BLOCKS_PER_MULTIPROCESSOR)
    gradient_kernel(const __grid_constant__ GradientArgs a, const __grid_constant__ RowPlan plan, Scale scale) {
  Team<WARPS> team;
  const Part part = part_of<WARPS>(plan);
  const int64_t t = part.row;
  if (t >= plan.rows) return;
  // The excluded column as one of these, which it need not be.
  int64_t exclude = load_index(a.exclude, t, -1);
  exclude = exclude < a.first_column ? -1 : exclude - a.first_column;
  const Row<Element> row = row_of<Element>(a, a.logits, exclude, t);
  const Row<Element> base = row_of<Element>(a, HAS_BASE ? a.base : a.logits, exclude, t);
  const float* const shares = a.shares + t * SHARES;
  const Share share{shares[0], shares[1], shares[2]}, base_share{shares[3], shares[4], shares[5]};
  Gradient* const gradient = static_cast<Gradient*>(const_cast<void*>(a.gradient.data)) + t * a.gradient.row_stride;

  // Slot j's target among these columns, -1 for one that is not in this part or not reached.
  const auto target_here = [&](int64_t j) {
    const int64_t v = a.target.data[t * a.target.row_stride + j * a.target.slot_stride] - a.first_column;
    const bool here = v >= int64_t{part.begin} * TILE && v < int64_t{part.end} * TILE && v < row.columns;
    return here && v != exclude ? v : int64_t{-1};
  };
  for (int64_t j = team.thread; j < a.target.count; j += Team<WARPS>::THREADS) {
    const int64_t v = target_here(j);
    if (v < 0) continue;
    double value = exact_share_at(share, row.at(v), a.scale);
    if constexpr (HAS_BASE) value -= exact_share_at(base_share, base.at(v), a.scale);
    value -= weight_at(v + a.first_column, a.target, a.pull, t);
    a.target_gradient[t * a.target.count + j] = static_cast<float>(value);
  }
  team.sync();
#pragma unroll 1
  for (int tile = part.begin + team.warp(); tile < part.end; tile += WARPS) {
    float x[PER_LANE];
    row.template load_tile<true>(tile, team.lane(), x);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) x[i] = share_at(share, x[i], scale);
    if constexpr (HAS_BASE) {
      float b[PER_LANE];
      base.template load_tile<true>(tile, team.lane(), b);
#pragma unroll
      for (int i = 0; i < PER_LANE; ++i) {
        const float pulled = share_at(base_share, b[i], scale);
        x[i] = x[i] == pulled ? 0.0f : x[i] - pulled;  // not inf - inf
      }
    }
    store_tile<Element>(gradient, row.columns, tile, team.lane(), x);
  }
  team.sync();
  for (int64_t j = team.thread; j < a.target.count; j += Team<WARPS>::THREADS) {
    const int64_t v = target_here(j);
    if (v >= 0) store_one(gradient + v, a.target_gradient[t * a.target.count + j]);
  }
}

void gradient(const GradientArgs& a, Queue queue) {
  const OnDevice guard(queue.device);
  const bool has_base = a.base.data != nullptr;
  const RowPlan plan = plan_rows(a.shape.rows, a.shape.columns, 0, false,
                                 has_base ? BLOCKS_WITH_BASE : BLOCKS_PER_MULTIPROCESSOR, chip_of(queue.device));
  const Grid grid{plan.blocks};  // its splits do not wait for each other
  with_types(a.shape, plan, a.scale, [&](auto element, auto warps, auto scale) {
    using Element = decltype(element);
    using Scale = decltype(scale);
    constexpr int WARPS = decltype(warps)::value;
    with_gradient<Element>(a.gradient_dtype, [&](auto entry) {
      using Gradient = decltype(entry);
      if (has_base) {
        launch(gradient_kernel<Element, Gradient, Scale, WARPS, true>, grid, queue, a, plan, scale);
      } else {
        launch(gradient_kernel<Element, Gradient, Scale, WARPS, false>, grid, queue, a, plan, scale);
      }
    });
  });
}

}  // namespace cuda
}  // namespace dam
