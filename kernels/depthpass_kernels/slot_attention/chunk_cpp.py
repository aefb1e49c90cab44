"""C++ of a chunk's attention on a CPU, both directions: one call each where torch takes a dozen ops for microseconds of work.

Per key head: the rows of all queries that share it, a softmax, and products in tiles of up to six rows by 16 features.
Gradients of keys and values are added where they belong.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from depthpass_kernels.cpp import build
from depthpass_kernels.select import traced

SIZES = 17
ARGUMENTS = ("int64_t", *("const float*",) * 4, *("float*",) * 4, "float", *("int64_t",) * (SIZES + 1))
SOURCE = """
#include <immintrin.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

// exp of eight numbers up to 0, within two units in the last place: 2^n times a polynomial in what is left.
static inline __m256 exp_of(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-87.3f), x);  // in this order NaN stays
  __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x));
  __m256 y = _mm256_set1_ps(1.f / 5040);
  for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(c));
  __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(y, _mm256_castsi256_ps(power));
}

static inline float sum_of(__m256 x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// ROWS rows of a by four of b, inner products.
template <int ROWS>
static inline void dots(const float* a, const float* b, int64_t width, float* y, int64_t columns) {
  __m256 total[ROWS][4];
  #pragma GCC unroll 2
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < 4; c++) total[r][c] = _mm256_setzero_ps();
  for (int64_t d = 0; d < width; d += 8) {
    __m256 left[ROWS];
    #pragma GCC unroll 2
    for (int r = 0; r < ROWS; r++) left[r] = _mm256_loadu_ps(a + r * width + d);
    #pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
      __m256 right = _mm256_loadu_ps(b + c * width + d);
      #pragma GCC unroll 2
      for (int r = 0; r < ROWS; r++) total[r][c] = _mm256_fmadd_ps(left[r], right, total[r][c]);
    }
  }
  #pragma GCC unroll 2
  for (int r = 0; r < ROWS; r++) {
    __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(total[r][0], total[r][1]), _mm256_hadd_ps(total[r][2], total[r][3]));
    _mm_storeu_ps(y + r * columns, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
  }
}

// y [rows, keys] = a b^T, a [rows, width], b [keys, width].
static void products(const float* a, const float* b, int64_t rows, int64_t keys, int64_t width, float* y) {
  for (int64_t n = 0; n < keys; n += 4) {
    if (n + 4 <= keys) {
      int64_t r = 0;
      for (; r + 2 <= rows; r += 2) dots<2>(a + r * width, b + n * width, width, y + r * keys + n, keys);
      if (r < rows) dots<1>(a + r * width, b + n * width, width, y + r * keys + n, keys);
      continue;
    }
    for (int64_t r = 0; r < rows; r++)
      for (int64_t m = n; m < keys; m++) {
        __m256 total = _mm256_setzero_ps();
        for (int64_t d = 0; d < width; d += 8)
          total = _mm256_fmadd_ps(_mm256_loadu_ps(a + r * width + d), _mm256_loadu_ps(b + m * width + d), total);
        y[r * keys + m] = sum_of(total);
      }
  }
}

// ROWS rows of 16 features of y = factor * x b, or y + that; x entry (r, i) at r * row + i * entry, b and y of that width.
template <int ROWS, bool ADD>
static inline void tile(const float* x, int64_t row, int64_t entry, const float* b, int64_t width, int64_t inner, float* y,
                        float factor) {
  __m256 left[ROWS], right[ROWS];
  #pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++) left[r] = right[r] = _mm256_setzero_ps();
  for (int64_t i = 0; i < inner; i++) {
    __m256 p = _mm256_loadu_ps(b + i * width), q = _mm256_loadu_ps(b + i * width + 8);
    #pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      __m256 value = _mm256_broadcast_ss(x + r * row + i * entry);
      left[r] = _mm256_fmadd_ps(value, p, left[r]);
      right[r] = _mm256_fmadd_ps(value, q, right[r]);
    }
  }
  __m256 f = _mm256_set1_ps(factor);
  #pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++) {
    float* to = y + r * width;
    _mm256_storeu_ps(to, _mm256_fmadd_ps(f, left[r], ADD ? _mm256_loadu_ps(to) : _mm256_setzero_ps()));
    _mm256_storeu_ps(to + 8, _mm256_fmadd_ps(f, right[r], ADD ? _mm256_loadu_ps(to + 8) : _mm256_setzero_ps()));
  }
}

