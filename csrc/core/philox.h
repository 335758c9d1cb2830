// Philox 4x32-10 (Salmon et al., SC 2011). The random stream of every backend; dam/ops/_philox.py states its contract.
//
//   key      (seed low, seed high)
//   counter  (index, 1 << 31 | use << 24 | sample, row id low, row id high)
//
// The domain bit keeps every counter apart from those of torch's generators, whose second words stay below 2^31.
#pragma once

#include <cstdint>

#include "config.h"
#if !defined(__CUDACC__)
#include "simd.h"
#endif

DAM_BEGIN

constexpr int TILE = 1024;  // tokens raced together; part of the random stream's contract
constexpr uint32_t DOMAIN_BIT = 1u << 31;
constexpr int SAMPLE_BITS = 24;
constexpr uint32_t TILE_STREAM = DOMAIN_BIT | 0u << SAMPLE_BITS;
constexpr uint32_t TOKEN_STREAM = DOMAIN_BIT | 1u << SAMPLE_BITS;

DAM_HD uint64_t multiply_low(uint64_t a, uint32_t m) { return (a & 0xFFFFFFFFu) * m; }

// Four 32-bit words, each in a 64-bit integer or lane of them, whose upper halves are not read.
template <class U>
struct Words {
  U x, y, z, w;
};

// What is fixed while an index runs.
struct Stream {
  uint64_t seed;
  uint64_t row_id;
  uint32_t sample_stream;  // TILE_STREAM + sample, or TOKEN_STREAM + sample
};

// The block of a counter and key, words with upper halves that are not zero. U is uint64_t or a vector of them.
template <class U>
DAM_HD Words<U> philox(Words<U> c, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const U p0 = multiply_low(c.x, 0xD2511F53u);
    const U p1 = multiply_low(c.z, 0xCD9E8D57u);
    c = {(p1 >> 32) ^ c.y ^ uint64_t{key0}, p1, (p0 >> 32) ^ c.w ^ uint64_t{key1}, p0};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

template <class U>
DAM_HD Words<U> philox(U index, Stream s) {
  const U zero{};
  return philox<U>({index, zero + s.sample_stream, zero + (s.row_id & 0xFFFFFFFFu), zero + (s.row_id >> 32)},
                   static_cast<uint32_t>(s.seed), static_cast<uint32_t>(s.seed >> 32));
}

DAM_END
