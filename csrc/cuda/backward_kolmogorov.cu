// backward_kolmogorov: the closed forms, and the walk along one dimension of a lattice. Contract:
// dam/ops/backward_kolmogorov.py.
#include <type_traits>

#include "rows.h"

namespace dam {
namespace cuda {

// ---- Uniform and Absorbing: result = stays * terminal + one number per row

constexpr int BLOCKS_PER_MULTIPROCESSOR = 3;

template <class Element, int WARPS>
__global__ void __launch_bounds__(THREADS_PER_BLOCK, BLOCKS_PER_MULTIPROCESSOR)
    closed_form_kernel(const __grid_constant__ ClosedFormArgs a, const __grid_constant__ RowPlan plan, Unit, bool sums,
                       bool finishes) {
  Team<WARPS> team;
  const Part part = part_of<WARPS>(plan);
  const int64_t t = part.row;
  if (t >= plan.rows) return;
  // Summed around the mask token, as subtracting it again would cancel.
  const Row<Element> row{static_cast<const Element*>(a.terminal.data) + t * a.terminal.row_stride, a.shape.columns,
                         a.mask_token, nullptr};
  double* const totals = a.totals + t * plan.tiles;
  if (sums) {
#pragma unroll 1
    for (int tile = part.begin + team.warp(); tile < part.end; tile += WARPS) {
      float x[PER_LANE];
      row.template load_tile<false>(tile, team.lane(), x, 0.0f);
      double sum = 0.0;
#pragma unroll
      for (int i = 0; i < PER_LANE; ++i) sum += x[i];
      sum = reduce_warp(sum, Sum{});
      if (team.lane() == 0) totals[tile] = sum;
    }
    if (!finishes) return;
    sync_row(plan, team);
  }
  double total = 0.0;
  for (int k = team.thread; k < plan.tiles; k += Team<WARPS>::THREADS) total += totals[k];
  total = team.sum(total);
  const bool absorbing = a.mask_token >= 0;
  const double at_mask = absorbing ? load_one(row.data + a.mask_token) : 0.0f;
  // Not finite if any entry is not.
  const double poison = 0.0 * (total + at_mask);
  const double shared = absorbing ? (a.transpose ? 0.0 : at_mask) : total / static_cast<double>(row.columns);
  const double term = a.moves * shared + poison;
  float* const result = a.result + t * row.columns;
#pragma unroll 1
  for (int tile = part.begin + team.warp(); tile < part.end; tile += WARPS) {
    float x[PER_LANE];
    row.template load_tile<true>(tile, team.lane(), x, 0.0f);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) x[i] = static_cast<float>(x[i] * a.stays + term);
    store_tile<Element>(result, row.columns, tile, team.lane(), x);
  }
  if (!absorbing) return;
  team.sync();
  if (team.thread == 0 && a.mask_token >= int64_t{part.begin} * TILE && a.mask_token < int64_t{part.end} * TILE) {
    result[a.mask_token] = static_cast<float>(at_mask + poison + (a.transpose ? a.moves * total : 0.0));
  }
}

void closed_form(const ClosedFormArgs& a, Queue queue) {
  const OnDevice guard(queue.device);
  const RowPlan plan = plan_rows(a.shape.rows, a.shape.columns, a.shape.columns * element_bytes(a.shape.dtype), true,
                                 BLOCKS_PER_MULTIPROCESSOR, chip_of(queue.device));
  with_types(a.shape, plan, [&](auto element, auto warps) {
    launch_rows(closed_form_kernel<decltype(element), decltype(warps)::value>, plan, queue, a, Unit{});
  });
}

// ---- Lattice
//
// The walk along one dimension is a product with a matrix of weights, new[i] = sum_j W[i, j] old[j]. With both points
// on a cycle W[i, j] = w[their distance]. A line with two ends is one half of a cycle of twice its length whose other
// half mirrors it, so the image of j, at -1 - j, adds its weight.

constexpr int POINTS = 64, LINES = 64, DEPTH = 16;  // results of a block, and its step over the points they come from
constexpr int WARP_POINTS = POINTS / WARPS_PER_BLOCK, LANE_LINES = LINES / WARP;

struct WalkMemory {
  double old[DEPTH][LINES + 1];  // a column more, or lines along the points would all lie in the same banks
  double weights[DEPTH][POINTS];
  int64_t source[LINES], result[LINES];  // offsets of the lines' first points; -1 past the last line
  int64_t row[LINES];
  double taps[FEW_TAPS];
};

static_assert(sizeof(WalkMemory) <= 48 * 1024, "more shared memory must be asked for");

// Weight of a point at a distance below `cycle`, which goes round it.
__device__ __forceinline__ double tap_at(const double* taps, int64_t radius, int64_t distance, int64_t cycle) {
  const int64_t shorter = distance < cycle - distance ? distance : cycle - distance;
  if (shorter < 0 || shorter > radius) return 0.0;
  // The point opposite is reached from both sides, each with its weight.
  return 2 * shorter == cycle ? 2.0 * taps[shorter] : taps[shorter];
}

__device__ __forceinline__ double load_double(const double* x) { return *x; }
template <class Element>
__device__ __forceinline__ double load_double(const Element* x) {
  return load_one(x);
}

template <class Source, class Result>
__global__ void __launch_bounds__(THREADS_PER_BLOCK) walk_kernel(const __grid_constant__ WalkArgs a) {
  WalkMemory& memory = *reinterpret_cast<WalkMemory*>(shared_memory());
  const int64_t tiles = divided_up(a.length, POINTS);
  const int64_t first = block_of_grid() % tiles * POINTS, first_line = block_of_grid() / tiles * LINES;
  const int64_t row_lines = a.columns / a.length;
  const int thread = thread_of_block(), lane = thread % WARP, warp = thread / WARP;
  if (thread < LINES) {
    const int64_t line = first_line + thread;
    const int64_t row = line / row_lines, within = line % row_lines;
    const int64_t origin = within / a.inner * (a.inner * a.length) + within % a.inner;
    const bool inside = line < a.rows * row_lines;
    memory.source[thread] = inside ? row * a.source.row_stride + origin : -1;
    memory.result[thread] = row * a.columns + origin;
    memory.row[thread] = row;
  }
  if (!a.taps) {
    for (int k = thread; k <= a.radius; k += THREADS_PER_BLOCK) memory.taps[k] = a.few_taps.weights[k];
  }
  const double* const taps = a.taps ? a.taps : memory.taps;
  // Points from which others are reached: positions, before those past an end are taken round the cycle.
  int64_t begin = first - a.radius, end = first + POINTS + a.radius;
  const int64_t cycle = a.periodic ? a.length : 2 * a.length;
  bool mirrored = false;
  if (a.periodic) {
    if (end - begin >= a.length) begin = 0, end = a.length;
  } else {
    begin = begin > 0 ? begin : 0;
    end = end < a.length ? end : a.length;
    // Where the distances of images, point + other + 1, include one of at most the radius.
    mirrored = first + begin < a.radius || first + POINTS + end > cycle - a.radius;
  }
  const auto position = [&](int64_t j) { return !a.periodic ? j : j < 0 ? j + a.length : j % a.length; };

  const Source* const source = static_cast<const Source*>(a.source.data);
  double sums[WARP_POINTS][LANE_LINES] = {};
  for (int64_t start = begin; start < end; start += DEPTH) {
    sync_block();  // offsets and taps are there; the last step's values have been read
    for (int i = thread; i < DEPTH * LINES; i += THREADS_PER_BLOCK) {
      // Neighbouring threads read what lies side by side.
      const int d = a.inner == 1 ? i % DEPTH : i / LINES, l = a.inner == 1 ? i / DEPTH : i % LINES;
      const bool live = start + d < end && memory.source[l] >= 0;
      memory.old[d][l] = live ? load_double(source + memory.source[l] + position(start + d) * a.inner) : 0.0;
    }
    for (int i = thread; i < DEPTH * POINTS; i += THREADS_PER_BLOCK) {
      const int d = i / POINTS, p = i % POINTS;
      const int64_t point = first + p, other = position(start + d);
      double weight = tap_at(taps, a.radius, point < other ? other - point : point - other, cycle);
      if (mirrored) weight += tap_at(taps, a.radius, point + other + 1, cycle);
      memory.weights[d][p] = weight;
    }
    sync_block();
#pragma unroll 4
    for (int d = 0; d < DEPTH; ++d) {
      double old[LANE_LINES];
#pragma unroll
      for (int l = 0; l < LANE_LINES; ++l) old[l] = memory.old[d][lane + l * WARP];
#pragma unroll
      for (int p = 0; p < WARP_POINTS; ++p) {
        const double weight = memory.weights[d][warp * WARP_POINTS + p];
#pragma unroll
        for (int l = 0; l < LANE_LINES; ++l) sums[p][l] += weight * old[l];
      }
    }
  }
  Result* const result = static_cast<Result*>(a.result);
#pragma unroll
  for (int l = 0; l < LANE_LINES; ++l) {
    const int line = lane + l * WARP;
    if (memory.source[line] < 0) continue;
    bool wrong = false;
#pragma unroll
    for (int p = 0; p < WARP_POINTS; ++p) {
      const int64_t point = first + warp * WARP_POINTS + p;
      // Any weight, also 0, times what is not finite is not finite: the sums of a point's own block show it.
      wrong |= !(fabs(sums[p][l]) < HUGE_VAL);
      if (point < a.length) result[memory.result[line] + point * a.inner] = static_cast<Result>(sums[p][l]);
    }
    if (wrong) a.not_finite[memory.row[line]] = 1;
  }
}

// The same on the tensor cores, where few weights suffice and none goes round the cycle to a point from both sides.
//
// A line is continued past its ends, round the cycle: then every point is reached from those at most `radius` away, W
// is a band, and all of its rows are equal. Products are of [8 points, 4 sources] of W and [4 sources, 8 lines], so
// that a warp needs of W only what 8 points have, `steps` such products from the source `reach` before them on; those
// of the next 8 points are the same two products later. A warp has 32 points of 16 lines, and so keeps the last 7 in
// registers.

constexpr int SIDE = 8, DEEP = 4;                  // points or lines of a product, and its sources
constexpr int BAND_POINTS = 128, BAND_LINES = 32;  // results of a block
constexpr int WARP_BLOCKS = 4, WARP_COLUMNS = 2;   // eights of points and of lines that a warp has
constexpr int WARP_OF_POINTS = WARP_BLOCKS * SIDE, WARP_OF_LINES = WARP_COLUMNS * SIDE;
constexpr int LATER = SIDE / DEEP;  // products from 8 points to the next
constexpr int RING = 8;             // of W that are kept: at least 1 + LATER (WARP_BLOCKS - 1)
constexpr int BAND_SOURCES = 256;   // of a line that lie in shared memory at a time, at most
constexpr int BAND_BLOCKS = 3;      // on a multiprocessor

static_assert(WARPS_PER_BLOCK * WARP_OF_POINTS * WARP_OF_LINES == BAND_POINTS * BAND_LINES, "warps share a block");
static_assert(RING > LATER * (WARP_BLOCKS - 1) && BAND_SOURCES % (RING * DEEP) == 0 &&
                  WARP_OF_POINTS % (RING * DEEP) == 0,
              "the ring's places are fixed");

struct Band {
  int reach, steps, sources, chunk;  // chunk: sources at a time
  int source_stride, line_stride;    // of doubles in shared memory: lanes of a product lie in different banks
};

Band band_of(const WalkArgs& a) {
  Band band;
  band.reach = static_cast<int>(divided_up(a.radius, DEEP)) * DEEP;
  band.steps = (SIDE + 2 * band.reach) / DEEP;
  band.sources = BAND_POINTS + 2 * band.reach;
  band.chunk = band.sources < BAND_SOURCES ? band.sources : BAND_SOURCES;
  const int padded = static_cast<int>(divided_up(band.chunk, 16)) * 16 + DEEP;
  // Sources or lines side by side, as they lie in memory.
  band.source_stride = a.inner == 1 ? 1 : BAND_LINES + DEEP;
  band.line_stride = a.inner == 1 ? padded : 1;
  return band;
}

// Beside them, what each block works out once.
struct BandMemory {
  int64_t source[BAND_LINES], result[BAND_LINES], row[BAND_LINES];  // as in WalkMemory
  int position[BAND_POINTS + 2 * (FEW_TAPS + DEEP)];                // on the line, of each source
};

int64_t band_bytes(const Band& band) {
  const int64_t by_source = int64_t{band.chunk} * (BAND_LINES + DEEP), by_line = int64_t{BAND_LINES} * band.line_stride;
  const int64_t sources = by_source > by_line ? by_source : by_line;
  return static_cast<int64_t>(sizeof(BandMemory)) + (int64_t{band.steps} * WARP + sources) * 8;
}

// Whether a walk is such a band, its line short enough for int, and its weights few enough for every chip's block.
bool is_band(const WalkArgs& a) {
  constexpr int64_t MOST_BYTES = 96 * 1024;  // of shared memory: 99 kB on 8.6 and 8.9
  const int64_t cycle = a.periodic ? a.length : 2 * a.length;
  return !a.taps && 2 * a.radius + 1 <= cycle && cycle <= (int64_t{1} << 30) && band_bytes(band_of(a)) <= MOST_BYTES;
}

template <class Source, class Result>
__global__ void __launch_bounds__(THREADS_PER_BLOCK, BAND_BLOCKS)
    band_kernel(const __grid_constant__ WalkArgs a, const __grid_constant__ Band band) {
  BandMemory& memory = *reinterpret_cast<BandMemory*>(shared_memory());
  double* const weights = reinterpret_cast<double*>(&memory + 1);  // [steps, lane]
  double* const old = weights + band.steps * WARP;
  const int64_t tiles = divided_up(a.length, BAND_POINTS);
  const int first = static_cast<int>(block_of_grid() % tiles) * BAND_POINTS;
  const int64_t first_line = block_of_grid() / tiles * BAND_LINES;
  const int64_t row_lines = a.columns / a.length, lines = a.rows * row_lines;
  const int thread = thread_of_block(), lane = thread % WARP;
  const int warp = thread / WARP;
  const int length = static_cast<int>(a.length), cycle = a.periodic ? length : 2 * length;
  if (thread < BAND_LINES) {
    const int64_t line = first_line + thread;
    const int64_t row = line / row_lines, within = line % row_lines;
    const int64_t origin = within / a.inner * (a.inner * a.length) + within % a.inner;
    memory.source[thread] = line < lines ? row * a.source.row_stride + origin : -1;
    memory.result[thread] = row * a.columns + origin;
    memory.row[thread] = row;
  }
  for (int s = thread; s < band.sources; s += THREADS_PER_BLOCK) {
    const int around = ((first - band.reach + s) % cycle + cycle) % cycle;
    memory.position[s] = around < length ? around : cycle - 1 - around;
  }
  for (int i = thread; i < band.steps * WARP; i += THREADS_PER_BLOCK) {
    // Of the point in the product's row and the source in its column.
    const int apart = i % WARP / DEEP + band.reach - i / WARP * DEEP - i % DEEP;
    const int distance = apart < 0 ? -apart : apart;
    weights[i] = distance <= a.radius ? a.few_taps.weights[distance] : 0.0;
  }

  const int my_points = warp / (BAND_LINES / WARP_OF_LINES) * WARP_OF_POINTS;
  const int my_lines = warp % (BAND_LINES / WARP_OF_LINES) * WARP_OF_LINES;
  const bool idle = first + my_points >= length || first_line + my_lines >= lines;
  const bool half = first_line + my_lines + SIDE >= lines;  // of my lines
  // Products of all warps are counted from the block's first source on; mine begin at that of my first point.
  const int mine = my_points / DEEP, my_steps = band.steps + LATER * (WARP_BLOCKS - 1);
  double sums[WARP_BLOCKS][WARP_COLUMNS][2] = {};
  double ring[RING] = {};
  const Source* const source = static_cast<const Source*>(a.source.data);
  for (int start = 0; start < band.sources; start += band.chunk) {
    const int count = band.sources - start < band.chunk ? band.sources - start : band.chunk;
    sync_block();  // positions and offsets are there; the last chunk has been multiplied
    if (a.inner == 1) {
      // Neighbouring threads read what lies side by side.
      for (int l = warp; l < BAND_LINES; l += WARPS_PER_BLOCK) {
        const int64_t line = memory.source[l];
#pragma unroll 4
        for (int d = lane; d < count; d += WARP) {
          old[l * band.line_stride + d] = line >= 0 ? load_double(source + line + memory.position[start + d]) : 0.0;
        }
      }
    } else {
      const int64_t line = memory.source[lane];
#pragma unroll 8
      for (int d = warp; d < count; d += WARPS_PER_BLOCK) {
        const int64_t at = line + memory.position[start + d] * a.inner;
        old[d * band.source_stride + lane] = line >= 0 ? load_double(source + at) : 0.0;
      }
    }
    sync_block();
    if (idle) continue;
    const double* const here = old + lane % DEEP * band.source_stride + (my_lines + lane / DEEP) * band.line_stride;
    // RING steps from `group` on. OPENS: the first of mine; ENDS: some may lie past the end of a point's band.
    const auto multiply = [&](int group, auto opens, auto ends) {
      constexpr bool OPENS = decltype(opens)::value, ENDS = decltype(ends)::value;
#pragma unroll
      for (int i = 0; i < RING; ++i) {
        const int step = group + i - mine;
        if (ENDS && step >= my_steps) continue;
        if (!ENDS || step < band.steps) ring[i] = weights[step * WARP + lane];
        double right[WARP_COLUMNS];
#pragma unroll
        for (int c = 0; c < WARP_COLUMNS; ++c) {
          right[c] = here[(group + i - start / DEEP) * DEEP * band.source_stride + c * SIDE * band.line_stride];
        }
#pragma unroll
        for (int p = 0; p < WARP_BLOCKS; ++p) {
          if (OPENS && i < LATER * p) continue;
          if (ENDS && (step < LATER * p || step - LATER * p >= band.steps)) continue;
#pragma unroll
          for (int c = 0; c < WARP_COLUMNS; ++c) {
            if (c > 0 && half) continue;
            add_product(sums[p][c], ring[(i - LATER * p) & (RING - 1)], right[c]);
          }
        }
      }
    };
    const int end = (start + count) / DEEP;
    for (int group = start / DEEP; group < end; group += RING) {
      if (group < mine || group >= mine + my_steps) continue;
      if (group + RING > mine + band.steps) {
        multiply(group, std::false_type{}, std::true_type{});
      } else if (group == mine) {
        multiply(group, std::true_type{}, std::false_type{});
      } else {
        multiply(group, std::false_type{}, std::false_type{});
      }
    }
  }
  if (idle) return;
  Result* const result = static_cast<Result*>(a.result);
#pragma unroll
  for (int c = 0; c < WARP_COLUMNS; ++c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int line = my_lines + c * SIDE + lane % DEEP * 2 + i;
      if (memory.source[line] < 0) continue;
      bool wrong = false;
#pragma unroll
      for (int p = 0; p < WARP_BLOCKS; ++p) {
        const int point = first + my_points + p * SIDE + lane / DEEP;
        wrong |= !(fabs(sums[p][c][i]) < HUGE_VAL);
        if (point < length) result[memory.result[line] + point * a.inner] = static_cast<Result>(sums[p][c][i]);
      }
      if (wrong) a.not_finite[memory.row[line]] = 1;
    }
  }
}

