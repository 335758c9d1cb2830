// What every kernel over rows of logits shares: threads, tiles, and sums of exponentials over a row.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "../core/dtype.h"
#include "../core/philox.h"
#include "../core/simd.h"
#include "../core/summary.h"
#include "kernels.h"

DAM_BEGIN

// No containers or algorithms of the standard library in the kernels: their code would be shared between the
// instruction sets.

constexpr int64_t tile_count(int64_t columns) { return (columns + TILE - 1) / TILE; }

// Calls body(i, worker) for i in [0, count), worker in [0, threads).
template <class Body>
inline void parallel_for(int64_t count, int threads, int64_t chunk, Body body) {
#if defined(_OPENMP)
  if (threads > 1 && count > chunk) {  // less than one grab is not worth waking a thread for
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk)
    for (int64_t i = 0; i < count; ++i) body(i, omp_get_thread_num());
    return;
  }
#endif
  (void)threads, (void)chunk;
  for (int64_t i = 0; i < count; ++i) body(i, 0);
}

constexpr int64_t TILES_PER_GRAB = 32;  // what a thread takes at a time, so that taking costs little

// Calls body(t, worker, threads) for every row: rows side by side when there are enough of them, else one after another
// with `threads` for the tiles of each.
template <class Body>
inline void for_rows(const Shape& shape, Body body) {
  const int64_t tiles = tile_count(shape.columns);
  const bool side_by_side = shape.rows >= 2 * int64_t{shape.threads} || tiles < 2 * TILES_PER_GRAB;
  parallel_for(shape.rows, side_by_side ? shape.threads : 1, TILES_PER_GRAB / tiles + 1,
               [&](int64_t t, int worker) { body(t, worker, side_by_side ? 1 : shape.threads); });
}

// Calls body(tile) for every tile of a row.
template <class Body>
inline void for_tiles(int64_t columns, int threads, Body body) {
  parallel_for(tile_count(columns), threads, TILES_PER_GRAB, [&](int64_t tile, int) { body(tile); });
}

// Calls body(Element{}) with the element type that a dtype code stands for.
template <class Body>
inline void with_element(int dtype, Body body) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::float32: return body(float{});
    case Dtype::bfloat16: return body(bfloat16{});
    case Dtype::float16: return body(float16{});
  }
}

template <class Element>
inline float load_one(const Element* x) {
  if constexpr (std::is_same_v<Element, float>) {
    return *x;
  } else {
    return widen<float>(uint32_t{x->bits}, Element{});
  }
}

template <class Element>
inline f32 load_lanes(const Element* x) {
  if constexpr (std::is_same_v<Element, float>) {
    return load<f32>(x);
  } else {
    return widen<f32>(__builtin_convertvector(load<u16>(x), u32), Element{});
  }
}

template <class Element>
inline void store_one(Element* x, float value) {
  if constexpr (std::is_same_v<Element, float>) {
    *x = value;
  } else {
    x->bits = static_cast<uint16_t>(narrow<uint32_t>(value, Element{}));
  }
}

template <class Element>
inline void store_lanes(Element* x, f32 value) {
  if constexpr (std::is_same_v<Element, float>) {
    store(x, value);
  } else {
    store(x, __builtin_convertvector(narrow<u32>(value, Element{}), u16));
  }
}

template <class Element>
struct Row {
  const Element* data;
  int64_t columns;
  int64_t exclude;  // -1: none

  int count(int64_t tile) const {
    const int64_t left = columns - tile * TILE;
    return left < TILE ? static_cast<int>(left) : TILE;
  }

  double at(int64_t v) const { return v == exclude ? -HUGE_VAL : double{load_one(data + v)}; }

  // The TILE logits of a tile as floats, in place where they can be read there, else in `buffer`, with the excluded one
  // and those past the row's end at -inf.
  const float* load_tile(int64_t tile, float* buffer) const {
    const Element* x = data + tile * TILE;
    const int n = count(tile);
    const bool excludes = exclude >= tile * TILE && exclude < (tile + 1) * TILE;
    if constexpr (std::is_same_v<Element, float>) {
      if (n == TILE && !excludes) return x;
    }
    int i = 0;
    for (; i + LANES <= n; i += LANES) store(buffer + i, load_lanes(x + i));
    for (; i < n; ++i) buffer[i] = load_one(x + i);
    for (; i < TILE; ++i) buffer[i] = -HUGE_VALF;
    if (excludes) buffer[exclude - tile * TILE] = -HUGE_VALF;
    return buffer;
  }

  // Where the tile after this one begins, for prefetching: a tile is a page or less, and hardware prefetchers stop at
  // a page's end.
  const Element* next_tile(int64_t tile) const {
    return data + (tile + 1 < tile_count(columns) ? tile + 1 : tile) * TILE;
  }
};

template <class Element>
inline Row<Element> row_of(const Matrix& matrix, int64_t columns, const Indices& exclude, int64_t t) {
  return {static_cast<const Element*>(matrix.data) + t * matrix.row_stride, columns,
          exclude.data ? exclude.data[t * exclude.stride] : -1};
}

