// matching_loss: loss and gradient of a row in two reads of it, the second mostly from cache. A float32 gradient holds
// the first read's exponentials in between, which spares the second one. Contract: dam/ops/matching_loss.py.
#include "rows.h"

DAM_BEGIN

// 1 / temperature: known when a kernel is compiled where it is 1, so that nothing is multiplied by it then.
template <class Scale>
static double scale_of(const MatchingLossArgs& a, Scale) {
  return std::is_same_v<Scale, Unit> ? 1.0 : 1.0 / a.temperature;
}

// Of one tile of base logits b beside logits x: the summary of exp(scale * b), and
// cross = sum over the tile of exp(scale * (b - max)) (x - p), p the pivot of the x.
struct Cross {
  double max, sum, cross;
};

template <class Element, class Scale>
static Cross cross_tile(const float* b, const float* x, int width, float p, Scale scale, const Element* next) {
  const float max = max_of_tile(b, width);
  const float q = pivot(max);
  f32 sum[UNROLL] = {}, cross[UNROLL] = {};
  for (int i = 0; i < width; i += STEP) {
    prefetch(next, i);
    f32 e[UNROLL];
    load_differences(e, b + i, q);
    exp_each<true>(e, scale);
    for (int u = 0; u < UNROLL; ++u) {
      sum[u] += e[u];
      // A destination that the base does not reach counts 0 even where x is -inf.
      cross[u] += e[u] == 0.0f ? f32{} : e[u] * (load<f32>(x + i + u * LANES) - p);
    }
  }
  return {max, sum_lanes(sum), sum_lanes(cross)};
}

// Where the exponentials of tile k of row t are kept from the first read to the second, or null.
template <class Element>
static float* kept_tile(const MatchingLossArgs& a, const Row<Element>& row, int64_t t, int64_t k) {
  if constexpr (std::is_same_v<Element, float>) {
    // Not over the logits themselves, which are still needed; not past the row's end.
    if (a.gradient && a.gradient != a.logits.data && row.count(k) == TILE) {
      return static_cast<float*>(a.gradient) + t * a.shape.columns + k * TILE;
    }
  }
  (void)a, (void)row, (void)t, (void)k;
  return nullptr;
}

// x = factor * x over a tile; 0 for a factor of 0, whatever x is.
static void scale_tile(float* x, float factor) {
  for (int i = 0; i < TILE; i += LANES) store(x + i, factor == 0.0f ? f32{} : factor * load<f32>(x + i));
}

struct MatchingRow {
  Summary total;       // of the logits
  Summary base_total;  // of the base logits
  double cross;        // sum over v of exp(scale * (base(v) - base max)) (logit(v) - reference)
};

template <class Element, class Scale>
static MatchingRow read_row(const MatchingLossArgs& a, int64_t t, const Row<Element>& row, const Row<Element>& base,
                            Scale factor, int threads, int worker) {
  const double scale = scale_of(a, factor);
  const Tiles tiles = scratch_tiles(a.scratch, worker, row.columns);
  double* const base_max = scratch_array(a.scratch, worker, 2);
  double* const base_sum = scratch_array(a.scratch, worker, 3);
  double* const cross = scratch_array(a.scratch, worker, 4);
  for_tiles(row.columns, threads, [&](int64_t k) {
    alignas(64) float buffer[TILE], base_buffer[TILE];
    const float* x = row.load_tile(k, buffer);
    float* const keep = kept_tile(a, row, t, k);
    const int width = row.width(k);
    const Summary s = keep ? sum_tile<true>(x, width, factor, row.tile_ahead(k), keep)
                           : sum_tile(x, width, factor, row.tile_ahead(k));
    tiles.max[k] = s.max;
    tiles.sum[k] = s.sum;
    if (base.data) {
      const float p = static_cast<float>(pivot(s.max));
      const Cross c = cross_tile(base.load_tile(k, base_buffer), x, width, p, factor, base.tile_ahead(k));
      base_max[k] = c.max;
      base_sum[k] = c.sum;
      cross[k] = c.cross;
    }
  });
  MatchingRow result{finish_sum(row, scale, tiles), {-HUGE_VAL, 0.0}, 0.0};
  if (base.data) {
    const double reference = a.normalized ? pivot(result.total.max) : 0.0;
    double max = -HUGE_VAL;
    for (int64_t k = 0; k < tiles.count; ++k) max = base_max[k] > max ? base_max[k] : max;
    result.base_total.max = max;
    for (int64_t k = 0; k < tiles.count; ++k) {
      const double mass = exp(scale * (base_max[k] - pivot(max)));
      result.base_total.sum += mass * base_sum[k];
      // Not 0 * -inf for a tile of which the base reaches nothing.
      if (mass > 0.0) result.cross += mass * (cross[k] + base_sum[k] * (pivot(tiles.max[k]) - reference));
    }
  }
  return result;
}

