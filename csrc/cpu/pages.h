// What the pages of an array are: not there before they are touched, and large ones slow to come by on some machines.
// Not for kernels: what the standard library puts inline must not be compiled for instructions that a machine may lack.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <system_error>

namespace dam {

constexpr const char* VIRTIO_DEVICES = "/sys/bus/virtio/devices";

// As a virtual machine's balloon device says, if it reports free pages: those of 2 MB, after a second or two. The host
// then maps each anew, 4 KB after 4 KB, which takes ten times as long as what was never given back.
inline bool memory_goes_back(const std::string& devices = VIRTIO_DEVICES) {
  constexpr size_t REPORTING = 5;  // VIRTIO_BALLOON_F_REPORTING
  std::error_code error;
  const std::filesystem::directory_iterator end;
  for (std::filesystem::directory_iterator device(devices, error); !error && device != end; device.increment(error)) {
    std::string id, features;
    std::ifstream(device->path() / "device") >> id;
    std::ifstream(device->path() / "features") >> features;
    if (id == "0x0005" && features.size() > REPORTING && features[REPORTING] == '1') return true;
  }
  return false;
}

// Whether an array has its pages yet, as its middle says. The system zeroes a page when it is first touched, and leaves it
// in the caches: what is stored past them then goes to memory twice, and took 1.5 times as long as what is not.
inline bool has_pages(const void* array, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t middle = (reinterpret_cast<uintptr_t>(array) + static_cast<uintptr_t>(bytes / 2)) / page * page;
  unsigned char resident = 1;
  if (mincore(reinterpret_cast<void*>(middle), page, &resident) == 0) return (resident & 1) != 0;
#endif
  (void)array, (void)bytes;
  return true;
}

// Whether a result is to be stored past the caches.
inline bool streams(const void* result, int64_t bytes) {
  constexpr int64_t SECOND_CACHE = int64_t{2} << 20;  // bytes that a core's own does not hold
  return bytes >= SECOND_CACHE && has_pages(result, bytes);
}

}  // namespace dam
