// A 64 x 64 tile of the overlap matrix: included inside a namespace after pairs_impl.h.

// Intersections of a tile; row i of the tile holds something iff bit i of `rows` is set.
struct Tile {
  int32_t inter[kBlock][kBlock];
  uint64_t rows;
};

// Which pairs of the tile to count, and the words in which both sides have pixels at all.
struct TilePlan {
  uint64_t candidates[kBlock];  // bit j of word i: the boxes meet and the labels are equal
  int64_t rows, columns;        // size of the tile
  int64_t begin, end;
  int64_t pairs;
  int64_t longest;  // an estimate of the words that a pair has in common
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
    *first = least(static_cast<int32_t>(*first), v.first[k]);
    *last = most(static_cast<int32_t>(*last), v.last[k]);
    sum += v.last[k] - v.first[k];
  }
  *mean = sum / count;
}

static inline TilePlan plan_tile(const MaskView& a, const MaskView& b, int64_t i0, int64_t j0,
                                 bool mirror) {
  TilePlan plan;
  plan.rows = a.count - i0 < kBlock ? a.count - i0 : kBlock;
  plan.columns = b.count - j0 < kBlock ? b.count - j0 : kBlock;
  plan.pairs = 0;
  int64_t first[2], last[2], mean[2];
  hull(a, i0, plan.rows, &first[0], &last[0], &mean[0]);
  hull(b, j0, plan.columns, &first[1], &last[1], &mean[1]);
  plan.begin = first[0] > first[1] ? first[0] : first[1];
  plan.end = last[0] < last[1] ? last[0] : last[1];
  plan.longest = mean[0] < mean[1] ? mean[0] : mean[1];
  for (int64_t i = 0; i < plan.rows; ++i) {
    uint64_t bits = meeting(b, j0, a, i0 + i);
    if (mirror && i0 == j0) bits &= ~low_bits(i);  // on the diagonal one half is enough
    plan.candidates[i] = bits;
    plan.pairs += __builtin_popcountll(bits);
  }
  return plan;
}

static inline void count_pairs(const MaskView& a, const MaskView& b, int64_t i0, int64_t j0,
                               const TilePlan& plan, Tile* tile) {
  for (int64_t i = 0; i < plan.rows; ++i) {
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

#ifdef UNSEG_HAS_COLUMNS
// Clocks, roughly, as measured: counting everything, or only the pairs that meet.
static inline bool columns_are_cheaper(const TilePlan& plan) {
  const int64_t all = 900 * (plan.end - plan.begin);
  return all < plan.pairs * (24 + plan.longest / 5);
}

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
static inline void write_tile(const uint32_t (*values)[kBlock], const TilePlan& plan, int64_t i0,
                              int64_t j0, bool mirror, uint32_t* out, int64_t stride) {
  for (int64_t i = 0; i < plan.rows; ++i) {
    __builtin_memcpy(out + (i0 + i) * stride + j0, values[i], plan.columns * sizeof(uint32_t));
  }
  if (!mirror) return;
  for (int64_t j = 0; j < plan.columns; j += 4) {
    for (int64_t i = 0; i < plan.rows; i += 4) {
      uint32_t* corner = out + (j0 + j) * stride + i0 + i;
      if (j + 4 <= plan.columns && i + 4 <= plan.rows) {
        transpose_4x4(&values[i][j], corner, stride);
        continue;
      }
      for (int64_t jj = j; jj < j + 4 && jj < plan.columns; ++jj) {
        for (int64_t ii = i; ii < i + 4 && ii < plan.rows; ++ii) {
          out[(j0 + jj) * stride + i0 + ii] = values[ii][jj];
        }
      }
    }
  }
}

static void overlap_tile(const MaskView& a, const MaskView& b, int64_t i0, int64_t j0, int mode,
                         bool mirror, void* out, int64_t stride) {
  const TilePlan plan = plan_tile(a, b, i0, j0, mirror);
  Tile tile;
  tile.rows = 0;
#ifdef UNSEG_HAS_COLUMNS
  const bool all = columns_are_cheaper(plan);
  if (all) count_all(a, b, i0, j0, plan, &tile);
#else
  const bool all = false;
#endif
  if (!all) count_pairs(a, b, i0, j0, plan, &tile);
  const bool small = largest_area(a, i0) <= (1 << 23) && largest_area(b, j0) <= (1 << 23);
  alignas(64) uint32_t values[kBlock][kBlock];
  for (int64_t i = 0; i < plan.rows; ++i) {
    if (tile.rows >> i & 1) {
      ratio_row(tile, a, b, i0, i, j0, mode, small, values[i]);
    } else {
      __builtin_memset(values[i], 0, sizeof(values[i]));
    }
  }
  const bool diagonal = mirror && i0 == j0;
  if (diagonal) {
    for (int64_t i = 0; i < plan.rows; ++i) {
      for (int64_t j = 0; j < i; ++j) values[i][j] = values[j][i];
    }
  }
  write_tile(values, plan, i0, j0, mirror && !diagonal, static_cast<uint32_t*>(out), stride);
}
