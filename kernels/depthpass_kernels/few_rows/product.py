"""Product of a few rows: costs what reading the weight costs, which is read once for all rows.

Several accumulators per row keep the additions from waiting for each other, and a weight is asked for some KB before it is
needed (``AHEAD`` entries, ``NEAR``: depthpass_kernels.processor.ahead): together they read at the rate of a copy. Where the
processor multiplies pairs of bfloat16 into float32 sums it does.
"""

MOST = 4
"""Rows of one pass over the weight: their accumulators fill the registers."""
ARGUMENTS = ("const T*", "const T*", "const T*", "T*", *("int64_t",) * 5)
SOURCE = """
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
constexpr bool PAIRS = std::is_same_v<T, at::BFloat16>;
#else
constexpr bool PAIRS = false;
#endif
using X = std::conditional_t<PAIRS, T, float>;

// Sums of the row's leading whole vectors by row of x; returns how many entries they took.
template <int ROWS>
static inline int64_t leading(const T* row, const X* x, int64_t in, float* sums) {
  int64_t i = 0;
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
  if constexpr (PAIRS) {
    constexpr int PARTS = ROWS <= 2 ? 4 : 2;
    __m512 total[ROWS][PARTS];
    for (int r = 0; r < ROWS; r++)
      for (int p = 0; p < PARTS; p++) total[r][p] = _mm512_setzero_ps();
    for (; i + 32 * PARTS <= in; i += 32 * PARTS) {
      #pragma GCC unroll 4
      for (int p = 0; p < PARTS; p++) {
        __builtin_prefetch(row + i + p * 32 + AHEAD, 0, NEAR);
        __m512bh w = (__m512bh)_mm512_loadu_si512(row + i + p * 32);
        #pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
          total[r][p] = _mm512_dpbf16_ps(total[r][p], w, (__m512bh)_mm512_loadu_si512(x + r * in + i + p * 32));
      }
    }
    for (int r = 0; r < ROWS; r++) {
      for (int p = 1; p < PARTS; p++) total[r][0] = _mm512_add_ps(total[r][0], total[r][p]);
      sums[r] = _mm512_reduce_add_ps(total[r][0]);
    }
  }
#endif
  if constexpr (!PAIRS) {
    using Half = at::vec::Vectorized<T>;
    using Wide = at::vec::Vectorized<float>;
    constexpr int STEP = Half::size(), PARTS = ROWS <= 2 ? 2 : 1;
    Wide total[ROWS][2 * PARTS];
    for (int r = 0; r < ROWS; r++)
      for (int p = 0; p < 2 * PARTS; p++) total[r][p] = Wide(0);
    for (; i + STEP * PARTS <= in; i += STEP * PARTS) {
      #pragma GCC unroll 2
      for (int p = 0; p < PARTS; p++) {
        __builtin_prefetch(row + i + p * STEP + AHEAD, 0, NEAR);
        auto [a, b] = at::vec::convert_to_float<T>(Half::loadu(row + i + p * STEP));
        #pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
          const X* q = x + r * in + i + p * STEP;
          total[r][2 * p] = at::vec::fmadd(a, Wide::loadu(q), total[r][2 * p]);
          total[r][2 * p + 1] = at::vec::fmadd(b, Wide::loadu(q + STEP / 2), total[r][2 * p + 1]);
        }
      }
    }
    for (int r = 0; r < ROWS; r++) {
      for (int p = 1; p < 2 * PARTS; p++) total[r][0] = total[r][0] + total[r][p];
      sums[r] = at::vec::vec_reduce_all<float>([](Wide a, Wide b) { return a + b; }, total[r][0]);
    }
  }
  return i;
}

template <int ROWS>
static void product(const T* w, const X* x, const T* bias, T* y, int64_t out, int64_t in, int threads) {
  #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t o = 0; o < out; o++) {
    const T* row = w + o * in;
    float sums[ROWS];
    int64_t done = leading<ROWS>(row, x, in, sums);
    for (int r = 0; r < ROWS; r++) {
      for (int64_t j = done; j < in; j++) sums[r] += static_cast<float>(row[j]) * static_cast<float>(x[r * in + j]);
      if (bias) sums[r] += static_cast<float>(bias[o]);
      y[r * out + o] = static_cast<T>(sums[r]);
    }
  }
}

extern "C" void kernel(const T* w, const T* x, const T* bias, T* y,
                       int64_t rows, int64_t out, int64_t in, int64_t biased, int64_t threads) {
  std::vector<X> given(x, x + rows * in);
  const T* b = biased ? bias : nullptr;
  switch (rows) {
    case 1: return product<1>(w, given.data(), b, y, out, in, threads);
    case 2: return product<2>(w, given.data(), b, y, out, in, threads);
    case 3: return product<3>(w, given.data(), b, y, out, in, threads);
    case 4: return product<4>(w, given.data(), b, y, out, in, threads);
  }
}
"""
