// The CPU kernels, once per instruction set, behind a table of function pointers: those of the mask
// ops, after which the names are, and of boc_affinity.
// Free of torch. mask_kernels() picks the best table the processor runs.
#pragma once

#include <cstdint>

#include "../boc_affinity.h"
#include "../mask_ops.h"

// The SIMD kernels are GCC/Clang on x86-64; everything else runs the portable ones.
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define UNSEG_X86 1
#else
#define UNSEG_X86 0
#endif

namespace unseg {

// Masks are processed in blocks of 64, so that a block's candidates fit one 64-bit word.
constexpr int64_t kBlock = 64;

// Features are read in panels of rows, one cache line for each channel.
constexpr int kPanelBytes = 64;

// Element type of a dense mask.
enum class PixelType { kByte, kFloat, kHalf, kBFloat16, kDouble };

// N masks in evaluation order, one array per field; arrays are padded to a multiple of kBlock
// with masks of zero area, so loops over a block need no remainder.
// row[k][w] may only be read for words w of the whole groups that [first, last) touches.
struct MaskView {
  int64_t count;
  const uint64_t* const* row;
  const int32_t *area, *x0, *y0, *x1, *y1, *first, *last, *label;
};

// Scratch memory and results of matrix NMS, in evaluation order.
struct MatrixState {
  double* most;         // c_j: largest overlap with an earlier mask
  const float* most_f;  // the same in float32, padded to a multiple of kBlock
  double* decay;        // result
  double sigma;
  int kernel;
};

struct MaskKernels {
  const char* name;
  // Packs one mask of `height` x `width` pixels and describes it (kMetaFields values). `words`
  // has row_words() words, all of which are written.
  void (*pack)(const void* pixels, PixelType type, double threshold, int64_t height, int64_t width,
               uint64_t* words, int32_t* meta);
  // Fills in the description of a row whose words are complete.
  void (*describe)(const uint64_t* words, int64_t height, int64_t width, int32_t* meta);
  // Overlaps of masks [i0, i0 + 64) of `a` with [j0, j0 + 64) of `b`, written as float32 (int32
  // for kInter) to out[i * stride + j]. `symmetric`: a and b are the same and overlap[i][j] is
  // overlap[j][i]; the tile is then also written to out[j * stride + i].
  void (*overlap_tile)(const MaskView& a, const MaskView& b, int64_t i0, int64_t j0, int mode,
                       bool symmetric, void* out, int64_t stride);
  // Does a mask among [begin, kept.count) of `kept` overlap mask j of `masks` by more than
  // `threshold`? Adds the number of pairs it had to count to `counted`.
  bool (*suppressed)(const MaskView& kept, int64_t begin, const MaskView& masks, int64_t j,
                     int mode, double threshold, int64_t* counted);
  // The two passes of matrix NMS for column j; `bounds` is scratch of at least j + 64 floats.
  void (*matrix_most)(const MaskView& masks, int64_t j, float* bounds, MatrixState& state);
  void (*matrix_decay)(const MaskView& masks, int64_t j, MatrixState& state);
  // BoC of rows [i0, i0 + 64) with rows [j0, j0 + 64) of `count` rows of features, written to
  // out[i * count + j] and out[j * count + i]; 1 on the diagonal. `panels` (see kPanelBytes) hold a
  // multiple of kBlock rows, those past the end zero.
  void (*boc_tile_float)(const float* panels, int64_t count, int64_t channels, int64_t i0,
                         int64_t j0, float* out);
  void (*boc_tile_double)(const double* panels, int64_t count, int64_t channels, int64_t i0,
                          int64_t j0, double* out);
};

const MaskKernels* mask_kernels_portable();
#if UNSEG_X86
const MaskKernels* mask_kernels_popcnt();
const MaskKernels* mask_kernels_avx2();
const MaskKernels* mask_kernels_avx512();
#endif

// The table in use: the best one that the processor supports, at most the one that the environment
// variable UNSEG_MASK_ISA (portable, popcnt, avx2, avx512) names. The variable is read at each
// call, so it can be changed in a running process.
const MaskKernels& mask_kernels();

}  // namespace unseg
