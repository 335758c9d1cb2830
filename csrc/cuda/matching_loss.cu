// matching_loss: the loss of each row in one read, and its gradient in a second, of many rows with a base in a launch of
// its own. Contract: dam/ops/matching_loss.py.
#include "rows.h"

namespace dam {
namespace cuda {

constexpr int BLOCKS_PER_MULTIPROCESSOR = 3;
constexpr int BLOCKS_WITH_BASE = 2;  // two tiles at once in a warp's registers

// Shared memory of a multiprocessor of sm_90, less what every block takes of it besides.
constexpr int64_t SHARED_BYTES = 228 * 1024, RESERVED_BYTES = 1024;

// Arrays of the work memory.
constexpr int MODEL = 0, BASE = 2, CROSS = 4;

// Summaries of the tiles of the logits x and of the base logits b, and sum of exp(scale (b - max b)) (x - max x).
template <int WARPS, class Element, class Scale>
__device__ __forceinline__ void cross_tiles(const Row<Element>& row, const Row<Element>& base, const Part& part,
                                            const Summaries& out, const Summaries& base_out, float* cross, Scale scale,
                                            const Team<WARPS>& team, Element* keep, Element* keep_base) {
#pragma unroll 1
  for (int tile = part.begin + team.warp(); tile < part.end; tile += WARPS) {
    float x[PER_LANE], b[PER_LANE];
    row.template load_tile<false>(tile, team.lane(), x);
    base.template load_tile<false>(tile, team.lane(), b);
    if (keep) {
      store_tile<Element>(keep, row.columns, tile, team.lane(), x);
      store_tile<Element>(keep_base, row.columns, tile, team.lane(), b);
    }
    const TileSummary base_summary = summarize(b, max_of_tile(b), scale);
    const float max = max_of_tile(x), p = pivot(max);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      // A destination that the base does not reach counts 0 even where x is -inf.
      sum += b[i] == 0.0f ? 0.0f : b[i] * (x[i] - p);
    }
    sum = reduce_warp(sum, Sum{});
    const TileSummary summary = summarize(x, max, scale);
    if (team.lane() == 0) {
      out.max[tile] = summary.max;
      out.excess[tile] = summary.excess;
      base_out.max[tile] = base_summary.max;
      base_out.excess[tile] = base_summary.excess;
      cross[tile] = sum;
    }
  }
}

// Totals of a whole row and of the base's, and sum over v of exp(scale (b - max b)) (x - reference), where the
// reference is max x if `centred`, else 0. All at once: what a row waits for between its passes takes longer than
// moving its bytes.
struct Crossed {
  Total model, base;
  double cross;
};
template <int WARPS>
__device__ __forceinline__ Crossed merge_crossed(const Summaries& tiles, const Summaries& base, const float* cross,
                                                 bool centred, double scale, Team<WARPS>& team) {
  float max[2] = {-HUGE_VALF, -HUGE_VALF};
#pragma unroll 1
  for (int k = team.thread; k < tiles.count; k += Team<WARPS>::THREADS) {
    max[0] = larger(tiles.max[k], max[0]);
    max[1] = larger(base.max[k], max[1]);
  }
  team.reduce_each(max, Larger{});
  const double p = pivot(max[0]), base_p = pivot(max[1]), reference = centred ? p : 0.0;
  double sums[3] = {0.0, 0.0, 0.0};
#pragma unroll 1
  for (int k = team.thread; k < tiles.count; k += Team<WARPS>::THREADS) {
    const double mass = exp(scale * (base.max[k] - base_p)), base_sum = 1.0 + base.excess[k];
    sums[0] += (1.0 + tiles.excess[k]) * exp(scale * (tiles.max[k] - p));
    sums[1] += base_sum * mass;
    // Not 0 * -inf for a tile of which the base reaches nothing.
    if (mass != 0.0) sums[2] += mass * (cross[k] + base_sum * (pivot(tiles.max[k]) - reference));
  }
  team.reduce_each(sums, Sum{});
  return {{max[0], sums[0]}, {max[1], sums[1]}, sums[2]};
}

template <class Element, class Gradient, class Scale, int WARPS, bool HAS_BASE>
__global__ void __launch_bounds__(THREADS_PER_BLOCK, HAS_BASE ? BLOCKS_WITH_BASE : BLOCKS_PER_MULTIPROCESSOR)
    matching_loss_kernel(const __grid_constant__ MatchingLossArgs a, const __grid_constant__ RowPlan plan, Scale factor,
                         bool sums, bool finishes) {
  // Known when the kernel is compiled where it is 1, so that nothing is multiplied by it then.
  const double scale = std::is_same_v<Scale, Unit> ? 1.0 : a.scale;
  Team<WARPS> team;
  const Part part = part_of<WARPS>(plan);
  const int64_t t = part.row;
  if (t >= plan.rows) return;
  const int64_t exclude = load_exclude(a.exclude, a.shape, t);
  const Row<Element> row = row_of<Element>(a, a.logits, exclude, t);
  const Row<Element> base = row_of<Element>(a, HAS_BASE ? a.base : a.logits, exclude, t);
  const Summaries tiles = summaries_of(a.summaries, MODEL, plan, t);
  const Summaries base_tiles = summaries_of(a.summaries, HAS_BASE ? BASE : MODEL, plan, t);
  float* const cross = summary_array(a.summaries, HAS_BASE ? CROSS : MODEL, plan, t);
  float* const target_logit = a.target_logit + t * a.target.count;
  const auto counts = [&](int64_t v) { return v >= 0 && v != exclude; };
  const auto is_here = [&](int64_t v) {
    return counts(v) && v >= int64_t{part.begin} * TILE && v < int64_t{part.end} * TILE;
  };

  // The block's part of the row in shared memory, and then of the base's: each lane reads again what it has put there.
  Row<Element> again = row, base_again = base;
  Element *keep = nullptr, *keep_base = nullptr;
  if (WARPS > 1 && a.keeps) {
    keep = reinterpret_cast<Element*>(shared_memory() + TEAM_BYTES) - int64_t{part.begin} * TILE;
    keep_base = keep + int64_t{plan.split_tiles} * TILE;
    again.data = keep;
    base_again.data = keep_base;
  }
  if (sums) {
    if constexpr (HAS_BASE) {
      cross_tiles(row, base, part, tiles, base_tiles, cross, factor, team, keep, keep_base);
    } else {
      sum_tiles<WARPS, false>(row, part, tiles, factor, team, keep);
    }
    // Kept, since the gradient may take the place of the logits, and all that share the row need them.
    for (int64_t j = team.thread; j < a.target.count; j += Team<WARPS>::THREADS) {
      const int64_t v = load_target(a.target, a.shape, t, j);
      if (is_here(v)) target_logit[j] = row.at(v);
    }
    if (!finishes) return;
    sync_row(plan, team);
  }

  // ---- of the whole row
  Crossed of_row;
  if constexpr (HAS_BASE) {
    of_row = merge_crossed(tiles, base_tiles, cross, a.normalized, scale, team);
  } else {
    of_row.model = merge_tiles(tiles, scale, team);
  }
  const Total total = of_row.model;
  const double reference = pivot(total.max);
  const double base_weight = HAS_BASE ? load_value(a.base_weight, t, 0) : 0.0;
  const double row_scale = a.row_scale.data ? load_value(a.row_scale, t, 0) : 1.0 / static_cast<double>(plan.rows);
  // Of a row that reaches nothing as if it were 1: its costs are infinite, not inf - inf.
  const double log_sum = total.sum == 0.0 ? 0.0 : log(total.sum);
  double base_reference = 0.0, base_log_rate = 0.0, base_loss = 0.0;
  if constexpr (HAS_BASE) {
    base_reference = pivot(of_row.base.max);
    base_log_rate = a.normalized ? -log(of_row.base.sum) : scale * base_reference;
    if (base_weight != 0.0) {
      base_loss = base_weight * ((a.normalized ? log_sum : 0.0) - ::exp(base_log_rate) * scale * of_row.cross);
    }
  }
  double sums_of_targets[2] = {0.0, 0.0};
  double &loss = sums_of_targets[0], &weights = sums_of_targets[1];
  for (int64_t j = team.thread; j < a.target.count; j += Team<WARPS>::THREADS) {
    const int64_t v = load_target(a.target, a.shape, t, j);
    double w = load_value(a.weight, t, j);
    if (!counts(v) || w == 0.0) continue;
    weights += w;
    const double x = target_logit[j];
    // Weights on an unreachable destination add up first: to 0 that counts 0, or to what has a sign; not to inf - inf.
    if (x == -HUGE_VAL) w = weight_at(v, a.target, a.weight, t);
    if (w == 0.0) continue;
    loss += w * (a.normalized ? log_sum - scale * (x - reference) : -scale * x);
  }
  team.reduce_each(sums_of_targets, Sum{});
  loss += base_loss;
  weights += base_weight;
  if (!a.normalized) loss += ::exp(scale * reference) * total.sum;
  if (part.split == 0 && team.thread == 0) a.loss[t] = row_scale * loss;

  // ---- the gradient, of this part
  // A row that can reach nothing has no distribution to push down.
  const double outflow = total.sum == 0.0 ? 0.0 : a.normalized ? weights : 1.0;
  const double slope = row_scale * scale;  // what the chain rule multiplies the gradient by
  const Share share = share_of(slope * outflow, a.normalized ? -log_sum : scale * reference, reference, scale);
  const Share base_share = share_of(slope * base_weight, base_log_rate, base_reference, scale);
  if (a.shares && part.split == 0 && team.thread == 0) store_shares(a.shares + t * SHARES, share, base_share);
  if (!a.gradient.data) return;
  Gradient* const gradient = static_cast<Gradient*>(const_cast<void*>(a.gradient.data)) + t * a.gradient.row_stride;
#pragma unroll 1
  for (int tile = part.begin + team.warp(); tile < part.end; tile += WARPS) {
    float x[PER_LANE];
    again.template load_tile<false>(tile, team.lane(), x);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) x[i] = share_at(share, x[i], factor);
    if constexpr (HAS_BASE) {
      float b[PER_LANE];
      base_again.template load_tile<false>(tile, team.lane(), b);
#pragma unroll
      for (int i = 0; i < PER_LANE; ++i) {
        const float pulled = share_at(base_share, b[i], factor);
        x[i] = x[i] == pulled ? 0.0f : x[i] - pulled;  // not inf - inf
      }
    }
    store_tile<Element>(gradient, row.columns, tile, team.lane(), x);
  }
  team.sync();
  for (int64_t j = team.thread; j < a.target.count; j += Team<WARPS>::THREADS) {
    const int64_t v = load_target(a.target, a.shape, t, j);
    if (!is_here(v)) continue;
    double value = exact_share_at(share, target_logit[j], scale);
    if constexpr (HAS_BASE) value -= exact_share_at(base_share, base.at(v), scale);
    store_one(gradient + v, static_cast<float>(value - slope * weight_at(v, a.target, a.weight, t)));
  }
}

