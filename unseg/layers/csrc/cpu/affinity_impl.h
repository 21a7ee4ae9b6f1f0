// One tile of unseg::boc_affinity: included inside the namespace of an instruction set, after
// tile_impl.h and a definition of kVectorBytes.
//
// The lanes of a vector are different rows j, so no sum runs across lanes. Written with the vector
// extensions of GCC and Clang, whose operators also work on plain numbers, for other compilers.

template <typename T, typename Integer>
struct Lanes {
  using Real = T;
#if defined(__GNUC__) || defined(__clang__)
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  typedef Integer Bits __attribute__((vector_size(kVectorBytes)));
  static inline Vector magnitude(Vector v) {
    const Integer no_sign = static_cast<Integer>(~(Integer{1} << (8 * sizeof(Integer) - 1)));
    return reinterpret_cast<Vector>(reinterpret_cast<Bits>(v) & no_sign);
  }
#else
  using Vector = T;
  static inline Vector magnitude(Vector v) { return v < 0 ? -v : v; }
#endif
  static constexpr int kCount = static_cast<int>(sizeof(Vector) / sizeof(T));
  static inline Vector load(const T* values) {
    Vector v;
    __builtin_memcpy(&v, values, sizeof(v));
    return v;
  }
  static inline Vector broadcast(T value) { return value - Vector{}; }
};

constexpr int kAffinityRows = 4;  // rows i at a time: with them all sums stay in registers

// BoC of kAffinityRows rows, at `a` in a panel, with as many rows as a vector has lanes, at `b` in
// a panel, written to out[r * kBlock].
template <typename L>
static inline void boc_rows(const typename L::Real* a, const typename L::Real* b, int64_t channels,
                            typename L::Real* out) {
  using Real = typename L::Real;
  using Vector = typename L::Vector;
  constexpr int kPanel = kPanelBytes / static_cast<int>(sizeof(Real));
  Vector difference[kAffinityRows] = {}, sum[kAffinityRows] = {}, most[kAffinityRows] = {};
  for (int64_t begin = 0; begin < channels; begin += kChannelChunk) {
    const int64_t end = begin + kChannelChunk < channels ? begin + kChannelChunk : channels;
    Vector d[kAffinityRows] = {}, s[kAffinityRows] = {};
    for (int64_t c = begin; c < end; ++c) {
      const Vector y = L::load(b + c * kPanel);
#pragma GCC unroll 4
      for (int r = 0; r < kAffinityRows; ++r) {
        const Vector x = L::broadcast(a[c * kPanel + r]);
        const Vector gap = L::magnitude(x - y);
        d[r] += gap;
        s[r] += L::magnitude(x + y);
        most[r] = gap > most[r] ? gap : most[r];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kAffinityRows; ++r) {
      difference[r] += d[r];
      sum[r] += s[r];
    }
  }
  const Vector infinity = L::broadcast(static_cast<Real>(__builtin_inf()));
#pragma GCC unroll 4
  for (int r = 0; r < kAffinityRows; ++r) {
    const Vector ratio = difference[r] / sum[r];
    const Vector affinity = (Real{1} + most[r]) / (Real{1} + ratio);
    const Vector value = ratio < infinity ? affinity : Vector{};  // false for NaN
    __builtin_memcpy(out + r * kBlock, &value, sizeof(value));
  }
}

static inline void write_affinities(const float (*values)[kBlock], int64_t rows, int64_t columns,
                                    bool mirror, float* across, float* down, int64_t stride) {
  write_rows(reinterpret_cast<const uint32_t(*)[kBlock]>(values), rows, columns, mirror,
             reinterpret_cast<uint32_t*>(across), reinterpret_cast<uint32_t*>(down), stride);
}

static inline void write_affinities(const double (*values)[kBlock], int64_t rows, int64_t columns,
                                    bool mirror, double* across, double* down, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) across[i * stride + j] = values[i][j];
  }
  for (int64_t j = 0; mirror && j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) down[j * stride + i] = values[i][j];
  }
}

template <typename L>
static inline void boc_tile(const typename L::Real* panels, int64_t count, int64_t channels,
                            int64_t i0, int64_t j0, typename L::Real* out) {
  using Real = typename L::Real;
  constexpr int kPanel = kPanelBytes / static_cast<int>(sizeof(Real));
  const int64_t last = i0 + kBlock < count ? i0 + kBlock : count;
  const int64_t columns = j0 + kBlock < count ? kBlock : count - j0;
  // Row k lies at k % kPanel in panel k / kPanel.
  const auto row = [=](int64_t k) { return panels + k / kPanel * kPanel * channels + k % kPanel; };
  for (int64_t i = i0; i < last; i += kAffinityRows) {
    alignas(64) Real values[kAffinityRows][kBlock];
    for (int64_t j = 0; j < columns; j += L::kCount) {
      boc_rows<L>(row(i), row(j0 + j), channels, values[0] + j);
    }
    const int64_t rows = last - i < kAffinityRows ? last - i : kAffinityRows;
    if (i0 == j0) {
      for (int64_t r = 0; r < rows; ++r) values[r][i - i0 + r] = Real{1};
    }
    write_affinities(values, rows, columns, i0 != j0, out + i * count + j0, out + j0 * count + i,
                     count);
  }
}

static void boc_tile_float(const float* panels, int64_t count, int64_t channels, int64_t i0,
                           int64_t j0, float* out) {
  boc_tile<Lanes<float, int32_t>>(panels, count, channels, i0, j0, out);
}

static void boc_tile_double(const double* panels, int64_t count, int64_t channels, int64_t i0,
                            int64_t j0, double* out) {
  boc_tile<Lanes<double, int64_t>>(panels, count, channels, i0, j0, out);
}
