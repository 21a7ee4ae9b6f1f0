// Bit primitives for AVX-512 with VPOPCNTDQ: included inside a namespace under that target. The
// same functions as in primitives_scalar.h, plus the 4 x 4 block.

// Rows are whole groups and a row's words outside its window are zero, so a window may be widened
// to whole groups: no masks, aligned loads.
static inline int64_t count_bits(const uint64_t* a, int64_t begin, int64_t end) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t w = begin & ~7; w < end; w += 8) {
    sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_loadu_si512(a + w)));
  }
  return _mm512_reduce_add_epi64(sum);
}

static inline __m512i popcnt_common(const uint64_t* a, const uint64_t* b) {
  return _mm512_popcnt_epi64(_mm512_and_si512(_mm512_loadu_si512(a), _mm512_loadu_si512(b)));
}

static inline int64_t count_common(const uint64_t* a, const uint64_t* b, int64_t begin,
                                   int64_t end) {
  __m512i even = _mm512_setzero_si512(), odd = even;
  int64_t w = begin & ~7;
  for (; w + 8 < end; w += 16) {
    even = _mm512_add_epi64(even, popcnt_common(a + w, b + w));
    odd = _mm512_add_epi64(odd, popcnt_common(a + w + 8, b + w + 8));
  }
  if (w < end) even = _mm512_add_epi64(even, popcnt_common(a + w, b + w));
  return _mm512_reduce_add_epi64(_mm512_add_epi64(even, odd));
}

// Adds the common bits of four rows of each side to out[4 * i + j]. Sixteen accumulators reuse
// every loaded word four times: a pair alone would be bound by its two loads.
#define UNSEG_HAS_BLOCK 1
static inline void count_common_4x4(const uint64_t* const* a, const uint64_t* const* b,
                                    int64_t begin, int64_t end, int32_t* out) {
  __m512i sum[16];
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) sum[k] = _mm512_setzero_si512();
  for (int64_t w = begin & ~7; w < end; w += 8) {
    __m512i column[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) column[j] = _mm512_loadu_si512(b[j] + w);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i row = _mm512_loadu_si512(a[i] + w);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512i bits = _mm512_popcnt_epi64(_mm512_and_si512(row, column[j]));
        sum[4 * i + j] = _mm512_add_epi64(sum[4 * i + j], bits);
      }
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) out[k] += static_cast<int32_t>(_mm512_reduce_add_epi64(sum[k]));
}

static inline uint64_t above(const float* values, float limit) {
  const __m512 v = _mm512_set1_ps(limit);
  uint64_t bits = 0;
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const __mmask16 m = _mm512_cmp_ps_mask(_mm512_loadu_ps(values + 16 * k), v, _CMP_GT_OQ);
    bits |= static_cast<uint64_t>(m) << (16 * k);
  }
  return bits;
}

static inline void pack_bytes(const uint8_t* pixels, uint64_t* words) {
#pragma GCC unroll 8
  for (int w = 0; w < 8; ++w) {
    const __m512i v = _mm512_loadu_si512(pixels + 64 * w);
    words[w] = _mm512_test_epi8_mask(v, v);
  }
}

// 16 pixels as float32 -> 16 bits, four times a word.
template <typename Load>
static inline void pack_words_16(float limit, Load load, uint64_t* words) {
  const __m512 v = _mm512_set1_ps(limit);
#pragma GCC unroll 8
  for (int w = 0; w < 8; ++w) {
    uint64_t word = 0;
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __mmask16 m = _mm512_cmp_ps_mask(load(64 * w + 16 * k), v, _CMP_GT_OQ);
      word |= static_cast<uint64_t>(m) << (16 * k);
    }
    words[w] = word;
  }
}

static inline __m256i load_16_shorts(const uint16_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

static inline void pack_float(const float* pixels, float limit, uint64_t* words) {
  pack_words_16(limit, [=](int k) { return _mm512_loadu_ps(pixels + k); }, words);
}
static inline void pack_half(const uint16_t* pixels, float limit, uint64_t* words) {
  pack_words_16(limit, [=](int k) { return _mm512_cvtph_ps(load_16_shorts(pixels + k)); }, words);
}
static inline void pack_bfloat16(const uint16_t* pixels, float limit, uint64_t* words) {
  const auto load = [=](int k) {
    const __m512i wide = _mm512_cvtepu16_epi32(load_16_shorts(pixels + k));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  };
  pack_words_16(limit, load, words);
}
static inline void pack_double(const double* pixels, double limit, uint64_t* words) {
  const __m512d v = _mm512_set1_pd(limit);
  for (int w = 0; w < 8; ++w) {
    uint64_t word = 0;
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      const __mmask8 m = _mm512_cmp_pd_mask(_mm512_loadu_pd(pixels + 64 * w + 8 * k), v, _CMP_GT_OQ);
      word |= static_cast<uint64_t>(m) << (8 * k);
    }
    words[w] = word;
  }
}
