// Loads of float32, bfloat16 and float16 to float, and stores that round to nearest, ties to even.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "config.h"
#include "math.h"

DAM_BEGIN

// float64 is not a dtype of logits: only csrc/cuda takes it, for numbers per row or per slot.
enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Calls body(Element{}) with the element type that the code of a dtype of logits stands for.
template <class Body>
inline void with_element(int dtype, Body body) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::float32: return body(float{});
    case Dtype::bfloat16: return body(bfloat16{});
    case Dtype::float16: return body(float16{});
    case Dtype::float64: return;
  }
}

// The conversions take and give 16-bit patterns in 32-bit integers U, scalar or lane by lane.

template <class F, class U>
DAM_HD F widen(U bits, bfloat16) {
  return bit_cast<F>(bits << 16);
}

template <class F, class U>
DAM_HD F widen(U bits, float16) {
  const U magnitude = (bits & 0x7FFFu) << 13;
  const U exponent = bits & 0x7C00u;
  const U normal = magnitude + (exponent == 0x7C00u ? U{} + (224u << 23) : U{} + (112u << 23));
  // Through a normal number, so that flush-to-zero modes do not lose float16's subnormals.
  const U tiny = bit_cast<U>(bit_cast<F>(magnitude + (113u << 23)) - bit_cast<float>(113u << 23));
  return bit_cast<F>((exponent == 0u ? tiny : normal) | (bits & 0x8000u) << 16);
}

template <class U, class F>
DAM_HD U narrow(F value, bfloat16) {
  const U bits = bit_cast<U>(value);
  const U rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return value == value ? rounded : U{} + 0x7FC0u;
}

template <class U, class F>
DAM_HD U narrow(F value, float16) {
  const U bits = bit_cast<U>(value);
  const U magnitude = bits & 0x7FFFFFFFu;
  const U normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 1/2 rounds at the subnormals' spacing of 2^-24.
  const U tiny = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - (126u << 23);
  const U large = magnitude > 0x7F800000u ? U{} + 0x7E00u : U{} + 0x7C00u;
  const U result = magnitude < 0x38800000u ? tiny : normal;
  return (magnitude < 0x47800000u ? result : large) | ((bits >> 16) & 0x8000u);
}

// One number at a time; a device, Arm and F16C have instructions for it.

template <class Element>
DAM_HD float load_one(const Element* x) {
  if constexpr (std::is_same_v<Element, float>) {
    return *x;
#if defined(__CUDA_ARCH__)
  } else if constexpr (std::is_same_v<Element, float16>) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x->bits));
    return value;
#elif defined(__aarch64__)
  } else if constexpr (std::is_same_v<Element, float16>) {
    return bit_cast<__fp16>(x->bits);
#elif defined(__F16C__)
  } else if constexpr (std::is_same_v<Element, float16>) {
    return _cvtsh_ss(x->bits);
#endif
  } else {
    return widen<float>(uint32_t{x->bits}, Element{});
  }
}

template <class Element>
DAM_HD void store_one(Element* x, float value) {
  if constexpr (std::is_same_v<Element, float>) {
    *x = value;
#if defined(__CUDA_ARCH__)
  } else if constexpr (std::is_same_v<Element, float16>) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(x->bits) : "f"(value));
  } else if constexpr (std::is_same_v<Element, bfloat16>) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(x->bits) : "f"(value));
#elif defined(__aarch64__)
  } else if constexpr (std::is_same_v<Element, float16>) {
    x->bits = bit_cast<uint16_t>(static_cast<__fp16>(value));
#endif
  } else {
    x->bits = static_cast<uint16_t>(narrow<uint32_t>(value, Element{}));
  }
}

DAM_END
