#include "packed_rows.h"

#include <ATen/Parallel.h>

#include <cstring>
#include <limits>
#include <mutex>
#include <utility>

namespace unseg {
namespace {

PixelType pixel_type(at::ScalarType type) {
  switch (type) {
    case at::kBool:
    case at::kByte:
    case at::kChar:
      return PixelType::kByte;
    case at::kFloat:
      return PixelType::kFloat;
    case at::kHalf:
      return PixelType::kHalf;
    case at::kBFloat16:
      return PixelType::kBFloat16;
    case at::kDouble:
      return PixelType::kDouble;
    default:
      TORCH_CHECK_TYPE(false, "masks must be bool, uint8, int8 or floating, not ", type);
  }
}

}  // namespace

void check_size(int64_t height, int64_t width) {
  TORCH_CHECK_VALUE(height >= 0 && width >= 0 &&
                        (width == 0 || height <= std::numeric_limits<int32_t>::max() / width),
                    "masks of ", height, " x ", width, " pixels: at most 2^31 - 1 are supported");
}

DenseMasks::DenseMasks(const at::Tensor& masks) : tensor(masks) {
  TORCH_CHECK(masks.is_cpu(), "masks are on ", masks.device(), ", not on the CPU");
  TORCH_CHECK_VALUE(masks.dim() == 3, "masks must have shape (N, H, W), not ", masks.sizes());
  type = pixel_type(masks.scalar_type());
  count = masks.size(0);
  height = masks.size(1);
  width = masks.size(2);
  check_size(height, width);
  // Masks may lie apart, or be one mask repeated; only each for itself must be contiguous.
  const bool contiguous = (masks.stride(2) == 1 || width <= 1) &&
                          (masks.stride(1) == width || height <= 1);
  if (!contiguous) tensor = masks.contiguous();
  stride = tensor.stride(0) * tensor.element_size();
  pixels = static_cast<const char*>(tensor.const_data_ptr());
}

int64_t DenseMasks::grain() const {
  constexpr int64_t kGrainBytes = 1 << 20;
  const int64_t bytes = height * width * tensor.element_size();
  return kGrainBytes / (bytes > 0 ? bytes : 1) + 1;
}

PackedRows::PackedRows(const at::Tensor& masks, const std::optional<at::Tensor>& meta,
                       const char* name) {
  if (meta.has_value()) {
    refer_to(masks, *meta, name);
  } else {
    pack(masks);
  }
}

void PackedRows::refer_to(const at::Tensor& bits, const at::Tensor& meta, const char* name) {
  TORCH_CHECK_TYPE(bits.scalar_type() == at::kLong, name, ": bits must be int64, not ",
                   bits.scalar_type());
  TORCH_CHECK_TYPE(meta.scalar_type() == at::kInt, name, ": meta must be int32, not ",
                   meta.scalar_type());
  TORCH_CHECK_VALUE(bits.dim() == 2 && bits.size(1) % kWordGroup == 0, name,
                    ": bits must have shape (N, words) with words a multiple of ", kWordGroup,
                    ", not ", bits.sizes());
  TORCH_CHECK_VALUE(meta.dim() == 2 && meta.size(0) == bits.size(0) && meta.size(1) == kMetaFields,
                    name, ": meta must have shape (", bits.size(0), ", ", kMetaFields, "), not ",
                    meta.sizes());
  TORCH_CHECK(bits.is_cpu() && meta.is_cpu(), name, ": bits are on ", bits.device(),
              ", meta is on ", meta.device(), ", both must be on the CPU");
  bits_ = bits.contiguous();
  descriptions_ = meta.contiguous();
  meta_ = descriptions_.const_data_ptr<int32_t>();
  words_ = bits.size(1);
  const auto* base = reinterpret_cast<const uint64_t*>(bits_.const_data_ptr<int64_t>());
  rows_.resize(bits.size(0));
  for (int64_t i = 0; i < count(); ++i) {
    const int32_t* m = meta_ + kMetaFields * i;
    TORCH_CHECK_VALUE(m[kFirst] >= 0 && m[kFirst] <= m[kLast] && m[kLast] <= words_ &&
                          m[kArea] >= 0 && m[kArea] <= 64 * words_,
                      name, ": meta of mask ", i, " does not belong to rows of ", words_, " words");
    rows_[i] = base + words_ * i;
  }
}

void PackedRows::pack(const at::Tensor& masks) {
  const DenseMasks dense(masks);
  TORCH_CHECK_TYPE(dense.type == PixelType::kByte, "masks must be bool, uint8 or int8, not ",
                   masks.scalar_type());
  words_ = row_words(dense.height * dense.width);
  rows_.resize(dense.count);
  descriptions_ = at::empty({dense.count, kMetaFields}, at::kInt);
  auto* meta = descriptions_.mutable_data_ptr<int32_t>();
  meta_ = meta;
  const MaskKernels& kernels = mask_kernels();
  std::mutex mutex;
  at::parallel_for(0, dense.count, dense.grain(), [&](int64_t begin, int64_t end) {
    WordArena arena;
    for (int64_t i = begin; i < end; ++i) {
      int32_t* m = meta + kMetaFields * i;
      uint64_t* row = arena.reserve(words_);
      kernels.pack(dense.pixels + i * dense.stride, dense.type, 0.0, dense.height, dense.width, row,
                   m);
      const int64_t first = m[kFirst] / kWordGroup * kWordGroup;
      const int64_t length = round_up(m[kLast], kWordGroup) - first;
      std::memmove(row, row + first, static_cast<size_t>(length) * sizeof(uint64_t));
      arena.commit(length);
      rows_[i] = row - first;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    arenas_.push_back(std::move(arena));
  });
}

}  // namespace unseg
