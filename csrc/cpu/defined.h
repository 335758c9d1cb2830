// The row kernel of rate_matching_loss for a divergence that a generated file defines (dam/divergences/texts.py): one read
// of the logits; three of normalised ones, of which the sum comes first, then what their gradient shares. The later ones
// are from cache. Contract: dam/divergences/matching.py.
#pragma once

#include <memory>

#include "rows.h"

DAM_BEGIN

// Elementary functions of a vector of floats, of csrc/core/math.h or else lane by lane by the C library, which doubles
// have too.
namespace fn {

template <class F>
struct NumberOf {
  using type = std::decay_t<decltype(F{}[0])>;
};
template <>
struct NumberOf<double> {
  using type = double;
};
template <class F>
using Number = typename NumberOf<F>::type;

template <class F, class Function>
inline F each(F x, Function function) {
  if constexpr (std::is_same_v<F, double>) {
    return function(x);
  } else {
    F result;
    for (unsigned i = 0; i < sizeof(F) / sizeof(x[0]); ++i) result[i] = function(x[i]);
    return result;
  }
}

template <class F>
inline F exp(F x) {
  return each(x, [](auto a) { return std::exp(a); });
}
inline f32 exp(f32 x) { return exp_float(x); }
inline f64 exp(f64 x) {
  // Beyond what the vectors' takes; below -700 that is 0.
  if (any(x > 700.0)) return each(x, [](auto a) { return std::exp(a); });
  return dam::exp(x);
}
template <class F>
inline F log(F x) {
  return each(x, [](auto a) { return std::log(a); });
}
inline f32 log(f32 x) { return log_float(x); }
template <class F>
inline F log1p(F x) {
  return each(x, [](auto a) { return std::log1p(a); });
}
inline f32 log1p(f32 x) { return log1p_float(x); }
template <class F>
inline F expm1(F x) {
  return each(x, [](auto a) { return std::expm1(a); });
}
inline f32 expm1(f32 x) { return expm1_float(x); }
template <class F>
inline F sqrt(F x) {
  return each(x, [](auto a) { return std::sqrt(a); });
}
template <class F>
inline F sin(F x) {
  return each(x, [](auto a) { return std::sin(a); });
}
template <class F>
inline F cos(F x) {
  return each(x, [](auto a) { return std::cos(a); });
}
template <class F>
inline F tanh(F x) {
  return each(x, [](auto a) { return std::tanh(a); });
}
inline f32 tanh(f32 x) { return tanh_float(x); }
template <class F>
inline F atan(F x) {
  return each(x, [](auto a) { return std::atan(a); });
}
template <class F>
inline F erf(F x) {
  return each(x, [](auto a) { return std::erf(a); });
}
template <class F>
inline F pow(F x, Number<F> n) {
  return each(x, [n](auto a) { return std::pow(a, n); });
}
template <class F>
inline std::enable_if_t<!std::is_same_v<F, double>, F> pow(F x, F n) {
  F result;
  for (unsigned i = 0; i < sizeof(F) / sizeof(x[0]); ++i) result[i] = std::pow(x[i], n[i]);
  return result;
}

// a where the test holds, else b.
template <class F, class Test>
inline F chosen(Test test, F a, F b) {
  return test ? a : b;
}

// exp(k x). Of floats for |k x| < 87; the error is that of exp_each. NEAR: |k x| and |x| are at most 86.
template <bool NEAR, int N>
inline void raised(f32 (&out)[N], const f32 (&x)[N], double k) {
  const double size = std::fabs(k);
  int exponent;
  const bool exact = std::frexp(size, &exponent) == 0.5;  // a power of 2, by which multiplying rounds nothing
  const float sign = k < 0.0 ? -1.0f : 1.0f;
  const float by = exact ? sign * static_cast<float>(size) : sign;
  if (NEAR && exact) {
    for (int i = 0; i < N; ++i) out[i] = x[i];
    exp_near(out, Exact{by});
    return;
  }
  for (int i = 0; i < N; ++i) out[i] = x[i] * by;
  if (NEAR) {
    exp_near(out, exp_factor(size));
  } else if (exact) {
    exp_each<true>(out, Unit{});
  } else {
    exp_each<true>(out, exp_factor(size));
  }
}
template <bool NEAR>
inline void raised(double (&out)[1], const double (&x)[1], double k) { out[0] = std::exp(k * x[0]); }
template <bool NEAR>
inline void raised(f64 (&out)[1], const f64 (&x)[1], double k) { out[0] = exp(x[0] * k); }

}  // namespace fn

