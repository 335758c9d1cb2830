// What the kernels over rows of logits share: tiles, and sums of exponentials over a row.
//
// A warp has a tile of 1024 logits in its registers, 32 to a lane, so that sums over a tile need no shared memory. What
// is kept of a tile, its maximum and `excess`, depends on the tile alone: not on who sums it, or on how a row lies in
// memory. excess + 1 = sum of exp(scale (x - max)), exact also where it is tiny: log1p(excess) is what a tile's
// log-sum-exp lies above its maximum.
#pragma once

#include <cstdint>

#include "../core/dtype.h"
#include "../core/summary.h"
#include "kernels.h"
#include "launch.h"
#include "team.h"

namespace dam {
namespace cuda {

constexpr int TILE = COLUMNS_PER_TILE;
constexpr int PER_LANE = TILE / WARP;

// Elements of one load of 16 bytes.
template <class Element>
constexpr int PER_LOAD = 16 / sizeof(Element);

// Columns, within a tile, of a lane's logits: whole loads side by side. That of logit i is the lane's first one and
// this number, which is known when a kernel is compiled.
template <class Element>
__device__ constexpr int column_step(int i) {
  return i / PER_LOAD<Element> * (WARP * PER_LOAD<Element>)+i % PER_LOAD<Element>;
}

__device__ __forceinline__ bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

template <class Element>
struct Row {
  const Element* data;
  int64_t columns;
  int64_t exclude;            // -1: none
  const uint8_t* suppressed;  // null: none

  // Of a column that is not suppressed, as no target is.
  __device__ float at(int64_t v) const { return v == exclude ? -HUGE_VALF : load_one(data + v); }

  __device__ bool suppresses(int64_t v) const { return suppressed && (suppressed[v / 8] >> v % 8 & 1); }

  // Columns of a tile, less than TILE in the last one.
  __device__ int count(int tile) const {
    const int64_t left = columns - int64_t{tile} * TILE;
    return left < TILE ? static_cast<int>(left) : TILE;
  }

