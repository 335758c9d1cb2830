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

// b where either is NaN. simd.h has the vectors' one instruction.
template <class F>
DAM_HD F larger(F a, F b) {
  return a > b ? a : b;
}
#if defined(__CUDA_ARCH__)
DAM_HD float larger(float a, float b) { return fmaxf(a, b); }
#endif

// a / b; on a device within 2 units in the last place, for |b| < 2^126.
DAM_HD float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// 2^-125 keeps a result a normal number; what is smaller is 0.
constexpr float LEAST_EXPONENT = -125.0f;

// The inverse temperature that exp_scaled multiplies its argument with. Factor: any, in two floats, so that it costs no
// accuracy where products are fused with sums. Unit: temperature 1, known when a kernel is compiled, which costs less.
struct Factor {
  float high, low;  // scale * log2(e)
  float floor;      // arguments below it give 0
};
struct Unit {
  static constexpr float high = 1.44269504f;
  static constexpr float floor = LEAST_EXPONENT / 1.44269504f;
};
// A power of 2, or minus one, known when a kernel is compiled: what Unit costs. For exp_near alone.
struct Exact {
  float scale;
  float high = 1.44269504f * scale;
};

DAM_HD Factor exp_factor(double scale) {
  const double c = std::fmin(scale * 1.4426950408889634, 1e31);
  const float high = static_cast<float>(c);
  return {high, static_cast<float>(c - high), static_cast<float>(LEAST_EXPONENT / c)};
}

// What is left of x after n = round(scale x log2(e)) powers of 2, as an argument of raised_fraction.
template <class F>
DAM_HD F fraction(F x, F n, Factor c) {
  return x * c.low + (x * c.high - n);
}
template <class F>
DAM_HD F fraction(F x, F n, Exact c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__CUDACC__)
  return x - n * (0.69314718f / c.scale);  // this float is within 2e-9 of ln 2
#else
  return (x - n * (0.693359375f / c.scale)) + n * (2.12194440e-4f / c.scale);  // the first product is exact
#endif
}
template <class F>
DAM_HD F fraction(F x, F n, Unit) {
  return fraction(x, n, Exact{1.0f});
}

// (2^r - 1) / r for |r| <= 1/2, and (e^(scale r) - 1) / r for |scale r| <= ln(2) / 2: minimax, 1 + r times them within
// 2^-23.3. Powers of the scale round nothing.
template <class F>
DAM_HD F raised_fraction(F r, Factor) {
  F q = r * 0.001326472731f + 0.009671512991f;
  q = q * r + 0.05550733581f;
  q = q * r + 0.2402224243f;
  return q * r + 0.6931470037f;
}
template <class F>
DAM_HD F raised_fraction(F r, Exact c) {
  const float s = c.scale;
  F q = r * (0.008290315047f * s * s * s * s * s) + 0.0418979302f * s * s * s * s;
  q = q * r + 0.1666763574f * s * s * s;
  q = q * r + 0.4999915063f * s * s;
  return q * r + 0.999999702f * s;
}
template <class F>
DAM_HD F raised_fraction(F r, Unit) {
  return raised_fraction(r, Exact{1.0f});
}

// x = exp(scale * x) for scale * x < 88; exactly 1 at 0, NaN for NaN. Below exp(-86.6) and at -inf exactly 0 with
// FLUSH, else at most 2^-125. Relative error < 2^-22.4 + 2^-28.4 |x| for Unit; for a Factor 2^-22.4 where products are
// fused with sums (AVX2, AVX-512, most others) and 2^-22 (1 + |scale x|) elsewhere. F is float or a vector of floats.
// The N of them go through each step together: one by one, the chain of dependent operations would fill a core's
// scheduler before the next one starts.
template <bool FLUSH, int N, class F, class Scale>
DAM_HD void exp_each(F (&x)[N], Scale c) {
  using U = typename BitsOf<F>::type;
  F shifted[N], r[N], q[N];
  for (int i = 0; i < N; ++i) {
    if constexpr (!FLUSH) x[i] = larger(F{} + c.floor, x[i]);
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    shifted[i] = x[i] * c.high + 12582912.0f;
  }
  for (int i = 0; i < N; ++i) r[i] = fraction(x[i], shifted[i] - 12582912.0f, c);
  for (int i = 0; i < N; ++i) q[i] = raised_fraction(r[i], c);
  for (int i = 0; i < N; ++i) {
    const F power = bit_cast<F>((bit_cast<U>(shifted[i]) << 23) + (127u << 23));
    const F result = (q[i] * r[i] + 1.0f) * power;
    if constexpr (FLUSH) {
      x[i] = x[i] < c.floor ? F{} : result;
    } else {
      x[i] = result;
    }
  }
}

// The same for |scale x| <= 86, of which nothing is too small: not for NaN, whose digits may be lost with it.
template <int N, class F, class Scale>
DAM_HD void exp_near(F (&x)[N], Scale c) {
  using U = typename BitsOf<F>::type;
  F shifted[N], r[N], q[N];
  for (int i = 0; i < N; ++i) shifted[i] = x[i] * c.high + 12582912.0f;
  for (int i = 0; i < N; ++i) r[i] = fraction(x[i], shifted[i] - 12582912.0f, c);
  for (int i = 0; i < N; ++i) q[i] = raised_fraction(r[i], c);
  // Added to the exponent, which costs less than a product where these wait for one another.
  for (int i = 0; i < N; ++i) x[i] = bit_cast<F>(bit_cast<U>(q[i] * r[i] + 1.0f) + (bit_cast<U>(shifted[i]) << 23));
}

