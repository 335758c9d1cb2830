// CUDA's execution model on the CPU, as far as csrc/cuda uses it: the same kernels run without a GPU, for tests.
//
// Each thread of a block, or of the blocks of a cluster, is a fiber. One runs until it waits for others, then the next:
// what is written and read between two barriers happens in an order that tests can choose, and a barrier that some
// threads never reach is an error.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "../core/math.h"
#include "../cuda/geometry.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace dam {
namespace emulator {

cuda::Chip chip();

// What the emulated chip is like. order: 0 runs the threads in turn, other numbers in an order that they decide.
void pretend(const cuda::Chip& chip, uint64_t order);

// Runs a kernel; an exception that a thread of it throws ends it and is thrown here.
void run(int64_t blocks, int threads, int64_t shared_bytes, int64_t cluster, const std::function<void()>& kernel);

// ---- of the thread that runs

struct Place {
  int64_t block;
  int thread;
  char* shared;  // of its block
};
const Place& place();

enum class Scope { warp, block, cluster };
void wait_for_all(Scope scope);

// Exchanges 8 bytes within the warp: the value that `lane` brings.
uint64_t exchange(uint64_t bits, int lane);
// As add_product of device.h.
void add_product(double (&sums)[2], double left, double right);

}  // namespace emulator

namespace cuda {

constexpr int WARP = 32;

template <int BYTES>
struct alignas(BYTES) Packed {
  uint32_t words[BYTES / 4];
};

inline char* shared_memory() { return emulator::place().shared; }
inline int thread_of_block() { return emulator::place().thread; }
inline int64_t block_of_grid() { return emulator::place().block; }

inline void sync_warp() { emulator::wait_for_all(emulator::Scope::warp); }
inline void sync_block() { emulator::wait_for_all(emulator::Scope::block); }
inline void sync_cluster() { emulator::wait_for_all(emulator::Scope::cluster); }

template <class T>
T shuffle(T value, int lane) {
  static_assert(sizeof(T) <= 8, "at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulator::exchange(bits, lane);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
T shuffle_xor(T value, int mask) {
  return shuffle(value, thread_of_block() % WARP ^ mask);
}
template <class T>
T shuffle_down(T value, int lanes) {
  const int lane = thread_of_block() % WARP;
  return shuffle(value, lane + lanes < WARP ? lane + lanes : lane);
}

inline bool any_of_warp(bool holds) {
  for (int mask = WARP / 2; mask > 0; mask /= 2) holds |= shuffle_xor(holds, mask);
  return holds;
}

inline void add_product(double (&sums)[2], double left, double right) { emulator::add_product(sums, left, right); }

// As a chip does, which has no unaligned access.
void check(bool condition, const char* message);

template <bool ONCE>
Packed<16> load_packed(const void* address) {
  check(reinterpret_cast<uintptr_t>(address) % 16 == 0, "a load of 16 bytes is not aligned");
  Packed<16> value;
  std::memcpy(&value, address, 16);
  return value;
}
template <int BYTES>
void store_packed(void* address, const Packed<BYTES>& value) {
  check(reinterpret_cast<uintptr_t>(address) % BYTES == 0, "a store of several words is not aligned");
  std::memcpy(address, &value, BYTES);
}

// Up to infinity where the result is too large, as a device's instruction has it; the host's polynomial ends before.
template <class Scale>
float exp_scaled(float x, Scale c) {
  const float power = x * c.high;
  return power >= 126.0f ? static_cast<float>(std::exp2(static_cast<double>(power))) : dam::exp_scaled(x, c);
}

inline uint64_t opaque(uint64_t value) { return value; }
inline double difference(double a, double b) { return a - b; }

inline void atomic_min(int64_t* address, int64_t value) {
  if (value < *address) *address = value;
}

}  // namespace cuda
}  // namespace dam