  // A lane's logits of a tile, `absent` for excluded and suppressed ones and past the row's end. ONCE: the row is not
  // read again.
  template <bool ONCE>
  __device__ __forceinline__ void load_tile(int tile, int lane, float (&x)[PER_LANE], float absent = -HUGE_VALF) const {
    const Element* const from = data + int64_t{tile} * TILE + lane * PER_LOAD<Element>;
    const int n = count(tile) - lane * PER_LOAD<Element>;  // columns from the lane's first one on
    if (count(tile) == TILE && is_aligned(from)) {
      Packed<16> loads[PER_LANE / PER_LOAD<Element>];
#pragma unroll
      for (int i = 0; i < PER_LANE / PER_LOAD<Element>; ++i) {
        loads[i] = load_packed<ONCE>(from + i * (WARP * PER_LOAD<Element>));
      }
#pragma unroll
      for (int i = 0; i < PER_LANE; ++i) {
        const Packed<16>& load = loads[i / PER_LOAD<Element>];
        if constexpr (sizeof(Element) == 4) {
          x[i] = bit_cast<float>(load.words[i % 4]);
        } else {
          const uint32_t word = load.words[i % 8 / 2];
          Element one;
          one.bits = static_cast<uint16_t>(i % 2 ? word >> 16 : word & 0xFFFFu);
          x[i] = load_one(&one);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < PER_LANE; ++i) {
        x[i] = column_step<Element>(i) < n ? load_one(from + column_step<Element>(i)) : absent;
      }
    }
    const int64_t excluded = exclude - int64_t{tile} * TILE;
    if (exclude >= 0 && excluded >= 0 && excluded < TILE) {
      const int step = static_cast<int>(excluded) - lane * PER_LOAD<Element>;
#pragma unroll
      for (int i = 0; i < PER_LANE; ++i) {
        if (column_step<Element>(i) == step) x[i] = absent;
      }
    }
    if (suppressed) suppress(tile, lane, x, absent);
  }

  // `absent` at the suppressed columns of a tile; by all lanes of a warp.
  __device__ __forceinline__ void suppress(int tile, int of_lane, float (&x)[PER_LANE], float absent) const {
    const int lane = static_cast<int>(opaque(of_lane));  // what is made of it would take registers from tile to tile
    // The bits of a tile are a word for each lane. Most tiles have none.
    const uint32_t word = reinterpret_cast<const uint32_t*>(suppressed)[tile * WARP + lane];
    if (!any_of_warp(word != 0)) return;
#pragma unroll
    for (int i = 0; i < PER_LANE; i += PER_LOAD<Element>) {
      const int column = column_step<Element>(i) + lane * PER_LOAD<Element>;
      const uint32_t mine = shuffle(word, column / 32) >> column % 32;
#pragma unroll
      for (int j = 0; j < PER_LOAD<Element>; ++j) {
        if (mine >> j & 1) x[i + j] = absent;
      }
    }
  }
};

// Row t of one of an op's matrices, without `exclude` and what the op suppresses.
template <class Element, class Args>
__device__ __forceinline__ Row<Element> row_of(const Args& a, const Matrix& matrix, int64_t exclude, int64_t t) {
  return {static_cast<const Element*>(matrix.data) + t * matrix.row_stride, a.shape.columns, exclude, a.suppressed};
}

__device__ __forceinline__ int64_t load_exclude(const Indices& exclude, const Shape& shape, int64_t t) {
  const int64_t v = load_index(exclude, t, -1);
  DAM_DEVICE_CHECK(v >= -1 && v < shape.columns, "exclude must be -1 or in [0, V)");
  return v;
}

__device__ __forceinline__ int64_t load_target(const Targets& target, const Shape& shape, int64_t t, int64_t j) {
  const int64_t v = target.data[t * target.row_stride + j * target.slot_stride];
  DAM_DEVICE_CHECK(v >= -1 && v < shape.columns, "target must be -1 or in [0, V)");
  return v;
}

// Writes a lane's part of a tile, as it was loaded from elements of type Loaded, rounded to nearest.
template <class Loaded, class Element>
__device__ __forceinline__ void store_tile(Element* row, int64_t columns, int tile, int lane,
                                           const float (&x)[PER_LANE]) {
  // What lies side by side, in one store or in two.
  constexpr int PER_STORE = PER_LOAD<Loaded> < PER_LOAD<Element> ? PER_LOAD<Loaded> : PER_LOAD<Element>;
  constexpr int BYTES = PER_STORE * sizeof(Element);
  Element* const to = row + int64_t{tile} * TILE + lane * PER_LOAD<Loaded>;
  const int64_t left = columns - int64_t{tile} * TILE;
  if (left >= TILE && reinterpret_cast<uintptr_t>(to) % BYTES == 0) {
#pragma unroll
    for (int i = 0; i < PER_LANE; i += PER_STORE) {
      Packed<BYTES> value;
#pragma unroll
      for (int w = 0; w < BYTES / 4; ++w) {
        if constexpr (sizeof(Element) == 4) {
          value.words[w] = bit_cast<uint32_t>(x[i + w]);
        } else {
          Element low, high;
          store_one(&low, x[i + 2 * w]);
          store_one(&high, x[i + 2 * w + 1]);
          value.words[w] = uint32_t{low.bits} | uint32_t{high.bits} << 16;
        }
      }
      store_packed(to + column_step<Loaded>(i), value);
    }
  } else {
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      if (column_step<Loaded>(i) < left - lane * PER_LOAD<Loaded>) store_one(to + column_step<Loaded>(i), x[i]);
    }
  }
}

// ---- sums

struct TileSummary {
  float max;
  float excess;
};

// Over a lane's logits, in CHAINS that do not wait for each other.
constexpr int CHAINS = 4;
template <class Operation>
__device__ __forceinline__ float reduce_lane(const float (&x)[PER_LANE], Operation operation) {
  float chains[CHAINS];
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) chains[i % CHAINS] = i < CHAINS ? x[i] : operation(x[i], chains[i % CHAINS]);
  return operation(operation(chains[0], chains[1]), operation(chains[2], chains[3]));
}

// Of a tile whose logits the lanes of a warp hold. A NaN among them may be left out; it shows in the sum.
__device__ __forceinline__ float max_of_tile(const float (&x)[PER_LANE]) {
  return reduce_warp(reduce_lane(x, Larger{}), Larger{});
}

// Summary of such a tile; leaves exp(scale (x - max)) in x.
template <class Scale>
__device__ __forceinline__ TileSummary summarize(float (&x)[PER_LANE], float max, Scale scale) {
  const float p = pivot(max);
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) x[i] = exp_scaled(x[i] - p, scale);
  const float sum = reduce_warp(reduce_lane(x, Sum{}), Sum{});
  // In one float with the maximum's 1 the rest is rounded at 2^-24 of it, which shows in the log of a total close to 1:
  // the ones of such a tile are counted apart, and the difference of the two sums is their number.
  constexpr float PEAKED = 4.0f;
  if (!(sum < PEAKED)) return {max, sum - 1.0f};
  float rest = 0.0f;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) rest += x[i] < 1.0f ? x[i] : 0.0f;
  rest = reduce_warp(rest, Sum{});
  return {max, rest + (floorf(sum - rest + 0.5f) - 1.0f)};
}

