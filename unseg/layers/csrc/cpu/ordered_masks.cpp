#include "ordered_masks.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace unseg {

OrderedMasks::OrderedMasks(int64_t capacity)
    : padded_(round_up(capacity, kBlock)),
      fields_(kMetaFields * padded_, 0),
      rows_(padded_, nullptr),
      view_{0,        rows_.data(), field(0), field(1), field(2),
            field(3), field(4),     field(5), field(6), field(7)} {}

OrderedMasks::OrderedMasks(const PackedRows& rows, const std::vector<int32_t>& labels,
                           const std::vector<int64_t>* order)
    : OrderedMasks(rows.count()) {
  for (int64_t k = 0; k < rows.count(); ++k) {
    const int64_t i = order != nullptr ? (*order)[k] : k;
    rows_[k] = rows.row(i);
    for (int f = 0; f < kSpare; ++f) field(f)[k] = rows.meta(i)[f];
    field(kSpare)[k] = labels.empty() ? 0 : labels[i];
  }
  view_.count = rows.count();
}

void OrderedMasks::append(const MaskView& other, int64_t j) {
  const int64_t k = view_.count++;
  const int32_t* const source[kMetaFields] = {other.area, other.x0,    other.y0,   other.x1,
                                              other.y1,   other.first, other.last, other.label};
  for (int f = 0; f < kMetaFields; ++f) field(f)[k] = source[f][j];
  rows_[k] = other.row[j];
}

std::vector<double> read_scores(const at::Tensor& scores, int64_t count) {
  TORCH_CHECK_TYPE(at::isFloatingType(scores.scalar_type()), "scores must be floating, not ",
                   scores.scalar_type());
  TORCH_CHECK_VALUE(scores.dim() == 1 && scores.size(0) == count, "scores must have shape (", count,
                    "), not ", scores.sizes());
  TORCH_CHECK(scores.is_cpu(), "scores are on ", scores.device(), ", the masks are on the CPU");
  if (scores.scalar_type() == at::kFloat && scores.is_contiguous()) {
    const float* values = scores.const_data_ptr<float>();
    return {values, values + count};
  }
  const at::Tensor exact = scores.to(at::kDouble).contiguous();
  const double* values = exact.const_data_ptr<double>();
  return {values, values + count};
}

std::vector<int64_t> falling_order(const std::vector<double>& scores) {
  std::vector<std::pair<double, int64_t>> ranked;
  ranked.reserve(scores.size());
  std::vector<int64_t> not_numbers;
  for (size_t i = 0; i < scores.size(); ++i) {
    if (std::isnan(scores[i])) {
      not_numbers.push_back(static_cast<int64_t>(i));
    } else {
      ranked.emplace_back(0.0 - scores[i], static_cast<int64_t>(i));  // 0 - x: one zero, not two
    }
  }
  std::sort(ranked.begin(), ranked.end());
  std::vector<int64_t> order;
  order.reserve(scores.size());
  for (const auto& entry : ranked) order.push_back(entry.second);
  order.insert(order.end(), not_numbers.begin(), not_numbers.end());
  return order;
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
