// The CUDA kernel of unseg::boc_affinity, free of torch.
//
// Legend: n rows of C channels; a tile is kAffinityTile x kAffinityTile pairs of rows.
//
// A block computes a tile on or above the diagonal, each thread kAffinityEach x kAffinityEach pairs
// of it, and writes it to both sides. kChannelChunk channels of both rows of pairs lie in shared
// memory at a time. Sums are added in the order of the CPU kernels, so bits are theirs as well.
#pragma once

#include <cmath>
#include <cstdint>

#include "../boc_affinity.h"

namespace unseg {
namespace cuda {

constexpr int kAffinityTile = 64;
constexpr int kAffinitySide = 16;  // a block is kAffinitySide x kAffinitySide threads
constexpr int kAffinityEach = kAffinityTile / kAffinitySide;

// Channels [begin, begin + kChannelChunk) of the rows from `first` on; zeros past the ends, which
// add nothing. One more column keeps writes of neighbouring threads on different banks.
template <typename Real>
__device__ inline void stage_rows(const Real* features, int64_t count, int64_t channels,
                                  int64_t first, int64_t begin,
                                  Real (*shared)[kAffinityTile + 1]) {
  const int thread = threadIdx.y * kAffinitySide + threadIdx.x;
  for (int k = thread; k < kAffinityTile * kChannelChunk; k += kAffinitySide * kAffinitySide) {
    const int row = k / kChannelChunk, channel = k % kChannelChunk;
    const bool inside = first + row < count && begin + channel < channels;
    shared[channel][row] =
        inside ? features[(first + row) * channels + begin + channel] : Real(0);
  }
}

// What a thread knows of its pairs: sums over the chunks so far, and the largest difference.
template <typename Real>
struct PairSums {
  Real difference[kAffinityEach][kAffinityEach] = {};
  Real sum[kAffinityEach][kAffinityEach] = {};
  Real most[kAffinityEach][kAffinityEach] = {};
};

// Adds the chunk in shared memory. Thread (x, y) has the rows 4 y ... 4 y + 3 and the columns
// x, x + 16, ...: its reads are broadcasts or on different banks.
template <typename Real>
__device__ inline void add_chunk(const Real (*a)[kAffinityTile + 1],
                                 const Real (*b)[kAffinityTile + 1], int channels,
                                 PairSums<Real>* sums) {
  Real difference[kAffinityEach][kAffinityEach] = {}, sum[kAffinityEach][kAffinityEach] = {};
  for (int c = 0; c < channels; ++c) {
    Real x[kAffinityEach], y[kAffinityEach];
#pragma unroll
    for (int r = 0; r < kAffinityEach; ++r) {
      x[r] = a[c][threadIdx.y * kAffinityEach + r];
      y[r] = b[c][threadIdx.x + r * kAffinitySide];
    }
#pragma unroll
    for (int r = 0; r < kAffinityEach; ++r) {
#pragma unroll
      for (int s = 0; s < kAffinityEach; ++s) {
        const Real gap = fabs(x[r] - y[s]);
        difference[r][s] += gap;
        sum[r][s] += fabs(x[r] + y[s]);
        sums->most[r][s] = gap > sums->most[r][s] ? gap : sums->most[r][s];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kAffinityEach; ++r) {
#pragma unroll
    for (int s = 0; s < kAffinityEach; ++s) {
      sums->difference[r][s] += difference[r][s];
      sums->sum[r][s] += sum[r][s];
    }
  }
}

template <typename Real>
__device__ inline Real boc_value(Real difference, Real sum, Real most) {
  const Real ratio = difference / sum;
  // False for NaN.
  return ratio < Real(INFINITY) ? (Real(1) + most) / (Real(1) + ratio) : Real(0);
}

// Block (x, y) has the tile of rows from y * kAffinityTile, columns from x * kAffinityTile.
template <typename Real>
__global__ void boc_kernel(const Real* features, int64_t count, int64_t channels, Real* out) {
  if (blockIdx.x < blockIdx.y) return;
  __shared__ Real a[kChannelChunk][kAffinityTile + 1];
  __shared__ Real b[kChannelChunk][kAffinityTile + 1];
  const int64_t i0 = int64_t{blockIdx.y} * kAffinityTile;
  const int64_t j0 = int64_t{blockIdx.x} * kAffinityTile;
  PairSums<Real> sums;
  for (int64_t begin = 0; begin < channels; begin += kChannelChunk) {
    __syncthreads();  // all threads are done with the chunk before
    stage_rows(features, count, channels, i0, begin, a);
    stage_rows(features, count, channels, j0, begin, b);
    __syncthreads();
    const int64_t left = channels - begin;
    add_chunk(a, b, static_cast<int>(left < kChannelChunk ? left : kChannelChunk), &sums);
  }
#pragma unroll
  for (int r = 0; r < kAffinityEach; ++r) {
#pragma unroll
    for (int s = 0; s < kAffinityEach; ++s) {
      const int64_t i = i0 + threadIdx.y * kAffinityEach + r;
      const int64_t j = j0 + threadIdx.x + s * kAffinitySide;
      if (i >= count || j >= count) continue;
      const Real value =
          i == j ? Real(1)
                 : boc_value(sums.difference[r][s], sums.sum[r][s], sums.most[r][s]);
      out[i * count + j] = value;
      if (i0 != j0) out[j * count + i] = value;
    }
  }
}

}  // namespace cuda
}  // namespace unseg