void matching_loss(const MatchingLossArgs& asked, Queue queue) {
  const OnDevice guard(queue.device);
  MatchingLossArgs a = asked;
  const bool has_base = a.base.data != nullptr;
  const int64_t row_bytes = a.shape.columns * element_bytes(a.shape.dtype) * (has_base ? 2 : 1);
  const Chip chip = chip_of(queue.device);
  const RowPlan plan =
      has_base && a.gradient.data
          ? plan_two_passes(a.shape.rows, a.shape.columns, row_bytes, BLOCKS_WITH_BASE, chip)
          : plan_rows(a.shape.rows, a.shape.columns, row_bytes, a.gradient.data != nullptr,
                      has_base ? BLOCKS_WITH_BASE : BLOCKS_PER_MULTIPROCESSOR, chip);
  const int64_t part_bytes = plan.split_tiles * COLUMNS_PER_TILE * element_bytes(a.shape.dtype) * (has_base ? 2 : 1);
  const int64_t block_bytes =
      SHARED_BYTES / (has_base ? BLOCKS_WITH_BASE : BLOCKS_PER_MULTIPROCESSOR) - RESERVED_BYTES - TEAM_BYTES;
  // Clusters are those of sm_90.
  a.keeps = plan.clustered && a.gradient.data && part_bytes <= block_bytes;
  const int64_t kept_bytes = a.keeps ? part_bytes : 0;
  with_types(a.shape, plan, a.scale, [&](auto element, auto warps, auto factor) {
    using Element = decltype(element);
    using Scale = decltype(factor);
    constexpr int WARPS = decltype(warps)::value;
    with_gradient<Element>(a.gradient_dtype, [&](auto gradient) {
      using Gradient = decltype(gradient);
      if (has_base) {
        launch_rows(matching_loss_kernel<Element, Gradient, Scale, WARPS, true>, plan, queue, a, factor, kept_bytes);
      } else {
        launch_rows(matching_loss_kernel<Element, Gradient, Scale, WARPS, false>, plan, queue, a, factor, kept_bytes);
      }
    });
  });
}

}  // namespace cuda
}  // namespace dam
