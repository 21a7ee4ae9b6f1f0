// The kernels in plain C++, for any processor.
#include "mask_kernels.h"

namespace unseg {
namespace portable {

static inline int64_t popcount64(uint64_t v) {
  v -= (v >> 1) & 0x5555555555555555ULL;
  v = (v & 0x3333333333333333ULL) + ((v >> 2) & 0x3333333333333333ULL);
  v = (v + (v >> 4)) & 0x0f0f0f0f0f0f0f0fULL;
  return static_cast<int64_t>((v * 0x0101010101010101ULL) >> 56);
}

#include "primitives_scalar.h"

#include "pack_impl.h"
#include "pairs_impl.h"
#include "tile_impl.h"
#include "affinity_impl.h"

}  // namespace portable

const MaskKernels* mask_kernels_portable() {
  using namespace portable;
  static const MaskKernels table = {"portable", pack,        describe,    overlap_tile,
                                    suppressed, matrix_most, matrix_decay,
                                    boc_tile_float, boc_tile_double};
  return &table;
}

}  // namespace unseg