struct DefinedArgs {
  Shape shape;
  Matrix logits;
  Indices exclude;
  const uint8_t* suppressed;
  const int64_t* target;  // [T, J]
  int64_t targets;        // J
  const double* weight;   // [T, J]
  const double* row_scale;
  double* loss;    // [T]
  void* gradient;  // [T, V] of the logits' dtype, or null
  Scratch scratch;
};

// A file is compiled once for rates, and once for those that are normalised, where these are asked for.
#if defined(DAM_NORMALIZED)
constexpr bool NORMALIZED = true;
#else
constexpr bool NORMALIZED = false;
#endif

// What the tiles of a row share. Rates u of logits x are exp(x - log_total); the gradient is
// scale (phi''(u) u^2 - u outflow), and what the targets have beside it.
struct OfRow {
  double scale;
  double log_total = 0.0;
  double outflow = 0.0;
  // In floats, log_total in two.
  float factor = to_float(scale);
  float high = static_cast<float>(log_total), low = static_cast<float>(log_total - high);
  float coefficient = to_float(scale * outflow);
  // Log rates below it have a gradient that floats do not hold: their rate is 0, which an outflow above 2^5 would have
  // made more of than the 2^-120 that counts as 0.
  float lowest = NORMALIZED && !(std::fabs(outflow) <= 32.0) ? Unit::floor : -HUGE_VALF;

  f32 log_rates(const float* x) const {
    if constexpr (NORMALIZED) return (load<f32>(x) - high) - low;
    return load<f32>(x);
  }
  // Whether factors of the gradient are none of floats: infinite, or so small that digits are lost.
  bool is_wide() const {
    const double size = std::fabs(scale), shared = NORMALIZED ? std::fabs(scale * outflow) : 0.0;
    return !(size <= 3.4e38 && shared <= 3.4e38) || (size < 1.2e-38 && size > 0.0);
  }
};

// Sums over a tile of phi'(u) u - phi(u) and, of normalised rates, of phi''(u) u^2.
struct TileSums {
  double pull, curvature;
};

// A tile's sums, and its gradient in `out`, in doubles; log rates of -inf are no destinations.
template <class Phi, bool GRADIENT>
inline TileSums wide_tile(const float* x, int width, const OfRow& row, float* out) {
  TileSums sums{0.0, 0.0};
  for (int i = 0; i < width; ++i) {
    const double one[1] = {x[i] - row.log_total};
    double pull[1] = {0.0}, curvature[1] = {0.0}, shared = 0.0;
    if (x[i] != -HUGE_VALF) {
      Phi::terms(one, pull, curvature);
      const double u = NORMALIZED ? std::exp(one[0]) : 0.0;
      shared = u == 0.0 ? 0.0 : u * row.outflow;
    }
    sums.pull += pull[0];
    sums.curvature += curvature[0];
    if constexpr (GRADIENT) out[i] = static_cast<float>(row.scale * (curvature[0] - shared));
  }
  return sums;
}

// Whether any of the sizes of log rates, as bits of floats, is not below the bound of near ones. NaN's is not.
template <class Phi>
inline bool is_far(u32 sizes) {
  return fold(sizes, [](auto a, auto b) { return larger(a, b); }) >= bit_cast<uint32_t>(Phi::NEAR);
}
inline u32 size_of(f32 x) { return bit_cast<u32>(x) & 0x7FFFFFFFu; }

// What is to be added up of UNROLL vectors of log rates, and their gradient.
template <class Phi, bool GRADIENT, bool IS_NEAR>
inline void defined_step(const f32 (&d)[UNROLL], const OfRow& row, f32 (&pull)[UNROLL], f32 (&curvature)[UNROLL],
                         f32 (&change)[UNROLL]) {
  Phi::template terms<IS_NEAR>(d, pull, curvature);
  if constexpr (!GRADIENT) return;
  for (int n = 0; n < UNROLL; ++n) change[n] = row.factor * curvature[n];
  if constexpr (NORMALIZED) {
    f32 u[UNROLL];
    fn::raised<IS_NEAR>(u, d, 1.0);
    for (int n = 0; n < UNROLL; ++n) change[n] -= row.coefficient * u[n];
  }
}

