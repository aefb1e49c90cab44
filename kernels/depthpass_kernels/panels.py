"""Products with a weight in panels of two vectors of columns, where oneDNN's are not the fastest: C++ of this package.

A tile of up to 14 rows by one panel (six with AVX2) keeps its sums in registers; a panel is cut along the inner dimension into
blocks that stay in the first cache while all rows pass. At a few dozen rows these reach 1.1 to 2.4 times the rate of oneDNN's
packed products with AVX2 alone and on Intel's processors with AVX-512; on others with AVX-512 oneDNN stays (docs/benchmarks.md).
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from depthpass_kernels.cpp import build
from depthpass_kernels.processor import onednn_leads, vectors

ARGUMENTS = ("int64_t", "const float*", "const float*", "const float*", "float*", *("int64_t",) * 6)
SOURCE = """
#include <immintrin.h>
#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(__AVX512F__) && !defined(HALF_AS_WIDE)
typedef __m512 Vector;
constexpr int64_t LANES = 16, AHEAD = 128;
constexpr int MOST = 14, NEAR = 2;
static inline Vector load(const float* x) { return _mm512_loadu_ps(x); }
static inline void store(float* y, Vector v) { _mm512_storeu_ps(y, v); }
static inline Vector all(float x) { return _mm512_set1_ps(x); }
static inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
#else
typedef __m256 Vector;
constexpr int64_t LANES = 8, AHEAD = 256;
constexpr int MOST = 6, NEAR = 3;
static inline Vector load(const float* x) { return _mm256_loadu_ps(x); }
static inline void store(float* y, Vector v) { _mm256_storeu_ps(y, v); }
static inline Vector all(float x) { return _mm256_set1_ps(x); }
static inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
#endif
constexpr int64_t COLUMNS = 2 * LANES;
constexpr int64_t BLOCK = 256;  // of the inner dimension

static int64_t count_of(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// The first tile asks for what it will read in a while, AHEAD rows of a panel, and how NEAR it is to come: a panel comes
// from memory once, then from the first cache.
template <int ROWS, bool FIRST>
static void tile(const float* x, int64_t in, const float* panel, const float* start, int64_t step, float* y, int64_t out,
                 int64_t length) {
  Vector left[ROWS], right[ROWS];
  #pragma GCC unroll 14
  for (int r = 0; r < ROWS; r++) {
    left[r] = load(start + r * step);
    right[r] = load(start + r * step + LANES);
  }
  #pragma GCC unroll 4
  for (int64_t i = 0; i < length; i++) {
    Vector a = load(panel + i * COLUMNS), b = load(panel + i * COLUMNS + LANES);
    if constexpr (FIRST)
      for (int64_t line = 0; line < COLUMNS; line += 16) __builtin_prefetch(panel + (i + AHEAD) * COLUMNS + line, 0, NEAR);
    #pragma GCC unroll 14
    for (int r = 0; r < ROWS; r++) {
      Vector value = all(x[r * in + i]);
      left[r] = fma(value, a, left[r]);
      right[r] = fma(value, b, right[r]);
    }
  }
  #pragma GCC unroll 14
  for (int r = 0; r < ROWS; r++) {
    store(y + r * out, left[r]);
    store(y + r * out + LANES, right[r]);
  }
}

template <bool FIRST, int ROWS = MOST>
static void tile_of(int64_t rows, const float* x, int64_t in, const float* panel, const float* start, int64_t step, float* y,
                    int64_t out, int64_t length) {
  if (rows == ROWS) return tile<ROWS, FIRST>(x, in, panel, start, step, y, out, length);
  if constexpr (ROWS > 1) tile_of<FIRST, ROWS - 1>(rows, x, in, panel, start, step, y, out, length);
}

// All rows times one block of a panel, in tiles of nearly the same size.
static void rows_of(const float* x, int64_t rows, int64_t in, const float* panel, const float* bias, float* y, int64_t out,
                    int64_t length) {
  int64_t tiles = (rows + MOST - 1) / MOST, step = bias ? 0 : out;
  for (int64_t t = 0, r = 0; t < tiles; t++) {
    int64_t count = rows / tiles + (t < rows % tiles);
    float* to = y + r * out;
    const float *from = x + r * in, *start = bias ? bias : to;
    (t ? tile_of<false> : tile_of<true>)(count, from, in, panel, start, step, to, out, length);
    r += count;
  }
}

// y = x W^T + b.
static void product(const float* x, const float* panels, const float* bias, float* y, int64_t rows, int64_t out, int64_t in,
                    int64_t threads) {
  #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < count_of(out, COLUMNS); p++) {
    const int64_t columns = std::min(COLUMNS, out - p * COLUMNS);
    const float* panel = panels + p * COLUMNS * in;
    float start[COLUMNS] = {};
    if (bias) std::copy_n(bias + p * COLUMNS, columns, start);
    // A last panel that is narrower is read and written through whole ones.
    std::vector<float> whole, part;
    float* to = y + p * COLUMNS;
    int64_t stride = out;
    if (columns < COLUMNS) {
      whole.resize(2 * BLOCK * COLUMNS), part.resize(rows * COLUMNS);
      to = part.data(), stride = COLUMNS;
    }
    for (int64_t k = 0; k < in; k += BLOCK) {
      const int64_t length = std::min(BLOCK, in - k);
      const float* block = panel + k * columns;
      if (columns < COLUMNS) {
        for (int64_t i = 0; i < length; i++) std::copy_n(block + i * columns, columns, whole.data() + i * COLUMNS);
        block = whole.data();
      }
      rows_of(x + k, rows, in, block, k ? nullptr : start, to, stride, length);
    }
    if (columns < COLUMNS)
      for (int64_t r = 0; r < rows; r++) std::copy_n(to + r * COLUMNS, columns, y + r * out + p * COLUMNS);
  }
}

