// A 64 x 64 tile of the overlap matrix: included inside a namespace after pairs_impl.h.

// Intersections of a tile; row i of the tile holds something iff bit i of `rows` is set.
struct Tile {
  int32_t inter[kBlock][kBlock];
  uint64_t rows;
};

// The tile's size, the words in which both sides have pixels at all, and what counting takes.
struct TilePlan {
  int64_t rows, columns;
  int64_t begin, end;
  int64_t row_words;  // words of all rows within [begin, end)
  int64_t pair_words;  // an estimate of the words that a pair has in common
};

// Bit k: the box of mask begin + k of `a` meets that of mask j of `b`, and the labels are equal.
static inline uint64_t meeting(const MaskView& a, int64_t begin, const MaskView& b, int64_t j) {
  const int32_t *x0 = a.x0 + begin, *y0 = a.y0 + begin, *x1 = a.x1 + begin, *y1 = a.y1 + begin;
  const int32_t* label = a.label + begin;
  const int32_t qx0 = b.x0[j], qy0 = b.y0[j], qx1 = b.x1[j], qy1 = b.y1[j], qlabel = b.label[j];
  float hits[kBlock];
#pragma GCC ivdep
  for (int k = 0; k < kBlock; ++k) {
    const int32_t hit = static_cast<int32_t>(x0[k] < qx1) & static_cast<int32_t>(qx0 < x1[k]) &
                        static_cast<int32_t>(y0[k] < qy1) & static_cast<int32_t>(qy0 < y1[k]) &
                        static_cast<int32_t>(label[k] == qlabel);
    hits[k] = static_cast<float>(hit);
  }
  return above(hits, 0.0f);
}

// The words in which masks [begin, begin + count) have pixels, and their mean number per mask.
static inline void hull(const MaskView& v, int64_t begin, int64_t count, int64_t* first,
                        int64_t* last, int64_t* mean) {
  int64_t sum = 0;
  *first = INT32_MAX;
  *last = 0;
  for (int64_t k = begin; k < begin + count; ++k) {
    if (v.area[k] == 0) continue;
    if (v.first[k] < *first) *first = v.first[k];
    if (v.last[k] > *last) *last = v.last[k];
    sum += v.last[k] - v.first[k];
  }
  *mean = sum / count;
}

static inline TilePlan plan_tile(const MaskView& a, const MaskView& b, int64_t i0, int64_t j0) {
  TilePlan plan;
  plan.rows = a.count - i0 < kBlock ? a.count - i0 : kBlock;
  plan.columns = b.count - j0 < kBlock ? b.count - j0 : kBlock;
  int64_t first[2], last[2], mean[2];
  hull(a, i0, plan.rows, &first[0], &last[0], &mean[0]);
  hull(b, j0, plan.columns, &first[1], &last[1], &mean[1]);
  plan.begin = first[0] > first[1] ? first[0] : first[1];
  plan.end = last[0] < last[1] ? last[0] : last[1];
  plan.pair_words = mean[0] < mean[1] ? mean[0] : mean[1];
  plan.row_words = 0;
  for (int64_t i = i0; i < i0 + plan.rows; ++i) {
    const int64_t from = a.first[i] > plan.begin ? a.first[i] : plan.begin;
    const int64_t to = a.last[i] < plan.end ? a.last[i] : plan.end;
    if (from < to) plan.row_words += to - from;
  }
  return plan;
}

// Only pairs whose boxes meet; with `diagonal`, where i and j are the same masks, each pair once.
// Returns false, with nothing counted, if that takes more than `budget` clocks.
static inline bool count_pairs(const MaskView& a, const MaskView& b, int64_t i0, int64_t j0,
                               bool diagonal, const TilePlan& plan, int64_t budget, Tile* tile) {
  uint64_t candidates[kBlock] = {};
  int64_t pairs = 0;
  for (int64_t i = 0; i < plan.rows; ++i) {
    candidates[i] = meeting(b, j0, a, i0 + i);
    if (candidates[i] != 0) tile->rows |= 1ULL << i;
    if (diagonal) candidates[i] &= ~low_bits(i);
    pairs += __builtin_popcountll(candidates[i]);
  }
  if (pairs * (24 + plan.pair_words / 5) > budget) return false;
  for (int64_t i = 0; i < plan.rows; ++i) {
    if (tile->rows >> i & 1) __builtin_memset(tile->inter[i], 0, sizeof(tile->inter[i]));
  }
  for (int64_t i = 0; i < plan.rows; ++i) {
    for (uint64_t bits = candidates[i]; bits != 0; bits &= bits - 1) {
      const int64_t j = __builtin_ctzll(bits);
      const auto inter = static_cast<int32_t>(intersection(a, i0 + i, b, j0 + j));
      tile->inter[i][j] = inter;
      if (diagonal) tile->inter[j][i] = inter;
    }
  }
  return true;
}