// The same in floats for a whole tile, none of whose log rates has a size of Phi::NEAR or more; false where one has.
template <class Phi, bool GRADIENT, class Element>
inline bool near_tile(const float* x, const OfRow row, float* out, const Element* next, TileSums& found) {
  // Where they are far, most often some of the first are.
  u32 sizes{};
  for (int n = 0; n < UNROLL; ++n) sizes = larger(size_of(row.log_rates(x + n * LANES)), sizes);
  if (is_far<Phi>(sizes)) return false;
  f32 sums[UNROLL] = {}, bends[UNROLL] = {};
  for (int i = 0; i < TILE; i += STEP) {
    prefetch(next, i);
    f32 d[UNROLL], pull[UNROLL], curvature[UNROLL], change[UNROLL];
    for (int n = 0; n < UNROLL; ++n) d[n] = row.log_rates(x + i + n * LANES);
    defined_step<Phi, GRADIENT, true>(d, row, pull, curvature, change);
    for (int n = 0; n < UNROLL; ++n) {
      sizes = larger(size_of(d[n]), sizes);
      sums[n] += pull[n];
      if constexpr (NORMALIZED) bends[n] += curvature[n];
      if constexpr (GRADIENT) store(out + i + n * LANES, change[n]);
    }
  }
  found = {sum_lanes(sums), NORMALIZED ? sum_lanes(bends) : 0.0};
  return !is_far<Phi>(sizes);
}

// Of any tile, `whole` or not: near ones as above, others with care for those of -inf; once more in doubles where one
// turns out to be of those that floats do not hold.
template <class Phi, bool GRADIENT, class Element>
inline TileSums defined_tile(const float* x, int width, bool whole, const OfRow row, float* out, const Element* next) {
  if constexpr (!(Phi::LOWEST < Phi::HIGHEST)) return wide_tile<Phi, GRADIENT>(x, width, row, out);
  if (GRADIENT && row.is_wide()) return wide_tile<Phi, GRADIENT>(x, width, row, out);
  TileSums found;
  if (whole && near_tile<Phi, GRADIENT>(x, row, out, next, found)) return found;
  f32 sums[UNROLL] = {}, bends[UNROLL] = {}, top = f32{} - HUGE_VALF;
  u32 outside{};
  const float lowest = GRADIENT && row.lowest > Phi::LOWEST ? row.lowest : Phi::LOWEST;
  for (int i = 0; i < width; i += STEP) {
    prefetch(next, i);
    f32 d[UNROLL], pull[UNROLL], curvature[UNROLL], change[UNROLL];
    for (int n = 0; n < UNROLL; ++n) d[n] = row.log_rates(x + i + n * LANES);
    defined_step<Phi, GRADIENT, false>(d, row, pull, curvature, change);
    for (int n = 0; n < UNROLL; ++n) {
      const auto none = d[n] == -HUGE_VALF;
      if constexpr (Phi::LOWEST > -HUGE_VALF || (GRADIENT && NORMALIZED)) outside |= (u32)((d[n] < lowest) & ~none);
      top = larger(d[n], top);
      sums[n] += none ? f32{} : pull[n];
      if constexpr (NORMALIZED) bends[n] += none ? f32{} : curvature[n];
      if constexpr (GRADIENT) store(out + i + n * LANES, none ? f32{} : change[n]);
    }
  }
  outside |= (u32)(top > Phi::HIGHEST);
  if (fold(outside, [](auto a, auto b) { return a | b; }) != 0) return wide_tile<Phi, GRADIENT>(x, width, row, out);
  return {sum_lanes(sums), NORMALIZED ? sum_lanes(bends) : 0.0};
}