#if defined(__CUDA_ARCH__)
// By the device's own instruction: relative error < 2^-22 + 1.25 * 2^-24 |scale x|, of the instruction and of its
// argument, which is rounded once (and for Unit multiplied with a rounded log2(e)).
DAM_HD float exp2_of(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
DAM_HD float exp_scaled(float x, Unit c) { return exp2_of(x * c.high); }
DAM_HD float exp_scaled(float x, Factor c) { return x < c.floor ? 0.0f : exp2_of(fmaf(x, c.high, x * c.low)); }
#endif

template <class F, class Scale>
DAM_HD F exp_scaled(F x, Scale c) {
  F one[1] = {x};
  exp_each<true>(one, c);
  return one[0];
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

// Elementary functions of all floats, for F a float or a vector of floats. Errors are in units in the last place (ulp) of
// the result, the largest over a sweep of all exponents and where they are largest (tests/test_elementary.py). Of other
// results than exp's below 2^-126 digits may be lost, of 0 the sign.

// e^x, infinite beyond 88.72, 0 below -103.98: error 5.5 ulp at its ends, subnormal results too, 2.2 for |x| < 1.
template <class F>
DAM_HD F exp_float(F x) {
  using U = typename BitsOf<F>::type;
  x = x > 89.5f ? F{} + 89.5f : x;
  const F shifted = x * Unit::high + 12582912.0f;
  const F r = fraction(x, shifted - 12582912.0f, Unit{});
  // By two halves of its power: 2^128 is no float, and what is subnormal is rounded once.
  const U power = bit_cast<U>(shifted), half = power >> 1;
  const F first = bit_cast<F>((half << 23) + (127u << 23));
  const F second = bit_cast<F>(((power - half) << 23) + (127u << 23));
  const F result = (raised_fraction(r, Unit{}) * r + 1.0f) * first * second;
  return x < -104.0f ? F{} : result;
}

// log(x) + more for normal x > 0.
template <class F>
DAM_HD F log_of_normal(F x, F more) {
  using U = typename BitsOf<F>::type;
  // x = (1 + f) 2^k with 1 + f in [sqrt(1/2), sqrt(2)).
  const U bits = bit_cast<U>(x);
  const U biased = (bits - 0x3F3504F3u + (127u << 23)) >> 23;  // k + 127
  const F k = bit_cast<F>(biased | 0x4B000000u) - (8388608.0f + 127.0f);
  const F f = bit_cast<F>(bits - (biased << 23) + (127u << 23)) - 1.0f;
  // (log(1 + f) - f + f^2 / 2) / f^3: minimax, log(1 + f) within 2^-27.
  F q = f * -0.076344974f + 0.12761578f;
  q = q * f - 0.13160183f;
  q = q * f + 0.14201757f;
  q = q * f - 0.16623357f;
  q = q * f + 0.20001227f;
  q = q * f - 0.2500082f;
  q = q * f + 0.3333333f;
  const F square = f * f;
  // ln 2 in two parts, of which k times the first is exact.
  const F rest = (square * f * q - square * 0.5f) + (k * -2.12194440e-4f + more);
  return k * 0.693359375f + (f + rest);
}

// Error 0.9 ulp. -inf at 0, NaN below.
template <class F>
DAM_HD F log_float(F x) {
  const auto small = x < 1.17549435e-38f;  // subnormal, or none of these
  const F result = log_of_normal(small ? x * 8388608.0f : x, small ? F{} - 15.9423847f : F{});
  const F outside = x == 0.0f ? F{} - HUGE_VALF : x < 0.0f ? F{} + NAN : x;  // infinity and NaN are their own
  return (x > 0.0f) & (x < HUGE_VALF) ? result : outside;
}

// log(1 + x): error 1 ulp. -inf at -1, NaN below.
template <class F>
DAM_HD F log1p_float(F x) {
  const F u = x + 1.0f;
  const F lost = (x - (u - 1.0f)) / u;  // what rounding u took away, as the logarithm has it
  const F result = log_of_normal(u, lost);
  const F outside = x == -1.0f ? F{} - HUGE_VALF : x < -1.0f ? F{} + NAN : x;
  return (x > -1.0f) & (x < HUGE_VALF) ? result : outside;
}

// e^x - 1, infinite beyond 88.72: error 4.7 ulp at its end, 2 for |x| < 1.
template <class F>
DAM_HD F expm1_float(F x) {
  using U = typename BitsOf<F>::type;
  x = x > 88.9f ? F{} + 88.9f : x;
  x = larger(F{} - 20.0f, x);  // which is -1
  const F shifted = x * Unit::high + 12582912.0f;
  const F r = fraction(x, shifted - 12582912.0f, Unit{});
  // (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2: minimax, e^r - 1 within 2^-26.
  F q = r * 0.001388251f + 0.00836658f;
  q = q * r + 0.0416672f;
  q = q * r + 0.16666543f;
  q = q * r + 0.49999997f;
  const F p = q * (r * r) + r;
  const F half_power = bit_cast<F>((bit_cast<U>(shifted) << 23) + (126u << 23));
  return (half_power * p + (half_power - 0.5f)) * 2.0f;
}

// Error 3 ulp.
template <class F>
DAM_HD F tanh_float(F x) {
  using U = typename BitsOf<F>::type;
  const U sign = bit_cast<U>(x) & 0x80000000u;
  F size = bit_cast<F>(bit_cast<U>(x) ^ sign);
  size = size > 10.0f ? F{} + 10.0f : size;  // which is 1
  const F e = expm1_float(size + size);
  return bit_cast<F>(bit_cast<U>(e / (e + 2.0f)) | sign);
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
