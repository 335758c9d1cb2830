// backward_kolmogorov: the closed forms, and the walk along one dimension of a lattice. Contract:
// dam/ops/backward_kolmogorov.py.
#include "rows.h"

DAM_BEGIN

// ---- Uniform and Absorbing: result = stays * terminal + one number per row

static double sum_of(const float* x, int64_t count) {
  f64 lanes[UNROLL] = {};
  int64_t i = 0;
  for (; i + UNROLL * WIDE <= count; i += UNROLL * WIDE) {
    for (int u = 0; u < UNROLL; ++u) lanes[u] += load_wide(x + i + u * WIDE);
  }
  double sum = sum_lanes(lanes);
  for (; i < count; ++i) sum += x[i];
  return sum;
}

static void scale_and_add(float* out, const float* x, int64_t count, double factor, double term) {
  int64_t i = 0;
  for (; i + WIDE <= count; i += WIDE) {
    store(out + i, __builtin_convertvector(load_wide(x + i) * factor + term, f32_narrow));
  }
  for (; i < count; ++i) out[i] = static_cast<float>(x[i] * factor + term);
}

template <class Element>
static void closed_form_row(const ClosedFormArgs& a, int64_t t, int threads, Tiles tiles) {
  const Row<Element> row{static_cast<const Element*>(a.terminal.data) + t * a.terminal.row_stride, a.shape.columns, -1,
                         nullptr};
  const bool absorbing = a.mask_token >= 0;
  for_tiles(row.columns, threads, [&](int64_t k) {
    alignas(64) float buffer[TILE];
    const float* x = row.template load_tile<true>(k, buffer);
    const int64_t n = row.count(k), mask = a.mask_token - k * TILE;
    // Summed around the mask token, as subtracting it again would cancel.
    tiles.sum[k] =
        absorbing && mask >= 0 && mask < n ? sum_of(x, mask) + sum_of(x + mask + 1, n - mask - 1) : sum_of(x, n);
  });
  double total = 0.0;
  for (int64_t k = 0; k < tiles.count; ++k) total += tiles.sum[k];
  const double at_mask = absorbing ? row.at(a.mask_token) : 0.0;
  // Not finite if any entry is not.
  const double poison = 0.0 * (total + at_mask);
  const double shared = absorbing ? (a.transpose ? 0.0 : at_mask) : total / row.columns;
  const double term = a.moves * shared + poison;

  float* result = a.result + t * row.columns;
  for_tiles(row.columns, threads, [&](int64_t k) {
    alignas(64) float buffer[TILE];
    scale_and_add(result + k * TILE, row.template load_tile<true>(k, buffer), row.count(k), a.stays, term);
  });
  if (absorbing) {
    result[a.mask_token] = static_cast<float>(at_mask + poison + (a.transpose ? a.moves * total : 0.0));
  }
}

void closed_form(const ClosedFormArgs& a) {
  with_element(a.shape.dtype, [&](auto element) {
    for_rows(a.shape, [&](int64_t t, int worker, int threads) {
      closed_form_row<decltype(element)>(a, t, threads, scratch_tiles(a.scratch, worker, a.shape.columns));
    });
  });
}

// ---- Lattice

constexpr int RESULTS = 4;  // registers of results at once

// out[i] = taps[0] x[i] + sum_k taps[k] (x[i + k stride] + x[i - k stride]). Works on whole groups of registers: up to
// FILTER_PADDING entries more are read and written than counted.
static void filter(const double* x, int64_t count, const double* taps, int64_t radius, int64_t stride, double* out) {
  static_assert(RESULTS * WIDE <= FILTER_PADDING, "the scratch is too short");
  for (int64_t i = 0; i < count; i += RESULTS * WIDE) {
    f64 sum[RESULTS];
    for (int u = 0; u < RESULTS; ++u) sum[u] = taps[0] * load<f64>(x + i + u * WIDE);
    for (int64_t k = 1; k <= radius; ++k) {
      const double* right = x + i + k * stride;
      const double* left = x + i - k * stride;
      for (int u = 0; u < RESULTS; ++u) sum[u] += taps[k] * (load<f64>(right + u * WIDE) + load<f64>(left + u * WIDE));
    }
    for (int u = 0; u < RESULTS; ++u) store(out + i + u * WIDE, sum[u]);
  }
}

// The point of the line that position i, which may lie past an end, stands for: wrapped, or mirrored.
static int64_t point_of(int64_t i, int64_t length, bool periodic) {
  const int64_t cycle = periodic ? length : 2 * length;
  const int64_t wrapped = (i % cycle + cycle) % cycle;
  return wrapped < length ? wrapped : 2 * length - 1 - wrapped;
}

void filter_lines(const FilterArgs& a) {
  // Lines are taken `width` at a time, side by side in scratch, so that short ones fill vectors too: neighbours in the
  // inner dimension, or in the outer one where there is no inner one.
  const bool along = a.inner == 1;
  const int64_t siblings = along ? a.outer : a.inner;
  const int64_t most = along && a.length >= FILTER_SEGMENT / FILTER_WIDTH ? 1 : FILTER_WIDTH;
  const int64_t width = siblings < most ? siblings : most;
  const int64_t groups = (siblings + width - 1) / width;
  const int64_t segment = FILTER_SEGMENT / width;
  const int64_t segments = (a.length + segment - 1) / segment;
  const int64_t point_stride = along ? 1 : a.inner;
  const int64_t line_stride = along ? a.length : 1;

  parallel_for((along ? 1 : a.outer) * groups * segments, a.threads, 1, [&](int64_t item, int worker) {
    const int64_t begin = item % segments * segment;
    const int64_t group = item / segments % groups;
    const int64_t outer = item / segments / groups;
    const int64_t points = a.length - begin < segment ? a.length - begin : segment;
    const int64_t lines = siblings - group * width < width ? siblings - group * width : width;
    const int64_t origin = outer * a.length * a.inner + group * width * line_stride;

    double* out = a.scratch + worker * filter_scratch(a.radius);
    double* in = out + FILTER_SEGMENT + FILTER_PADDING;
    for (int64_t i = 0; i < points + 2 * a.radius; ++i) {
      const double* source = a.source + origin + point_of(begin + i - a.radius, a.length, a.periodic) * point_stride;
      for (int64_t l = 0; l < lines; ++l) in[i * lines + l] = source[l * line_stride];
    }
    filter(in + a.radius * lines, points * lines, a.taps, a.radius, lines, out);
    for (int64_t i = 0; i < points; ++i) {
      double* result = a.result + origin + (begin + i) * point_stride;
      for (int64_t l = 0; l < lines; ++l) result[l * line_stride] = out[i * lines + l];
    }
  });
}

DAM_END
