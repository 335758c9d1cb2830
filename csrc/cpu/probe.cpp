// The numerics of csrc/core as this instruction set computes them, for the tests.
#include "../core/race.h"
#include "rows.h"

DAM_BEGIN

void probe_exp(const float* x, float* result, int64_t count, double scale) {
  const Factor factor = exp_factor(scale);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(result + i, exp_scaled(load<f32>(x + i), factor));
  for (; i < count; ++i) result[i] = exp_scaled(x[i], factor);
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

DAM_END
