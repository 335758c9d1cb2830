// How the kernels of csrc/cpu and csrc/cuda take arrays: addresses and strides in elements; a null pointer stands for
// an absent argument.
#pragma once

#include <cstdint>

namespace dam {

// A matrix with unit inner stride.
struct Matrix {
  const void* data;
  int64_t row_stride;
};

// int64 [T], whose stride is 0 where a row's value is everyone's.
struct Indices {
  const int64_t* data;
  int64_t stride;
};

// [G, K, S] with unit inner stride.
struct Cube {
  const void* data;
  int64_t group_stride, row_stride;
};

}  // namespace dam
