// unseg::mask_overlap, unseg::mask_nms and unseg::matrix_nms on the CPU.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "large_tensor.h"
#include "ordered_masks.h"

namespace unseg {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Threads are woken for pieces of at least some 50 microseconds, the time of so many bounds.
constexpr int64_t kWorthThreads = 100000;

at::Tensor mask_overlap(const at::Tensor& masks1, const OptionalTensor& meta1,
                        const OptionalTensor& labels1, const OptionalTensor& masks2,
                        const OptionalTensor& meta2, const OptionalTensor& labels2, int64_t mode) {
  TORCH_CHECK_VALUE(mode >= kIoU && mode <= kInter, "mode must be 0 to 4, not ", mode);
  const bool self = !masks2.has_value();
  TORCH_CHECK_VALUE(!self || !(meta2.has_value() || labels2.has_value()),
                    "meta2 or labels2 are given without masks2");
  TORCH_CHECK_VALUE(self || labels1.has_value() == labels2.has_value(),
                    "labels1 and labels2 must be given together");
  const PackedRows rows1(masks1, meta1, "masks1");
  std::optional<PackedRows> rows2;
  if (!self) {
    rows2.emplace(*masks2, meta2, "masks2");
    TORCH_CHECK_VALUE(rows1.words() == rows2->words(), "masks1 has ", rows1.words(),
                      " words a row, masks2 has ", rows2->words());
  }
  const int64_t n = rows1.count(), m = self ? n : rows2->count();
  std::vector<int32_t> small1, small2;
  small_labels(labels1, n, labels2, m, &small1, &small2);
  const OrderedMasks first(rows1, small1, nullptr);
  std::optional<OrderedMasks> second;
  if (!self) second.emplace(*rows2, small2, nullptr);
  const MaskView& a = first.view();
  const MaskView& b = self ? a : second->view();

  at::Tensor out = empty_large({n, m}, mode == kInter ? at::kInt : at::kFloat);
  void* values = out.mutable_data_ptr();
  const bool symmetric = self && mode != kIoA && mode != kIoB;
  std::vector<std::pair<int64_t, int64_t>> tiles;
  for (int64_t i = 0; i < n; i += kBlock) {
    for (int64_t j = symmetric ? i : 0; j < m; j += kBlock) tiles.emplace_back(i, j);
  }
  const MaskKernels& kernels = mask_kernels();
  at::parallel_for(0, static_cast<int64_t>(tiles.size()), 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      kernels.overlap_tile(a, b, tiles[t].first, tiles[t].second, static_cast<int>(mode), symmetric,
                           values, m);
    }
  });
  return out;
}

// Greedy NMS, 64 candidates at a time: each is first tested against the masks kept so far, all
// candidates side by side; then, one after the other, against the candidates kept before it. What
// is kept does not depend on the number of threads.
std::tuple<at::Tensor, at::Tensor, at::Tensor> mask_nms(
    const at::Tensor& packed_or_dense, const OptionalTensor& meta, const OptionalTensor& labels,
    const at::Tensor& scores, double threshold, int64_t mode) {
  TORCH_CHECK_VALUE(mode >= kIoU && mode < kInter, "mode must be 0 to 3, not ", mode);
  TORCH_CHECK_VALUE(threshold >= 0, "iou_threshold must be at least 0, not ", threshold);
  const PackedRows rows(packed_or_dense, meta, "masks");
  const int64_t n = rows.count();
  std::vector<int32_t> small, none;
  small_labels(labels, n, std::nullopt, 0, &small, &none);
  const std::vector<int64_t> order = falling_order(read_scores(scores, n));
  const OrderedMasks all(rows, small, &order);
  const MaskView& masks = all.view();
  OrderedMasks kept(n);
  const MaskKernels& kernels = mask_kernels();
  const int overlap = static_cast<int>(mode);

  at::Tensor keep = at::zeros({n}, at::kBool), ranked = at::empty({n}, at::kLong);
  bool* flags = keep.mutable_data_ptr<bool>();
  int64_t* indices = ranked.mutable_data_ptr<int64_t>();
  std::fill(indices, indices + n, -1);
  int64_t last_counted = 0;  // pairs counted for the block before: what the next one will cost
  int64_t mean_words = 0;
  for (int64_t k = 0; k < n; ++k) mean_words += masks.last[k] - masks.first[k];
  mean_words /= std::max<int64_t>(n, 1);
  for (int64_t block = 0; block < n; block += kBlock) {
    const int64_t size = std::min(kBlock, n - block), before = kept.view().count;
    std::array<bool, kBlock> dropped{};
    std::array<int64_t, kBlock> counted{};
    // A pair takes as long as some 20 bounds and a bound for every other word.
    const bool worth = before * size + last_counted * (20 + mean_words / 2) > 4 * kWorthThreads;
    at::parallel_for(0, size, worth ? 8 : size, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        dropped[k] =
            kernels.suppressed(kept.view(), 0, masks, block + k, overlap, threshold, &counted[k]);
      }
    });
    last_counted = 0;
    for (int64_t k = 0; k < size; ++k) {
      last_counted += counted[k];
      if (dropped[k] || kernels.suppressed(kept.view(), before, masks, block + k, overlap,
                                           threshold, &last_counted)) {
        continue;
      }
      const int64_t index = order[block + k];
      indices[kept.view().count] = index;
      flags[index] = true;
      kept.append(masks, block + k);
    }
  }
  return {keep, ranked, at::scalar_tensor(kept.view().count, at::kLong)};
}

