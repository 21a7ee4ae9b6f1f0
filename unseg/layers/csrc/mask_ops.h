// What the CPU and the CUDA mask ops share: the packed format and the definition of an overlap.
// Free of torch, so that kernels stay on raw pointers.
//
// Legend: N masks of H x W pixels; a row is one mask as 64-bit words.
//
// Packed format (specs/mask_ops.md 2.1). Pixel p of the flattened mask is bit (p & 63) of word
// (p >> 6). A row holds ceil(H * W / 64) words rounded up to a multiple of kWordGroup; bits past
// the last pixel are zero. Eight int32 per mask describe it, see MetaField.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define UNSEG_HOST_DEVICE __host__ __device__
#else
#define UNSEG_HOST_DEVICE
#endif

namespace unseg {

// Words per group: one AVX-512 register, and one 64-byte cache line.
constexpr int64_t kWordGroup = 8;

// Columns of the meta tensor, int32 (N, kMetaFields).
enum MetaField {
  kArea = 0,   // set pixels
  kX0 = 1,     // bounding box, half open; all zero for an empty mask
  kY0 = 2,
  kX1 = 3,
  kY1 = 4,
  kFirst = 5,  // words [first, last) hold all set pixels
  kLast = 6,
  kSpare = 7,  // always zero
};
constexpr int64_t kMetaFields = 8;

// The Python side (unseg.layers.native) numbers them alike.
enum OverlapMode { kIoU = 0, kIoMin = 1, kIoA = 2, kIoB = 3, kInter = 4 };
enum DecayKernel { kGaussian = 0, kLinear = 1 };

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

inline int64_t row_words(int64_t pixels) { return round_up((pixels + 63) / 64, kWordGroup); }

// The denominator of an overlap of two masks with areas a and b that share `inter` pixels.
UNSEG_HOST_DEVICE inline int64_t overlap_denominator(int64_t inter, int64_t a, int64_t b,
                                                     int mode) {
  if (mode == kIoU) return a + b - inter;
  if (mode == kIoMin) return a < b ? a : b;
  return mode == kIoA ? a : b;
}

// The one definition of an overlap ratio: exact integers, one float64 division, 0 for 0/0.
UNSEG_HOST_DEVICE inline double overlap_ratio(int64_t inter, int64_t a, int64_t b, int mode) {
  const int64_t denominator = overlap_denominator(inter, a, b, mode);
  return denominator > 0 ? static_cast<double>(inter) / static_cast<double>(denominator) : 0.0;
}

}  // namespace unseg
