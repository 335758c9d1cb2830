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

// How many vectors go side by side through a loop over a tile, and the numbers in them.
constexpr int UNROLL = 4;
constexpr int STEP = UNROLL * LANES;

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

// The least of the indices that threads enter, or -1.
class FirstBad {
 public:
  void enter(int64_t index) {
#if defined(_OPENMP)
#pragma omp critical(dam_first_bad)
#endif
    first_ = first_ < 0 || index < first_ ? index : first_;
  }
  int64_t index() const { return first_; }

 private:
  int64_t first_ = -1;
};

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

template <class Element>
inline f32 load_lanes(const Element* x) {
  if constexpr (std::is_same_v<Element, float>) {
    return load<f32>(x);
#if defined(__F16C__)
  } else if constexpr (std::is_same_v<Element, float16>) {
#if defined(__AVX512F__)
    return (f32)_mm512_maskz_cvtph_ps(0xFFFF, (__m256i)load<u16>(x));
#else
    return (f32)_mm256_cvtph_ps((__m128i)load<u16>(x));
#endif
#elif defined(__aarch64__)
  } else if constexpr (std::is_same_v<Element, float16>) {
    return (f32)vcvt_f32_f16((float16x4_t)load<u16>(x));
#endif
  } else {
    return widen<f32>(load_wide(&x->bits), Element{});
  }
}

