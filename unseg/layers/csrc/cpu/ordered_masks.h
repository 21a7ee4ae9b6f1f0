// Packed masks as one array per field, in the order in which an op visits them.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "packed_rows.h"

namespace unseg {

// Owns what a MaskView points to, but for the words.
class OrderedMasks {
 public:
  // Room for `capacity` masks, none of them there yet.
  explicit OrderedMasks(int64_t capacity);
  // The masks `order`, all of them as they come if null. `labels` as from small_labels(), or empty.
  OrderedMasks(const PackedRows& rows, const std::vector<int32_t>& labels,
               const std::vector<int64_t>* order);
  OrderedMasks(const OrderedMasks&) = delete;
  OrderedMasks& operator=(const OrderedMasks&) = delete;

  const MaskView& view() const { return view_; }
  // Appends mask j of another set.
  void append(const MaskView& other, int64_t j);

 private:
  // Fields in the order of MaskView: area, x0, y0, x1, y1, first, last, label.
  int32_t* field(int k) { return fields_.data() + k * padded_; }

  int64_t padded_;
  std::vector<int32_t> fields_;
  std::vector<const uint64_t*> rows_;
  MaskView view_;
};

// Scores as float64. Raises unless they are floating with shape (count,), on the CPU.
std::vector<double> read_scores(const at::Tensor& scores, int64_t count);

// Indices by falling score; equal scores in input order, NaN last.
std::vector<int64_t> falling_order(const std::vector<double>& scores);

// int64 labels as int32 numbers, equal where the labels are equal, over both tensors alike. Absent
// tensors give empty vectors. Raises on a wrong shape or type.
void small_labels(const std::optional<at::Tensor>& labels1, int64_t count1,
                  const std::optional<at::Tensor>& labels2, int64_t count2,
                  std::vector<int32_t>* small1, std::vector<int32_t>* small2);

}  // namespace unseg
