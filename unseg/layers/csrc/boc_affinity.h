// What the CPU and the CUDA kernels of unseg::boc_affinity share. Free of torch.
//
// Legend: a, b two rows of C channels (specs/deep_spectral.md 1.6).
//
//   BoC(a, b) = (1 + max_c |a_c - b_c|) / (1 + BC),   BC = sum_c |a_c - b_c| / sum_c |a_c + b_c|
//
// 0 where BC is infinite or NaN; 1 on the diagonal. Both kernels add up kChannelChunk channels at a
// time and then these sums, one after the other, so results have the same bits on every processor
// and errors grow slowly with C. 1 / (1 + BC) is also sum |a + b| / (2 sum max(|a|, |b|)): as
// accurate, but one operation more. sum |a + b| as a difference of the other two sums saves one,
// and loses all digits where b is close to -a.
#pragma once

namespace unseg {

constexpr int kChannelChunk = 32;

}  // namespace unseg
