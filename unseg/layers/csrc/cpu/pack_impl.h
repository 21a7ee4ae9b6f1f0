// Packing and describing one mask: included inside a namespace after the bit primitives.

static inline int lowest_bit(uint64_t word) { return __builtin_ctzll(word); }
static inline int highest_bit(uint64_t word) { return 63 - __builtin_clzll(word); }

// Widens [*x0, *x1) to the columns of the set bits in words [begin, end). Bit 0 of word 0 is
// column 0 of some row.
static inline void widen_columns(const uint64_t* words, int64_t begin, int64_t end, int64_t width,
                                 int64_t* x0, int64_t* x1) {
  int64_t column = begin * 64 % width;
  for (int64_t w = begin; w < end && (*x0 > 0 || *x1 < width); ++w) {
    uint64_t word = words[w];
    int64_t start = column;  // column of bit 0 of what is left of the word
    while (word != 0) {
      const int64_t in_row = width - start;
      const uint64_t part = in_row < 64 ? word & ((1ULL << in_row) - 1) : word;
      if (part != 0) {
        const int64_t left = start + lowest_bit(part), right = start + highest_bit(part) + 1;
        if (left < *x0) *x0 = left;
        if (right > *x1) *x1 = right;
      }
      word = in_row < 64 ? word >> in_row : 0;
      start = 0;
    }
    column = (column + 64) % width;
  }
}

// Rows and words meet in the same phase every width / gcd(width, 64) words, so words a period
// apart can be OR-ed before looking at columns: cheap and vectorised.
static inline void find_columns(const uint64_t* words, int64_t first, int64_t last, int64_t width,
                                int64_t* x0, int64_t* x1) {
  constexpr int64_t kLongest = 512;
  const int64_t common = (width & -width) < 64 ? (width & -width) : 64;
  const int64_t period = width / common;
  *x0 = width;
  *x1 = 0;
  if (period > kLongest || last - first <= 2 * period) {
    widen_columns(words, first, last, width, x0, x1);
    return;
  }
  uint64_t folded[kLongest] = {};
  for (int64_t w = first / period * period; w < last; w += period) {
    const int64_t begin = w < first ? first - w : 0;
    const int64_t end = w + period > last ? last - w : period;
    for (int64_t k = begin; k < end; ++k) folded[k] |= words[w + k];
  }
  widen_columns(folded, 0, period, width, x0, x1);
}

// As MaskKernels::describe, given that all set bits lie in words [first, last).
static inline void describe_between(const uint64_t* words, int64_t first, int64_t last,
                                    int64_t width, int32_t* meta) {
  for (int k = 0; k < kMetaFields; ++k) meta[k] = 0;
  while (first < last && words[first] == 0) ++first;
  while (first < last && words[last - 1] == 0) --last;
  if (first >= last) return;
  const int64_t y0 = (64 * first + lowest_bit(words[first])) / width;
  const int64_t y1 = (64 * (last - 1) + highest_bit(words[last - 1])) / width + 1;
  int64_t x0, x1;
  find_columns(words, first, last, width, &x0, &x1);
  meta[kArea] = static_cast<int32_t>(count_bits(words, first, last));
  meta[kX0] = static_cast<int32_t>(x0);
  meta[kY0] = static_cast<int32_t>(y0);
  meta[kX1] = static_cast<int32_t>(x1);
  meta[kY1] = static_cast<int32_t>(y1);
  meta[kFirst] = static_cast<int32_t>(first);
  meta[kLast] = static_cast<int32_t>(last);
}

static void describe(const uint64_t* words, int64_t height, int64_t width, int32_t* meta) {
  describe_between(words, 0, (height * width + 63) / 64, width, meta);
}

// Packs `count` pixels; pack_512(pixels, words) turns 512 of them into a group of words. Returns
// through first and last which words can be non-zero.
template <typename Pixel, typename Pack512>
static inline void pack_pixels(const Pixel* pixels, int64_t count, uint64_t* words,
                               int64_t* first, int64_t* last, Pack512 pack_512) {
  constexpr int64_t kPixels = 64 * kWordGroup;
  constexpr int64_t kAhead = 16384;  // into the second cache, four pages on
  *first = -1;
  *last = 0;
  for (int64_t p = 0; p < count; p += kPixels) {
    uint64_t group[kWordGroup];
    const int64_t left = count - p;
    if (left >= kPixels) {
      const char* ahead = reinterpret_cast<const char*>(pixels + p) + kAhead;
      constexpr int64_t kBytes = kPixels * sizeof(Pixel);
      for (int64_t k = 0; k < kBytes; k += 64) __builtin_prefetch(ahead + k, 0, 2);
      pack_512(pixels + p, group);
    } else {
      Pixel rest[kPixels] = {};
      __builtin_memcpy(rest, pixels + p, left * static_cast<int64_t>(sizeof(Pixel)));
      pack_512(rest, group);
      for (int64_t k = 0; k < kWordGroup; ++k) {  // the padding may lie above the threshold
        const int64_t valid = left - 64 * k;
        group[k] = valid >= 64 ? group[k] : valid > 0 ? group[k] & ((1ULL << valid) - 1) : 0;
      }
    }
    uint64_t any = 0;
    for (int k = 0; k < kWordGroup; ++k) any |= group[k];
    uint64_t* target = words + p / 64;
    if (any != 0) {
      if (*first < 0) *first = p / 64;
      *last = p / 64 + kWordGroup;
    }
    for (int k = 0; k < kWordGroup; ++k) target[k] = group[k];
  }
}

static void pack(const void* pixels, PixelType type, double threshold, int64_t height,
                 int64_t width, uint64_t* words, int32_t* meta) {
  const int64_t count = height * width;
  const float limit = static_cast<float>(threshold);
  int64_t first = -1, last = 0;
  const auto run = [&](const auto* typed, auto pack_512) {
    pack_pixels(typed, count, words, &first, &last, pack_512);
  };
  switch (type) {
    case PixelType::kByte:
      run(static_cast<const uint8_t*>(pixels),
          [](const uint8_t* p, uint64_t* w) { pack_bytes(p, w); });
      break;
    case PixelType::kFloat:
      run(static_cast<const float*>(pixels),
          [=](const float* p, uint64_t* w) { pack_float(p, limit, w); });
      break;
    case PixelType::kHalf:
      run(static_cast<const uint16_t*>(pixels),
          [=](const uint16_t* p, uint64_t* w) { pack_half(p, limit, w); });
      break;
    case PixelType::kBFloat16:
      run(static_cast<const uint16_t*>(pixels),
          [=](const uint16_t* p, uint64_t* w) { pack_bfloat16(p, limit, w); });
      break;
    case PixelType::kDouble:
      run(static_cast<const double*>(pixels),
          [=](const double* p, uint64_t* w) { pack_double(p, threshold, w); });
      break;
  }
  describe_between(words, first < 0 ? 0 : first, last, width, meta);
}
