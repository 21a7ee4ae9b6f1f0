// Bit primitives in plain C++: included inside a namespace by the portable and popcnt kernels.
// They need `popcount64` to be defined before.

constexpr int kVectorBytes = 16;  // SSE2, NEON

// Sums over the words [begin, end), which need not be a multiple of a group.
static inline int64_t count_bits(const uint64_t* a, int64_t begin, int64_t end) {
  int64_t sum = 0;
  for (int64_t w = begin; w < end; ++w) sum += popcount64(a[w]);
  return sum;
}

static inline int64_t count_common(const uint64_t* a, const uint64_t* b, int64_t begin,
                                   int64_t end) {
  int64_t even = 0, odd = 0;
  int64_t w = begin;
  for (; w + 2 <= end; w += 2) {
    even += popcount64(a[w] & b[w]);
    odd += popcount64(a[w + 1] & b[w + 1]);
  }
  if (w < end) even += popcount64(a[w] & b[w]);
  return even + odd;
}

// out[out_stride * j + i] = in[in_stride * i + j] for a block of 4 x 4 values of 32 bits.
static inline void transpose_4x4(const uint32_t* in, int64_t in_stride, uint32_t* out,
                                 int64_t out_stride) {
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) out[out_stride * j + i] = in[in_stride * i + j];
  }
}

// Bit k of the result: values[k] > limit, for 64 values.
static inline uint64_t above(const float* values, float limit) {
  uint64_t bits = 0;
  for (int k = 0; k < 64; ++k) bits |= static_cast<uint64_t>(values[k] > limit) << k;
  return bits;
}

// 512 pixels to 8 words.
static inline void pack_bytes(const uint8_t* pixels, uint64_t* words) {
  for (int w = 0; w < 8; ++w) {
    uint64_t word = 0;
    for (int k = 0; k < 8; ++k) {
      uint64_t eight;
      __builtin_memcpy(&eight, pixels + 64 * w + 8 * k, 8);
      // Bit 7 of each byte says whether the byte was non-zero; the product gathers the eight.
      const uint64_t low = 0x7f7f7f7f7f7f7f7fULL;
      eight = (((eight & low) + low) | eight) & ~low;
      word |= (((eight >> 7) * 0x0102040810204080ULL) >> 56) << (8 * k);
    }
    words[w] = word;
  }
}

template <typename Pixel, typename Limit, typename Convert>
static inline void pack_above(const Pixel* pixels, Limit limit, Convert convert, uint64_t* words) {
  for (int w = 0; w < 8; ++w) {
    uint64_t word = 0;
    for (int k = 0; k < 64; ++k) {
      word |= static_cast<uint64_t>(convert(pixels[64 * w + k]) > limit) << k;
    }
    words[w] = word;
  }
}

static inline float float_from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

static inline float float_from_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 31, fraction = half & 1023;
  if (exponent == 31) return float_from_bits(sign | 0x7f800000u | (fraction << 13));
  if (exponent > 0) return float_from_bits(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float magnitude = static_cast<float>(fraction) * (1.0f / 16777216.0f);  // subnormal
  return sign ? -magnitude : magnitude;
}

static inline void pack_float(const float* pixels, float limit, uint64_t* words) {
  pack_above(pixels, limit, [](float x) { return x; }, words);
}
static inline void pack_double(const double* pixels, double limit, uint64_t* words) {
  pack_above(pixels, limit, [](double x) { return x; }, words);
}
static inline void pack_half(const uint16_t* pixels, float limit, uint64_t* words) {
  pack_above(pixels, limit, float_from_half, words);
}
static inline void pack_bfloat16(const uint16_t* pixels, float limit, uint64_t* words) {
  pack_above(
      pixels, limit,
      [](uint16_t x) { return float_from_bits(static_cast<uint32_t>(x) << 16); }, words);
}
