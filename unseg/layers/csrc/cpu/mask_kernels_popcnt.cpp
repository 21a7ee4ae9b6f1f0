// The kernels in plain C++ with the POPCNT instruction.
#include "mask_kernels.h"

#if UNSEG_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("popcnt")
#endif

namespace unseg {
namespace popcnt {

static inline int64_t popcount64(uint64_t v) { return __builtin_popcountll(v); }

#include "primitives_scalar.h"

#include "pack_impl.h"
#include "pairs_impl.h"
#include "tile_impl.h"
#include "affinity_impl.h"

}  // namespace popcnt

const MaskKernels* mask_kernels_popcnt() {
  using namespace popcnt;
  static const MaskKernels table = {"popcnt", pack,        describe,    overlap_tile,
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
