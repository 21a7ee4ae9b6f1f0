#include "large_tensor.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/Storage.h>

#include <cstdlib>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; older kernels refuse it and nothing is lost
#endif
#endif

namespace unseg {

#ifdef __linux__
namespace {

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kLarge = kHugePage / 2;  // from here on a huge page wastes less than it saves
constexpr size_t kSmall = 1 << 16;

// Asks for all pages of a block at once instead of one by one.
void populate(void* data, size_t bytes) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (start + page - 1) / page * page, end = (start + bytes) / page * page;
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_WRITE);
}

}  // namespace

at::Tensor empty_large(at::IntArrayRef size, at::ScalarType type) {
  size_t bytes = c10::elementSize(type);
  for (const int64_t extent : size) bytes *= static_cast<size_t>(extent);
  if (bytes < kLarge) {
    at::Tensor tensor = at::empty(size, type);
    if (bytes >= kSmall) populate(tensor.mutable_data_ptr(), bytes);
    return tensor;
  }
  void* data = nullptr;
  const size_t reserved = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  if (posix_memalign(&data, kHugePage, reserved) != 0) return at::empty(size, type);
  (void)madvise(data, reserved, MADV_HUGEPAGE);
  c10::DataPtr pointer(data, data, &std::free, at::Device(at::kCPU));
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(pointer),
                       c10::GetCPUAllocator(), /*resizable=*/true);
  return at::empty({0}, type).set_(std::move(storage), 0, size);
}
#else
at::Tensor empty_large(at::IntArrayRef size, at::ScalarType type) { return at::empty(size, type); }
#endif

}  // namespace unseg
