// Vectors of one register, in the compiler's vector extensions: the operators of csrc/core's templates work on them
// as on scalars, lane by lane. Host only.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "config.h"
#include "math.h"

DAM_BEGIN

#if defined(__AVX512F__)
constexpr int REGISTER_BYTES = 64;
#elif defined(__AVX2__)
constexpr int REGISTER_BYTES = 32;
#else
constexpr int REGISTER_BYTES = 16;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

constexpr int LANES = REGISTER_BYTES / 4;  // 32-bit lanes
constexpr int WIDE = REGISTER_BYTES / 8;   // 64-bit lanes

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
using f32 = VectorOf<float, LANES>::type;
using u32 = VectorOf<uint32_t, LANES>::type;
using u16 = VectorOf<uint16_t, LANES>::type;
using f64 = VectorOf<double, WIDE>::type;
using u64 = VectorOf<uint64_t, WIDE>::type;
using f32_narrow = VectorOf<float, WIDE>::type;

template <>
struct BitsOf<f32> {
  using type = u32;
};
template <>
struct BitsOf<f64> {
  using type = u64;
};

template <class V, class T>
DAM_HD V load(const T* address) {
  V value;
  std::memcpy(&value, address, sizeof(V));
  return value;
}

template <class V, class T>
DAM_HD void store(T* address, V value) {
  std::memcpy(address, &value, sizeof(V));
}

// Half a register's numbers, made a register's. On Arm GCC takes half of one through general registers.
DAM_HD f64 load_wide(const float* x) {
#if defined(__aarch64__)
  return (f64)vcvt_f64_f32(vld1_f32(x));
#else
  return __builtin_convertvector(load<f32_narrow>(x), f64);
#endif
}
DAM_HD u32 load_wide(const uint16_t* x) {
#if defined(__aarch64__)
  return (u32)vmovl_u16(vld1_u16(x));
#else
  return __builtin_convertvector(load<u16>(x), u32);
#endif
}

// 0, 1, 2, ...
template <class V>
DAM_HD V iota() {
  V value{};
  for (unsigned i = 0; i < sizeof(V) / sizeof(value[0]); ++i) value[i] = i;
  return value;
}

// One instruction each; the compiler does not find it by itself. Arm has none: its two say something else of a NaN.
#if defined(__x86_64__)
template <>
DAM_HD f32 larger(f32 a, f32 b) {
#if defined(__AVX512F__)
  return (f32)_mm512_maskz_max_ps(0xFFFF, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (f32)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return (f32)_mm_max_ps((__m128)a, (__m128)b);
#endif
}
#endif

// All lanes brought together by an associative and commutative function of two vectors, half by half: lane after lane
// each would wait for the last.
template <class V, class F>
DAM_HD auto fold(V lanes, F combine) {
  using T = std::decay_t<decltype(lanes[0])>;
  constexpr int HALF = sizeof(V) / sizeof(T) / 2;
  if constexpr (HALF == 0) {
    return lanes[0];
  } else {
    T each[2 * HALF];
    store(each, lanes);
    using Half = typename VectorOf<T, HALF>::type;
    return fold(combine(load<Half>(each), load<Half>(each + HALF)), combine);
  }
}

// Whether a comparison of doubles holds in any lane.
template <class Mask>
DAM_HD bool any(Mask lanes) {
#if defined(__AVX512F__)
  return _mm512_movepi64_mask((__m512i)lanes) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_pd((__m256d)lanes) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_pd((__m128d)lanes) != 0;
#else
  return fold(lanes, [](auto a, auto b) { return a | b; }) != 0;
#endif
}

// Product of the low 32 bits of each lane with m.
DAM_HD u64 multiply_low(u64 a, uint32_t m) {
  const u64 b = u64{} + m;
#if defined(__AVX512F__)
  return (u64)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (u64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (u64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  return (u64)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}

// A store that leaves the caches to others; after the last of them, other threads need the fence.
DAM_HD void store_past_caches(float* address, float value) {
#if defined(__x86_64__)
  _mm_stream_si32(reinterpret_cast<int*>(address), bit_cast<int>(value));
#else
  *address = value;
#endif
}

DAM_HD void fence_past_caches() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

DAM_END
