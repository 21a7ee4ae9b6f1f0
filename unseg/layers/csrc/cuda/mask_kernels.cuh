// The CUDA kernels of the mask ops, free of torch.
//
// Legend: N, M masks, W words a row; a tile is kTile x kTile pairs of masks.
//
// pack_kernel makes the words. All other ops visit pairs of masks in tiles: pair_kernel counts
// common bits of all pairs of a tile, over the words where both sides have pixels, and hands each
// count to a Visitor, which stores an overlap, sets a bit of the suppression matrix, or takes part
// in a maximum. Tiles in which no upper bound could matter are left at once. Every result is
// either exact or a maximum of exact numbers, so it does not depend on the order of execution.
#pragma once

#include "../mask_ops.h"

namespace unseg {
namespace cuda {

using Word = unsigned long long;

constexpr int kTile = 64;      // masks on each side of a tile; also the bits of a Word
constexpr int kSide = 16;      // a block is kSide x kSide threads,
constexpr int kEach = 4;       // each of which has kEach x kEach pairs
constexpr int kStage = 32;     // words of each mask held in shared memory at a time
constexpr int kPackThreads = 512;
constexpr int kPackSteps = 8;  // pieces of 32 pixels that a warp has in flight
constexpr int kGridRows = 65535;  // the most blocks that a grid may have in y

// N packed masks, visited in `order` if it is not null.
struct View {
  const Word* bits;       // (N, words)
  const int* meta;        // (N, kMetaFields)
  const int64_t* labels;  // (N,) or null
  const int64_t* order;   // (N,) or null
  int count;
  int words;

  __device__ int64_t index(int i) const { return order != nullptr ? order[i] : i; }
};

// What a tile needs to know of one mask. A mask past the end has area 0 and an empty box.
struct Brief {
  int area, x0, y0, x1, y1, first, last;
  int64_t label;
};

__device__ inline Brief brief_of(const View& v, int i) {
  Brief b = {0, 0, 0, 0, 0, 0, 0, 0};
  if (i >= v.count) return b;
  const int64_t index = v.index(i);
  const int* m = v.meta + kMetaFields * index;
  b.area = m[kArea];
  b.x0 = m[kX0];
  b.y0 = m[kY0];
  b.x1 = m[kX1];
  b.y1 = m[kY1];
  // Clamped: a description that does not fit must not lead outside of the row.
  b.first = m[kFirst] < 0 ? 0 : m[kFirst];
  b.last = m[kLast] > v.words ? v.words : m[kLast];
  b.label = v.labels != nullptr ? v.labels[index] : 0;
  return b;
}

// The most pixels that two masks can share.
__device__ inline int most_common(const Brief& a, const Brief& b) {
  if (a.label != b.label) return 0;
  const int w = (a.x1 < b.x1 ? a.x1 : b.x1) - (a.x0 > b.x0 ? a.x0 : b.x0);
  const int h = (a.y1 < b.y1 ? a.y1 : b.y1) - (a.y0 > b.y0 ? a.y0 : b.y0);
  if (w <= 0 || h <= 0) return 0;
  const int smaller = a.area < b.area ? a.area : b.area;
  return w * h < smaller ? w * h : smaller;
}

// ---- packing ------------------------------------------------------------------------------------

struct ByteSet {
  using Pixel = unsigned char;
  __device__ bool operator()(Pixel x) const { return x != 0; }
};
struct FloatAbove {
  using Pixel = float;
  float limit;
  __device__ bool operator()(Pixel x) const { return x > limit; }
};
struct DoubleAbove {
  using Pixel = double;
  double limit;
  __device__ bool operator()(Pixel x) const { return x > limit; }
};

// One block packs one mask: grid N, kPackThreads threads. A warp reads 32 neighbouring pixels at a
// time and its ballot is half a word. `stride` is in pixels, from mask to mask.
template <typename IsSet>
__global__ void pack_kernel(const typename IsSet::Pixel* pixels, int64_t stride, IsSet is_set,
                            int count, int width, int words, unsigned* bits, int* meta) {
  __shared__ int shared[kMetaFields];
  const typename IsSet::Pixel* mask = pixels + stride * blockIdx.x;
  unsigned* row = bits + 2 * static_cast<int64_t>(words) * blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x < kMetaFields) {
    const bool least = threadIdx.x == kX0 || threadIdx.x == kY0 || threadIdx.x == kFirst;
    shared[threadIdx.x] = least ? INT32_MAX : 0;
  }
  __syncthreads();

