// The row kernel of rate_ratio for a rate that a generated file defines (dam/rates.py), in doubles: one read of the model's
// row and one of the base's. Contract: dam/ops/rate_ratio.py.
#pragma once

#include "defined.h"

DAM_BEGIN

struct DefinedRateArgs {
  Shape shape;
  Matrix logits, base;
  Indices exclude;
  const uint8_t* suppressed;
  const int64_t* target;  // [T, J]
  int64_t targets;        // J
  Indices state;          // absent: the rate does not depend on it
  float* log_ratio;       // [T, J]
  float* escape_gap;      // [T]
  Scratch scratch;
};

// Sum of the rates of a row's destinations; -inf is none.
template <class Rate, class Element>
static double escape_rate(const Row<Element>& row, double state, int threads, double* sums) {
  for_tiles(row.columns, threads, [&](int64_t k) {
    alignas(64) float buffer[TILE];
    const float* z = row.template load_tile<true>(k, buffer);
    f64 sum{};
    for (int i = 0; i < row.width(k); i += WIDE) {
      const f64 zs[1] = {load_wide(z + i)};
      const f64 ys[1] = {iota<f64>() + static_cast<double>(k * TILE + i)}, xs[1] = {f64{} + state};
      f64 rates[1];
      Rate::rate(zs, ys, xs, rates);
      sum += zs[0] == -HUGE_VAL ? f64{} : rates[0];
    }
    sums[k] = fold(sum, [](auto a, auto b) { return a + b; });
  });
  double total = 0.0;
  for (int64_t k = 0; k < tile_count(row.columns); ++k) total += sums[k];
  return total;
}

template <class Rate, class Element>
static void defined_rate_row(const DefinedRateArgs& a, int64_t t, int threads, int worker) {
  const Row<Element> row = row_of<Element>(a, a.logits, t);
  const Row<Element> base = row_of<Element>(a, a.base, t);
  const double state = a.state.data ? static_cast<double>(a.state.data[t * a.state.stride]) : 0.0;
  const auto log_rate = [&](const Row<Element>& of, int64_t v) {
    const double zs[1] = {of.at(v)}, ys[1] = {static_cast<double>(v)}, xs[1] = {state};
    double found[1] = {-HUGE_VAL};
    if (zs[0] != -HUGE_VAL) Rate::log_rate(zs, ys, xs, found);
    return found[0];
  };
  for (int64_t j = t * a.targets; j < (t + 1) * a.targets; ++j) {
    const int64_t v = a.target[j];
    a.log_ratio[j] = static_cast<float>(v < 0 ? 0.0 : log_rate(base, v) - log_rate(row, v));
  }
  double* const sums = scratch_array(a.scratch, worker, 0);
  const double of_model = escape_rate<Rate>(row, state, threads, sums);
  a.escape_gap[t] = static_cast<float>(of_model - escape_rate<Rate>(base, state, threads, sums));
}

template <class Rate>
static void defined_rate(DefinedRateArgs a) {
  a.scratch.length = scratch_length(a.shape.columns);
  const std::unique_ptr<double[]> memory(new double[a.shape.threads * SCRATCH_ARRAYS * a.scratch.length]);
  a.scratch.data = memory.get();
  with_element(a.shape.dtype, [&](auto element) {
    for_rows(a.shape, [&](int64_t t, int worker, int threads) {
      defined_rate_row<Rate, decltype(element)>(a, t, threads, worker);
    });
  });
}

DAM_END

// The one function that a generated file gives to others; the order of its arguments is that of dam/rates.py.
#define DAM_DEFINED_RATE(Rate)                                                                                       \
  extern "C" __attribute__((visibility("default"))) void dam_defined_rate(                                           \
      int64_t rows, int64_t columns, int dtype, int threads, const void* logits, int64_t row_stride,                 \
      const void* base, int64_t base_stride, const int64_t* exclude, int64_t exclude_stride,                         \
      const uint8_t* suppressed, const int64_t* target, int64_t targets, const int64_t* state, int64_t state_stride, \
      float* log_ratio, float* escape_gap) {                                                                         \
    dam::defined_rate<dam::Rate>({{rows, columns, dtype, threads}, {logits, row_stride}, {base, base_stride},        \
                                  {exclude, exclude_stride}, suppressed, target, targets, {state, state_stride},     \
                                  log_ratio, escape_gap, {}});                                                       \
  }
