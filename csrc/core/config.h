// Macros that let the numerics of csrc/core compile for the host, once per instruction set, and for a device.
#pragma once

#if defined(__CUDACC__)
#define DAM_HD __host__ __device__ __forceinline__
#else
#define DAM_HD inline __attribute__((always_inline))
#endif

// The same source is compiled once per instruction set and linked into one library. Every inline function and
// template gets the set's name into its symbol, or the linker would keep one copy for all sets.
#if defined(DAM_ISA)
#define DAM_BEGIN \
  namespace dam { \
  inline namespace DAM_ISA {
#define DAM_END \
  }             \
  }
#else
#define DAM_BEGIN namespace dam {
#define DAM_END }
#endif
