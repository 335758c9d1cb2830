// rate_ratio: one read of the model's row and one of the base's. Contract: dam/ops/rate_ratio.py.
#include "rows.h"

DAM_BEGIN

template <class Element>
static void rate_ratio_row(const RateRatioArgs& a, int64_t t, int threads, int worker) {
  const Row<Element> row = row_of<Element>(a, a.logits, t);
  const Row<Element> base = row_of<Element>(a, a.base, t);
  const Summary total = sum_row(row, 1.0, threads, scratch_tiles(a.scratch, worker, row.columns));
  const Summary base_total = sum_row(base, 1.0, threads, scratch_tiles(a.scratch, worker, row.columns));
  for (int64_t j = t * a.targets; j < (t + 1) * a.targets; ++j) {
    const int64_t v = a.target[j];
    a.log_ratio[j] = static_cast<float>(v < 0 ? 0.0 : base.at(v) - row.at(v));
  }
  const auto escape_rate = [](Summary s) { return std::exp(pivot(s.max)) * s.sum; };
  a.escape_gap[t] = static_cast<float>(escape_rate(total) - escape_rate(base_total));
}

void rate_ratio(const RateRatioArgs& a) {
  with_element(a.shape.dtype, [&](auto element) {
    for_rows(a.shape,
             [&](int64_t t, int worker, int threads) { rate_ratio_row<decltype(element)>(a, t, threads, worker); });
  });
}

DAM_END
