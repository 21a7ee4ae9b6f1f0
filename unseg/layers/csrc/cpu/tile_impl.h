// A 64 x 64 tile of the overlap matrix: included inside a namespace after pairs_impl.h.

// Intersections of a tile; row i of the tile holds something iff bit i of `rows` is set.
struct Tile {
  int32_t inter[kBlock][kBlock];
  uint64_t rows;
};

// The words in which both blocks have pixels, and whether counting all pairs there at once is
// cheaper than pair by pair: the 4 x 4 block counts a group in 1.5 cycles against 2, and a single
// pair costs about 12 cycles besides.
struct TilePlan {
  uint64_t candidates[kBlock];  // bit j of word i: the boxes meet and the labels are equal
  int64_t begin, end;
  bool dense;
};

static inline void plan_tile(const MaskView& a, const MaskView& b, int64_t i0, int64_t j0,
                             bool mirror, TilePlan* plan) {
  float bounds[kBlock];
  int64_t pair_cost = 0;
  plan->begin = INT32_MAX;
  plan->end = 0;
  for (int64_t i = 0; i < kBlock; ++i) {
    plan->candidates[i] = 0;
    if (i0 + i >= a.count) continue;
    bound_block_as<kIoU>(b, j0, a, i0 + i, bounds);
    uint64_t bits = above(bounds, 0.0f);
    if (mirror && i0 == j0) bits &= ~low_bits(i);  // on the diagonal one half is enough
    plan->candidates[i] = bits;
    for (; bits != 0; bits &= bits - 1) {
      const int64_t j = j0 + __builtin_ctzll(bits);
      const int64_t begin = most(a.first[i0 + i], b.first[j]);
      const int64_t end = least(a.last[i0 + i], b.last[j]);
      if (begin >= end) continue;
      pair_cost += 12 + (end - begin) / 4;
      if (begin < plan->begin) plan->begin = begin;
      if (end > plan->end) plan->end = end;
    }
  }
  const int64_t dense_cost = kBlock * kBlock * (6 + (plan->end - plan->begin) * 3 / 16);
  plan->dense = plan->begin < plan->end && dense_cost < pair_cost;
}

static inline void count_pairs(const MaskView& a, const MaskView& b, int64_t i0, int64_t j0,
                               const TilePlan& plan, Tile* tile) {
  for (int64_t i = 0; i < kBlock; ++i) {
    uint64_t bits = plan.candidates[i];
    if (bits == 0) continue;
    tile->rows |= 1ULL << i;
    __builtin_memset(tile->inter[i], 0, sizeof(tile->inter[i]));
    for (; bits != 0; bits &= bits - 1) {
      const int64_t j = __builtin_ctzll(bits);
      tile->inter[i][j] = static_cast<int32_t>(intersection(a, i0 + i, b, j0 + j));
    }
  }
}

#ifdef UNSEG_HAS_BLOCK
// All pairs, a stretch of words at a time so that the rows stay in the cache.
static inline void count_blocks(const MaskView& a, const MaskView& b, int64_t i0, int64_t j0,
                                const TilePlan& plan, Tile* tile) {
  constexpr int64_t kStretch = 512;
  const int64_t rows = a.count - i0 < kBlock ? a.count - i0 : kBlock;
  const int64_t columns = b.count - j0 < kBlock ? b.count - j0 : kBlock;
  __builtin_memset(tile->inter, 0, sizeof(tile->inter));
  tile->rows = ~0ULL;
  for (int64_t w = plan.begin / kWordGroup * kWordGroup; w < plan.end; w += kStretch) {
    const int64_t stop = w + kStretch < plan.end ? w + kStretch : plan.end;
    for (int64_t i = 0; i < rows; i += 4) {
      const uint64_t* left[4];
      for (int64_t k = 0; k < 4; ++k) left[k] = a.row[i0 + least(i + k, rows - 1)];
      for (int64_t j = 0; j < columns; j += 4) {
        const uint64_t* right[4];
        for (int64_t k = 0; k < 4; ++k) right[k] = b.row[j0 + least(j + k, columns - 1)];
        int32_t sums[16] = {};
        count_common_4x4(left, right, w, stop, sums);
        for (int k = 0; k < 16; ++k) tile->inter[i + k / 4][j + k % 4] += sums[k];
      }
    }
  }
  for (int64_t i = 0; i < kBlock; ++i) {  // other labels, and pairs that the boxes rule out
    for (int64_t j = 0; j < kBlock; ++j) {
      if (!(plan.candidates[i] >> j & 1)) tile->inter[i][j] = 0;
    }
  }
}
#endif