void walk(const WalkArgs& a, Queue queue) {
  if (!a.taps && a.few_taps.count != a.radius + 1) throw std::invalid_argument("dam: a walk needs radius + 1 taps");
  const OnDevice guard(queue.device);
  const int64_t lines = a.rows * (a.columns / a.length);
  const auto launch_to = [&](auto source, auto result) {
    using Source = decltype(source);
    using Result = decltype(result);
    if (is_band(a)) {
      const Band band = band_of(a);
      const int64_t blocks = divided_up(lines, BAND_LINES) * divided_up(a.length, BAND_POINTS);
      launch(band_kernel<Source, Result>, Grid{blocks, THREADS_PER_BLOCK, band_bytes(band)}, queue, a, band);
    } else {
      const int64_t blocks = divided_up(lines, LINES) * divided_up(a.length, POINTS);
      launch(walk_kernel<Source, Result>, Grid{blocks, THREADS_PER_BLOCK, sizeof(WalkMemory)}, queue, a);
    }
  };
  const auto launch_from = [&](auto source) {
    if (a.result_is_double) {
      launch_to(source, double{});
    } else {
      launch_to(source, float{});
    }
  };
  if (static_cast<Dtype>(a.source_dtype) == Dtype::float64) {
    launch_from(double{});
  } else {
    with_element(a.source_dtype, launch_from);
  }
}

__global__ void __launch_bounds__(THREADS_PER_BLOCK) fill_with_nan_kernel(const __grid_constant__ FillArgs a) {
  const int64_t t = block_of_grid();
  if (a.marked[t] == 0) return;
  for (int64_t v = thread_of_block(); v < a.columns; v += THREADS_PER_BLOCK) {
    a.result[t * a.columns + v] = static_cast<float>(HUGE_VAL - HUGE_VAL);
  }
}

void fill_with_nan(const FillArgs& a, Queue queue) {
  const OnDevice guard(queue.device);
  launch(fill_with_nan_kernel, Grid{a.rows}, queue, a);
}

}  // namespace cuda
}  // namespace dam
