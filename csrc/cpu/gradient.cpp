// gradient: of the logits of some columns of rows, for ops whose sums over a row were made elsewhere, too. Contract:
// dam/ops/_gradient.py.
#include "rows.h"

DAM_BEGIN

// What is proportional to a rate: coefficient * exp(scale * (x - p)).
struct Share {
  float coefficient, p;
};

// Of coefficient * exp(scale * (x - reference)), with p a float, so that x - p loses nothing. 0 where nothing is asked
// for, whatever the row holds.
static Share share_of(const double* share, double scale) {
  const float p = static_cast<float>(share[1]);
  return {share[0] == 0.0 ? 0.0f : to_float(share[0] * std::exp(scale * (p - share[1]))), p};
}

template <class Element>
static void gradient_row(const GradientArgs& a, int64_t t, int threads) {
  const int64_t excluded = a.exclude.data ? a.exclude.data[t * a.exclude.stride] : -1;
  const int64_t here = excluded - a.first_column;
  const auto row_at = [&](const Matrix& matrix) {
    const Element* data = static_cast<const Element*>(matrix.data) + t * matrix.row_stride;
    return Row<Element>{data, a.shape.columns, excluded >= 0 && here >= 0 && here < a.shape.columns ? here : -1,
                        a.suppressed};
  };
  const Row<Element> row = row_at(a.logits), base = row_at(a.base.data ? a.base : a.logits);
  const double scale = 1.0 / a.temperature;
  const Share share = share_of(a.shares + 4 * t, scale);
  const Share base_share = a.base.data ? share_of(a.shares + 4 * t + 2, scale) : Share{0.0f, 0.0f};
  const int64_t* target = a.target + t * a.targets;
  const double* pull = a.pull + t * a.targets;
  Element* gradient = static_cast<Element*>(a.gradient) + t * a.shape.columns;

  for_tiles(row.columns, threads, [&](int64_t k) {
    alignas(64) float buffer[TILE];
    const int width = row.width(k);
    GradientTile<Element> out(gradient, k, row.count(k));
    const float* x = row.load_tile(k, buffer);
    with_scale(scale, [&](auto factor) {
      scaled_exp_tile<false>(out.values, x, width, share.p, factor, share.coefficient, row.tile_ahead(k));
      if (base_share.coefficient == 0.0f) return;
      const float* b = base.load_tile(k, buffer);
      scaled_exp_tile<true>(out.values, b, width, base_share.p, factor, base_share.coefficient, base.tile_ahead(k));
    });
    for (int64_t j = 0; j < a.targets; ++j) {
      const int64_t v = target[j] - a.first_column;
      if (target[j] >= 0 && target[j] != excluded && v < row.columns) out.add(v, -pull[j]);
    }
    out.finish();
  });
}

void gradient(const GradientArgs& a) {
  with_element(a.shape.dtype, [&](auto element) {
    for_rows(a.shape, [&](int64_t t, int, int threads) { gradient_row<decltype(element)>(a, t, threads); });
  });
}

DAM_END
