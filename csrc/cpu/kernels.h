// Arguments and entry points of the CPU kernels, shared by every instruction set and by the bindings: from ops.def.
#pragma once

#include <cstdint>

#include "../core/arguments.h"
#include "../core/dtype.h"

namespace dam {

struct Shape {
  int64_t rows, columns;
  int dtype;  // of core/dtype.h
  int threads;
};

// Per tile of a row, SCRATCH_ARRAYS doubles; the arrays' length is a multiple of any vector's.
constexpr int SCRATCH_ARRAYS = 5;
struct Scratch {
  double* data;  // [threads, SCRATCH_ARRAYS, length]
  int64_t length;
};
constexpr int64_t whole_vectors(int64_t count) { return (count + 7) / 8 * 8; }
constexpr int64_t scratch_length(int64_t columns) { return whole_vectors(columns / 1024 + 1); }

constexpr int64_t FILTER_SEGMENT = 2048;  // results of filter_lines made from one load of the scratch
constexpr int64_t FILTER_WIDTH = 8;       // lines side by side
constexpr int64_t FILTER_PADDING = 32;
constexpr int64_t filter_scratch(int64_t radius) {  // doubles per thread
  return 2 * (FILTER_SEGMENT + FILTER_PADDING) + 2 * radius * FILTER_WIDTH;
}

// What multiplies 16-bit numbers: float32 instructions once they are widened, dot products of pairs, or tiles.
enum Instructions : int { WIDENED = 0, PAIRS = 1, TILES = 2 };

// Floats for the hidden states of as many rows as are multiplied at a time, rearranged, and for the head's last rows in
// each thread.
constexpr int64_t PRODUCT_ROWS = 1024;
constexpr int64_t product_scratch(const Shape& shape, int64_t depth) {
  const int64_t rows = shape.rows < PRODUCT_ROWS ? shape.rows : PRODUCT_ROWS;
  return (rows + 16) * (depth + 32) + shape.threads * 16 * (depth + 32) + 16;
}
constexpr int64_t whole_tiles(int64_t count) { return (count + 31) / 32 * 32; }
// Of a block of the result: its sums; the head, and in each thread 32 rows of the gradient in two parts, of as many
// columns of the gradient as are multiplied at a time.
constexpr int64_t HIDDEN_ROWS = 512, HIDDEN_WIDTH = 1024, HIDDEN_CHUNK = 192;
constexpr int64_t product_hidden_scratch(const Shape& shape, int64_t depth) {
  const int64_t rows = shape.rows < HIDDEN_ROWS ? whole_tiles(shape.rows) : HIDDEN_ROWS;
  const int64_t wide = depth < HIDDEN_WIDTH ? whole_tiles(depth) : HIDDEN_WIDTH;
  return rows * wide + wide * HIDDEN_CHUNK / 2 + shape.threads * 32 * HIDDEN_CHUNK + 16;
}
// The hidden states; and of each thread as many times 32 columns of the gradient, in two parts, as they are multiplied
// with one after another.
constexpr int64_t WEIGHT_PASSES = 4;
constexpr int64_t product_weight_scratch(const Shape& shape, int64_t depth) {
  return whole_tiles(shape.rows) * (whole_tiles(depth) / 2 + shape.threads * WEIGHT_PASSES * 32) + 16;
}
inline float* cache_line_of(float* memory) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
}

constexpr int64_t LARGE = int64_t{32} << 20;  // bytes of an array that no cache holds
constexpr int64_t matrix_bytes(const Shape& shape) {
  return shape.rows * shape.columns * (shape.dtype == static_cast<int>(Dtype::float32) ? 4 : 2);
}

// struct JumpArgs and so on.
#define TAKES(type, name) type name;
#define ROWS(shape, name) \
  Shape shape;            \
  Matrix name;
#define TARGETS(name, count) \
  const int64_t* name;       \
  int64_t count;
#define LOOKS(type, name, as) type name;
#define MAKES(type, name, sizes) type* name;
#define READS(type, name) const type* name;
#define FILLS(type, name) type* name;
#define FILLS_LARGE(type, name, bytes) type* name;
#define KNOWN(type, name, value) type name;
#define WORK(type, name, count) type* name;
#define SCRATCH(name) Scratch name;
#define OP(name, Name, result, does, members) \
  struct Name##Args {                         \
    members                                   \
  };
#include "ops.def"

// Entry points of one instruction set: jump and so on.
struct Kernels {
#define OP(name, Name, result, does, members) result (*name)(const Name##Args&);
#include "ops.def"
  void (*exp)(const float* x, float* result, int64_t count, double scale);
  void (*exponential)(const uint32_t* words, double* result, int64_t count);  // words [count, 2]: high, low
  void (*philox)(const uint32_t* counter, const uint32_t* key, uint32_t* words);
  uint64_t (*read)(const uint64_t* data, int64_t count, int threads);
};

}  // namespace dam
