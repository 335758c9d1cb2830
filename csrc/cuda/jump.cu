// jump: one read of a row gives the mass of each tile; a race among the tiles chooses one of them, a race inside it the
// destination. Contract: dam/ops/jump.py; random stream: dam/ops/_philox.py.
#include "../core/philox.h"
#include "../core/race.h"
#include "rows.h"

namespace dam {
namespace cuda {

constexpr int BLOCKS_PER_MULTIPROCESSOR = 4;
constexpr int BLOCKS_OF_SHORT_ROWS = 3;  // the draws' random keys take registers
constexpr int HALF = TILE / 2;
// From this many draws on each warp of a block makes some; fewer are made by the whole block, one after another.
constexpr int SAMPLES_BY_WARPS = 4;
constexpr int SAMPLES_IN_ONE_LAUNCH = 64;
constexpr int SAMPLES_PER_BLOCK = 64;  // of a launch of draws alone

// The random words of a counter.
__device__ __forceinline__ Words<uint64_t> words_of(uint64_t counter, const Stream& stream) {
  // The keys of Philox's ten rounds would take twenty registers beside a race.
  return philox(counter, Stream{opaque(stream.seed), stream.row_id, stream.sample_stream});
}

// Keys of a race: the smallest wins, and of equal times the lowest index.
__device__ __forceinline__ uint64_t key_of(float arrival, int index) {
  // Times are not negative: their bits are in their order. A NaN never arrives.
  const uint32_t time = bit_cast<uint32_t>(arrival < HUGE_VALF ? arrival : HUGE_VALF);
  return uint64_t{time} << 32 | static_cast<uint32_t>(index);
}
// Of the largest number, for a temperature of 0.
__device__ __forceinline__ uint64_t greedy_key_of(float x, int index) {
  const uint32_t bits = bit_cast<uint32_t>(x + 0.0f);  // -0 and 0 are equal
  const uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t{~ascending} << 32 | static_cast<uint32_t>(index);
}
__device__ __forceinline__ int index_of(uint64_t key) { return static_cast<int>(key & 0xFFFFFFFFu); }

// The first tile to arrive; they are numbered from first_tile on.
template <int WARPS, class Scale>
__device__ __forceinline__ int race_tiles(const Summaries& tiles, float max, Scale scale, bool greedy,
                                          uint32_t first_tile, const Stream& stream, Team<WARPS>& team) {
  const float p = pivot(max);
  uint64_t first = ~uint64_t{0};
#pragma unroll 1
  for (int k = team.thread; k < tiles.count; k += Team<WARPS>::THREADS) {
    uint64_t key;
    if (greedy) {
      key = greedy_key_of(tiles.max[k], k);
    } else {
      const Words<uint64_t> words = words_of(first_tile + static_cast<uint32_t>(k), stream);
      const float mass = (1.0f + tiles.excess[k]) * exp_scaled(tiles.max[k] - p, scale);
      key = key_of(quotient(exponential32(static_cast<uint32_t>(words.x), static_cast<uint32_t>(words.y)), mass), k);
    }
    first = key < first ? key : first;
  }
  return index_of(team.smallest(first));
}

// The first token of a tile to arrive, as a column of the row.
template <int WARPS, class Element, class Scale>
__device__ __forceinline__ int64_t race_tokens(const Row<Element>& row, int tile, float max, Scale scale, bool greedy,
                                               uint32_t first_tile, const Stream& stream, Team<WARPS>& team) {
  const int width = row.count(tile);
  const float p = pivot(max);
  uint64_t first = ~uint64_t{0};
#pragma unroll 1
  for (int i = team.thread; i < HALF && i < width; i += Team<WARPS>::THREADS) {
    // One counter serves two tokens half a tile apart.
    const Words<uint64_t> words = words_of((first_tile + static_cast<uint32_t>(tile)) * HALF + i, stream);
    const auto enter = [&](int at, uint64_t high, uint64_t low) {
      const int64_t v = int64_t{tile} * TILE + at;
      const float x = row.suppresses(v) ? -HUGE_VALF : row.at(v);
      const float arrival =
          quotient(exponential32(static_cast<uint32_t>(high), static_cast<uint32_t>(low)), exp_scaled(x - p, scale));
      const uint64_t key = greedy ? greedy_key_of(x, at) : key_of(arrival, at);
      first = key < first ? key : first;
    };
    enter(i, words.x, words.y);
    if (i + HALF < width) enter(i + HALF, words.z, words.w);
  }
  return int64_t{tile} * TILE + index_of(team.smallest(first));
}

// One draw of a row, by all of a team.
template <int WARPS, class Element, class Scale>
__device__ __forceinline__ void draw(const JumpArgs& a, const Row<Element>& row, int64_t of_row, int sample,
                                     const Summaries& tiles, const Total& total, Scale scale, Team<WARPS>& team) {
  const int64_t t = static_cast<int64_t>(opaque(static_cast<uint64_t>(of_row)));  // addresses made of it are not kept
  const uint64_t seed = a.seed_address ? static_cast<uint64_t>(*a.seed_address) : a.seed;
  const uint64_t id = static_cast<uint64_t>(load_index(a.row_ids, t, t));
  const uint32_t s = static_cast<uint32_t>(sample);
  const uint32_t first_tile = static_cast<uint32_t>(a.first_tile);
  const int tile = race_tiles(tiles, total.max, scale, a.greedy, first_tile, {seed, id, TILE_STREAM + s}, team);
  const int64_t token =
      race_tokens(row, tile, tiles.max[tile], scale, a.greedy, first_tile, {seed, id, TOKEN_STREAM + s}, team);
  if (team.thread == 0) {
    const bool reachable = total.sum > 0.0;  // false for NaN
    const double log_sum = log(total.sum);
    const double log_prob = a.scale * (static_cast<double>(row.at(token)) - total.max) - log_sum;
    a.target[t * a.samples + sample] = reachable ? token : -1;
    a.log_prob[t * a.samples + sample] = reachable ? static_cast<float>(log_prob) : -HUGE_VALF;
    if (sample == 0) {
      a.log_escape[t] = static_cast<float>(a.scale * pivot(total.max) + log_sum);
      if (a.first_bad && !reachable) atomic_min(a.first_bad, a.first_row + t);
    }
  }
}

template <class Element, class Scale, int WARPS>
__global__ void __launch_bounds__(THREADS_PER_BLOCK, WARPS == 1 ? BLOCKS_OF_SHORT_ROWS : BLOCKS_PER_MULTIPROCESSOR)
    jump_kernel(const __grid_constant__ JumpArgs a, const __grid_constant__ RowPlan plan, Scale scale, bool sums,
                bool finishes) {
  Team<WARPS> team;
  const Part part = part_of<WARPS>(plan);
  if (part.row >= plan.rows) return;
  const Row<Element> row = row_of<Element>(a, a.logits, load_exclude(a.exclude, a.shape, part.row), part.row);
  const Summaries tiles = summaries_of(a.summaries, 0, plan, part.row);
  if (sums) {
    sum_tiles<WARPS, true>(row, part, tiles, scale, team);
    if (!finishes) return;
    sync_row(plan, team);
  }
  const int units = plan.splits;  // blocks that share the draws of a row
  if (WARPS == 1 || a.samples < SAMPLES_BY_WARPS) {
    if (part.split >= a.samples) return;
    const Total total = merge_tiles(tiles, a.scale, team);
    for (int s = part.split; s < a.samples; s += units) draw(a, row, part.row, s, tiles, total, scale, team);
  } else {
    Team<1> warp;
    const Total total = merge_tiles(tiles, a.scale, warp);
    for (int s = part.split * WARPS + team.warp(); s < a.samples; s += units * WARPS) {
      draw(a, row, part.row, s, tiles, total, scale, warp);
    }
  }
}

// When what was drawn arrived, and its tile, and the log escape rate: in double, to be compared with those of tiles
// elsewhere. In a launch of its own, a thread for a draw, so that draws from whole rows are not held up by it.
template <class Element>
__global__ void arrival_kernel(const __grid_constant__ JumpArgs a, const __grid_constant__ RowPlan plan) {
  const int64_t at = block_of_grid() * THREADS_PER_BLOCK + thread_of_block();
  if (at >= plan.rows * a.samples) return;
  const int64_t t = at / a.samples, target = a.target[at];
  const uint32_t s = static_cast<uint32_t>(at % a.samples);
  const Summaries tiles = summaries_of(a.summaries, 0, plan, t);
  if (s == 0) {
    Summary total{-HUGE_VAL, 0.0};
    for (int k = 0; k < tiles.count; ++k) total = merge(total, {tiles.max[k], 1.0 + tiles.excess[k]}, a.scale);
    a.exact_log_escape[t] = log_total(total, a.scale);
  }
  double tile_time = HUGE_VAL, token_time = HUGE_VAL;
  if (target >= 0) {
    const int tile = static_cast<int>(target / TILE), place = static_cast<int>(target % TILE);
    const double x = load_one(static_cast<const Element*>(a.logits.data) + t * a.logits.row_stride + target);
    if (a.greedy) {
      tile_time = token_time = -x;
    } else {
      const uint64_t seed = a.seed_address ? static_cast<uint64_t>(*a.seed_address) : a.seed;
      const uint64_t id = static_cast<uint64_t>(load_index(a.row_ids, t, t));
      const auto log_exponential = [](uint64_t high, uint64_t low) {
        return log(static_cast<double>(exponential32(static_cast<uint32_t>(high), static_cast<uint32_t>(low))));
      };
      const uint64_t number = static_cast<uint32_t>(a.first_tile + tile);
      const Words<uint64_t> of_tile = philox(number, Stream{seed, id, TILE_STREAM + s});
      const Words<uint64_t> of_token = philox(number * HALF + place % HALF, Stream{seed, id, TOKEN_STREAM + s});
      tile_time = log_exponential(of_tile.x, of_tile.y) - log1p(static_cast<double>(tiles.excess[tile])) -
                  a.scale * tiles.max[tile];
      token_time = (place < HALF ? log_exponential(of_token.x, of_token.y) : log_exponential(of_token.z, of_token.w)) -
                   a.scale * x;
    }
  }
  a.arrival[2 * at] = tile_time;
  a.arrival[2 * at + 1] = token_time;
}

static void draw_rows(const JumpArgs& a, const RowPlan& plan, Queue queue) {
  with_types(a.shape, plan, a.scale, [&](auto element, auto warps, auto scale) {
    const auto kernel = jump_kernel<decltype(element), decltype(scale), decltype(warps)::value>;
    if (a.samples <= SAMPLES_IN_ONE_LAUNCH) return launch_rows(kernel, plan, queue, a, scale);
    launch(kernel, Grid{plan.blocks}, queue, a, plan, scale, true, false);
    // A launch of draws alone: its splits are of the samples.
    RowPlan draws = plan;
    draws.clustered = false;
    if (plan.team_warps > 1) {
      draws.splits = static_cast<int>(divided_up(a.samples, SAMPLES_PER_BLOCK));
      draws.blocks = draws.rows * draws.splits;
    }
    launch(kernel, Grid{draws.blocks}, queue, a, draws, scale, false, true);
  });
}

void jump(const JumpArgs& a, Queue queue) {
  const OnDevice guard(queue.device);
  const RowPlan plan = plan_rows(a.shape.rows, a.shape.columns, a.shape.columns * element_bytes(a.shape.dtype), false,
                                 BLOCKS_PER_MULTIPROCESSOR, chip_of(queue.device), true);
  draw_rows(a, plan, queue);
  if (!a.arrival) return;
  const Grid grid{divided_up(a.shape.rows * a.samples, THREADS_PER_BLOCK)};
  with_element(a.shape.dtype,
               [&](auto element) { launch(arrival_kernel<decltype(element)>, grid, queue, a, plan); });
}

}  // namespace cuda
}  // namespace dam