// sum over v of w(v) (log normaliser - scale * logit(v)), or the rates' form, before row_scale; and the gradient.
template <class Element, class Scale>
static void matching_row(const MatchingLossArgs& a, int64_t t, Scale factor, int threads, int worker) {
  const double scale = scale_of(a, factor);
  const Row<Element> row = row_of<Element>(a, a.logits, t);
  const Row<Element> base = a.base.data && a.base_weight[t] != 0.0
                                ? row_of<Element>(a, a.base, t)
                                : Row<Element>{nullptr, 0, -1, nullptr};
  const MatchingRow r = read_row(a, t, row, base, factor, threads, worker);
  const int64_t* target = a.target + t * a.targets;
  const double* weight = a.weight + t * a.targets;
  const double base_weight = base.data ? a.base_weight[t] : 0.0;
  const double row_scale = a.row_scale[t];
  const auto counts = [&](int64_t j) { return target[j] >= 0 && target[j] != row.exclude; };

  const auto weight_of = [&](int64_t v) {
    double sum = 0.0;
    for (int64_t j = 0; j < a.targets; ++j) sum += target[j] == v ? weight[j] : 0.0;
    return sum;
  };

  // Of a row that reaches nothing as if it were 1: its costs are infinite, not inf - inf.
  const double log_sum = r.total.sum == 0.0 ? 0.0 : std::log(r.total.sum);
  double loss = 0.0, total_weight = base_weight;
  for (int64_t j = 0; j < a.targets; ++j) {
    if (!counts(j) || weight[j] == 0.0) continue;
    total_weight += weight[j];
    const double x = row.at(target[j]);
    // Weights on an unreachable destination add up first: to 0 that counts 0, or to what has a sign; not to inf - inf.
    const double w = x == -HUGE_VAL ? weight_of(target[j]) : weight[j];
    if (w == 0.0) continue;
    loss += w * (a.normalized ? log_sum - scale * (x - pivot(r.total.max)) : -scale * x);
  }
  const double rate_of_max = a.normalized ? 1.0 / r.total.sum : std::exp(scale * pivot(r.total.max));
  const double base_rate_of_max = a.normalized ? 1.0 / r.base_total.sum : std::exp(scale * pivot(r.base_total.max));
  if (base_weight != 0.0) loss += base_weight * ((a.normalized ? log_sum : 0.0) - base_rate_of_max * scale * r.cross);
  if (!a.normalized) loss += rate_of_max * r.total.sum;
  a.loss[t] = row_scale * loss;
  if (!a.gradient) return;

  const double outflow = a.normalized ? total_weight : 1.0;
  const double slope = row_scale * scale;  // what the chain rule multiplies the gradient by
  const float coefficient = outflow == 0.0 ? 0.0f : to_float(slope * outflow * rate_of_max);
  const float base_coefficient = base_weight == 0.0 ? 0.0f : to_float(slope * base_weight * base_rate_of_max);
  const float p = static_cast<float>(pivot(r.total.max)), q = static_cast<float>(pivot(r.base_total.max));
  Element* gradient = static_cast<Element*>(a.gradient) + t * a.shape.columns;
  const double* const tile_max = scratch_tiles(a.scratch, worker, row.columns).max;
  for_tiles(row.columns, threads, [&](int64_t k) {
    alignas(64) float buffer[TILE];
    const int width = row.width(k);
    GradientTile<Element> out(gradient, k, row.count(k));
    if (float* const kept = kept_tile(a, row, t, k)) {
      scale_tile(kept,
                 coefficient == 0.0f ? 0.0f : to_float(coefficient * exp(scale * (tile_max[k] - pivot(r.total.max)))));
    } else {
      scaled_exp_tile<false>(out.values, row.load_tile(k, buffer), width, p, factor, coefficient, row.tile_ahead(k));
    }
    if (base_coefficient != 0.0f) {
      scaled_exp_tile<true>(out.values, base.load_tile(k, buffer), width, q, factor, base_coefficient,
                            base.tile_ahead(k));
    }
    for (int64_t j = 0; j < a.targets; ++j) {
      if (counts(j)) out.add(target[j], -slope * weight[j]);
    }
    out.finish();
  });
}

void matching_loss(const MatchingLossArgs& a) {
  with_element(a.shape.dtype, [&](auto element) {
    with_scale(1.0 / a.temperature, [&](auto factor) {
      for_rows(a.shape, [&](int64_t t, int worker, int threads) {
        matching_row<decltype(element)>(a, t, factor, threads, worker);
      });
    });
  });
}

DAM_END
