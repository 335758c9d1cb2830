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

constexpr int64_t LARGE = int64_t{32} << 20;  // bytes of an array that no cache holds
constexpr int64_t matrix_bytes(const Shape& shape) {
  return shape.rows * shape.columns * (shape.dtype == static_cast<int>(Dtype::float32) ? 4 : 2);
}

// struct JumpArgs and so on.
#define TAKES(type, name) type name;
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
