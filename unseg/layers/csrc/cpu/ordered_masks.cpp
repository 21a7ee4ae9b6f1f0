#include "ordered_masks.h"

#include <algorithm>
#include <limits>

namespace unseg {

OrderedMasks::OrderedMasks(int64_t capacity)
    : padded_(round_up(capacity, kBlock)),
      fields_(kMetaFields * padded_, 0),
      rows_(padded_, nullptr),
      view_{0,        rows_.data(), field(0), field(1), field(2),
            field(3), field(4),     field(5), field(6), field(7)} {}

OrderedMasks::OrderedMasks(const PackedRows& rows, const std::vector<int32_t>& labels,
                           const at::Tensor* order)
    : OrderedMasks(rows.count()) {
  const int64_t count = rows.count();
  const int64_t* indices = nullptr;
  if (order != nullptr) {
    TORCH_CHECK_TYPE(order->scalar_type() == at::kLong, "order must be int64, not ",
                     order->scalar_type());
    TORCH_CHECK_VALUE(order->dim() == 1 && order->size(0) == count && order->is_contiguous(),
                      "order must be contiguous with shape (", count, "), not ", order->sizes());
    TORCH_CHECK(order->is_cpu(), "order is on ", order->device(), ", the masks are on the CPU");
    indices = order->const_data_ptr<int64_t>();
  }
  for (int64_t k = 0; k < count; ++k) {
    const int64_t i = indices != nullptr ? indices[k] : k;
    TORCH_CHECK_INDEX(i >= 0 && i < count, "order holds ", i, ", but there are ", count, " masks");
    rows_[k] = rows.row(i);
    for (int f = 0; f < kSpare; ++f) field(f)[k] = rows.meta(i)[f];
    field(kSpare)[k] = labels.empty() ? 0 : labels[i];
  }
  view_.count = count;
}

void OrderedMasks::append(const MaskView& other, int64_t j) {
  const int64_t k = view_.count++;
  const int32_t* const source[kMetaFields] = {other.area, other.x0,    other.y0,   other.x1,
                                              other.y1,   other.first, other.last, other.label};
  for (int f = 0; f < kMetaFields; ++f) field(f)[k] = source[f][j];
  rows_[k] = other.row[j];
}

void small_labels(const std::optional<at::Tensor>& labels1, int64_t count1,
                  const std::optional<at::Tensor>& labels2, int64_t count2,
                  std::vector<int32_t>* small1, std::vector<int32_t>* small2) {
  const std::optional<at::Tensor>* tensors[2] = {&labels1, &labels2};
  const int64_t counts[2] = {count1, count2};
  const int64_t* data[2] = {nullptr, nullptr};
  std::vector<int64_t> values;  // filled only if some label needs more than 32 bits
  bool fits = true;
  for (int t = 0; t < 2; ++t) {
    if (!tensors[t]->has_value()) continue;
    const at::Tensor& labels = **tensors[t];
    TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong, "labels must be int64, not ",
                     labels.scalar_type());
    TORCH_CHECK_VALUE(
        labels.dim() == 1 && labels.size(0) == counts[t] && labels.is_contiguous(),
        "labels must be contiguous with shape (", counts[t], "), not ", labels.sizes());
    TORCH_CHECK(labels.is_cpu(), "labels are on ", labels.device(), ", the masks are on the CPU");
    data[t] = labels.const_data_ptr<int64_t>();
    for (int64_t k = 0; k < counts[t]; ++k) {
      fits = fits && data[t][k] >= std::numeric_limits<int32_t>::min() &&
             data[t][k] <= std::numeric_limits<int32_t>::max();
    }
  }
  if (!fits) {
    for (int t = 0; t < 2; ++t) {
      if (data[t] != nullptr) values.insert(values.end(), data[t], data[t] + counts[t]);
    }
    std::sort(values.begin(), values.end());
  }
  std::vector<int32_t>* small[2] = {small1, small2};
  for (int t = 0; t < 2; ++t) {
    if (data[t] == nullptr) continue;
    small[t]->resize(counts[t]);
    for (int64_t k = 0; k < counts[t]; ++k) {
      const int64_t rank =
          fits ? data[t][k]
               : std::lower_bound(values.begin(), values.end(), data[t][k]) - values.begin();
      (*small[t])[k] = static_cast<int32_t>(rank);
    }
  }
}

}  // namespace unseg
