// log_prob: log-probabilities of given destinations, and their gradient in the logits. Contract: dam/ops/log_prob.py.
#include "rows.h"

DAM_BEGIN

template <class Element>
static void log_prob_row(const LogProbArgs& a, int64_t t, int threads, Tiles tiles) {
  const Row<Element> row = row_of<Element>(a, a.logits, t);
  const double scale = 1.0 / a.temperature;
  const Summary total = sum_row(row, scale, threads, tiles);
  const double log_sum = std::log(total.sum);
  a.log_escape[t] = log_total(total, scale);
  for (int64_t j = t * a.targets; j < (t + 1) * a.targets; ++j) {
    const int64_t v = a.target[j];
    // Differences to the maximum first: at logits of 1e4 the small result would otherwise be rounded with the large.
    a.log_prob[j] = static_cast<float>(v < 0 ? 0.0 : scale * (row.at(v) - total.max) - log_sum);
  }
}

void log_prob(const LogProbArgs& a) {
  with_element(a.shape.dtype, [&](auto element) {
    for_rows(a.shape, [&](int64_t t, int worker, int threads) {
      log_prob_row<decltype(element)>(a, t, threads, scratch_tiles(a.scratch, worker, a.shape.columns));
    });
  });
}

// gradient[v] = sum_j upstream_j (1[v = target_j] - p(v)) / temperature
template <class Element>
static void log_prob_backward_row(const LogProbBackwardArgs& a, int64_t t, int threads) {
  const Row<Element> row = row_of<Element>(a, a.logits, t);
  const double scale = 1.0 / a.temperature;
  const int64_t* target = a.target + t * a.targets;
  const double* upstream = a.upstream + t * a.targets;
  double total = 0.0;
  for (int64_t j = 0; j < a.targets; ++j) {
    if (target[j] >= 0 && target[j] != row.exclude) total += upstream[j];
  }
  // p(v) = exp(scale (x - p)) exp(scale p - log_escape) with p a float, so that x - p loses nothing.
  const float p = pivot(static_cast<float>(a.log_escape[t] * a.temperature));
  // A row that nothing is asked of has gradient 0, whatever it holds.
  const float coefficient = total == 0.0 ? 0.0f : to_float(-scale * total * std::exp(scale * p - a.log_escape[t]));
  Element* gradient = static_cast<Element*>(a.gradient) + t * a.shape.columns;

  for_tiles(row.columns, threads, [&](int64_t k) {
    alignas(64) float buffer[TILE];
    GradientTile<Element> out(gradient, k, row.count(k));
    const float* x = row.load_tile(k, buffer);
    with_scale(scale, [&](auto s) {
      scaled_exp_tile<false>(out.values, x, row.width(k), p, s, coefficient, row.tile_ahead(k));
    });
    for (int64_t j = 0; j < a.targets; ++j) {
      if (target[j] != row.exclude) out.add(target[j], scale * upstream[j]);
    }
    out.finish();
  });
}

void log_prob_backward(const LogProbBackwardArgs& a) {
  with_element(a.shape.dtype, [&](auto element) {
    for_rows(a.shape, [&](int64_t t, int, int threads) { log_prob_backward_row<decltype(element)>(a, t, threads); });
  });
}

DAM_END
