// The kernels for AVX-512 with VPOPCNTDQ. Only functions of this file are compiled for that target: headers of the
// standard library stay outside, so no shared template is.
#include "mask_kernels.h"

#if UNSEG_X86

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,fma,f16c,bmi,popcnt"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own intrinsics
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,fma,f16c,bmi,popcnt,prefer-vector-width=512")
#endif

namespace unseg {
namespace avx512 {

#include "primitives_avx512.h"

#include "pack_impl.h"
#include "pairs_impl.h"
#include "tile_impl.h"
#include "affinity_impl.h"

}  // namespace avx512

const MaskKernels* mask_kernels_avx512() {
  using namespace avx512;
  static const MaskKernels table = {"avx512", pack,        describe,    overlap_tile,
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
