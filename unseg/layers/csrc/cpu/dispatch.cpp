// Chooses the kernels for the processor at hand.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "mask_kernels.h"

namespace unseg {
namespace {

// From worst to best; a null entry is not for this processor.
struct Choice {
  const char* name;
  const MaskKernels* table;
};

const Choice* choices() {
#if UNSEG_X86
  __builtin_cpu_init();
  const bool popcnt = __builtin_cpu_supports("popcnt");
  const bool avx2 = popcnt && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi");
  const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vpopcntdq");
  static const Choice all[4] = {{"portable", mask_kernels_portable()},
                                {"popcnt", popcnt ? mask_kernels_popcnt() : nullptr},
                                {"avx2", avx2 ? mask_kernels_avx2() : nullptr},
                                {"avx512", avx512 ? mask_kernels_avx512() : nullptr}};
#else
  static const Choice all[4] = {{"portable", mask_kernels_portable()},
                                {"popcnt", nullptr},
                                {"avx2", nullptr},
                                {"avx512", nullptr}};
#endif
  return all;
}

}  // namespace

const MaskKernels& mask_kernels() {
  static const Choice* const all = choices();
  const char* wanted = std::getenv("UNSEG_MASK_ISA");
  int best = 3;
  if (wanted != nullptr && *wanted != '\0') {
    for (best = 3; best >= 0 && std::string(wanted) != all[best].name;) --best;
    if (best < 0) {
      throw std::invalid_argument("UNSEG_MASK_ISA must be portable, popcnt, avx2 or avx512, not " +
                                  std::string(wanted));
    }
  }
  while (all[best].table == nullptr) --best;
  return *all[best].table;
}

}  // namespace unseg
