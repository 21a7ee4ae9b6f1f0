// The kernels for AVX2. Only functions of this file are compiled for that target: headers of the
// standard library stay outside, so no shared template is.
#include "mask_kernels.h"

#if UNSEG_X86

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,popcnt")
#endif

namespace unseg {
namespace avx2 {

#include "primitives_avx2.h"

#include "pack_impl.h"
#include "pairs_impl.h"
#include "tile_impl.h"
#include "affinity_impl.h"

}  // namespace avx2

const MaskKernels* mask_kernels_avx2() {
  using namespace avx2;
  static const MaskKernels table = {"avx2", pack,        describe,    overlap_tile,
                                    suppressed, matrix_most, matrix_decay,
                                    boc_tile_float, boc_tile_double};
  return &table;
}

}  // namespace unseg

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // UNSEG_X86
