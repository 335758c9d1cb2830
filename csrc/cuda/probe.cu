// The numerics of csrc/core as the device computes them, for the tests.
#include "../core/philox.h"
#include "../core/race.h"
#include "rows.h"

namespace dam {
namespace cuda {

__device__ __forceinline__ int64_t place_in_grid() { return block_of_grid() * THREADS_PER_BLOCK + thread_of_block(); }
static Grid grid_of(int64_t count) { return Grid{divided_up(count, THREADS_PER_BLOCK)}; }

template <class Scale>
__global__ void probe_exp_kernel(const float* x, float* result, int64_t count, Scale scale) {
  const int64_t i = place_in_grid();
  if (i < count) result[i] = exp_scaled(x[i], scale);
}

__global__ void probe_exponential_kernel(const uint32_t* words, float* result, int64_t count) {
  const int64_t i = place_in_grid();
  if (i < count) result[i] = exponential32(words[2 * i], words[2 * i + 1]);
}

__global__ void probe_philox_kernel(const uint32_t* counters, uint64_t key, uint32_t* words, int64_t count) {
  const int64_t i = place_in_grid();
  if (i >= count) return;
  const uint32_t* const c = counters + 4 * i;
  const Words<uint64_t> block =
      philox<uint64_t>({c[0], c[1], c[2], c[3]}, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
  words[4 * i] = static_cast<uint32_t>(block.x);
  words[4 * i + 1] = static_cast<uint32_t>(block.y);
  words[4 * i + 2] = static_cast<uint32_t>(block.z);
  words[4 * i + 3] = static_cast<uint32_t>(block.w);
}

void probe_exp(const float* x, float* result, int64_t count, double scale, Queue queue) {
  const OnDevice guard(queue.device);
  if (scale == 1.0) {
    launch(probe_exp_kernel<Unit>, grid_of(count), queue, x, result, count, Unit{});
  } else {
    launch(probe_exp_kernel<Factor>, grid_of(count), queue, x, result, count, exp_factor(scale));
  }
}

void probe_exponential(const uint32_t* words, float* result, int64_t count, Queue queue) {
  const OnDevice guard(queue.device);
  launch(probe_exponential_kernel, grid_of(count), queue, words, result, count);
}

void probe_philox(const uint32_t* counters, uint64_t key, uint32_t* words, int64_t count, Queue queue) {
  const OnDevice guard(queue.device);
  launch(probe_philox_kernel, grid_of(count), queue, counters, key, words, count);
}

}  // namespace cuda
}  // namespace dam
