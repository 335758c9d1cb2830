// entropy: of the distribution of a row's next jump, in one read of it, and its gradient. Contract: dam/ops/entropy.py.
#include "rows.h"

DAM_BEGIN

// Summary of exp(scale (x - max)) over a tile, and sum of exp(scale (x - max)) (x - max).
struct Moment {
  Summary of;
  double moment;
};

template <class Element, class Scale>
static Moment moment_tile(const float* x, int width, Scale scale, const Element* next) {
  const float max = max_of_tile(x, width);
  const float p = pivot(max);
  f32 sum[UNROLL] = {}, moment[UNROLL] = {};
  for (int i = 0; i < width; i += STEP) {
    prefetch(next, i);
    f32 d[UNROLL], e[UNROLL];
    load_differences(d, x + i, p);
    for (int u = 0; u < UNROLL; ++u) e[u] = d[u];
    exp_each<true>(e, scale);
    for (int u = 0; u < UNROLL; ++u) {
      sum[u] += e[u];
      moment[u] += e[u] == 0.0f ? f32{} : e[u] * d[u];  // not 0 * -inf
    }
  }
  return {{max, sum_lanes(sum)}, sum_lanes(moment)};
}

template <class Element>
static void entropy_row(const EntropyArgs& a, int64_t t, int threads, int worker) {
  const Row<Element> row = row_of<Element>(a, a.logits, t);
  const double scale = 1.0 / a.temperature;
  const Tiles tiles = scratch_tiles(a.scratch, worker, a.shape.columns);
  double* const moments = scratch_array(a.scratch, worker, 2);
  with_scale(scale, [&](auto s) {
    for_tiles(row.columns, threads, [&](int64_t k) {
      alignas(64) float buffer[TILE];
      const Moment tile = moment_tile(row.load_tile(k, buffer), row.width(k), s, row.tile_ahead(k));
      tiles.max[k] = tile.of.max;
      tiles.sum[k] = tile.of.sum;
      moments[k] = tile.moment;
    });
  });
  const Summary total = finish_sum(row, scale, tiles);  // leaves each tile's mass
  double moment = 0.0;
  for (int64_t k = 0; k < tiles.count; ++k) {
    const double mass = exp(scale * (tiles.max[k] - pivot(total.max)));
    if (mass > 0.0) moment += mass * moments[k] + tiles.sum[k] * (tiles.max[k] - total.max);
  }
  a.log_escape[t] = log_total(total, scale);
  // Two terms of one sign: the entropy of a row that is nearly certain keeps its digits.
  a.entropy[t] = static_cast<float>(std::log(total.sum) - scale * moment / total.sum);
}

void entropy(const EntropyArgs& a) {
  with_element(a.shape.dtype, [&](auto element) {
    for_rows(a.shape,
             [&](int64_t t, int worker, int threads) { entropy_row<decltype(element)>(a, t, threads, worker); });
  });
}

// gradient[v] = -p(v) (total + slope (entropy + log p(v))) / temperature
template <class Element>
static void entropy_backward_row(const EntropyBackwardArgs& a, int64_t t, int threads) {
  const Row<Element> row = row_of<Element>(a, a.logits, t);
  const double scale = 1.0 / a.temperature;
  // log p(v) = scale (x - p) + (scale p - log_escape) with p a float, so that x - p loses nothing.
  const float p = pivot(static_cast<float>(a.log_escape[t] * a.temperature));
  const double log_rate = scale * p - a.log_escape[t];
  const float rate = to_float(std::exp(log_rate));
  const float constant = to_float(-scale * (a.total[t] + a.slope[t] * (a.entropy[t] + log_rate)));
  const float linear = to_float(-scale * scale * a.slope[t]);
  Element* gradient = static_cast<Element*>(a.gradient) + t * a.shape.columns;
  for_tiles(row.columns, threads, [&](int64_t k) {
    alignas(64) float buffer[TILE];
    GradientTile<Element> out(gradient, k, row.count(k));
    const float* x = row.load_tile(k, buffer);
    with_scale(scale, [&](auto s) {
      for (int i = 0; i < row.width(k); i += STEP) {
        prefetch(row.tile_ahead(k), i);
        f32 d[UNROLL], e[UNROLL];
        load_differences(d, x + i, p);
        for (int u = 0; u < UNROLL; ++u) e[u] = d[u];
        exp_each<true>(e, s);
        for (int u = 0; u < UNROLL; ++u) {
          store(out.values + i + u * LANES, e[u] == 0.0f ? f32{} : rate * e[u] * (constant + linear * d[u]));
        }
      }
    });
    out.finish();
  });
}

void entropy_backward(const EntropyBackwardArgs& a) {
  with_element(a.shape.dtype, [&](auto element) {
    for_rows(a.shape, [&](int64_t t, int, int threads) { entropy_backward_row<decltype(element)>(a, t, threads); });
  });
}

DAM_END
