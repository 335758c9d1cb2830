// Exponential race: of events with rates r_i the first is event i with probability r_i / sum r.
#pragma once

#include <cstdint>

#include "config.h"
#include "math.h"

DAM_BEGIN

// A 32-bit word as a double; upper halves of the 64-bit lanes of U are not read.
template <class F, class U>
DAM_HD F from_word(U word) {
  // Under the exponent of 2^52 it is that double plus the word.
  return bit_cast<F>((word & 0xFFFFFFFFu) | 0x4330000000000000u) - 4503599627370496.0;
}

// Standard exponential from 64 random bits: E = -log1p(-u), u = (bits + 1/2) 2^-64.
//
// The small end decides which improbable token wins: it keeps full relative accuracy down to 2^-65.
template <class F, class U>
DAM_HD F exponential(U high, U low) {
  const F u = from_word<F>(high) * 0x1p-32 + (from_word<F>(low) + 0.5) * 0x1p-64;
  const double largest = 1.0 - 0x1p-53;
  return negative_log1m(u < largest ? u : F{} + largest);
}

// The same in float32, to a relative 2^-22: for chips with few double-precision units. Both u and 1 - u come from the
// bits, so that neither the small end nor the large one loses digits.
DAM_HD float exponential32(uint32_t high, uint32_t low) {
  const float u = static_cast<float>(high) * 0x1p-32f + (static_cast<float>(low) + 0.5f) * 0x1p-64f;
  const float z = static_cast<float>(~high) * 0x1p-32f + (static_cast<float>(~low) + 0.5f) * 0x1p-64f;
  // z = m 2^k with m in [sqrt(1/2), sqrt(2)); k = 0 for u < 0.29, where m - 1 would have lost the small end.
  const int32_t bits = bit_cast<int32_t>(z);
  const int32_t k = (bits - 0x3F3504F3) >> 23;
  const float m = bit_cast<float>(bits - k * (1 << 23));
  const float f = u < 0.29f ? -u : m - 1.0f;
  // log(1 + f) = 2 atanh(f / (2 + f)); the next term of the series is below 3e-9 of the first.
  const float s = quotient(f, f + 2.0f);
  const float w = s * s;
  const float q = (((w * (1.0f / 9) + 1.0f / 7) * w + 1.0f / 5) * w + 1.0f / 3) * w + 1.0f;
  return static_cast<float>(k) * -0.69314718f - 2.0f * s * q;
}

// The earliest of the arrivals seen, lane by lane; merging is associative and order-free.
template <class F>
struct Earliest {
  F time = F{} + HUGE_VAL;
  F index = F{};  // exact as a double below 2^53

  // A rate of 0 arrives at infinity, hence never; a NaN never.
  DAM_HD void enter(F exponential, F rate, F at) {
    const F arrival = exponential / rate;
    const auto earlier = arrival < time;
    time = earlier ? arrival : time;
    index = earlier ? at : index;
  }
};

DAM_END
