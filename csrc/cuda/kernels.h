// Arguments and declarations of the CUDA kernels, from ops.def, for the bindings and for C++ programs: an op `jump` has
// `struct JumpArgs` and `void jump(const JumpArgs&, Queue)`. Plain C++.
//
// T rows, V columns, J targets per row. Every array lies on the device, work memory too: nothing is allocated here, and
// nothing waits for the device, so that every call can be part of a CUDA graph. A call that cannot be launched throws.
#pragma once

#include <cstdint>

#include "../core/arguments.h"

namespace dam {
namespace cuda {

// Where a call runs: index of the device, and the cudaStream_t as an address.
struct Queue {
  int device;
  uintptr_t stream;
};

struct Shape {
  int64_t rows, columns;
  int dtype;  // of core/dtype.h
};

// int64 [T, J], -1 for none.
struct Targets {
  const int64_t* data;
  int64_t row_stride, slot_stride, count;  // count: J
};

// [T] or [T, J] of any floating-point dtype.
struct Values {
  const void* data;
  int dtype;
  int64_t row_stride, slot_stride;
};

// Work memory of the ops over rows: float [arrays, T, tiles], tiles of 1024 columns.
constexpr int64_t summary_floats(int arrays, int64_t rows, int64_t columns) {
  return arrays * rows * ((columns + 1023) / 1024);
}
constexpr int ROW_SUMMARIES = 2;   // of a row of logits: maximum and excess of each tile
constexpr int BASE_SUMMARIES = 5;  // and of base logits beside them, and a cross term

// What the gradient of a row's logits x depends on, coefficient * exp(scale (x - reference)): float32 coefficient, and
// the reference as a sum of two; then the same of base logits.
constexpr int SHARES = 6;

// Weights of a walk that go with the launch itself, whose arguments may take 4 kB.
constexpr int64_t FEW_TAPS = 448;
struct FewTaps {
  double weights[FEW_TAPS];
  int64_t count;
};

// struct JumpArgs and so on, whose members ops.def lists.
#define TAKES(type, name) type name;
#define READS(type, name) const type* name;
#define FILLS(type, name) type* name;
#define CHOSEN(type, name) type name;
#define OP(name, Name, does, members) \
  struct Name##Args {                 \
    members                           \
  };
#include "ops.def"

// void jump(const JumpArgs&, Queue) and so on.
#define OP(name, Name, does, members) void name(const Name##Args&, Queue);
#include "ops.def"

// The numerics of csrc/core as the device computes them, for the tests; arrays on the device.
void probe_exp(const float* x, float* result, int64_t count, double scale, Queue);
void probe_exponential(const uint32_t* words, float* result, int64_t count, Queue);  // words [count, 2]: high, low
void probe_philox(const uint32_t* counters, uint64_t key, uint32_t* words, int64_t count, Queue);  // [count, 4]

}  // namespace cuda
}  // namespace dam