template <bool ADD>
static void combine(const float* x, int64_t row, int64_t entry, const float* b, int64_t width, int64_t rows, int64_t inner,
                    float* y, float factor) {
  const int64_t tiles = (rows + 5) / 6;
  for (int64_t d = 0; d < width; d += 16) {
    const float* from = b + d;
    for (int64_t t = 0, r = 0; t < tiles; t++) {
      const int64_t size = rows / tiles + (t < rows % tiles);
      const float* a = x + r * row;
      float* to = y + r * width + d;
      switch (size) {
        case 1: tile<1, ADD>(a, row, entry, from, width, inner, to, factor); break;
        case 2: tile<2, ADD>(a, row, entry, from, width, inner, to, factor); break;
        case 3: tile<3, ADD>(a, row, entry, from, width, inner, to, factor); break;
        case 4: tile<4, ADD>(a, row, entry, from, width, inner, to, factor); break;
        case 5: tile<5, ADD>(a, row, entry, from, width, inner, to, factor); break;
        case 6: tile<6, ADD>(a, row, entry, from, width, inner, to, factor); break;
      }
      r += size;
    }
  }
}

// Softmax of each row over the keys up to its own; the others get 0.
static void softmax(float* p, int64_t rows, int64_t keys, int64_t group, int64_t count) {
  for (int64_t r = 0; r < rows; r++, p += keys) {
    const int64_t seen = keys - count + r / group + 1, whole = seen / 8 * 8;
    float most = p[0], total = 0;
    #pragma omp simd reduction(max : most)
    for (int64_t n = 0; n < seen; n++) most = std::max(most, p[n]);
    __m256 m = _mm256_set1_ps(most), sum = _mm256_setzero_ps();
    for (int64_t n = 0; n < whole; n += 8) {
      __m256 e = exp_of(_mm256_sub_ps(_mm256_loadu_ps(p + n), m));
      _mm256_storeu_ps(p + n, e);
      sum = _mm256_add_ps(sum, e);
    }
    for (int64_t n = whole; n < seen; n++) total += p[n] = std::exp(p[n] - most);
    total = 1 / (total + sum_of(sum));
    __m256 share = _mm256_set1_ps(total);
    for (int64_t n = 0; n < whole; n += 8) _mm256_storeu_ps(p + n, _mm256_mul_ps(_mm256_loadu_ps(p + n), share));
    for (int64_t n = whole; n < seen; n++) p[n] *= total;
    std::fill(p + seen, p + keys, 0.f);
  }
}

// The rows of a key head, which lie [batch, count, heads, width] with the given strides, one below the other.
struct Rows {
  int64_t batch, token, head, heads, group, count, width;
  int64_t at(int64_t key_head, int64_t r) const {
    return key_head / heads * batch + r / group * token + (key_head % heads * group + r % group) * head;
  }
  void gather(const float* x, int64_t key_head, float factor, float* to) const {
    for (int64_t r = 0; r < count * group; r++, to += width) {
      const float* from = x + at(key_head, r);
      for (int64_t d = 0; d < width; d++) to[d] = from[d] * factor;
    }
  }
  void scatter(const float* from, int64_t key_head, float* y) const {
    for (int64_t r = 0; r < count * group; r++, from += width) std::copy_n(from, width, y + at(key_head, r));
  }
};

