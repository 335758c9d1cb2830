// The numerics of csrc/core as this instruction set computes them, for the tests; a plain read of memory, the floor
// that the benchmarks state.
#include "../core/race.h"
#include "rows.h"

DAM_BEGIN

void probe_exp(const float* x, float* result, int64_t count, double scale) {
  with_scale(scale, [&](auto factor) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(result + i, exp_scaled(load<f32>(x + i), factor));
    for (; i < count; ++i) result[i] = exp_scaled(x[i], factor);
  });
}

void probe_exponential(const uint32_t* words, double* result, int64_t count) {
  int64_t i = 0;
  for (; i + WIDE <= count; i += WIDE) {
    u64 high{}, low{};
    for (int lane = 0; lane < WIDE; ++lane) {
      high[lane] = words[2 * (i + lane)];
      low[lane] = words[2 * (i + lane) + 1];
    }
    store(result + i, exponential<f64>(high, low));
  }
  for (; i < count; ++i) result[i] = exponential<double>(uint64_t{words[2 * i]}, uint64_t{words[2 * i + 1]});
}

void probe_philox(const uint32_t* counter, const uint32_t* key, uint32_t* words) {
  const u64 zero{};
  const Words<u64> block =
      philox<u64>({zero + counter[0], zero + counter[1], zero + counter[2], zero + counter[3]}, key[0], key[1]);
  words[0] = static_cast<uint32_t>(block.x[0]);
  words[1] = static_cast<uint32_t>(block.y[0]);
  words[2] = static_cast<uint32_t>(block.z[0]);
  words[3] = static_cast<uint32_t>(block.w[0]);
}

// The wrapping sum of all 64-bit words. Loads and one addition each: what no kernel that reads these bytes can
// undercut.
uint64_t probe_read(const uint64_t* data, int64_t count, int threads) {
  constexpr int64_t GRAB = 1 << 14;
  uint64_t total = 0;
  parallel_for((count + GRAB - 1) / GRAB, threads, 1, [&](int64_t grab, int) {
    const uint64_t* x = data + grab * GRAB;
    const int64_t n = count - grab * GRAB < GRAB ? count - grab * GRAB : GRAB;
    u64 lanes[UNROLL] = {};
    int64_t i = 0;
    for (; i + UNROLL * WIDE <= n; i += UNROLL * WIDE) {
      for (int u = 0; u < UNROLL; ++u) lanes[u] += load<u64>(x + i + u * WIDE);
    }
    uint64_t sum = 0;
    for (; i < n; ++i) sum += x[i];
    for (const u64& lane : lanes) {
      for (int j = 0; j < WIDE; ++j) sum += lane[j];
    }
#if defined(_OPENMP)
#pragma omp atomic
#endif
    total += sum;
  });
  return total;
}

DAM_END
