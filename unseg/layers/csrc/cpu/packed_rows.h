// Where the words and descriptions of N masks lie: in the tensors of a PackedMasks, or, for dense
// masks, in memory of this op's own.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "mask_kernels.h"
#include "word_arena.h"

namespace unseg {

// A dense tensor of masks, checked: (N, H, W), each mask contiguous.
struct DenseMasks {
  at::Tensor tensor;  // keeps the pixels alive
  PixelType type;
  int64_t count, height, width;
  int64_t stride;  // bytes from mask to mask
  const char* pixels;

  // Raises unless `masks` is on the CPU and has a shape and type that can be packed.
  explicit DenseMasks(const at::Tensor& masks);
  // Chunk of masks for one thread.
  int64_t grain() const;
};

// Raises unless masks of this size can be packed.
void check_size(int64_t height, int64_t width);

class PackedRows {
 public:
  // `meta` given: `masks` are its bits. Otherwise `masks` are dense and packed here; only the words
  // between a mask's first and last pixel are then stored. Raises on wrong types, shapes or
  // descriptions, so that kernels need no checks; `name` is for the message.
  PackedRows(const at::Tensor& masks, const std::optional<at::Tensor>& meta, const char* name);

  int64_t count() const { return static_cast<int64_t>(rows_.size()); }
  int64_t words() const { return words_; }
  // Word w of mask i is row(i)[w], for w in the whole groups around its span only.
  const uint64_t* row(int64_t i) const { return rows_[i]; }
  const int32_t* meta(int64_t i) const { return meta_ + kMetaFields * i; }

 private:
  void refer_to(const at::Tensor& bits, const at::Tensor& meta, const char* name);
  void pack(const at::Tensor& masks);

  at::Tensor bits_, descriptions_;  // what the pointers refer to
  std::vector<WordArena> arenas_;
  std::vector<const uint64_t*> rows_;
  const int32_t* meta_ = nullptr;
  int64_t words_ = 0;
};

}  // namespace unseg