#ifdef UNSEG_HAS_COLUMNS
// All pairs, a stretch of words at a time so that the transposed words stay in the first cache.
static inline void count_all(const MaskView& a, const MaskView& b, int64_t i0, int64_t j0,
                             const TilePlan& plan, Tile* tile) {
  constexpr int64_t kStretch = 32;
  static const uint64_t kZeros[kWordGroup] = {};
  alignas(64) uint64_t columns[kStretch * kBlock];
  __builtin_memset(tile->inter, 0, sizeof(tile->inter));
  tile->rows = ~0ULL;
  for (int64_t w = plan.begin & ~7; w < plan.end; w += kStretch) {
    const int64_t words = w + kStretch < plan.end ? kStretch : plan.end - w;
    for (int64_t part = 0; part < words; part += 8) {
      for (int64_t k = 0; k < kBlock; k += 8) {
        const uint64_t* groups[8];
        for (int64_t r = 0; r < 8; ++r) {
          const int64_t j = j0 + k + r, word = w + part;  // beyond the span there are zeros
          const bool stored = word + kWordGroup > b.first[j] && word < b.last[j];
          groups[r] = stored ? b.row[j] + word : kZeros;
        }
        transpose_8x8(groups, columns + kBlock * part + k);
      }
    }
    for (int64_t i = 0; i < plan.rows; ++i) {
      const int64_t begin = most(a.first[i0 + i], w), end = least(a.last[i0 + i], w + words);
      if (begin >= end) continue;
      count_columns(a.row[i0 + i] + begin, columns + kBlock * (begin - w), end - begin,
                    tile->inter[i]);
    }
  }
  for (int64_t i = 0; i < plan.rows; ++i) {
    const int32_t own = a.label[i0 + i];
    const int32_t* label = b.label + j0;
    for (int64_t j = 0; j < kBlock; ++j) tile->inter[i][j] &= -static_cast<int32_t>(label[j] == own);
  }
}
#endif

// Chooses the cheaper way. The numbers are clocks, roughly, measured.
static inline void count_tile(const MaskView& a, const MaskView& b, int64_t i0, int64_t j0,
                              bool diagonal, const TilePlan& plan, Tile* tile) {
  tile->rows = 0;
  if (plan.begin >= plan.end) return;
#ifdef UNSEG_HAS_COLUMNS
  constexpr int64_t kBoxes = 4000;  // comparing all boxes
  const int64_t all = 20 * kBlock + 12 * plan.row_words + 40 * (plan.end - plan.begin);
  if (all < kBoxes || !count_pairs(a, b, i0, j0, diagonal, plan, all - kBoxes, tile)) {
    count_all(a, b, i0, j0, plan, tile);
  }
#else
  count_pairs(a, b, i0, j0, diagonal, plan, INT64_MAX, tile);
#endif
}

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

// Writes up to four rows of a tile, and with `mirror` the same values as columns below the diagonal.
// Values are moved as 32-bit patterns, float32 or int32 alike.
static inline void write_rows(const uint32_t (*values)[kBlock], int64_t rows, int64_t columns,
                              bool mirror, uint32_t* across, uint32_t* down, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    if (columns == kBlock) {  // of constant size: no call
      __builtin_memcpy(across + i * stride, values[i], sizeof(values[i]));
    } else {
      __builtin_memcpy(across + i * stride, values[i], columns * sizeof(uint32_t));
    }
  }
  if (!mirror) return;
  int64_t j = 0;
  for (; rows == 4 && j + 4 <= columns; j += 4) {
    transpose_4x4(values[0] + j, kBlock, down + j * stride, stride);
  }
  for (; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) down[j * stride + i] = values[i][j];
  }
}

static void overlap_tile(const MaskView& a, const MaskView& b, int64_t i0, int64_t j0, int mode,
                         bool symmetric, void* out, int64_t stride) {
  const TilePlan plan = plan_tile(a, b, i0, j0);
  const bool diagonal = symmetric && i0 == j0, mirror = symmetric && i0 != j0;
  Tile tile;
  count_tile(a, b, i0, j0, diagonal, plan, &tile);
  const bool small = largest_area(a, i0) <= (1 << 23) && largest_area(b, j0) <= (1 << 23);
  uint32_t* across = static_cast<uint32_t*>(out) + i0 * stride + j0;
  uint32_t* down = static_cast<uint32_t*>(out) + j0 * stride + i0;
  // Four rows at a time: their writes, which miss the caches, overlap with the next divisions.
  for (int64_t i = 0; i < plan.rows; i += 4) {
    alignas(64) uint32_t values[4][kBlock] = {};
    const int64_t rows = plan.rows - i < 4 ? plan.rows - i : 4;
    for (int64_t k = 0; k < rows; ++k) {
      if (tile.rows >> (i + k) & 1) ratio_row(tile, a, b, i0, i + k, j0, mode, small, values[k]);
    }
    write_rows(values, rows, plan.columns, mirror, across + i * stride, down + i, stride);
  }
}
