// Launching a kernel, with its errors checked. Compiled without nvcc, csrc/emulator runs it instead.
#pragma once

#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>

#include "device.h"
#include "geometry.h"
#include "kernels.h"

namespace dam {
namespace cuda {

struct Grid {
  int64_t blocks;
  int threads = THREADS_PER_BLOCK;
  int64_t shared_bytes = TEAM_BYTES;
  int64_t cluster = 1;  // blocks of a cluster
};

#if defined(__CUDACC__)

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("dam: ") + what + ": " + cudaGetErrorString(error));
  }
}

// Makes a device the current one, as torch may have another thread's there, and puts back what was.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "no CUDA device");
    if (before_ != device) check(cudaSetDevice(device), "choosing the device");
    moved_ = before_ != device;
  }
  ~OnDevice() {
    if (moved_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool moved_ = false;
};

template <int UNUSED = 0>
__global__ void probe_architecture_kernel() {}

// The chip of the current device. Asked for once per device: attributes cost microseconds.
inline Chip chip_of(int device) {
  constexpr int MOST = 64;
  static std::mutex mutex;
  static Chip known[MOST];
  const std::lock_guard<std::mutex> lock(mutex);
  if (device < 0 || device >= MOST) throw std::runtime_error("dam: device index " + std::to_string(device));
  Chip& chip = known[device];
  if (chip.multiprocessors == 0) {
    int major = 0, l2 = 0, count = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device attributes");
    check(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device), "device attributes");
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "device attributes");
    // Code that was compiled for an older chip has no barrier of a cluster, whatever it runs on.
    cudaFuncAttributes code;
    check(cudaFuncGetAttributes(&code, probe_architecture_kernel<>), "this build of dam has no code for the device");
    chip = {count, l2, major >= 9 && code.ptxVersion >= 90};
  }
  return chip;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, Queue queue, Arguments... arguments) {
  if (grid.blocks == 0) return;
  if (grid.blocks > 0x7FFFFFFF) throw std::runtime_error("dam: more than 2^31 blocks of a CUDA kernel");
  constexpr int64_t LITTLE = 4096;  // bytes of shared memory that as many blocks as fit the registers find room for
  if (grid.shared_bytes > LITTLE) {
    const void* const function = reinterpret_cast<const void*>(kernel);
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(grid.shared_bytes)),
          "shared memory of a kernel");
    check(
        cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "shared memory of a kernel");
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = reinterpret_cast<cudaStream_t>(queue.stream);
  config.attrs = &attribute;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "launching a kernel");
}

#else

inline Chip chip_of(int) { return emulator::chip(); }

class OnDevice {
 public:
  explicit OnDevice(int) {}
  ~OnDevice() {}
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, Queue, Arguments... arguments) {
  emulator::run(grid.blocks, grid.threads, grid.shared_bytes, grid.cluster, [&] { kernel(arguments...); });
}

#endif

// Launches kernels of rows: one that does all, or one for the summaries and one for the rest. The kernel takes
// (arguments, plan, scale, sums, finishes), the last two saying what of the work it is to do.
template <class Args, class Scale>
void launch_rows(void (*kernel)(Args, RowPlan, Scale, bool, bool), const RowPlan& plan, Queue queue,
                 const Args& arguments, Scale scale, int64_t more_shared_bytes = 0) {
  const Grid grid{plan.blocks, THREADS_PER_BLOCK, TEAM_BYTES + more_shared_bytes, plan.clustered ? plan.splits : 1};
  if (plan.one_launch()) {
    launch(kernel, grid, queue, arguments, plan, scale, true, true);
  } else {
    launch(kernel, grid, queue, arguments, plan, scale, true, false);
    launch(kernel, grid, queue, arguments, plan, scale, false, true);
  }
}

}  // namespace cuda
}  // namespace dam
