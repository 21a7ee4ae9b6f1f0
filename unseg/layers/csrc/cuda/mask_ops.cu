// The mask ops on CUDA devices: checks, memory and launches. No op waits for the device.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "mask_kernels.cuh"

namespace unseg {
namespace cuda {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Packed masks; the tensors keep alive what views refer to.
struct Packed {
  at::Tensor bits, meta;
  int64_t count() const { return bits.size(0); }
  int64_t words() const { return bits.size(1); }
};

void check_cuda(const at::Tensor& tensor, const at::Tensor& like, const char* name) {
  TORCH_CHECK(tensor.device() == like.device(), name, " is on ", tensor.device(),
              ", the masks are on ", like.device());
}

template <typename IsSet>
void launch_pack(const at::Tensor& masks, IsSet is_set, const Packed& packed) {
  const int64_t pixels = masks.size(1) * masks.size(2);
  pack_kernel<IsSet><<<static_cast<unsigned>(masks.size(0)), kPackThreads, 0,
                       at::cuda::getCurrentCUDAStream()>>>(
      static_cast<const typename IsSet::Pixel*>(masks.const_data_ptr()), pixels, is_set,
      static_cast<int>(pixels), static_cast<int>(masks.size(2)), static_cast<int>(packed.words()),
      reinterpret_cast<unsigned*>(packed.bits.mutable_data_ptr<int64_t>()),
      packed.meta.mutable_data_ptr<int>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

Packed pack_dense(const at::Tensor& dense, double threshold) {
  TORCH_CHECK_VALUE(dense.dim() == 3, "masks must have shape (N, H, W), not ", dense.sizes());
  const int64_t count = dense.size(0), height = dense.size(1), width = dense.size(2);
  TORCH_CHECK_VALUE(width == 0 || height <= std::numeric_limits<int32_t>::max() / width,
                    "masks of ", height, " x ", width, " pixels: at most 2^31 - 1 are supported");
  const at::ScalarType type = dense.scalar_type();
  const bool bytes = type == at::kBool || type == at::kByte || type == at::kChar;
  const bool small_float = type == at::kHalf || type == at::kBFloat16;
  TORCH_CHECK_TYPE(bytes || small_float || type == at::kFloat || type == at::kDouble,
                   "masks must be bool, uint8, int8 or floating, not ", type);
  Packed packed;
  packed.bits = at::empty({count, row_words(height * width)}, dense.options().dtype(at::kLong));
  packed.meta = at::zeros({count, kMetaFields}, dense.options().dtype(at::kInt));
  if (packed.bits.numel() == 0) return packed;
  // Small floats are compared in float32 anyway.
  const at::Tensor masks = (small_float ? dense.to(at::kFloat) : dense).contiguous();
  if (bytes) {
    launch_pack(masks, ByteSet{}, packed);
  } else if (type == at::kDouble) {
    launch_pack(masks, DoubleAbove{threshold}, packed);
  } else {
    launch_pack(masks, FloatAbove{static_cast<float>(threshold)}, packed);
  }
  return packed;
}

// Bits and meta as they are, or dense masks packed.
Packed pack_operand(const at::Tensor& masks, const OptionalTensor& meta, const char* name) {
  if (!meta.has_value()) {
    TORCH_CHECK_TYPE(!masks.is_floating_point(), name, " must be bool, uint8 or int8, not ",
                     masks.scalar_type());
    return pack_dense(masks, 0.0);
  }
  TORCH_CHECK_TYPE(masks.scalar_type() == at::kLong && meta->scalar_type() == at::kInt, name,
                   ": bits must be int64 and meta int32, not ", masks.scalar_type(), " and ",
                   meta->scalar_type());
  TORCH_CHECK_VALUE(masks.dim() == 2 && masks.size(1) % kWordGroup == 0, name,
                    ": bits must have shape (N, words) with words a multiple of ", kWordGroup,
                    ", not ", masks.sizes());
  TORCH_CHECK_VALUE(
      meta->dim() == 2 && meta->size(0) == masks.size(0) && meta->size(1) == kMetaFields, name,
      ": meta must have shape (", masks.size(0), ", ", kMetaFields, "), not ", meta->sizes());
  check_cuda(*meta, masks, "meta");
  return {masks.contiguous(), meta->contiguous()};
}

const int64_t* check_labels(const OptionalTensor& labels, const Packed& packed) {
  if (!labels.has_value()) return nullptr;
  TORCH_CHECK_TYPE(labels->scalar_type() == at::kLong, "labels must be int64, not ",
                   labels->scalar_type());
  TORCH_CHECK_VALUE(
      labels->dim() == 1 && labels->size(0) == packed.count() && labels->is_contiguous(),
      "labels must be contiguous with shape (", packed.count(), "), not ", labels->sizes());
  check_cuda(*labels, packed.bits, "labels");
  return labels->const_data_ptr<int64_t>();
}

View view_of(const Packed& packed, const int64_t* labels, const int64_t* order) {
  TORCH_CHECK_VALUE(packed.count() <= std::numeric_limits<int32_t>::max() - kTile,
                    "too many masks: ", packed.count());
  return {reinterpret_cast<const Word*>(packed.bits.const_data_ptr<int64_t>()),
          packed.meta.const_data_ptr<int>(),
          labels,
          order,
          static_cast<int>(packed.count()),
          static_cast<int>(packed.words())};
}

template <typename Visitor>
void launch_pairs(const View& a, const View& b, const Visitor& visitor) {
  if (a.count == 0 || b.count == 0) return;
  const int columns = (b.count + kTile - 1) / kTile, rows = (a.count + kTile - 1) / kTile;
  for (int row = 0; row < rows; row += kGridRows) {
    const dim3 grid(columns, std::min(rows - row, kGridRows));
    pair_kernel<Visitor><<<grid, dim3(kSide, kSide), 0, at::cuda::getCurrentCUDAStream()>>>(
        a, b, visitor, row);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

// Scores as float64, and the indices by falling score: equal ones in input order, NaN last.
std::tuple<at::Tensor, at::Tensor> rank(const at::Tensor& scores, const Packed& packed) {
  TORCH_CHECK_TYPE(scores.is_floating_point(), "scores must be floating, not ",
                   scores.scalar_type());
  TORCH_CHECK_VALUE(scores.dim() == 1 && scores.size(0) == packed.count(),
                    "scores must have shape (", packed.count(), "), not ", scores.sizes());
  check_cuda(scores, packed.bits, "scores");
  const at::Tensor exact = scores.to(at::kDouble).contiguous();
  // 0 - x rises where x falls, and has one zero, not two; sort puts NaN above all numbers, but on
  // CUDA only without a sign (pytorch/pytorch#190781).
  const at::Tensor keys = at::rsub(exact, 0.0);
  keys.masked_fill_(keys.isnan(), std::numeric_limits<double>::quiet_NaN());
  const at::Tensor order =
      std::get<1>(at::sort(keys, /*stable=*/true, /*dim=*/0, /*descending=*/false));
  return {exact, order.contiguous()};
}

Word* words_of(const at::Tensor& tensor) {
  return reinterpret_cast<Word*>(tensor.mutable_data_ptr<int64_t>());
}

std::tuple<at::Tensor, at::Tensor> pack_masks(const at::Tensor& masks, double threshold) {
  const c10::cuda::CUDAGuard guard(masks.device());
  Packed packed = pack_dense(masks, threshold);
  return {packed.bits, packed.meta};
}

at::Tensor mask_overlap(const at::Tensor& masks1, const OptionalTensor& meta1,
                        const OptionalTensor& labels1, const OptionalTensor& masks2,
                        const OptionalTensor& meta2, const OptionalTensor& labels2, int64_t mode) {
  TORCH_CHECK_VALUE(mode >= kIoU && mode <= kInter, "mode must be 0 to 4, not ", mode);
  const bool self = !masks2.has_value();
  TORCH_CHECK_VALUE(!self || !(meta2.has_value() || labels2.has_value()),
                    "meta2 or labels2 are given without masks2");
  TORCH_CHECK_VALUE(self || labels1.has_value() == labels2.has_value(),
                    "labels1 and labels2 must be given together");
  const c10::cuda::CUDAGuard guard(masks1.device());
  const Packed packed1 = pack_operand(masks1, meta1, "masks1");
  Packed packed2 = packed1;
  if (!self) {
    check_cuda(*masks2, masks1, "masks2");
    packed2 = pack_operand(*masks2, meta2, "masks2");
    TORCH_CHECK_VALUE(packed1.words() == packed2.words(), "masks1 has ", packed1.words(),
                      " words a row, masks2 has ", packed2.words());
  }
  const View a = view_of(packed1, check_labels(labels1, packed1), nullptr);
  const View b = view_of(packed2, check_labels(self ? labels1 : labels2, packed2), nullptr);
  at::Tensor out = at::empty({packed1.count(), packed2.count()},
                             masks1.options().dtype(mode == kInter ? at::kInt : at::kFloat));
  StoreOverlap store{static_cast<int>(mode), packed2.count(), nullptr, nullptr};
  if (mode == kInter) {
    store.counts = out.mutable_data_ptr<int>();
  } else {
    store.ratios = out.mutable_data_ptr<float>();
  }
  launch_pairs(a, b, store);
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> mask_nms(const at::Tensor& masks,
                                                        const OptionalTensor& meta,
                                                        const OptionalTensor& labels,
                                                        const at::Tensor& scores, double threshold,
                                                        int64_t mode) {
  TORCH_CHECK_VALUE(mode >= kIoU && mode < kInter, "mode must be 0 to 3, not ", mode);
  TORCH_CHECK_VALUE(threshold >= 0, "iou_threshold must be at least 0, not ", threshold);
  const c10::cuda::CUDAGuard guard(masks.device());
  const Packed packed = pack_operand(masks, meta, "masks");
  const int64_t n = packed.count(), blocks = (n + kTile - 1) / kTile;
  const auto [exact, order] = rank(scores, packed);
  const int64_t* indices = order.const_data_ptr<int64_t>();
  const View view = view_of(packed, check_labels(labels, packed), indices);

  const auto longs = masks.options().dtype(at::kLong);
  at::Tensor keep = at::zeros({n}, masks.options().dtype(at::kBool));
  at::Tensor ranked = at::full({n}, -1, longs), total = at::zeros({}, longs);
  if (n == 0) return {keep, ranked, total};
  at::Tensor suppression = at::zeros({n, blocks}, longs), removed = at::zeros({blocks}, longs);
  launch_pairs(view, view,
               SuppressionBits{static_cast<int>(mode), static_cast<int>(n),
                               static_cast<int>(blocks), threshold, words_of(suppression)});
  choose_kernel<<<1, 512, 0, at::cuda::getCurrentCUDAStream()>>>(
      words_of(suppression), indices, static_cast<int>(n), static_cast<int>(blocks),
      words_of(removed), keep.mutable_data_ptr<bool>(), ranked.mutable_data_ptr<int64_t>(),
      total.mutable_data_ptr<int64_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {keep, ranked, total};
}

at::Tensor matrix_nms(const at::Tensor& masks, const OptionalTensor& meta,
                      const OptionalTensor& labels, const at::Tensor& scores, int64_t kernel,
                      double sigma) {
  TORCH_CHECK_VALUE(kernel == kGaussian || kernel == kLinear, "kernel must be 0 or 1, not ",
                    kernel);
  TORCH_CHECK_VALUE(kernel == kLinear || (sigma > 0 && std::isfinite(sigma)),
                    "sigma must be positive and finite, not ", sigma);
  const c10::cuda::CUDAGuard guard(masks.device());
  const Packed packed = pack_operand(masks, meta, "masks");
  const int64_t n = packed.count();
  const auto [exact, order] = rank(scores, packed);
  const int64_t* indices = order.const_data_ptr<int64_t>();
  const View view = view_of(packed, check_labels(labels, packed), indices);

  at::Tensor decayed = at::empty({n}, masks.options().dtype(at::kFloat));
  if (n == 0) return decayed;
  at::Tensor state = at::zeros({2, n}, masks.options().dtype(at::kLong));
  Word* most = words_of(state);
  Word* best = most + n;
  const int count = static_cast<int>(n);
  launch_pairs(view, view, LargestOverlap{count, most});
  launch_pairs(view, view, LargestGain{static_cast<int>(kernel), count, most, best});
  constexpr int kThreads = 256;
  decay_kernel<<<(count + kThreads - 1) / kThreads, kThreads, 0,
                 at::cuda::getCurrentCUDAStream()>>>(
      best, exact.const_data_ptr<double>(), indices, count, static_cast<int>(kernel), sigma,
      decayed.mutable_data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return decayed;
}

TORCH_LIBRARY_IMPL(unseg, CUDA, m) {
  m.impl("pack_masks", pack_masks);
  m.impl("mask_overlap", mask_overlap);
  m.impl("mask_nms", mask_nms);
  m.impl("matrix_nms", matrix_nms);
}

}  // namespace
}  // namespace cuda
}  // namespace unseg