// Splits the columns evenly. Column j costs about j, so a thread takes columns from both ends.
template <typename Body>
void for_columns(int64_t n, Body body) {
  const int64_t pairs = (n + 1) / 2;
  const int64_t grain = kWorthThreads / (n + 1) + 1;
  at::parallel_for(0, pairs, grain, [&](int64_t begin, int64_t end) {
    body(begin, end);
    const int64_t upper = std::max(n - end, pairs);
    if (upper < n - begin) body(upper, n - begin);
  });
}

at::Tensor matrix_nms(const at::Tensor& packed_or_dense, const OptionalTensor& meta,
                      const OptionalTensor& labels, const at::Tensor& scores, int64_t kernel,
                      double sigma) {
  TORCH_CHECK_VALUE(kernel == kGaussian || kernel == kLinear, "kernel must be 0 or 1, not ",
                    kernel);
  TORCH_CHECK_VALUE(kernel == kLinear || (sigma > 0 && std::isfinite(sigma)),
                    "sigma must be positive and finite, not ", sigma);
  const PackedRows rows(packed_or_dense, meta, "masks");
  const int64_t n = rows.count();
  std::vector<int32_t> small, none;
  small_labels(labels, n, std::nullopt, 0, &small, &none);
  const std::vector<double> values = read_scores(scores, n);
  const std::vector<int64_t> order = falling_order(values);
  const OrderedMasks ordered(rows, small, &order);
  const MaskView& masks = ordered.view();
  const MaskKernels& kernels = mask_kernels();

  const int64_t padded = round_up(n, kBlock);
  std::vector<double> most(n), decay(n);
  std::vector<float> most_f(padded, 0.0f);
  MatrixState state{most.data(), most_f.data(), decay.data(), sigma, static_cast<int>(kernel)};
  for_columns(n, [&](int64_t begin, int64_t end) {
    std::vector<float> bounds(padded);
    for (int64_t j = begin; j < end; ++j) kernels.matrix_most(masks, j, bounds.data(), state);
  });
  for (int64_t j = 0; j < n; ++j) most_f[j] = static_cast<float>(most[j]);
  for_columns(n, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) kernels.matrix_decay(masks, j, state);
  });

  at::Tensor out = at::empty({n}, at::kFloat);
  float* decayed = out.mutable_data_ptr<float>();
  for (int64_t j = 0; j < n; ++j) {
    decayed[order[j]] = static_cast<float>(values[order[j]] * decay[j]);
  }
  return out;
}

TORCH_LIBRARY_IMPL(unseg, CPU, m) {
  m.impl("mask_overlap", mask_overlap);
  m.impl("mask_nms", mask_nms);
  m.impl("matrix_nms", matrix_nms);
}

}  // namespace
}  // namespace unseg