static void pack(const float* weight, float* panels, int64_t out, int64_t in, int64_t row, int64_t column, int64_t threads) {
  #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < count_of(out, COLUMNS); p++) {
    const int64_t columns = std::min(COLUMNS, out - p * COLUMNS);
    const float* from = weight + p * COLUMNS * row;
    float* to = panels + p * COLUMNS * in;
    if (columns == COLUMNS) {
      for (int64_t k = 0; k < in; k++)
        for (int64_t c = 0; c < COLUMNS; c++) to[k * COLUMNS + c] = from[c * row + k * column];
    } else {
      for (int64_t k = 0; k < in; k++)
        for (int64_t c = 0; c < columns; c++) to[k * columns + c] = from[c * row + k * column];
    }
  }
}

extern "C" void kernel(int64_t what, const float* x, const float* panels, const float* bias, float* y,
                       int64_t rows, int64_t out, int64_t in, int64_t row, int64_t column, int64_t threads) {
  switch (what) {
    case 0: return product(x, panels, nullptr, y, rows, out, in, threads);
    case 1: return product(x, panels, bias, y, rows, out, in, threads);
    case 2: return pack(x, y, out, in, row, column, threads);
  }
}
"""


@functools.cache
def obstacle() -> str | None:
    """Why these products are not to be had, or not wanted, on this machine; None = they are. Builds them at the first call."""
    if vectors() not in ("AVX2", "AVX512"):
        return f"they are for processors with AVX2 or AVX-512, this one has {vectors()}"
    if onednn_leads():
        return "on this processor with AVX-512 oneDNN's packed products are faster"
    built = build(ARGUMENTS, SOURCE)
    if not isinstance(built, Exception):
        return None
    logging.getLogger("depthpass").info("products on the CPU take oneDNN's packed weights, not panels: %s", built)
    return f"{type(built).__name__}: {built}"


def in_panels(weight: Tensor) -> Tensor:
    """The entries of W ``[out, in]``, float32, panel after panel, in a contiguous tensor of that shape."""
    panels = torch.empty_like(weight, memory_format=torch.contiguous_format)
    _run(2, weight, weight, weight, panels, 0, *weight.shape, *weight.stride())
    return panels


def panel_product(x: Tensor, panels: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` for what :func:`in_panels` returns; x ``[..., in]``, b ``[out]``, float32 on the CPU."""
    x, (out, inner) = x.contiguous(), panels.shape
    y = x.new_empty(*x.shape[:-1], out)
    if bias is None:
        _run(0, x, panels, x, y, x.numel() // inner, out, inner, 0, 0)
    else:
        _run(1, x, panels, bias.contiguous(), y, x.numel() // inner, out, inner, 0, 0)
    return y


def _run(*given) -> None:
    built = build(ARGUMENTS, SOURCE)
    if isinstance(built, Exception):
        raise RuntimeError("the products of panels are not to be had on this machine") from built
    built(*given, torch.get_num_threads())