// One row of intersections to overlaps. While all numbers are below 2^24, float32 holds them
// exactly and its one rounding gives the same value as float64 rounded to float32.
template <typename Real>
static inline void divide_row(const int32_t* inter, int32_t area, const int32_t* areas, int mode,
                              float* __restrict out) {
  const Real own = static_cast<Real>(area);
#pragma GCC ivdep
  for (int k = 0; k < kBlock; ++k) {
    const Real other = static_cast<Real>(areas[k]), common = static_cast<Real>(inter[k]);
    Real denominator;
    if (mode == kIoU) {
      denominator = own + (other - common);
    } else if (mode == kIoMin) {
      denominator = own < other ? own : other;
    } else {
      denominator = mode == kIoA ? own : other;
    }
    // Nothing is below 1 but 0/0, which is 0 by definition.
    denominator = denominator > Real(1) ? denominator : Real(1);
    out[k] = static_cast<float>(common / denominator);
  }
}

// `small`: sums of two areas are below 2^24.
static inline void ratio_row(const Tile& tile, const MaskView& a, const MaskView& b, int64_t i0,
                             int64_t i, int64_t j0, int mode, bool small, void* out) {
  if (mode == kInter) {
    __builtin_memcpy(out, tile.inter[i], sizeof(tile.inter[i]));
  } else if (small) {
    divide_row<float>(tile.inter[i], a.area[i0 + i], b.area + j0, mode, static_cast<float*>(out));
  } else {
    divide_row<double>(tile.inter[i], a.area[i0 + i], b.area + j0, mode, static_cast<float*>(out));
  }
}

static inline int32_t largest_area(const MaskView& v, int64_t begin) {
  int32_t largest = 0;
  for (int k = 0; k < kBlock; ++k) largest = most(largest, v.area[begin + k]);
  return largest;
}

// Values are moved as 32-bit patterns here, float32 or int32 alike.
static void overlap_tile(const MaskView& a, const MaskView& b, int64_t i0, int64_t j0, int mode,
                         bool mirror, void* out, int64_t stride) {
  TilePlan plan;
  plan_tile(a, b, i0, j0, mirror, &plan);
  Tile tile;
  tile.rows = 0;
#ifdef UNSEG_HAS_BLOCK
  if (plan.dense) {
    count_blocks(a, b, i0, j0, plan, &tile);
  } else {
    count_pairs(a, b, i0, j0, plan, &tile);
  }
#else
  count_pairs(a, b, i0, j0, plan, &tile);
#endif
  const int64_t rows = a.count - i0 < kBlock ? a.count - i0 : kBlock;
  const int64_t columns = b.count - j0 < kBlock ? b.count - j0 : kBlock;
  const bool small = largest_area(a, i0) <= (1 << 23) && largest_area(b, j0) <= (1 << 23);
  const bool diagonal = mirror && i0 == j0;
  uint32_t values[kBlock][kBlock];
  for (int64_t i = 0; i < rows; ++i) {
    if (tile.rows >> i & 1) {
      ratio_row(tile, a, b, i0, i, j0, mode, small, values[i]);
    } else {
      __builtin_memset(values[i], 0, sizeof(values[i]));
    }
  }
  if (diagonal) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < i; ++j) values[i][j] = values[j][i];
    }
  }
  uint32_t* target = static_cast<uint32_t*>(out);
  for (int64_t i = 0; i < rows; ++i) {
    __builtin_memcpy(target + (i0 + i) * stride + j0, values[i], columns * sizeof(uint32_t));
  }
  if (!mirror || diagonal) return;
  for (int64_t j = 0; j < columns; ++j) {
    uint32_t* row = target + (j0 + j) * stride + i0;
    for (int64_t i = 0; i < rows; ++i) row[i] = values[i][j];
  }
}
