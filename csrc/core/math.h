// Elementary functions over scalars and vectors of floats and doubles.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "config.h"

DAM_BEGIN

template <class To, class From>
DAM_HD To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// Unsigned integers of the width of F; simd.h adds the vectors.
template <class F>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = uint32_t;
};
template <>
struct BitsOf<double> {
  using type = uint64_t;
};

// A factor in two floats, so that applying it costs no accuracy where products are fused with sums.
struct Factor {
  float high, low;
  float floor;  // arguments below it give 0
};

// The factor with which exp_scaled(x, factor) = exp(scale * x).
DAM_HD Factor exp_factor(double scale) {
  const double c = std::fmin(scale * 1.4426950408889634, 1e30);
  const float high = static_cast<float>(c);
  // 2^-125 keeps the result a normal number; what is smaller is 0.
  return {high, static_cast<float>(c - high), static_cast<float>(-125.0 / c)};
}

// exp(scale * x) for scale * x < 88; exactly 1 at 0, exactly 0 at -inf and below exp(-86.6); NaN for NaN.
// Relative error < 2^-22.9 where products are fused with sums (AVX2, AVX-512, most others), else 2^-22 (1 + |scale x|).
// F is float or a vector of floats.
template <class F>
DAM_HD F exp_scaled(F x, Factor c) {
  using U = typename BitsOf<F>::type;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const F shifted = x * c.high + 12582912.0f;
  const F n = shifted - 12582912.0f;
  const F r = x * c.low + (x * c.high - n);
  // (2^r - 1) / r, interpolated in the Chebyshev nodes of [-1/2, 1/2]; 2^r is within 1e-8.
  F q = r * 0.00015453163359803f + 0.00133908633146983f;
  q = q * r + 0.00961808301508427f;
  q = q * r + 0.05550356954336166f;
  q = q * r + 0.24022650718688965f;
  q = q * r + 0.69314718246459961f;
  const F power = bit_cast<F>((bit_cast<U>(shifted) << 23) + (127u << 23));
  const F result = (q * r + 1.0f) * power;
  return x < c.floor ? F{} : result;
}

// exp(x) for x <= 700, relative error < 4e-15; 0 below -700 and at -inf, NaN for NaN. F is double or a vector of
// doubles.
template <class F>
DAM_HD F exp(F x) {
  using U = typename BitsOf<F>::type;
  const F shifted = x * 1.4426950408889634 + 6755399441055744.0;  // 1.5 * 2^52
  const F n = shifted - 6755399441055744.0;
  const F r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;  // ln 2 in two parts
  F q = r * (1.0 / 479001600) + 1.0 / 39916800;
  q = q * r + 1.0 / 3628800;
  q = q * r + 1.0 / 362880;
  q = q * r + 1.0 / 40320;
  q = q * r + 1.0 / 5040;
  q = q * r + 1.0 / 720;
  q = q * r + 1.0 / 120;
  q = q * r + 1.0 / 24;
  q = q * r + 1.0 / 6;
  q = q * r + 0.5;
  const F p = q * r * r + r + 1.0;
  const F result = p * bit_cast<F>((bit_cast<U>(shifted) << 52) + (uint64_t{1023} << 52));
  return x < -700.0 ? F{} : result;
}

// -log(1 - u) for 0 < u < 1, relative error < 1e-14 down to the smallest u. F is double or a vector of doubles.
template <class F>
DAM_HD F negative_log1m(F u) {
  using U = typename BitsOf<F>::type;
  const F z = 1.0 - u;
  // z = m 2^k with m in [sqrt(1/2), sqrt(2)).
  const U bits = bit_cast<U>(z);
  const U biased = (bits - 0x3FE6A09E667F3BCDu + (uint64_t{1023} << 52)) >> 52;  // k + 1023
  const F m = bit_cast<F>(bits - (biased << 52) + (uint64_t{1023} << 52));
  const F k = bit_cast<F>(biased | 0x4330000000000000u) - (4503599627370496.0 + 1023.0);
  // k = 0 below 0.29, where -u is exact and m - 1 has lost the small end.
  const F f = u < 0.29 ? -u : m - 1.0;
  // log(1 + f) = 2 atanh(f / (2 + f)); the series' next term is below 1e-15 of the first.
  const F s = f / (f + 2.0);
  const F w = s * s;
  F q = w * (1.0 / 17) + 1.0 / 15;
  q = q * w + 1.0 / 13;
  q = q * w + 1.0 / 11;
  q = q * w + 1.0 / 9;
  q = q * w + 1.0 / 7;
  q = q * w + 1.0 / 5;
  q = q * w + 1.0 / 3;
  q = q * w + 1.0;
  return k * -0.6931471805599453 - 2.0 * s * q;
}

DAM_END