// sizes: batch, key heads, group, count, keys, width, width of values, the strides of a head's keys, values and of their
// gradients, and of q and the gradient of the result those of batch, token and head. p may be null: nothing is kept.
extern "C" void kernel(int64_t what, const float* q, const float* k, const float* v, const float* grad,
                       float* y, float* p, float* dk, float* dv, float scale, SIZES, int64_t threads) {
  const int64_t s[] = {NAMES};
  const bool back = what & 1, kept = what & 2;
  const int64_t heads = s[0] * s[1], group = s[2], count = s[3], keys = s[4], width = s[5], wide = s[6], rows = group * count;
  const Rows queries{s[11], s[12], s[13], s[1], group, count, width}, grads{s[14], s[15], s[16], s[1], group, count, wide};
  const int64_t own = back ? width : wide;
  const Rows result{count * s[1] * group * own, s[1] * group * own, own, s[1], group, count, own};
  #pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> query(rows * width), g(rows * wide), local(kept ? 0 : rows * keys), slopes(back ? rows * keys : 0);
    std::vector<float> out(rows * own);
    #pragma omp for schedule(static)
    for (int64_t h = 0; h < heads; h++) {
      const float *key = k + h * s[7], *value = v + h * s[8];
      float* shares = kept ? p + h * rows * keys : local.data();
      queries.gather(q, h, scale, query.data());
      if (!(back && kept)) {
        products(query.data(), key, rows, keys, width, shares);
        softmax(shares, rows, keys, group, count);
      }
      if (!back) {
        combine<false>(shares, keys, 1, value, wide, rows, keys, out.data(), 1);
        result.scatter(out.data(), h, y);
        continue;
      }
      grads.gather(grad, h, 1, g.data());
      float* slope = slopes.data();
      products(g.data(), value, rows, keys, wide, slope);
      for (int64_t r = 0; r < rows; r++) {
        float *row = slope + r * keys, total = 0;
        const float* share = shares + r * keys;
        #pragma omp simd reduction(+ : total)
        for (int64_t n = 0; n < keys; n++) total += row[n] * share[n];
        for (int64_t n = 0; n < keys; n++) row[n] = (row[n] - total) * share[n];
      }
      combine<false>(slope, keys, 1, key, width, rows, keys, out.data(), scale);
      result.scatter(out.data(), h, y);
      combine<true>(slope, 1, keys, query.data(), width, keys, rows, dk + h * s[9], 1);
      combine<true>(shares, 1, keys, g.data(), wide, keys, rows, dv + h * s[10], 1);
    }
  }
}
""".replace("SIZES", ", ".join(f"int64_t s{i}" for i in range(SIZES))).replace("NAMES", ", ".join(f"s{i}" for i in range(SIZES)))


@functools.cache
def _kernel() -> Callable[..., None] | None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return None  # no compiler is asked for what it cannot build
    built = build(ARGUMENTS, SOURCE)
    if not isinstance(built, Exception):
        return built
    logging.getLogger("depthpass").info("attention of a chunk on the CPU takes torch's own products: %s", built)
    return None


def fits(q: Tensor, k: Tensor, v: Tensor, *sums: Tensor) -> bool:
    """Whether the compiled code takes these operands, laid out as for :func:`forward`. Builds it at the first call."""
    if traced() or type(q) is not Tensor or any(t.dtype != torch.float32 for t in (q, k, v, *sums)):
        return False
    rows = all(t.stride(2) == 1 and t.stride(1) == t.shape[2] and t.shape[2] % 16 == 0 for t in (k, v, *sums))
    return rows and q.stride(3) == 1 and _kernel() is not None


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, keep: bool) -> tuple[Tensor, Tensor | None]:
    """As :func:`depthpass_kernels.slot_attention.chunk.forward`."""
    (batch, count, heads, _), (key_heads, keys, _) = q.shape, k.shape
    out = q.new_empty(batch, count, heads, v.shape[2])
    p = q.new_empty(key_heads, count * heads * batch // key_heads, keys) if keep else None
    _run(0, q, k, v, q, out, p, k, v, scale)
    return out, p


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor | None, scale: float, dk: Tensor, dv: Tensor) -> Tensor:
    """As :func:`depthpass_kernels.slot_attention.chunk.backward`."""
    grad, dq = grad.contiguous(), q.new_empty(q.shape)
    _run(1, q, k, v, grad, dq, p, dk, dv, scale)
    return dq


def _run(
    back: int, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, y: Tensor, p: Tensor | None, dk: Tensor, dv: Tensor, scale: float
) -> None:
    (batch, count, heads, width), (key_heads, keys, wide) = q.shape, v.shape
    strides = (k.stride(0), v.stride(0), dk.stride(0), dv.stride(0), *q.stride()[:3], *grad.stride()[:3])
    kernel = _kernel()
    assert kernel is not None
    kernel(
        back + 2 * (p is not None), q, k, v, grad, y, y if p is None else p, dk, dv, scale,
        batch, key_heads // batch, heads * batch // key_heads, count, keys, width, wide, *strides, torch.get_num_threads(),
    )
