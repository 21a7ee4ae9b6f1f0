// Overlaps, greedy NMS and matrix NMS: included inside a namespace after the bit primitives.
//
// What makes them fast is that few pairs are counted. The intersection of two masks is at most
//   limit = min(area_i, area_j, area of the intersection of their boxes)
// and every overlap grows with the intersection, so an upper bound of the overlap costs a dozen
// vector instructions for 16 pairs. Only pairs whose bound could change the result are counted, and
// only over the words where both masks have pixels. Decisions are made on exact counts.

// The bounds are float32 and rounded up by more than their rounding errors (below 5e-7).
constexpr float kRoundUp = 1.000001f;

static inline int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
static inline int32_t most(int32_t a, int32_t b) { return a > b ? a : b; }

// The largest float32 that is not above `value`.
static inline float round_down(double value) {
  const float nearest = static_cast<float>(value);
  return static_cast<double>(nearest) > value ? __builtin_nextafterf(nearest, -1.0f) : nearest;
}

// Bounds of the overlaps of masks [begin, begin + 64) of `a` with mask j of `b`. 0/0 gives NaN,
// which is above nothing and so never a candidate.
template <int kMode>
static inline void bound_block_as(const MaskView& a, int64_t begin, const MaskView& b, int64_t j,
                                  float* __restrict bounds) {
  const int32_t *x0 = a.x0 + begin, *y0 = a.y0 + begin, *x1 = a.x1 + begin, *y1 = a.y1 + begin;
  const int32_t *area = a.area + begin, *label = a.label + begin;
  const int32_t qx0 = b.x0[j], qy0 = b.y0[j], qx1 = b.x1[j], qy1 = b.y1[j];
  const int32_t qarea = b.area[j], qlabel = b.label[j];
#pragma GCC ivdep
  for (int k = 0; k < kBlock; ++k) {
    const int32_t w = most(least(x1[k], qx1) - most(x0[k], qx0), 0);
    const int32_t h = most(least(y1[k], qy1) - most(y0[k], qy0), 0);
    const int32_t smaller = least(area[k], qarea);
    // All ones or zero: a branch here would keep the loop from being vectorised.
    const int32_t same = -static_cast<int32_t>(label[k] == qlabel);
    const float inter = static_cast<float>(least(w * h, smaller) & same);
    float denominator;
    if (kMode == kIoU) {
      denominator = static_cast<float>(area[k]) + static_cast<float>(qarea) - inter;
    } else {
      denominator =
          static_cast<float>(kMode == kIoMin ? smaller : kMode == kIoA ? area[k] : qarea);
    }
    bounds[k] = inter * kRoundUp / denominator;
  }
}

static inline void bound_block(const MaskView& a, int64_t begin, const MaskView& b, int64_t j,
                               int mode, float* bounds) {
  switch (mode) {
    case kIoMin: return bound_block_as<kIoMin>(a, begin, b, j, bounds);
    case kIoA: return bound_block_as<kIoA>(a, begin, b, j, bounds);
    case kIoB: return bound_block_as<kIoB>(a, begin, b, j, bounds);
    default: return bound_block_as<kIoU>(a, begin, b, j, bounds);
  }
}

static inline int64_t intersection(const MaskView& a, int64_t i, const MaskView& b, int64_t j) {
  const int64_t begin = most(a.first[i], b.first[j]), end = least(a.last[i], b.last[j]);
  return begin < end ? count_common(a.row[i], b.row[j], begin, end) : 0;
}

static inline double exact_overlap(const MaskView& a, int64_t i, const MaskView& b, int64_t j,
                                   int mode) {
  return overlap_ratio(intersection(a, i, b, j), a.area[i], b.area[j], mode);
}

static inline uint64_t low_bits(int64_t count) {
  return count >= 64 ? ~0ULL : count <= 0 ? 0 : (1ULL << count) - 1;
}

// ---- greedy NMS ---------------------------------------------------------------------------------

static bool suppressed(const MaskView& kept, int64_t begin, const MaskView& masks, int64_t j,
                       int mode, double threshold, int64_t* counted) {
  const float limit = round_down(threshold);
  float bounds[kBlock];
  for (int64_t block = begin / kBlock * kBlock; block < kept.count; block += kBlock) {
    bound_block(kept, block, masks, j, mode, bounds);
    uint64_t candidates = above(bounds, limit) & ~low_bits(begin - block);
    for (; candidates != 0; candidates &= candidates - 1) {
      ++*counted;
      if (exact_overlap(kept, block + __builtin_ctzll(candidates), masks, j, mode) > threshold) {
        return true;
      }
    }
  }
  return false;
}