// Largest of a tile's numbers, NaN left out.
inline float max_of_tile(const float* x) {
  constexpr int UNROLL = 4;
  f32 max[UNROLL];
  for (f32& lanes : max) lanes = f32{} - HUGE_VALF;
  for (int i = 0; i < TILE; i += UNROLL * LANES) {
    for (int u = 0; u < UNROLL; ++u) {
      const f32 value = load<f32>(x + i + u * LANES);
      max[u] = value > max[u] ? value : max[u];
    }
  }
  float result = -HUGE_VALF;
  for (const f32& lanes : max) {
    for (int i = 0; i < LANES; ++i) result = lanes[i] > result ? lanes[i] : result;
  }
  return result;
}

template <class V>
inline double sum_lanes(V lanes) {
  double sum = 0.0;
  for (unsigned i = 0; i < sizeof(V) / sizeof(lanes[0]); ++i) sum += lanes[i];
  return sum;
}

// Summary of exp(scale * x) over a tile.
//
// The ones that the maximum contributes are counted apart: in one float with them the rest of a peaked row would round
// at 2^-24, and with it every log-probability close to 0.
template <class Element>
inline Summary sum_tile(const float* x, Factor scale, const Element* next) {
  const float max = max_of_tile(x);
  const float p = pivot(max);
  constexpr int UNROLL = 2;
  f32 rest[UNROLL] = {};
  u32 ones[UNROLL] = {};
  for (int i = 0; i < TILE; i += UNROLL * LANES) {
    __builtin_prefetch(next + i);
    for (int u = 0; u < UNROLL; ++u) {
      const f32 d = load<f32>(x + i + u * LANES) - p;
      const auto is_max = d == 0.0f;
      rest[u] += is_max ? f32{} : exp_scaled(d, scale);
      ones[u] -= (u32)is_max;
    }
  }
  double sum = 0.0;
  for (int u = 0; u < UNROLL; ++u) sum += sum_lanes(rest[u]);
  for (int u = 0; u < UNROLL; ++u) sum += sum_lanes(ones[u]);
  return {max, sum};
}

// Nearest finite float, so that a rate too large for one times a probability of 0 stays 0; NaN stays NaN.
inline float to_float(double value) {
  const double largest = 3.4028234663852886e38;
  return static_cast<float>(value > largest ? largest : value < -largest ? -largest : value);
}

// The gradient of one tile: floats to fill and correct, rounded once to the gradient's dtype.
template <class Element>
class GradientTile {
 public:
  float* values;  // [TILE]

  GradientTile(Element* row, int64_t tile, int count) : begin_(tile * TILE), count_(count), out_(row + begin_) {
    values = buffer_;
    if constexpr (std::is_same_v<Element, float>) {
      if (count == TILE) values = out_;
    }
  }

  // Ignores a v that lies elsewhere.
  void add(int64_t v, double value) {
    if (v >= begin_ && v < begin_ + TILE) values[v - begin_] += static_cast<float>(value);
  }

  void finish() {
    if (values != buffer_) return;
    int i = 0;
    for (; i + LANES <= count_; i += LANES) store_lanes(out_ + i, load<f32>(buffer_ + i));
    for (; i < count_; ++i) store_one(out_ + i, buffer_[i]);
  }

 private:
  int64_t begin_;
  int count_;
  Element* out_;
  alignas(64) float buffer_[TILE];
};

// out = coefficient * exp(scale * (x - p)) over a tile; 0 for a coefficient of 0, whatever x is. Arguments by value:
// through a reference the compiler would reload them after every store.
template <class Element>
inline void scaled_exp_tile(float* out, const float* x, float p, Factor scale, float coefficient, const Element* next) {
  if (coefficient == 0.0f) {
    for (int i = 0; i < TILE; i += LANES) store(out + i, f32{});
    return;
  }
  for (int i = 0; i < TILE; i += LANES) {
    __builtin_prefetch(next + i);
    store(out + i, coefficient * exp_scaled(load<f32>(x + i) - p, scale));
  }
}

// The summaries of a row's tiles.
struct Tiles {
  double* max;
  double* sum;
  int64_t count;
};

// Merges the tiles' summaries, in their order, and leaves in sum[] each tile's mass relative to the row's maximum.
inline Summary merge_tiles(Tiles tiles, double scale) {
  double max = -HUGE_VAL;
  for (int64_t k = 0; k < tiles.count; ++k) max = tiles.max[k] > max ? tiles.max[k] : max;
  const double p = pivot(max);
  double sum = 0.0;
  for (int64_t k = 0; k < tiles.count; ++k) {
    tiles.sum[k] *= exp(scale * (tiles.max[k] - p));
    sum += tiles.sum[k];
  }
  return {max, sum};
}

// Reads a row once: its summary, and the mass of each tile in tiles.sum.
template <class Element>
inline Summary sum_row(const Row<Element>& row, double scale, int threads, Tiles tiles) {
  const Factor factor = exp_factor(scale);
  for_tiles(row.columns, threads, [&](int64_t k) {
    alignas(64) float buffer[TILE];
    const Summary s = sum_tile(row.load_tile(k, buffer), factor, row.next_tile(k));
    tiles.max[k] = s.max;
    tiles.sum[k] = s.sum;
  });
  return merge_tiles(tiles, scale);
}

inline double* scratch_array(const Scratch& scratch, int worker, int array) {
  return scratch.data + (worker * SCRATCH_ARRAYS + array) * scratch.length;
}

inline Tiles scratch_tiles(const Scratch& scratch, int worker, int64_t columns) {
  return {scratch_array(scratch, worker, 0), scratch_array(scratch, worker, 1), tile_count(columns)};
}

DAM_END
