// Scaling of a gradient that was formed in the forward pass, by a factor that only the device knows. Contract:
// dam/ops/_formed_gradient.py.
#include "rows.h"

namespace dam {
namespace cuda {

constexpr int64_t PER_BLOCK = 16384;  // entries, as many as Triton's programs take

template <class Element>
__global__ void __launch_bounds__(THREADS_PER_BLOCK) scale_kernel(const __grid_constant__ ScaleArgs a) {
  const float by = static_cast<float>(load_value(a.factor, 0, 0));
  // The usual upstream gradient is exactly 1: then nothing is read or written.
  if (by == 1.0f) return;
  Element* const gradient = static_cast<Element*>(a.gradient);
  const Team<WARPS_PER_BLOCK> team;
  // In tiles, as rows of logits are.
  const Row<Element> whole{gradient, a.count, -1, nullptr};
  const int64_t begin = block_of_grid() * (PER_BLOCK / TILE), tiles = divided_up(a.count, TILE);
  const int64_t end = begin + PER_BLOCK / TILE < tiles ? begin + PER_BLOCK / TILE : tiles;
  for (int64_t tile = begin + team.warp(); tile < end; tile += WARPS_PER_BLOCK) {
    float x[PER_LANE];
    whole.template load_tile<true>(static_cast<int>(tile), team.lane(), x);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) x[i] *= by;
    store_tile<Element>(gradient, a.count, static_cast<int>(tile), team.lane(), x);
  }
}

void scale(const ScaleArgs& a, Queue queue) {
  const OnDevice guard(queue.device);
  const Grid grid{divided_up(a.count, PER_BLOCK)};
  with_element(a.dtype, [&](auto element) { launch(scale_kernel<decltype(element)>, grid, queue, a); });
}

}  // namespace cuda
}  // namespace dam
