// Bit primitives for AVX-512 with VPOPCNTDQ: included inside a namespace under that target. The
// same functions as in primitives_scalar.h, plus those for many pairs at once.

constexpr int kVectorBytes = 64;

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

// Transposes 8 words of 8 rows: out[64 * w + r] = rows[r][w].
static inline void transpose_8x8(const uint64_t* const* rows, uint64_t* out) {
  __m512i r[8], s[8];
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) r[k] = _mm512_loadu_si512(rows[k]);
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {  // pairs of rows
    s[2 * k] = _mm512_unpacklo_epi64(r[2 * k], r[2 * k + 1]);
    s[2 * k + 1] = _mm512_unpackhi_epi64(r[2 * k], r[2 * k + 1]);
  }
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {  // even and odd words: 128-bit lanes of four rows, then of eight
    const __m512i low_even = _mm512_shuffle_i64x2(s[k], s[k + 2], 0x88);
    const __m512i low_odd = _mm512_shuffle_i64x2(s[k], s[k + 2], 0xdd);
    const __m512i high_even = _mm512_shuffle_i64x2(s[k + 4], s[k + 6], 0x88);
    const __m512i high_odd = _mm512_shuffle_i64x2(s[k + 4], s[k + 6], 0xdd);
    _mm512_storeu_si512(out + 64 * k, _mm512_shuffle_i64x2(low_even, high_even, 0x88));
    _mm512_storeu_si512(out + 64 * (k + 2), _mm512_shuffle_i64x2(low_odd, high_odd, 0x88));
    _mm512_storeu_si512(out + 64 * (k + 4), _mm512_shuffle_i64x2(low_even, high_even, 0xdd));
    _mm512_storeu_si512(out + 64 * (k + 6), _mm512_shuffle_i64x2(low_odd, high_odd, 0xdd));
  }
}

// Adds to out[j] the common bits of `row` and of column j of `columns`, which holds `words` words
// of 64 rows, transposed. One broadcast word meets 64 masks and no sum crosses lanes: three
// operations per 512 bits, what the two vector ports do in 1.5 clocks.
#define UNSEG_HAS_COLUMNS 1
static inline void count_columns(const uint64_t* row, const uint64_t* columns, int64_t words,
                                 int32_t* out) {
  __m512i sum[8];
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) sum[k] = _mm512_setzero_si512();
  for (int64_t w = 0; w < words; ++w) {
    const __m512i word = _mm512_set1_epi64(static_cast<int64_t>(row[w]));
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      const __m512i common = _mm512_and_si512(word, _mm512_loadu_si512(columns + 64 * w + 8 * k));
      sum[k] = _mm512_add_epi64(sum[k], _mm512_popcnt_epi64(common));
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) {
    __m256i* target = reinterpret_cast<__m256i*>(out + 8 * k);
    const __m256i counts = _mm512_cvtepi64_epi32(sum[k]);
    _mm256_storeu_si256(target, _mm256_add_epi32(_mm256_loadu_si256(target), counts));
  }
}

#include "transpose_sse.h"

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
