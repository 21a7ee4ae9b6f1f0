// Part of the bit primitives for AVX2 and AVX-512: included inside a namespace.

// out[out_stride * j + i] = in[in_stride * i + j] for a block of 4 x 4 values of 32 bits.
static inline void transpose_4x4(const uint32_t* in, int64_t in_stride, uint32_t* out,
                                 int64_t out_stride) {
  __m128 r0 = _mm_loadu_ps(reinterpret_cast<const float*>(in));
  __m128 r1 = _mm_loadu_ps(reinterpret_cast<const float*>(in + in_stride));
  __m128 r2 = _mm_loadu_ps(reinterpret_cast<const float*>(in + 2 * in_stride));
  __m128 r3 = _mm_loadu_ps(reinterpret_cast<const float*>(in + 3 * in_stride));
  _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
  _mm_storeu_ps(reinterpret_cast<float*>(out), r0);
  _mm_storeu_ps(reinterpret_cast<float*>(out + out_stride), r1);
  _mm_storeu_ps(reinterpret_cast<float*>(out + 2 * out_stride), r2);
  _mm_storeu_ps(reinterpret_cast<float*>(out + 3 * out_stride), r3);
}
