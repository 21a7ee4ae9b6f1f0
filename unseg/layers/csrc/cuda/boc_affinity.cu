// unseg::boc_affinity on CUDA devices: checks, memory and the launch. Nothing waits for the device.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "affinity_kernels.cuh"

namespace unseg {
namespace cuda {
namespace {

template <typename Real>
void launch_boc(const at::Tensor& features, const at::Tensor& out) {
  const int64_t count = features.size(0);
  const int64_t tiles = (count + kAffinityTile - 1) / kAffinityTile;
  // What a grid may have in y; the result would take 64 TiB.
  TORCH_CHECK_VALUE(tiles <= 65535, "features have too many rows: ", count);
  const unsigned side = static_cast<unsigned>(tiles);
  boc_kernel<Real><<<dim3(side, side), dim3(kAffinitySide, kAffinitySide), 0,
                     at::cuda::getCurrentCUDAStream()>>>(
      features.const_data_ptr<Real>(), count, features.size(1), out.mutable_data_ptr<Real>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor boc_affinity(const at::Tensor& features) {
  TORCH_CHECK_TYPE(at::isFloatingType(features.scalar_type()), "features must be floating, not ",
                   features.scalar_type());
  TORCH_CHECK_VALUE(features.dim() == 2, "features must have shape (n, C), not ",
                    features.sizes());
  const c10::cuda::CUDAGuard guard(features.device());
  const bool is_double = features.scalar_type() == at::kDouble;
  const at::Tensor rows = features.to(is_double ? at::kDouble : at::kFloat).contiguous();
  at::Tensor out = at::empty({rows.size(0), rows.size(0)}, rows.options());
  if (out.numel() == 0) return out;
  if (is_double) {
    launch_boc<double>(rows, out);
  } else {
    launch_boc<float>(rows, out);
  }
  return out;
}

TORCH_LIBRARY_IMPL(unseg, CUDA, m) { m.impl("boc_affinity", boc_affinity); }

}  // namespace
}  // namespace cuda
}  // namespace unseg
