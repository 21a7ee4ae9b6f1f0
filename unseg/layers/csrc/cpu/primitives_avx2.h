// Bit primitives for AVX2 (with F16C and POPCNT): included inside a namespace under that target.
// The same functions as in primitives_scalar.h.

constexpr int kVectorBytes = 32;

static inline __m256i load_256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

// Bits of each byte by two look-ups of a nibble (Mula's method).
static inline __m256i popcnt_bytes(__m256i v) {
  const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2,
                                         1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i low = _mm256_set1_epi8(15);
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
  return _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(v, low)),
                         _mm256_shuffle_epi8(table, high));
}

static inline int64_t add_lanes(__m256i v) {
  const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  return _mm_cvtsi128_si64(half) + _mm_extract_epi64(half, 1);
}

// Sums popcounts of load(w) over whole groups of eight words; bytes hold 15 groups before they
// could overflow (2 vectors x 8 bits x 15 = 240).
template <typename Load>
static inline int64_t count_groups(int64_t begin, int64_t end, Load load) {
  const __m256i zero = _mm256_setzero_si256();
  __m256i sum = zero;
  for (int64_t w = begin & ~7; w < end;) {
    const int64_t stop = w + 8 * 15 < end ? w + 8 * 15 : end;
    __m256i bytes = zero;
    for (; w < stop; w += 8) {
      bytes = _mm256_add_epi8(bytes, popcnt_bytes(load(w)));
      bytes = _mm256_add_epi8(bytes, popcnt_bytes(load(w + 4)));
    }
    sum = _mm256_add_epi64(sum, _mm256_sad_epu8(bytes, zero));
  }
  return add_lanes(sum);
}

static inline int64_t count_bits(const uint64_t* a, int64_t begin, int64_t end) {
  return count_groups(begin, end, [=](int64_t w) { return load_256(a + w); });
}

static inline int64_t count_common(const uint64_t* a, const uint64_t* b, int64_t begin,
                                   int64_t end) {
  return count_groups(begin, end, [=](int64_t w) {
    return _mm256_and_si256(load_256(a + w), load_256(b + w));
  });
}

#include "transpose_sse.h"

static inline uint64_t above(const float* values, float limit) {
  const __m256 v = _mm256_set1_ps(limit);
  uint64_t bits = 0;
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) {
    const __m256 greater = _mm256_cmp_ps(_mm256_loadu_ps(values + 8 * k), v, _CMP_GT_OQ);
    bits |= static_cast<uint64_t>(static_cast<uint8_t>(_mm256_movemask_ps(greater))) << (8 * k);
  }
  return bits;
}

static inline void pack_bytes(const uint8_t* pixels, uint64_t* words) {
  const __m256i zero = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int w = 0; w < 8; ++w) {
    const __m256i low = _mm256_cmpeq_epi8(load_256(pixels + 64 * w), zero);
    const __m256i high = _mm256_cmpeq_epi8(load_256(pixels + 64 * w + 32), zero);
    const uint64_t low_bits = static_cast<uint32_t>(_mm256_movemask_epi8(low));
    const uint64_t high_bits = static_cast<uint32_t>(_mm256_movemask_epi8(high));
    words[w] = ~(low_bits | high_bits << 32);
  }
}

// 8 pixels as float32 -> 8 bits, eight times a word.
template <typename Load>
static inline void pack_words_8(float limit, Load load, uint64_t* words) {
  const __m256 v = _mm256_set1_ps(limit);
  for (int w = 0; w < 8; ++w) {
    uint64_t word = 0;
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      const int m = _mm256_movemask_ps(_mm256_cmp_ps(load(64 * w + 8 * k), v, _CMP_GT_OQ));
      word |= static_cast<uint64_t>(static_cast<uint8_t>(m)) << (8 * k);
    }
    words[w] = word;
  }
}

static inline __m128i load_8_shorts(const uint16_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

static inline void pack_float(const float* pixels, float limit, uint64_t* words) {
  pack_words_8(limit, [=](int k) { return _mm256_loadu_ps(pixels + k); }, words);
}
static inline void pack_half(const uint16_t* pixels, float limit, uint64_t* words) {
  pack_words_8(limit, [=](int k) { return _mm256_cvtph_ps(load_8_shorts(pixels + k)); }, words);
}
static inline void pack_bfloat16(const uint16_t* pixels, float limit, uint64_t* words) {
  const auto load = [=](int k) {
    const __m256i wide = _mm256_cvtepu16_epi32(load_8_shorts(pixels + k));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  };
  pack_words_8(limit, load, words);
}
static inline void pack_double(const double* pixels, double limit, uint64_t* words) {
  const __m256d v = _mm256_set1_pd(limit);
  for (int w = 0; w < 8; ++w) {
    uint64_t word = 0;
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) {
      const __m256d greater = _mm256_cmp_pd(_mm256_loadu_pd(pixels + 64 * w + 4 * k), v, _CMP_GT_OQ);
      word |= static_cast<uint64_t>(_mm256_movemask_pd(greater)) << (4 * k);
    }
    words[w] = word;
  }
}
