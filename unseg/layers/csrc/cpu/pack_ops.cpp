// unseg::pack_masks and unseg::pack_rle on the CPU.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>
#include <utility>
#include <vector>

#include "large_tensor.h"
#include "packed_rows.h"

namespace unseg {
namespace {

std::tuple<at::Tensor, at::Tensor> pack_masks(const at::Tensor& masks, double threshold) {
  const DenseMasks dense(masks);
  const int64_t words = row_words(dense.height * dense.width);
  at::Tensor bits = empty_large({dense.count, words}, at::kLong);
  at::Tensor meta = at::empty({dense.count, kMetaFields}, at::kInt);
  auto* rows = reinterpret_cast<uint64_t*>(bits.mutable_data_ptr<int64_t>());
  auto* description = meta.mutable_data_ptr<int32_t>();
  const MaskKernels& kernels = mask_kernels();
  at::parallel_for(0, dense.count, dense.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      kernels.pack(dense.pixels + n * dense.stride, dense.type, threshold, dense.height,
                   dense.width, rows + n * words, description + n * kMetaFields);
    }
  });
  return {bits, meta};
}

void set_bits(uint64_t* words, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int64_t first = begin >> 6, last = (end - 1) >> 6;
  const uint64_t head = ~0ULL << (begin & 63), tail = ~0ULL >> (63 - ((end - 1) & 63));
  if (first == last) {
    words[first] |= head & tail;
    return;
  }
  words[first] |= head;
  for (int64_t w = first + 1; w < last; ++w) words[w] = ~0ULL;
  words[last] |= tail;
}

// Runs of zeros and ones in turn, starting with zeros, to bits. False if they do not add up.
class RunWriter {
 public:
  RunWriter(uint64_t* words, int64_t pixels) : words_(words), pixels_(pixels) {}
  bool add(int64_t run) {
    if (run < 0 || run > pixels_ - position_) return false;
    if (value_) set_bits(words_, position_, position_ + run);
    position_ += run;
    value_ = !value_;
    return true;
  }
  bool complete() const { return position_ == pixels_; }

 private:
  uint64_t* words_;
  int64_t pixels_, position_ = 0;
  bool value_ = false;
};

// COCO's string: 5 bits a character from chr(48) up, bit 5 says that more follow, the last one
// carries the sign; from the fourth run on, the difference to the run before the last is stored.
bool read_string(const uint8_t* text, int64_t length, RunWriter* writer) {
  int64_t before[2] = {0, 0};  // the last run but one, the last run
  int64_t index = 0;
  for (int64_t p = 0; p < length; ++index) {
    int64_t run = 0;
    for (int shift = 0;; shift += 5) {
      if (p >= length || shift > 55 || text[p] < 48 || text[p] > 111) return false;
      const int64_t piece = text[p++] - 48;
      run |= (piece & 31) << shift;
      if (piece & 32) continue;
      if (piece & 16) run -= int64_t{1} << (shift + 5);
      break;
    }
    if (index > 2) run += before[0];
    if (!writer->add(run)) return false;
    before[0] = before[1];
    before[1] = run;
  }
  return writer->complete();
}

bool read_counts(const int64_t* runs, int64_t length, RunWriter* writer) {
  for (int64_t k = 0; k < length; ++k) {
    if (!writer->add(runs[k])) return false;
  }
  return writer->complete();
}

std::tuple<at::Tensor, at::Tensor> pack_rle(const at::Tensor& data, const at::Tensor& offsets,
                                            int64_t height, int64_t width) {
  check_size(height, width);
  const bool text = data.scalar_type() == at::kByte;
  TORCH_CHECK_TYPE(text || data.scalar_type() == at::kLong,
                   "data must be uint8 (compressed) or int64 (counts), not ", data.scalar_type());
  TORCH_CHECK_TYPE(offsets.scalar_type() == at::kLong, "offsets must be int64");
  TORCH_CHECK_VALUE(data.dim() == 1 && data.is_contiguous() && offsets.dim() == 1 &&
                        offsets.is_contiguous() && offsets.size(0) >= 1,
                    "data and offsets must be contiguous vectors, offsets not empty");
  TORCH_CHECK(data.is_cpu() && offsets.is_cpu(), "data is on ", data.device(), ", offsets on ",
              offsets.device(), ": both must be on the CPU");
  const int64_t count = offsets.size(0) - 1, words = row_words(height * width);
  const int64_t* starts = offsets.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < count; ++n) {
    TORCH_CHECK_VALUE(0 <= starts[n] && starts[n] <= starts[n + 1] &&
                          starts[n + 1] <= data.size(0),
                      "offsets must rise from 0 to the length of data");
  }
  at::Tensor bits = at::zeros({count, words}, at::kLong);
  at::Tensor meta = at::empty({count, kMetaFields}, at::kInt);
  auto* rows = reinterpret_cast<uint64_t*>(bits.mutable_data_ptr<int64_t>());
  auto* description = meta.mutable_data_ptr<int32_t>();
  const MaskKernels& kernels = mask_kernels();
  std::vector<uint8_t> valid(count, 1);  // exceptions must not leave a parallel region
  at::parallel_for(0, count, 32768 / (words + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t length = starts[n + 1] - starts[n];
      RunWriter writer(rows + n * words, height * width);
      valid[n] = text ? read_string(data.const_data_ptr<uint8_t>() + starts[n], length, &writer)
                      : read_counts(data.const_data_ptr<int64_t>() + starts[n], length, &writer);
      // Columns run fastest: describe the transposed image and swap the axes of the box.
      int32_t* m = description + n * kMetaFields;
      kernels.describe(rows + n * words, width, height, m);
      std::swap(m[kX0], m[kY0]);
      std::swap(m[kX1], m[kY1]);
    }
  });
  for (int64_t n = 0; n < count; ++n) {
    TORCH_CHECK_VALUE(valid[n], "masks: the run lengths of RLE ", n, " are malformed or do not add ",
                      "up to ", height, " x ", width, " pixels");
  }
  return {bits, meta};
}

TORCH_LIBRARY_IMPL(unseg, CPU, m) {
  m.impl("pack_masks", pack_masks);
  m.impl("pack_rle", pack_rle);
}

}  // namespace
}  // namespace unseg
