// The kernels of mask_kernels.cuh and affinity_kernels.cuh on the host, launched as mask_ops.cu and
// boc_affinity.cu launch them, as C functions on raw memory. Each returns null, or what went wrong. Rows are N x words; `meta` is
// N x 8; `order` and `labels` are int64 (N,), labels may be null.
#include "cuda_on_host.h"
// After the stand-ins for CUDA.
#include "../../unseg/layers/csrc/cuda/affinity_kernels.cuh"
#include "../../unseg/layers/csrc/cuda/mask_kernels.cuh"

using namespace unseg;
using namespace unseg::cuda;
using cuda_on_host::launch;

namespace {

template <typename Body>
const char* guarded(Body body) {
  static std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

// Of grids of few rows, so that small inputs take several launches.
template <typename Visitor>
void launch_pairs(const View& a, const View& b, const Visitor& visitor) {
  constexpr int kRows = 2;
  const int columns = (b.count + kTile - 1) / kTile, rows = (a.count + kTile - 1) / kTile;
  for (int row = 0; row < rows; row += kRows) {
    launch(pair_kernel<Visitor>, dim3(columns, std::min(rows - row, kRows)), dim3(kSide, kSide), a,
           b, visitor, row);
  }
}

template <typename IsSet>
void launch_pack(const void* pixels, IsSet is_set, int count, int height, int width,
                 unsigned* bits, int* meta) {
  const int size = height * width;
  launch(pack_kernel<IsSet>, dim3(count), dim3(kPackThreads),
         static_cast<const typename IsSet::Pixel*>(pixels), int64_t{size}, is_set, size, width,
         static_cast<int>(row_words(size)), bits, meta);
}

template <typename Real>
const char* launch_boc(const Real* features, int count, int channels, Real* out) {
  return guarded([=] {
    const unsigned tiles = static_cast<unsigned>((count + kAffinityTile - 1) / kAffinityTile);
    launch(boc_kernel<Real>, dim3(tiles, tiles), dim3(kAffinitySide, kAffinitySide), features,
           int64_t{count}, int64_t{channels}, out);
  });
}

__global__ void diverging_kernel() {
  if (threadIdx.x < 7) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

// Each thread reads what its neighbour writes, without a barrier.
__global__ void racing_kernel(int value, int* out) {
  __shared__ int shared[kTile];
  shared[threadIdx.x] = value;
  out[threadIdx.x] = shared[(threadIdx.x + 1) % kTile];
}

}  // namespace

extern "C" {

void set_schedule(int schedule) {
  cuda_on_host::device.schedule = static_cast<cuda_on_host::Schedule>(schedule);
}

// Pixels of 1, 4 or 8 bytes: bytes, floats or doubles.
const char* pack(const void* pixels, int bytes, double threshold, int count, int height, int width,
                 unsigned* bits, int* meta) {
  return guarded([=] {
    if (bytes == 1) launch_pack(pixels, ByteSet{}, count, height, width, bits, meta);
    const FloatAbove above{static_cast<float>(threshold)};
    if (bytes == 4) launch_pack(pixels, above, count, height, width, bits, meta);
    if (bytes == 8) launch_pack(pixels, DoubleAbove{threshold}, count, height, width, bits, meta);
  });
}

const char* overlap(const Word* bits1, const int* meta1, const int64_t* labels1, int count1,
                    const Word* bits2, const int* meta2, const int64_t* labels2, int count2,
                    int words, int mode, float* ratios, int* counts) {
  return guarded([=] {
    const View a{bits1, meta1, labels1, nullptr, count1, words};
    const View b{bits2, meta2, labels2, nullptr, count2, words};
    launch_pairs(a, b, StoreOverlap{mode, count2, ratios, counts});
  });
}

const char* nms(const Word* bits, const int* meta, const int64_t* labels, const int64_t* order,
                int count, int words, int mode, double threshold, bool* keep, int64_t* ranked,
                int64_t* total) {
  return guarded([=] {
    const View view{bits, meta, labels, order, count, words};
    const int blocks = (count + kTile - 1) / kTile;
    std::vector<Word> suppression(int64_t{count} * blocks), removed(blocks);
    launch_pairs(view, view,
                 SuppressionBits{mode, count, blocks, threshold, suppression.data()});
    launch(choose_kernel, dim3(1), dim3(512), suppression.data(), order, count, blocks,
           removed.data(), keep, ranked, total);
  });
}

const char* matrix(const Word* bits, const int* meta, const int64_t* labels, const int64_t* order,
                   int count, int words, const double* scores, int kernel, double sigma,
                   float* decayed) {
  return guarded([=] {
    const View view{bits, meta, labels, order, count, words};
    std::vector<Word> most(count), best(count);
    launch_pairs(view, view, LargestOverlap{count, most.data()});
    launch_pairs(view, view, LargestGain{kernel, count, most.data(), best.data()});
    launch(decay_kernel, dim3((count + 255) / 256), dim3(256), best.data(), scores, order, count,
           kernel, sigma, decayed);
  });
}

const char* boc_float(const float* features, int count, int channels, float* out) {
  return launch_boc(features, count, channels, out);
}
const char* boc_double(const double* features, int count, int channels, double* out) {
  return launch_boc(features, count, channels, out);
}

// Kernels that are wrong: the first must fail, the second must miss some of the values.
const char* diverge() {
  return guarded([] { launch(diverging_kernel, dim3(1), dim3(kTile)); });
}
const char* race(int value, int* out) {
  return guarded([=] { launch(racing_kernel, dim3(1), dim3(kTile), value, out); });
}
}
