// What the kernels take from CUDA's execution model. Compiled without nvcc, csrc/emulator gives the same names.
#pragma once

#include <cstdint>
#include <cstring>

#include "../core/config.h"

#if defined(__CUDACC__)

#include <cassert>

namespace dam {
namespace cuda {

constexpr int WARP = 32;

// Words that are loaded or stored by one instruction.
template <int BYTES>
struct alignas(BYTES) Packed {
  uint32_t words[BYTES / 4];
};

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

__device__ __forceinline__ int thread_of_block() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int64_t block_of_grid() { return blockIdx.x; }

__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ void sync_block() { __syncthreads(); }

// Of all threads of a cluster; what they wrote before is seen by the others after. Nowhere launched for older chips.
__device__ __forceinline__ void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Value of the lane of the warp whose index differs in the bits of `mask`.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}
template <class T>
__device__ __forceinline__ T shuffle_down(T value, int lanes) {
  return __shfl_down_sync(0xFFFFFFFFu, value, lanes);
}
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(0xFFFFFFFFu, value, lane);
}

// Whether it holds for any lane of the warp.
__device__ __forceinline__ bool any_of_warp(bool holds) { return __any_sync(0xFFFFFFFFu, holds); }

// Adds to [8, 8] sums of the warp the product of [8, 4] and [4, 8] numbers, on the tensor cores, rounded as float64's
// fused multiply-adds are. A lane has of the left ones that in row lane / 4 and column lane % 4, of the right ones that
// in row lane % 4 and column lane / 4, and the sums in row lane / 4 and columns 2 (lane % 4) and the next.
__device__ __forceinline__ void add_product(double (&sums)[2], double left, double right) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(sums[0]), "+d"(sums[1])
      : "d"(left), "d"(right));
}

// 16 aligned bytes. ONCE: they are not read again, and may leave the caches first.
template <bool ONCE>
__device__ __forceinline__ Packed<16> load_packed(const void* address) {
  const uint4* const from = static_cast<const uint4*>(address);
  const uint4 v = ONCE ? __ldcs(from) : *from;
  return {{v.x, v.y, v.z, v.w}};
}
template <int BYTES>
__device__ __forceinline__ void store_packed(void* address, const Packed<BYTES>& value) {
  *static_cast<Packed<BYTES>*>(address) = value;
}

// Hides a value from the compiler, which else works out ahead of a loop, and keeps in registers, all that depends on
// it.
__device__ __forceinline__ uint64_t opaque(uint64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}

// a - b, each rounded before: the compiler may not fuse a product that a is with the subtraction, which would leave
// of equal numbers the rounding error of one.
__device__ __forceinline__ double difference(double a, double b) { return __dsub_rn(a, b); }

// For numbers that are not negative.
__device__ __forceinline__ void atomic_min(int64_t* address, int64_t value) {
  atomicMin(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(value));
}

}  // namespace cuda
}  // namespace dam

// Stops the kernel, as torch's own kernels do for an index out of range: read out of bounds it must not be.
#define DAM_DEVICE_CHECK(condition, message) assert((condition) && message)

#else
#include "../emulator/emulator.h"
#define DAM_DEVICE_CHECK(condition, message) ::dam::cuda::check(condition, message)
#endif