template <class Phi, class Element>
static void defined_row(const DefinedArgs& a, int64_t t, int threads, int worker) {
  const Row<Element> row = row_of<Element>(a, a.logits, t);
  const int64_t* target = a.target + t * a.targets;
  const double* weight = a.weight + t * a.targets;
  const double scale = a.row_scale[t];
  Element* const gradient = a.gradient ? static_cast<Element*>(a.gradient) + t * a.shape.columns : nullptr;
  const int64_t tiles = tile_count(row.columns);
  double log_total = 0.0;
  if constexpr (NORMALIZED) {
    const Summary total = sum_row(row, 1.0, threads, scratch_tiles(a.scratch, worker, row.columns));
    log_total = total.sum == 0.0 ? 0.0 : total.max + std::log(total.sum);
  }

  // Weights on an unreachable destination of infinite cost add up first: to 0 that counts 0, or to what has a sign.
  const auto weight_of = [&](int64_t v) {
    double sum = 0.0;
    for (int64_t j = 0; j < a.targets; ++j) sum += target[j] == v ? weight[j] : 0.0;
    return sum;
  };
  // weight[j] times a value of the rate exp(x), which is at_zero at a rate of 0.
  const auto weighed = [&](int64_t j, double x, double value, double at_zero) {
    const double w = x == -HUGE_VAL && std::isinf(at_zero) ? weight_of(target[j]) : weight[j];
    return w == 0.0 ? 0.0 : w * (x == -HUGE_VAL ? at_zero : value);
  };
  const auto counts = [&](int64_t j) { return target[j] >= 0 && target[j] != row.exclude; };

  // Puts the gradient of tile k where it belongs; sums of it.
  const auto gradient_of = [&](int64_t k, const OfRow& of) {
    alignas(64) float buffer[TILE];
    const float* x = row.load_tile(k, buffer);
    GradientTile<Element> out(gradient, k, row.count(k));
    const TileSums found =
        defined_tile<Phi, true>(x, row.width(k), row.is_whole(k), of, out.values, row.tile_ahead(k));
    for (int64_t j = 0; j < a.targets; ++j) {
      if (!counts(j) || !out.has(target[j])) continue;
      // The whole sum in doubles: in floats either part may be infinite where the sum is not, or has a sign.
      const double at[1] = {row.at(target[j]) - log_total}, w = weight_of(target[j]);
      double slope[1], force[1], pull[1], curvature[1] = {0.0};
      Phi::at_target(at, slope, force);
      if (at[0] != -HUGE_VAL) Phi::terms(at, pull, curvature);
      const double pulled = w == 0.0 ? 0.0 : w * (at[0] == -HUGE_VAL ? Phi::FORCE_AT_ZERO : force[0]);
      const double u = NORMALIZED ? std::exp(at[0]) : 0.0;
      out.set(target[j], scale * (curvature[0] - pulled - (u == 0.0 ? 0.0 : u * of.outflow)));
    }
    out.finish();
    return found;
  };

  double* const pulls = scratch_array(a.scratch, worker, 0);
  double* const curvatures = scratch_array(a.scratch, worker, 1);
  for_tiles(row.columns, threads, [&](int64_t k) {
    TileSums found;
    if (gradient && !NORMALIZED) {
      found = gradient_of(k, OfRow{scale});
    } else {
      alignas(64) float buffer[TILE];
      const float* x = row.load_tile(k, buffer);
      found = defined_tile<Phi, false>(x, row.width(k), row.is_whole(k), OfRow{scale, log_total}, nullptr,
                                       row.tile_ahead(k));
    }
    pulls[k] = found.pull;
    curvatures[k] = found.curvature;
  });

  double loss = 0.0, outflow = 0.0;
  for (int64_t k = 0; k < tiles; ++k) {
    loss += pulls[k];
    outflow += curvatures[k];
  }
  for (int64_t j = 0; j < a.targets; ++j) {
    if (!counts(j)) continue;
    const double at[1] = {row.at(target[j]) - log_total};
    double slope[1], force[1];
    Phi::at_target(at, slope, force);
    loss -= weighed(j, at[0], slope[0], Phi::SLOPE_AT_ZERO);
    outflow -= weighed(j, at[0], force[0], Phi::FORCE_AT_ZERO);
  }
  a.loss[t] = scale * loss;
  if (NORMALIZED && gradient) {
    for_tiles(row.columns, threads, [&](int64_t k) { gradient_of(k, OfRow{scale, log_total, outflow}); });
  }
}

template <class Phi>
static void defined(DefinedArgs a) {
  a.scratch.length = scratch_length(a.shape.columns);
  const std::unique_ptr<double[]> memory(new double[a.shape.threads * SCRATCH_ARRAYS * a.scratch.length]);
  a.scratch.data = memory.get();
  with_element(a.shape.dtype, [&](auto element) {
    for_rows(a.shape, [&](int64_t t, int worker, int threads) {
      defined_row<Phi, decltype(element)>(a, t, threads, worker);
    });
  });
}

DAM_END

// The one function that a generated file gives to others; the order of its arguments is that of dam/divergences.
#define DAM_DEFINED(Phi)                                                                                              \
  extern "C" __attribute__((visibility("default"))) void dam_defined(                                                 \
      int64_t rows, int64_t columns, int dtype, int threads, const void* logits, int64_t row_stride,                  \
      const int64_t* exclude, int64_t exclude_stride, const uint8_t* suppressed, const int64_t* target,               \
      int64_t targets, const double* weight, const double* row_scale, double* loss, void* gradient) {                 \
    dam::defined<dam::Phi>({{rows, columns, dtype, threads}, {logits, row_stride}, {exclude, exclude_stride},         \
                            suppressed, target, targets, weight, row_scale, loss, gradient, {}});                     \
  }