  int area = 0, x0 = INT32_MAX, y0 = INT32_MAX, x1 = 0, y1 = 0, first = INT32_MAX, last = 0;
  const int halves = 2 * words, warps = kPackThreads / 32;
  for (int start = warp * kPackSteps; start < halves; start += warps * kPackSteps) {
    bool set[kPackSteps];
#pragma unroll
    for (int k = 0; k < kPackSteps; ++k) {
      const int64_t p = 32 * static_cast<int64_t>(start + k) + lane;
      set[k] = p < count && is_set(mask[p]);
    }
#pragma unroll
    for (int k = 0; k < kPackSteps; ++k) {
      const int half = start + k;  // kPackSteps divides `halves`, a multiple of 16
      const unsigned ballot = __ballot_sync(0xffffffffu, set[k]);
      if (lane == 0) row[half] = ballot;
      if (ballot == 0) continue;  // the same for the whole warp
      first = first < half / 2 ? first : half / 2;
      last = half / 2 + 1;
      if (lane == 0) area += __popc(ballot);
      if (set[k]) {
        const int p = 32 * half + lane, y = p / width, x = p - y * width;
        x0 = x < x0 ? x : x0;
        x1 = x + 1 > x1 ? x + 1 : x1;
        y0 = y < y0 ? y : y0;
        y1 = y + 1;
      }
    }
  }
  atomicAdd(&shared[kArea], area);
  atomicMin(&shared[kX0], x0);
  atomicMin(&shared[kY0], y0);
  atomicMax(&shared[kX1], x1);
  atomicMax(&shared[kY1], y1);
  atomicMin(&shared[kFirst], first);
  atomicMax(&shared[kLast], last);
  __syncthreads();
  if (threadIdx.x < kMetaFields) {
    const int value = shared[kArea] > 0 ? shared[threadIdx.x] : 0;
    meta[kMetaFields * static_cast<int64_t>(blockIdx.x) + threadIdx.x] = value;
  }
}

// ---- pairs --------------------------------------------------------------------------------------

// Loads kStage words from word `start` of the kTile masks from i0 on; zeros outside of [begin, end)
// and past the last mask.
__device__ inline void load_stage(const View& v, int i0, int start, int begin, int end, int thread,
                                  Word (*stage)[kStage + 1]) {
  for (int k = thread; k < kTile * kStage; k += kSide * kSide) {
    const int i = k / kStage, w = k % kStage, word = start + w;
    const bool inside = i0 + i < v.count && word >= begin && word < end;
    stage[i][w] = inside ? v.bits[v.index(i0 + i) * v.words + word] : 0;
  }
}

// Grid (tiles of b, up to kGridRows tiles of a, the first one with number `row`), block
// (kSide, kSide). A thread has masks y + kSide * r of the tile of `a` and x + kSide * c of that of
// `b`. With Visitor::kTriangle a and b are the same set, only pairs i < j count, and tiles below
// the diagonal are left out.
//
// Visitor: wants(a, b, i, j, limit) says whether a pair with at most `limit` common pixels matters;
// visit(a, b, i, j, row, column, inter, scratch) takes a count; finish(i0, j0, thread, scratch)
// ends the tile. `scratch` is kTile words of shared memory that start as Visitor::kInitial.
template <typename Visitor>
__global__ void pair_kernel(View a, View b, Visitor visitor, int row) {
  __shared__ Word left[kTile][kStage + 1];
  __shared__ Word right[kTile][kStage + 1];
  __shared__ Brief rows[kTile];
  __shared__ Brief columns[kTile];
  __shared__ Word scratch[kTile];
  __shared__ int window[4];  // first and last + 1 word of the rows, and of the columns
  const int i0 = (row + blockIdx.y) * kTile, j0 = blockIdx.x * kTile;
  if (Visitor::kTriangle && j0 < i0) return;
  const int x = threadIdx.x, y = threadIdx.y, thread = y * kSide + x;
  if (thread < 4) window[thread] = thread % 2 == 0 ? INT32_MAX : 0;
  __syncthreads();
  if (thread < 2 * kTile) {
    const bool is_row = thread < kTile;
    const int k = is_row ? thread : thread - kTile;
    const Brief brief = is_row ? brief_of(a, i0 + k) : brief_of(b, j0 + k);
    (is_row ? rows : columns)[k] = brief;
    if (is_row) scratch[k] = Visitor::kInitial;
    if (brief.area > 0) {
      atomicMin(&window[is_row ? 0 : 2], brief.first);
      atomicMax(&window[is_row ? 1 : 3], brief.last);
    }
  }
  __syncthreads();

  bool wanted = false;
  for (int r = 0; r < kEach; ++r) {
    for (int c = 0; c < kEach; ++c) {
      const int i = y + kSide * r, j = x + kSide * c;
      if (Visitor::kTriangle && i0 + i >= j0 + j) continue;
      const int limit = most_common(rows[i], columns[j]);
      wanted = wanted || (limit > 0 && visitor.wants(rows[i], columns[j], i0 + i, j0 + j, limit));
    }
  }
  if (!__syncthreads_or(wanted)) {
    if (Visitor::kVisitsAll) {  // all counts are zero
      for (int r = 0; r < kEach; ++r) {
        for (int c = 0; c < kEach; ++c) {
          const int i = y + kSide * r, j = x + kSide * c;
          if (i0 + i >= a.count || j0 + j >= b.count) continue;
          visitor.visit(rows[i], columns[j], i0 + i, j0 + j, i, j, 0, scratch);
        }
      }
    }
    return;
  }

  const int begin = window[0] > window[2] ? window[0] : window[2];
  const int end = window[1] < window[3] ? window[1] : window[3];
  int inter[kEach][kEach] = {};
  for (int start = begin; start < end; start += kStage) {
    load_stage(a, i0, start, begin, end, thread, left);
    load_stage(b, j0, start, begin, end, thread, right);
    __syncthreads();
    for (int w = 0; w < kStage; ++w) {
      Word mine[kEach], other[kEach];
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        mine[k] = left[y + kSide * k][w];
        other[k] = right[x + kSide * k][w];
      }
#pragma unroll
      for (int r = 0; r < kEach; ++r) {
#pragma unroll
        for (int c = 0; c < kEach; ++c) inter[r][c] += __popcll(mine[r] & other[c]);
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < kEach; ++r) {
#pragma unroll
    for (int c = 0; c < kEach; ++c) {
      const int i = y + kSide * r, j = x + kSide * c;
      const bool valid = i0 + i < a.count && j0 + j < b.count;
      if (!valid || (Visitor::kTriangle && i0 + i >= j0 + j)) continue;
      const int common = rows[i].label == columns[j].label ? inter[r][c] : 0;
      visitor.visit(rows[i], columns[j], i0 + i, j0 + j, i, j, common, scratch);
    }
  }
  __syncthreads();
  visitor.finish(i0, j0, thread, scratch);
}

// Stores all overlaps: float32 (a.count, columns), or int32 counts.
struct StoreOverlap {
  static constexpr bool kTriangle = false, kVisitsAll = true;
  static constexpr Word kInitial = 0;
  int mode;
  int64_t columns;
  float* ratios;
  int* counts;

  __device__ bool wants(const Brief&, const Brief&, int, int, int) const { return true; }
  __device__ void visit(const Brief& a, const Brief& b, int i, int j, int, int, int inter,
                        Word*) const {
    const int64_t at = i * columns + j;
    if (mode == kInter) {
      counts[at] = inter;
    } else {
      ratios[at] = static_cast<float>(overlap_ratio(inter, a.area, b.area, mode));
    }
  }
  __device__ void finish(int, int, int, Word*) const {}
};

// Sets bit j % 64 of word j / 64 of row i iff mask i suppresses mask j: Word (count, blocks),
// zeroed before. Bounds decide as the overlaps themselves do: a rounded quotient never falls when
// its numerator grows.
struct SuppressionBits {
  static constexpr bool kTriangle = true, kVisitsAll = false;
  static constexpr Word kInitial = 0;
  int mode, count, blocks;
  double threshold;
  Word* bits;

  __device__ bool wants(const Brief& a, const Brief& b, int, int, int limit) const {
    return overlap_ratio(limit, a.area, b.area, mode) > threshold;
  }
  __device__ void visit(const Brief& a, const Brief& b, int, int, int row, int column, int inter,
                        Word* scratch) const {
    if (overlap_ratio(inter, a.area, b.area, mode) > threshold) {
      atomicOr(&scratch[row], Word{1} << column);
    }
  }
  __device__ void finish(int i0, int j0, int thread, Word* scratch) const {
    if (thread >= kTile || i0 + thread >= count) return;
    bits[static_cast<int64_t>(i0 + thread) * blocks + j0 / kTile] = scratch[thread];
  }
};

// Doubles that are not negative compare like their bit patterns.
__device__ inline Word bits_of(double value) {
  return static_cast<Word>(__double_as_longlong(value));
}
__device__ inline double double_of(Word bits) {
  return __longlong_as_double(static_cast<long long>(bits));
}

// Pass 1 of matrix NMS: c_j, the largest IoU with an earlier mask, as bits; zeroed before.
struct LargestOverlap {
  static constexpr bool kTriangle = true, kVisitsAll = false;
  static constexpr Word kInitial = 0;
  int count;
  Word* most;

  // `most` may be read while it grows: an old value only lets more pairs pass.
  __device__ bool wants(const Brief& a, const Brief& b, int, int j, int limit) const {
    return overlap_ratio(limit, a.area, b.area, kIoU) > double_of(most[j]);
  }
  __device__ void visit(const Brief& a, const Brief& b, int, int, int, int column, int inter,
                        Word* scratch) const {
    atomicMax(&scratch[column], bits_of(overlap_ratio(inter, a.area, b.area, kIoU)));
  }
  __device__ void finish(int, int j0, int thread, Word* scratch) const {
    if (thread < kTile && j0 + thread < count) atomicMax(&most[j0 + thread], scratch[thread]);
  }
};

// Pass 2. Gaussian: max_i (u_ij^2 - c_i^2), at least 0. Linear: max_i (1 - q_ij) for the quotients
// q_ij = (1 - u_ij) / (1 - c_i) below 1, which is 1 - min_i q_ij; kept as 1 - q so that both
// kernels are maxima from 0 on. `best` holds bits and is zeroed before.
struct LargestGain {
  static constexpr bool kTriangle = true, kVisitsAll = false;
  static constexpr Word kInitial = 0;
  int kernel, count;
  const Word* most;
  Word* best;

  __device__ double gain(double u, double c) const {
    if (kernel == kGaussian) return u * u - c * c;
    return c < 1.0 ? 1.0 - (1.0 - u) / (1.0 - c) : 0.0;
  }
  __device__ bool wants(const Brief& a, const Brief& b, int i, int j, int limit) const {
    const double u = overlap_ratio(limit, a.area, b.area, kIoU);
    return gain(u, double_of(most[i])) > double_of(best[j]);
  }
  __device__ void visit(const Brief& a, const Brief& b, int i, int, int, int column, int inter,
                        Word* scratch) const {
    const double g = gain(overlap_ratio(inter, a.area, b.area, kIoU), double_of(most[i]));
    if (g > 0.0) atomicMax(&scratch[column], bits_of(g));
  }
  __device__ void finish(int, int j0, int thread, Word* scratch) const {
    if (thread < kTile && j0 + thread < count) atomicMax(&best[j0 + thread], scratch[thread]);
  }
};

// ---- what follows the pairs ---------------------------------------------------------------------

// Greedy choice from the suppression bits, on one block of any size: kTile masks at a time, one
// thread decides among them, then all threads drop what the kept ones suppress. `removed` is Word
// (blocks,), zeroed before; `keep` bool (count,) and `ranked` int64 (count,) start as false and -1.
__global__ void choose_kernel(const Word* bits, const int64_t* order, int count, int blocks,
                              Word* removed, bool* keep, int64_t* ranked, int64_t* total) {
  __shared__ Word diagonal[kTile];
  __shared__ Word chosen;
  int kept = 0;  // the same in all threads
  for (int block = 0; block < blocks; ++block) {
    const int i0 = block * kTile;
    for (int k = threadIdx.x; k < kTile; k += blockDim.x) {
      diagonal[k] = i0 + k < count ? bits[static_cast<int64_t>(i0 + k) * blocks + block] : 0;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      Word dropped = removed[block], picked = 0;
      for (int k = 0; k < kTile && i0 + k < count; ++k) {
        if (dropped >> k & 1) continue;
        picked |= Word{1} << k;
        dropped |= diagonal[k];
      }
      chosen = picked;
    }
    __syncthreads();
    const Word picked = chosen;
    for (int k = threadIdx.x; k < kTile; k += blockDim.x) {
      if (!(picked >> k & 1)) continue;
      const int rank = kept + __popcll(picked & ((Word{1} << k) - 1));
      ranked[rank] = order[i0 + k];
      keep[order[i0 + k]] = true;
    }
    for (int w = block + 1 + threadIdx.x; w < blocks; w += blockDim.x) {
      Word drop = removed[w];
      for (Word left = picked; left != 0; left &= left - 1) {
        const int k = __ffsll(static_cast<long long>(left)) - 1;
        drop |= bits[static_cast<int64_t>(i0 + k) * blocks + w];
      }
      removed[w] = drop;
    }
    kept += __popcll(picked);
    __syncthreads();
  }
  if (threadIdx.x == 0) *total = kept;
}

// Decayed scores in input order: float32 (count,).
__global__ void decay_kernel(const Word* best, const double* scores, const int64_t* order,
                             int count, int kernel, double sigma, float* decayed) {
  const int j = blockIdx.x * blockDim.x + threadIdx.x;
  if (j >= count) return;
  const double gain = double_of(best[j]);
  const double factor = kernel == kGaussian ? exp(-sigma * gain) : 1.0 - gain;
  decayed[order[j]] = static_cast<float>(scores[order[j]] * factor);
}

}  // namespace cuda
}  // namespace unseg
