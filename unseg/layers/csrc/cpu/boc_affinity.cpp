// unseg::boc_affinity on the CPU.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "large_tensor.h"
#include "mask_kernels.h"

namespace unseg {
namespace {

// Threads are woken for pieces of at least some 50 microseconds: so many channels of pairs.
constexpr int64_t kWorthThreads = 200000;

// The rows in panels, zeros after the last one: of each panel first channel 0 of all its rows, then
// channel 1, ...
template <typename Real>
at::Tensor pack_panels(const at::Tensor& features) {
  constexpr int64_t kPanel = kPanelBytes / sizeof(Real);
  const int64_t count = features.size(0), channels = features.size(1);
  at::Tensor panels = at::empty({round_up(count, kBlock) * channels}, features.options());
  const Real* from = features.const_data_ptr<Real>();
  Real* to = panels.mutable_data_ptr<Real>();
  for (int64_t first = 0; first < round_up(count, kBlock); first += kPanel) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t k = first; k < first + kPanel; ++k) {
        *to++ = k < count ? from[k * channels + c] : Real{0};
      }
    }
  }
  return panels;
}

template <typename Real>
void all_tiles(const at::Tensor& features, const at::Tensor& out,
               void (*tile)(const Real*, int64_t, int64_t, int64_t, int64_t, Real*)) {
  const int64_t count = features.size(0), channels = features.size(1);
  const at::Tensor packed = pack_panels<Real>(features);
  const Real* panels = packed.const_data_ptr<Real>();
  Real* values = out.mutable_data_ptr<Real>();
  std::vector<std::pair<int64_t, int64_t>> tiles;
  for (int64_t i = 0; i < count; i += kBlock) {
    for (int64_t j = i; j < count; j += kBlock) tiles.emplace_back(i, j);
  }
  const int64_t grain = kWorthThreads / (kBlock * kBlock * (channels + 1)) + 1;
  at::parallel_for(0, static_cast<int64_t>(tiles.size()), grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      tile(panels, count, channels, tiles[t].first, tiles[t].second, values);
    }
  });
}

at::Tensor boc_affinity(const at::Tensor& features) {
  TORCH_CHECK_TYPE(at::isFloatingType(features.scalar_type()), "features must be floating, not ",
                   features.scalar_type());
  TORCH_CHECK_VALUE(features.dim() == 2, "features must have shape (n, C), not ",
                    features.sizes());
  const bool is_double = features.scalar_type() == at::kDouble;
  const at::Tensor rows = features.to(is_double ? at::kDouble : at::kFloat).contiguous();
  const MaskKernels& kernels = mask_kernels();
  at::Tensor out = empty_large({rows.size(0), rows.size(0)}, rows.scalar_type());
  if (is_double) {
    all_tiles<double>(rows, out, kernels.boc_tile_double);
  } else {
    all_tiles<float>(rows, out, kernels.boc_tile_float);
  }
  return out;
}

TORCH_LIBRARY_IMPL(unseg, CPU, m) { m.impl("boc_affinity", boc_affinity); }

}  // namespace
}  // namespace unseg
