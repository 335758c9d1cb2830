// A team, what CUDA calls a cooperative group: the warps that work on one row, or one group of trajectories, together
// and alone; one warp, or all of a block.
#pragma once

#include <cstdint>

#include "../core/math.h"
#include "device.h"
#include "geometry.h"

namespace dam {
namespace cuda {

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
// b where a is NaN.
struct Larger {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return larger(a, b);
  }
};
struct Smaller {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};

// Over the lanes of a warp; every lane gets the same, bit for bit, when the operation commutes.
template <class T, class Operation>
__device__ __forceinline__ T reduce_warp(T value, Operation operation) {
#pragma unroll
  for (int mask = WARP / 2; mask > 0; mask /= 2) value = operation(value, shuffle_xor(value, mask));
  return value;
}

template <int WARPS>
class Team {
 public:
  static constexpr int THREADS = WARPS * WARP;

  __device__ Team() : thread(thread_of_block() % THREADS) {}

  const int thread;  // of the team

  __device__ int warp() const { return thread / WARP; }
  __device__ int lane() const { return thread % WARP; }

  // What its threads wrote before is seen by all of them after.
  __device__ void sync() const {
    if constexpr (WARPS == 1) {
      sync_warp();
    } else {
      sync_block();
    }
  }

  // Of all threads of the team, which all get the same and must all come here.
  template <class T, class Operation>
  __device__ T reduce(T value, Operation operation) {
    T one[1] = {value};
    reduce_each(one, operation);
    return one[0];
  }
  // Each of several values, which wait for each other's shuffles and barriers only once.
  template <int N, class T, class Operation>
  __device__ void reduce_each(T (&values)[N], Operation operation) {
    static_assert(N <= REDUCED_AT_ONCE && sizeof(T) <= 8, "more than the slots hold");
#pragma unroll
    for (int n = 0; n < N; ++n) values[n] = reduce_warp(values[n], operation);
    if constexpr (WARPS > 1) {
      // Two sets of slots in turn: a thread that is one reduction ahead does not write what others still read.
      T* const slots = reinterpret_cast<T*>(shared_memory() + turn_ * (TEAM_BYTES / 2));
      turn_ ^= 1;
      if (lane() == 0) {
#pragma unroll
        for (int n = 0; n < N; ++n) slots[n * WARPS + warp()] = values[n];
      }
      sync_block();
#pragma unroll
      for (int n = 0; n < N; ++n) {
        values[n] = slots[n * WARPS];
#pragma unroll
        for (int i = 1; i < WARPS; ++i) values[n] = operation(values[n], slots[n * WARPS + i]);
      }
    }
  }
  template <class T>
  __device__ T sum(T value) {
    return reduce(value, Sum{});
  }
  template <class T>
  __device__ T largest(T value) {
    return reduce(value, Larger{});
  }
  template <class T>
  __device__ T smallest(T value) {
    return reduce(value, Smaller{});
  }

 private:
  int turn_ = 0;
};

// ---- numbers that may be absent, or of any dtype

__device__ __forceinline__ int64_t load_index(const Indices& indices, int64_t t, int64_t absent) {
  return indices.data ? indices.data[t * indices.stride] : absent;
}

__device__ __forceinline__ double load_value(const Values& values, int64_t t, int64_t j) {
  const int64_t at = t * values.row_stride + j * values.slot_stride;
  switch (static_cast<Dtype>(values.dtype)) {
    case Dtype::float32: return load_one(static_cast<const float*>(values.data) + at);
    case Dtype::bfloat16: return load_one(static_cast<const bfloat16*>(values.data) + at);
    case Dtype::float16: return load_one(static_cast<const float16*>(values.data) + at);
    default: return static_cast<const double*>(values.data)[at];
  }
}

}  // namespace cuda
}  // namespace dam