// Where the summaries of a row's tiles lie.
struct Summaries {
  float* max;
  float* excess;
  int count;
};

__device__ __forceinline__ float* summary_array(float* summaries, int array, const RowPlan& plan, int64_t t) {
  return summaries + (array * plan.rows + t) * plan.tiles;
}
__device__ __forceinline__ Summaries summaries_of(float* summaries, int first_array, const RowPlan& plan, int64_t t) {
  return {summary_array(summaries, first_array, plan, t), summary_array(summaries, first_array + 1, plan, t),
          plan.tiles};
}

// The tiles of a row that a team reduces: all, or those of its split, where blocks share the row.
struct Part {
  int64_t row;
  int split;
  int begin, end;  // tiles
};
template <int WARPS>
__device__ __forceinline__ Part part_of(const RowPlan& plan) {
  if constexpr (WARPS == 1) {
    return {block_of_grid() * WARPS_PER_BLOCK + thread_of_block() / WARP, 0, 0, plan.tiles};
  } else {
    const int64_t row = block_of_grid() / plan.splits;
    const int split = static_cast<int>(block_of_grid() % plan.splits);
    const int begin = split * plan.split_tiles, end = begin + plan.split_tiles;
    return {row, split, begin, end < plan.tiles ? end : plan.tiles};
  }
}

// Between the summaries of a row's tiles and what is made of them: waits for all that have tiles of it.
template <int WARPS>
__device__ __forceinline__ void sync_row(const RowPlan& plan, const Team<WARPS>& team) {
  if (WARPS > 1 && plan.clustered) {
    sync_cluster();
  } else {
    team.sync();
  }
}

// Summaries of tiles of a row; `keep`, unless null, gets a copy of them, in the places that they have in the row.
template <int WARPS, bool ONCE, class Element, class Scale>
__device__ __forceinline__ void sum_tiles(const Row<Element>& row, const Part& part, const Summaries& out, Scale scale,
                                          const Team<WARPS>& team, Element* keep = nullptr) {
#pragma unroll 1
  for (int tile = part.begin + team.warp(); tile < part.end; tile += WARPS) {
    float x[PER_LANE];
    row.template load_tile<ONCE>(tile, team.lane(), x);
    if (keep) store_tile<Element>(keep, row.columns, tile, team.lane(), x);
    const TileSummary summary = summarize(x, max_of_tile(x), scale);
    if (team.lane() == 0) {
      out.max[tile] = summary.max;
      out.excess[tile] = summary.excess;
    }
  }
}

// Of a row: its largest logit, and the sum of exp(scale (x - max)): NaN for a NaN or +inf among them, 0 for a row with
// nothing to reach.
struct Total {
  float max;
  double sum;
};
template <int WARPS>
__device__ __forceinline__ Total merge_tiles(const Summaries& tiles, double scale, Team<WARPS>& team) {
  float max = -HUGE_VALF;
#pragma unroll 1
  for (int k = team.thread; k < tiles.count; k += Team<WARPS>::THREADS) max = larger(tiles.max[k], max);
  max = team.largest(max);
  const double p = pivot(max);
  double sum = 0.0;
#pragma unroll 1
  for (int k = team.thread; k < tiles.count; k += Team<WARPS>::THREADS) {
    sum += (1.0 + tiles.excess[k]) * exp(scale * (tiles.max[k] - p));
  }
  return {max, team.sum(sum)};
}