template <class Element>
inline void store_lanes(Element* x, f32 value) {
  if constexpr (std::is_same_v<Element, float>) {
    store(x, value);
#if defined(__F16C__)
  } else if constexpr (std::is_same_v<Element, float16>) {
#if defined(__AVX512F__)
    store(x, (u16)_mm512_maskz_cvtps_ph(0xFFFF, (__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    store(x, (u16)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#endif
#elif defined(__aarch64__)
  } else if constexpr (std::is_same_v<Element, float16>) {
    store(x, (u16)vcvt_f16_f32((float32x4_t)value));
#endif
  } else {
    store(x, __builtin_convertvector(narrow<u32>(value, Element{}), u16));
  }
}

// Where element i of a tile lies among its floats once it was loaded in any order. A vector of 32-bit words holds the
// even bfloat16s in its low halves and the odd ones in its high halves: taken apart so, two vectors cost two
// operations.
template <class Element>
constexpr int slot(int i) {
  if constexpr (std::is_same_v<Element, bfloat16>) {
    const int at = i % (2 * LANES);
    return i - at + (at % 2) * LANES + at / 2;
  } else {
    return i;
  }
}

// The 2 * LANES elements at x, in the slots' order.
template <class Element>
inline void load_slots(const Element* x, float* out) {
  if constexpr (std::is_same_v<Element, bfloat16>) {
    const u32 words = load<u32>(x);
    store(out, bit_cast<f32>(words << 16));
    store(out + LANES, bit_cast<f32>(words & 0xFFFF0000u));
  } else {
    store(out, load_lanes(x));
    store(out + LANES, load_lanes(x + LANES));
  }
}

template <class Element>
inline void store_slots(Element* out, const float* x) {
  if constexpr (std::is_same_v<Element, bfloat16>) {
    store(out, narrow<u32>(load<f32>(x), bfloat16{}) | narrow<u32>(load<f32>(x + LANES), bfloat16{}) << 16);
  } else {
    store_lanes(out, load<f32>(x));
    store_lanes(out + LANES, load<f32>(x + LANES));
  }
}

template <class Element>
struct Row {
  const Element* data;
  int64_t columns;
  int64_t exclude;            // -1: none
  const uint8_t* suppressed;  // null: none

  int count(int64_t tile) const {
    const int64_t left = columns - tile * TILE;
    return left < TILE ? static_cast<int>(left) : TILE;
  }

  // The numbers of a tile that loops go through: all of it, or what the row has of it, up to a whole step.
  int width(int64_t tile) const { return (count(tile) + STEP - 1) / STEP * STEP; }

  double at(int64_t v) const {
    const bool is_suppressed = suppressed && (suppressed[v / 8] >> v % 8 & 1);
    return v == exclude || is_suppressed ? -HUGE_VAL : double{load_one(data + v)};
  }

  // The suppressed columns of a tile, a bit each; null for none, which is all that most tiles have.
  const uint8_t* suppressed_in(int64_t tile) const {
    if (!suppressed) return nullptr;
    const uint8_t* const bits = suppressed + tile * (TILE / 8);
    u32 some{};
    for (int i = 0; i < TILE / 8; i += sizeof(u32)) some |= load<u32>(bits + i);
    return fold(some, [](auto a, auto b) { return a | b; }) ? bits : nullptr;
  }

  bool excludes_in(int64_t tile) const { return exclude >= tile * TILE && exclude < (tile + 1) * TILE; }

  // Whether a tile has all its columns, none of them excluded or suppressed.
  bool is_whole(int64_t tile) const { return count(tile) == TILE && !excludes_in(tile) && !suppressed_in(tile); }

  // Puts -inf at those columns of a tile in the buffer.
  template <bool IN_ORDER>
  static void suppress(const uint8_t* bits, int width, float* buffer) {
    // Of 2 * LANES elements, how far apart those of one vector lie, and those of two vectors.
    constexpr bool PAIRS = !IN_ORDER && std::is_same_v<Element, bfloat16>;
    constexpr uint32_t APART = PAIRS ? 2 : 1, NEXT = PAIRS ? 1 : LANES;
    for (int i = 0; i < width; i += 2 * LANES) {
      uint32_t some = 0;
      std::memcpy(&some, bits + i / 8, 2 * LANES / 8);
      if (some == 0) continue;
      for (uint32_t half = 0; half < 2; ++half) {
        float* const x = buffer + i + half * LANES;
        const u32 mine = (u32{} + some) >> (iota<u32>() * APART + half * NEXT) & 1u;
        store(x, mine != 0u ? f32{} - HUGE_VALF : load<f32>(x));
      }
    }
  }

  // A tile's width of logits as floats, in place where they can be read there, else in `buffer`, with the excluded and
  // suppressed ones and those past the row's end at -inf. In the slots' order unless IN_ORDER.
  template <bool IN_ORDER = false>
  const float* load_tile(int64_t tile, float* buffer) const {
    const auto place = [](int i) { return IN_ORDER ? i : slot<Element>(i); };
    const Element* x = data + tile * TILE;
    const int n = count(tile);
    const bool excludes = excludes_in(tile);
    const uint8_t* const bits = suppressed_in(tile);
    if constexpr (std::is_same_v<Element, float>) {
      if (n == TILE && !excludes && !bits) return x;
    }
    if (n < width(tile)) {
      for (int i = width(tile) - STEP; i < width(tile); i += LANES) store(buffer + i, f32{} - HUGE_VALF);
    }
    int i = 0;
    if constexpr (IN_ORDER) {
      for (; i + LANES <= n; i += LANES) store(buffer + i, load_lanes(x + i));
    } else {
      for (; i + 2 * LANES <= n; i += 2 * LANES) load_slots(x + i, buffer + i);
    }
    for (; i < n; ++i) buffer[place(i)] = load_one(x + i);
    if (excludes) buffer[place(static_cast<int>(exclude - tile * TILE))] = -HUGE_VALF;
    if (bits) suppress<IN_ORDER>(bits, width(tile), buffer);
    return buffer;
  }

  // Where the tile two past this one begins, for prefetching: a tile is a page or less, and hardware prefetchers stop
  // at a page's end. One tile ahead is 2 to 10% slower beyond the caches (Zen 3).
  const Element* tile_ahead(int64_t tile) const {
    return data + (tile + 2 < tile_count(columns) ? tile + 2 : tile) * TILE;
  }
};

// Row t of one of an op's matrices, without what the op leaves out.
template <class Element, class Args>
inline Row<Element> row_of(const Args& a, const Matrix& matrix, int64_t t) {
  return {static_cast<const Element*>(matrix.data) + t * matrix.row_stride, a.shape.columns,
          a.exclude.data ? a.exclude.data[t * a.exclude.stride] : -1, a.suppressed};
}

// Largest of a tile's numbers, NaN left out.
inline float max_of_tile(const float* x, int width) {
  f32 max[UNROLL];
  for (f32& lanes : max) lanes = f32{} - HUGE_VALF;
  for (int i = 0; i < width; i += STEP) {
    for (int u = 0; u < UNROLL; ++u) max[u] = larger(load<f32>(x + i + u * LANES), max[u]);
  }
  f32 all = max[0];
  for (const f32& lanes : max) all = larger(all, lanes);
  return fold(all, [](auto a, auto b) { return larger(a, b); });
}

// The lanes of a vector as doubles, added up to one vector of them.
template <class V>
inline f64 widened_sum(V lanes) {
  using T = std::decay_t<decltype(lanes[0])>;
  constexpr int COUNT = sizeof(V) / sizeof(T);
  T each[COUNT];
  store(each, lanes);
  f64 sum{};
  for (int i = 0; i < COUNT; i += WIDE) {
    sum += __builtin_convertvector(load<typename VectorOf<T, WIDE>::type>(each + i), f64);
  }
  return sum;
}

template <class V, int N>
inline double sum_lanes(const V (&vectors)[N]) {
  f64 sum{};
  for (const V& lanes : vectors) sum += widened_sum(lanes);
  return fold(sum, [](auto a, auto b) { return a + b; });
}

template <class V>
inline double sum_lanes(V lanes) {
  return sum_lanes({lanes});
}

template <class Element>
inline void prefetch(const Element* next, int i) {
  constexpr int PER_LINE = 64 / sizeof(Element);
  for (int j = 0; j < STEP; j += PER_LINE) __builtin_prefetch(next + i + j);
}

// x - p for the UNROLL vectors at x.
inline void load_differences(f32 (&d)[UNROLL], const float* x, float p) {
  for (int u = 0; u < UNROLL; ++u) d[u] = load<f32>(x + u * LANES) - p;
}

// Calls body(scale) with the scale as exp_each takes it.
template <class Body>
inline void with_scale(double scale, Body body) {
  if (scale == 1.0) {
    body(Unit{});
  } else {
    body(exp_factor(scale));
  }
}

// Summary of exp(scale * x) over a tile; with KEEP also leaves the exponentials, relative to the tile's maximum, in
// `keep`.
template <bool KEEP = false, class Element, class Scale>
inline Summary sum_tile(const float* x, int width, Scale scale, const Element* next, float* keep = nullptr) {
  const float max = max_of_tile(x, width);
  const float p = pivot(max);
  f32 sums[UNROLL] = {};
  for (int i = 0; i < width; i += STEP) {
    prefetch(next, i);
    f32 d[UNROLL];
    load_differences(d, x + i, p);
    exp_each<KEEP>(d, scale);
    for (int u = 0; u < UNROLL; ++u) {
      sums[u] += d[u];
      if constexpr (KEEP) store(keep + i + u * LANES, d[u]);
    }
  }
  // Of a tile with nothing to reach exp_each leaves 2^-125 each, which merging multiplies by exp(-inf).
  return {max, sum_lanes(sums)};
}

// The same sum with the ones that the maximum contributes counted apart.
template <class Scale>
inline double sum_peaked_tile(const float* x, int width, float max, Scale scale) {
  f32 rest{};
  u32 ones{};
  for (int i = 0; i < width; i += LANES) {
    const f32 d = load<f32>(x + i) - max;
    const auto is_max = d == 0.0f;
    rest += is_max ? f32{} : exp_scaled(d, scale);
    ones -= (u32)is_max;
  }
  return sum_lanes(rest) + sum_lanes(ones);
}

// Nearest finite float, so that a rate too large for one times a probability of 0 stays 0; NaN stays NaN.
inline float to_float(double value) {
  const double largest = 3.4028234663852886e38;
  return static_cast<float>(value > largest ? largest : value < -largest ? -largest : value);
}

// The gradient of one tile: floats to fill and correct in the slots' order, rounded once to the gradient's dtype.
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

  // Whether v lies here.
  bool has(int64_t v) const { return v >= begin_ && v < begin_ + TILE; }

  // Ignores a v that lies elsewhere, as set does.
  void add(int64_t v, double value) {
    if (has(v)) values[slot<Element>(static_cast<int>(v - begin_))] += static_cast<float>(value);
  }

  // In the place of what is there.
  void set(int64_t v, double value) {
    if (has(v)) values[slot<Element>(static_cast<int>(v - begin_))] = static_cast<float>(value);
  }

  void finish() {
    if (values != buffer_) return;
    int i = 0;
    for (; i + 2 * LANES <= count_; i += 2 * LANES) store_slots(out_ + i, buffer_ + i);
    for (; i < count_; ++i) store_one(out_ + i, buffer_[slot<Element>(i)]);
  }

 private:
  int64_t begin_;
  int count_;
  Element* out_;
  alignas(64) float buffer_[TILE];
};

// out = coefficient * exp(scale * (x - p)) over a tile, or out minus that; 0 for a coefficient of 0, whatever x is.
// Arguments by value: through a reference the compiler would reload them after every store.
template <bool SUBTRACT, class Element, class Scale>
inline void scaled_exp_tile(float* out, const float* x, int width, float p, Scale scale, float coefficient,
                            const Element* next) {
  if (coefficient == 0.0f) {
    for (int i = 0; i < width && !SUBTRACT; i += LANES) store(out + i, f32{});
    return;
  }
  for (int i = 0; i < width; i += STEP) {
    prefetch(next, i);
    f32 d[UNROLL];
    load_differences(d, x + i, p);
    exp_each<true>(d, scale);
    for (int u = 0; u < UNROLL; ++u) {
      float* to = out + i + u * LANES;
      store(to, SUBTRACT ? load<f32>(to) - coefficient * d[u] : coefficient * d[u]);
    }
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

// What sum_row does past its loop: merges the tiles' summaries and makes up for rounding.
//
// In one float with the maximum's 1 the rest of a tile is rounded at 2^-24 of it. That shows in the log of a total
// close to 1, so the tiles with the maximum of such a row are summed again.
template <class Element>
inline Summary finish_sum(const Row<Element>& row, double scale, Tiles tiles) {
  Summary total = merge_tiles(tiles, scale);
  constexpr double PEAKED = 4.0;
  if (!(total.sum > 0.0 && total.sum < PEAKED)) return total;
  total.sum = 0.0;
  for (int64_t k = 0; k < tiles.count; ++k) {
    if (tiles.max[k] == total.max) {
      alignas(64) float buffer[TILE];
      const float* x = row.load_tile(k, buffer);
      with_scale(scale,
                 [&](auto s) { tiles.sum[k] = sum_peaked_tile(x, row.width(k), static_cast<float>(total.max), s); });
    }
    total.sum += tiles.sum[k];
  }
  return total;
}

// Reads a row once: its summary, and the mass of each tile in tiles.sum.
template <class Element>
inline Summary sum_row(const Row<Element>& row, double scale, int threads, Tiles tiles) {
  with_scale(scale, [&](auto s) {
    for_tiles(row.columns, threads, [&](int64_t k) {
      alignas(64) float buffer[TILE];
      const Summary tile = sum_tile(row.load_tile(k, buffer), row.width(k), s, row.tile_ahead(k));
      tiles.max[k] = tile.max;
      tiles.sum[k] = tile.sum;
    });
  });
  return finish_sum(row, scale, tiles);
}

inline double* scratch_array(const Scratch& scratch, int worker, int array) {
  return scratch.data + (worker * SCRATCH_ARRAYS + array) * scratch.length;
}

inline Tiles scratch_tiles(const Scratch& scratch, int worker, int64_t columns) {
  return {scratch_array(scratch, worker, 0), scratch_array(scratch, worker, 1), tile_count(columns)};
}

DAM_END