// ---- matrix NMS ---------------------------------------------------------------------------------
// Wang et al., SOLOv2, 2020, section 3.3. With u_ij the IoU of two masks of one label, i before j:
//   c_j = max_i u_ij,   decay_j = min_i f(u_ij) / f(c_i),   f(u) = exp(-sigma u^2) or 1 - u.

// c_j by branch and bound, starting from the best bound: near duplicates then settle it at once.
static void matrix_most(const MaskView& masks, int64_t j, float* bounds, MatrixState& state) {
  int64_t best = 0;
  float best_bound = 0.0f;
  for (int64_t block = 0; block < j; block += kBlock) {
    bound_block_as<kIoU>(masks, block, masks, j, bounds + block);
    uint64_t candidates = above(bounds + block, best_bound) & low_bits(j - block);
    for (; candidates != 0; candidates &= candidates - 1) {
      const int64_t i = block + __builtin_ctzll(candidates);
      if (bounds[i] > best_bound) {
        best_bound = bounds[i];
        best = i;
      }
    }
  }
  double c = best_bound > 0.0f ? exact_overlap(masks, best, masks, j, kIoU) : 0.0;
  float limit = round_down(c);
  for (int64_t block = 0; block < j && c < 1.0; block += kBlock) {
    uint64_t candidates = above(bounds + block, limit) & low_bits(j - block);
    for (; candidates != 0; candidates &= candidates - 1) {
      const int64_t i = block + __builtin_ctzll(candidates);
      if (i == best || bounds[i] <= limit) continue;
      const double u = exact_overlap(masks, i, masks, j, kIoU);
      if (u > c) {
        c = u;
        limit = round_down(c);
      }
    }
  }
  state.most[j] = c;
}

// min_i f(u_ij) / f(c_i) = exp(-sigma max_i (u_ij^2 - c_i^2)): one exponential per mask and no
// underflow. The maximum is at least 0, the value at i = 0.
static inline double gaussian_decay(const MaskView& masks, int64_t j, const MatrixState& state) {
  double best = 0.0;
  float gains[kBlock];
  for (int64_t block = 0; block < j; block += kBlock) {
    bound_block_as<kIoU>(masks, block, masks, j, gains);
    const float* c = state.most_f + block;
    for (int k = 0; k < kBlock; ++k) gains[k] = gains[k] * gains[k] * kRoundUp - c[k] * c[k];
    uint64_t candidates = above(gains, round_down(best)) & low_bits(j - block);
    for (; candidates != 0; candidates &= candidates - 1) {
      const int k = __builtin_ctzll(candidates);
      if (gains[k] <= round_down(best)) continue;
      const double u = exact_overlap(masks, block + k, masks, j, kIoU);
      const double gain = u * u - state.most[block + k] * state.most[block + k];
      if (gain > best) best = gain;
    }
  }
  return __builtin_exp(-state.sigma * best);
}

// Rows with c_i = 1 are skipped: 0/0 in the formula. The quotient is at most 1, as above.
static inline double linear_decay(const MaskView& masks, int64_t j, const MatrixState& state) {
  constexpr float kSlack = 5e-7f;  // the rounding errors of gains[] below
  double best = 1.0;
  float bounds[kBlock], gains[kBlock];
  for (int64_t block = 0; block < j; block += kBlock) {
    bound_block_as<kIoU>(masks, block, masks, j, bounds);
    const float* c = state.most_f + block;
    // Positive if (1 - bound) / (1 - c_i) < best.
    const float scale = static_cast<float>(best);
    for (int k = 0; k < kBlock; ++k) gains[k] = scale * (1.0f - c[k]) - (1.0f - bounds[k]);
    uint64_t candidates = above(gains, -kSlack) & above(bounds, 0.0f) & low_bits(j - block);
    for (; candidates != 0; candidates &= candidates - 1) {
      const int64_t i = block + __builtin_ctzll(candidates);
      if (state.most[i] >= 1.0) continue;
      const double left = 1.0 - exact_overlap(masks, i, masks, j, kIoU);
      const double quotient = left / (1.0 - state.most[i]);
      if (quotient < best) best = quotient;
    }
  }
  return best;
}

static void matrix_decay(const MaskView& masks, int64_t j, MatrixState& state) {
  state.decay[j] = state.kernel == kGaussian ? gaussian_decay(masks, j, state)
                                             : linear_decay(masks, j, state);
}