__device__ __forceinline__ double escape_rate(const Total& total) {
  return ::exp(static_cast<double>(pivot(total.max))) * total.sum;
}

// ---- gradients
//
// A share is the part of a gradient that is proportional to a rate: weight times softmax(x), or times exp(x), written
// as coefficient * exp(scale (x - reference)).

struct Share {
  float coefficient;
  float high, low;  // the reference, as a sum
};

// factor * exp(log_rate + scale (x - reference)). 0 where nothing is asked for, whatever the row holds. What float32
// cannot hold goes into the reference: only entries that are too large themselves become infinite.
__device__ __forceinline__ Share share_of(double factor, double log_rate, double reference, double scale) {
  float coefficient = 0.0f;
  if (factor != 0.0) {
    constexpr double HELD = 69.0;  // 1e30
    const double log_size = log(fabs(factor)) + log_rate;
    if (!(log_size >= HELD)) {
      coefficient = static_cast<float>(copysign(exp(log_size), factor));
    } else {
      coefficient = static_cast<float>(copysign(1.0, factor));
      reference -= log_size / scale;
    }
  }
  const float high = static_cast<float>(reference);
  return {coefficient, high, static_cast<float>(reference - high)};
}

// 0 for a coefficient of 0, whatever x is.
template <class Scale>
__device__ __forceinline__ float share_at(const Share& share, float x, Scale scale) {
  if (share.coefficient == 0.0f) return 0.0f;
  return share.coefficient * exp_scaled((x - share.high) - share.low, scale);
}

// The same in double, where sums of numbers beyond float32 may cancel.
__device__ __forceinline__ double exact_share_at(const Share& share, float x, double scale) {
  if (share.coefficient == 0.0f) return 0.0;
  return share.coefficient * ::exp(scale * (static_cast<double>(x) - share.high - share.low));
}

__device__ inline void store_shares(float* out, const Share& share, const Share& base) {
  const float values[SHARES] = {share.coefficient, share.high, share.low, base.coefficient, base.high, base.low};
#pragma unroll
  for (int i = 0; i < SHARES; ++i) out[i] = values[i];
}

// Sum of the weights of all slots of row t whose target is v: targets may repeat.
__device__ inline double weight_at(int64_t v, const Targets& target, const Values& weight, int64_t t) {
  double sum = 0.0;
  for (int64_t j = 0; j < target.count; ++j) {
    if (target.data[t * target.row_stride + j * target.slot_stride] == v) sum += load_value(weight, t, j);
  }
  return sum;
}

// ---- launches

// Calls body(element) with the type of a gradient's entries: that of the logits, or bfloat16 beside float32 logits.
template <class Element, class Body>
void with_gradient(int dtype, Body body) {
  if constexpr (std::is_same_v<Element, float>) {
    if (static_cast<Dtype>(dtype) == Dtype::bfloat16) return body(bfloat16{});
  }
  body(Element{});
}

// Calls body(element, warps, scale) with the element type of a dtype, the warps of a team, and the scale as exp_scaled
// takes it: all known when a kernel is compiled.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <class Body>
void with_types(const Shape& shape, const RowPlan& plan, double scale, Body body) {
  with_element(shape.dtype, [&](auto element) {
    const auto with_team = [&](auto warps) {
      if (scale == 1.0) {
        body(element, warps, Unit{});
      } else {
        body(element, warps, exp_factor(scale));
      }
    };
    if (plan.team_warps == 1) {
      with_team(Count<1>{});
    } else {
      with_team(Count<WARPS_PER_BLOCK>{});
    }
  });
}
// The same for logits that are not scaled.
template <class Body>
void with_types(const Shape& shape, const RowPlan& plan, Body body) {
  with_element(shape.dtype, [&](auto element) {
    if (plan.team_warps == 1) {
      body(element, Count<1>{});
    } else {
      body(element, Count<WARPS_PER_BLOCK>{});
    }
  });
}

inline int64_t element_bytes(int dtype) { return dtype == static_cast<int>(Dtype::float32) ? 4 : 2; }

}  // namespace cuda
}  // namespace dam
