// adjoint_weights: sums backward along each trajectory and the weights of its group, in doubles, in one read.
// Contract: dam/ops/adjoint_weights.py.
#include "rows.h"

DAM_BEGIN

// Trajectories of one group that go side by side, one per lane: a sum along a single one would wait for each addition.
// STREAM writes past the caches, which a large result would only pass through.
template <bool STREAM, class Element>
static void sum_paths(const AdjointWeightsArgs& a, int64_t group, int64_t first, double* path_weight) {
  constexpr int PER_LINE = 64 / sizeof(Element);
  const Element *gain[WIDE], *gap[WIDE];
  float* out[WIDE];
  const bool has_gap = a.escape_gap.data != nullptr;
  const int count = a.size - first < WIDE ? static_cast<int>(a.size - first) : WIDE;
  const auto row = [&](const Cube& cube, int64_t k) {
    return static_cast<const Element*>(cube.data) + group * cube.group_stride + k * cube.row_stride;
  };
  for (int l = 0; l < WIDE; ++l) {
    const int64_t k = first + (l < count ? l : 0);  // the lanes past the last trajectory repeat one
    gain[l] = row(a.log_ratio, k);
    gap[l] = has_gap ? row(a.escape_gap, k) : gain[l];
    out[l] = a.log_path + (group * a.size + k) * (a.steps + 1);
  }
  const auto load_step = [](const Element* const* rows, int64_t s) {
    f32_narrow x;
    for (int l = 0; l < WIDE; ++l) x[l] = load_one(rows[l] + s);
    return __builtin_convertvector(x, f64);
  };
  const auto store_step = [&](f64 sum, int64_t s) {
    const f32_narrow rounded = __builtin_convertvector(sum, f32_narrow);
    for (int l = 0; l < WIDE; ++l) {
      if constexpr (STREAM) {
        store_past_caches(out[l] + s, rounded[l]);
      } else {
        out[l][s] = rounded[l];
      }
    }
  };
  f64 sum{};
  store_step(sum, a.steps);
  for (int64_t s = a.steps - 1; s >= 0; --s) {
    if (s % PER_LINE == 0) {  // of the trajectories that come next
      for (int l = 0; l < WIDE; ++l) {
        __builtin_prefetch(gain[l] + s + WIDE * a.log_ratio.row_stride);
        if (has_gap) __builtin_prefetch(gap[l] + s + WIDE * a.escape_gap.row_stride);
      }
    }
    sum += load_step(gain, s);
    if (has_gap) sum += load_step(gap, s);
    store_step(sum, s);
  }
  for (int l = 0; l < count; ++l) path_weight[first + l] = sum[l];
}

// The first of the group's trajectories that no weight can be given to, or -1.
template <class Element>
static int64_t weigh_group(const AdjointWeightsArgs& a, int64_t group, double* log_weight) {
  for (int64_t k = 0; k < a.size; k += WIDE) {
    if (a.stream) {
      sum_paths<true, Element>(a, group, k, log_weight);
    } else {
      sum_paths<false, Element>(a, group, k, log_weight);
    }
  }
  if (a.stream) fence_past_caches();
  const double* cost = a.terminal_cost + group * a.size;
  double top = -HUGE_VAL;
  for (int64_t k = 0; k < a.size; ++k) {
    const bool nan = log_weight[k] != log_weight[k] || cost[k] != cost[k];
    // An outcome of cost +inf is forbidden whatever its path weight, so inf - inf cannot arise.
    log_weight[k] = cost[k] == HUGE_VAL ? -HUGE_VAL : log_weight[k] - cost[k];
    if (nan || !(log_weight[k] < HUGE_VAL)) return k;
    top = log_weight[k] > top ? log_weight[k] : top;
  }
  // Relative to the largest first: at log weights of 10^16 and more, log K would be lost beside them.
  double total = 0.0;
  for (int64_t k = 0; k < a.size; ++k) {
    log_weight[k] -= pivot(top);
    total += exp(log_weight[k]);
  }
  const double excess = std::log(total / static_cast<double>(a.size));
  double sum = 0.0, square = 0.0;
  int64_t clipped = 0;
  for (int64_t k = 0; k < a.size; ++k) {
    double relative = log_weight[k] == -HUGE_VAL ? -HUGE_VAL : log_weight[k] - excess;
    if (relative > a.clip) {
      relative = a.clip;
      ++clipped;
    }
    const double weight = std::exp(relative);
    a.weight[group * a.size + k] = static_cast<float>(weight);
    sum += weight;
    square += weight * weight;
  }
  a.log_normalizer[group] = static_cast<float>(top == -HUGE_VAL ? -HUGE_VAL : top + excess);
  a.ess[group] = static_cast<float>(square > 0.0 ? sum * sum / square : 0.0);
  a.clipped[group] = static_cast<float>(static_cast<double>(clipped) / static_cast<double>(a.size));
  return -1;
}

int64_t adjoint_weights(const AdjointWeightsArgs& a) {
  FirstBad first_bad;
  with_element(a.dtype, [&](auto element) {
    parallel_for(a.groups, a.threads, 1, [&](int64_t group, int worker) {
      const int64_t k = weigh_group<decltype(element)>(a, group, a.scratch + worker * a.size);
      if (k >= 0) first_bad.enter(group * a.size + k);
    });
  });
  return first_bad.index();
}

DAM_END
