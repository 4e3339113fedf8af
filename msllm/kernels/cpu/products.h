// Products y [M, N] = x [M, K] w that read the matrix w once, for up to some hundred rows of x.
#pragma once

#include <type_traits>

#include "simd.h"

namespace msllm {

// The number of vectors of columns that registers hold together with M rows.
template <int M>
constexpr int WIDTH = 4 * M <= ACCUMULATORS   ? 4
                      : 2 * M <= ACCUMULATORS ? 2
                                              : 1;
constexpr int ROWS = ACCUMULATORS / 2;  // rows that registers hold at a time
// Rows of a transposed w that stay in the cache while they are multiplied by all rows of x.
constexpr int NEAR = 4;

// A matrix whose rows are `stride` apart in memory, and the values of a row `step` apart. Only x in
// add_product has a step other than 1.
template <typename T>
struct MatrixOf {
  const T* data;
  int64_t stride;
  int64_t step = 1;
  const T* row(int64_t i) const { return data + i * stride; }
};
using Matrix = MatrixOf<float>;

// Computes x [M, k] w [k, n] and calls f(row, first column, LANES numbers) on the results. k is at
// least 1, and n is a multiple of LANES * C. If x is bfloat16, so is w, and k and C are even. If x
// has eight bits, so has w, k is a multiple of 4, and C is even. Prefetches w at the distance
// `ahead`.
template <int M, int C, typename X, typename W, typename F>
void block_of_columns(MatrixOf<X> x, MatrixOf<W> w, int64_t k, int64_t n, int64_t ahead, F f) {
  constexpr int DEEP = sizeof(float) / sizeof(X);  // rows of w that are multiplied at a time
  using Sum = std::conditional_t<DEEP == 4, IntVec, Vec>;
  for (int64_t j = 0; j < n; j += LANES * C) {
    Sum sums[M][C] = {};
    const X* from = x.data;
    const W* weights = w.data + j;
    int64_t left = k;
    do {
      Sum columns[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; c += std::min(DEEP, 2)) {
        const W* here = weights + LANES * c;
        if constexpr (DEEP == 4) {
          load_fours(here, w.stride, columns + c);
        } else if constexpr (DEEP == 2) {
          load_pairs(here, here + w.stride, columns + c);
        } else {
          columns[c] = load(here);
        }
#pragma GCC unroll 4
        for (int i = 0; i < DEEP; ++i) __builtin_prefetch(here + i * w.stride + ahead, 0, 2);
      }
#pragma GCC unroll 32
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c)
          sums[m][c] = multiply_add(from + m * x.stride, columns[c], sums[m][c]);
      from += DEEP * x.step;
      weights += DEEP * w.stride;
    } while ((left -= DEEP) > 0);
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) f(m, j + LANES * c, to_floats(sums[m][c]));
  }
}

// y [M, n] += x [M, k] w^T, w [n, k], n a multiple of C. Prefetches the next rows of w.
template <int M, int C, typename W>
void block_of_rows(Matrix x, MatrixOf<W> w, float* y, int64_t y_stride, int64_t k, int64_t n) {
  const int64_t vectors = k / LANES * LANES;
  for (int64_t j = 0; j < n; j += C) {
    Vec parts[M][C] = {};
    auto add = [&](const float* from, const W* weights, auto... count) {
      Vec columns[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        columns[c] = load(weights + c * w.stride, count...);
        __builtin_prefetch(weights + (c + NEAR) * w.stride, 0, 2);
      }
#pragma GCC unroll 32
      for (int m = 0; m < M; ++m) {
        Vec row = load(from + m * x.stride, count...);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) parts[m][c] += row * columns[c];
      }
    };
    for (int64_t i = 0; i < vectors; i += LANES) add(x.data + i, w.row(j) + i);
    if (vectors < k) add(x.data + vectors, w.row(j) + vectors, k - vectors);
    for (int m = 0; m < M; ++m) {
      float* to = y + m * y_stride + j;
      if constexpr (C == 4) {
        Four four;
        std::memcpy(&four, to, sizeof four);
        four += sums(parts[m]);
        std::memcpy(to, &four, sizeof four);
      } else {
        for (int c = 0; c < C; ++c) to[c] += sum(parts[m][c]);
      }
    }
  }
}

// Calls f with `m` (1 to M) as a compile-time constant.
template <int M = ROWS, typename F>
void with_rows(int64_t m, F f) {
  if constexpr (M == 1) {
    f(std::integral_constant<int, 1>());
  } else if (m == M) {
    f(std::integral_constant<int, M>());
  } else {
    with_rows<M - 1>(m, f);
  }
}

// Calls f(first row, number of rows as a compile-time constant) for m rows in parts of about equal
// size.
template <int MOST = ROWS, typename F>
void by_rows(int64_t m, F f) {
  const int64_t parts = (m + MOST - 1) / MOST;
  for (int64_t part = 0, first = 0; part < parts; ++part) {
    const int64_t size = (m - first) / (parts - part);
    with_rows<MOST>(size, [&](auto rows) { f(first, rows); });
    first += size;
  }
}

// How a product divides w: `depth` rows at a time, and `tile` columns that stay in the cache while
// they are multiplied by all of x.
struct Cut {
  int64_t depth, tile;
};
// For a w in the second-level cache: a part fits into the first-level cache.
constexpr Cut CACHED{64, 64};

// y [m, n] += x [m, k] w [k, n]. If x is bfloat16, so is w, k is even, and n is a multiple of
// 2 * LANES. If x has eight bits, so has w, k is a multiple of 4, and n is a multiple of 2 * LANES.
//
// Prefetches the next rows of w. After the last columns of w it prefetches the columns that begin
// `next` columns after the first one of w. If `elsewhere` is given, it prefetches that distance
// from w instead.
template <typename X = float, typename W = float>
void add_product(MatrixOf<X> x, MatrixOf<W> w, float* y, int64_t y_stride, int64_t m, int64_t k,
                 int64_t n, Cut cut, int64_t next = 0, int64_t elsewhere = 0) {
  const int64_t vectors = n / LANES * LANES;
  for (int64_t tile = 0; tile < vectors; tile += cut.tile) {
    const int64_t end = std::min(tile + cut.tile, vectors);
    for (int64_t i = 0; i < k; i += cut.depth) {
      const int64_t depth = std::min(cut.depth, k - i),
                    after = end < vectors ? cut.tile : next - tile;
      const int64_t rows_ahead = i + depth < k ? depth * w.stride : after - i * w.stride;
      const int64_t ahead = elsewhere ? elsewhere : rows_ahead;
      by_rows(m, [&](int64_t first, auto rows) {
        constexpr int M = rows, C = std::is_same_v<X, float> ? WIDTH<M> : 2;
        const int64_t whole = tile + (end - tile) / (LANES * C) * (LANES * C);
        auto add = [&](auto columns, int64_t j, int64_t size) {
          const MatrixOf<X> from{x.row(first) + i * x.step, x.stride, x.step};
          const MatrixOf<W> weights{w.row(i) + j, w.stride};
          float* to = y + first * y_stride + j;
          block_of_columns<M, columns>(
              from, weights, depth, size, ahead, [&](int64_t row, int64_t column, Vec v) {
                store(to + row * y_stride + column, load(to + row * y_stride + column) + v);
              });
        };
        add(std::integral_constant<int, C>(), tile, whole - tile);
        if constexpr (std::is_same_v<X, float>)
          add(std::integral_constant<int, 1>(), whole, end - whole);
      });
    }
  }
  for (int64_t row = 0; row < m && vectors < n; ++row)
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = vectors; j < n; ++j)
        y[row * y_stride + j] += x.row(row)[i * x.step] * w.row(i)[j];
}

// y [m, n] += x [m, k] w^T, w [n, k].
template <typename W = float>
void add_product_transposed(Matrix x, MatrixOf<W> w, float* y, int64_t y_stride, int64_t m,
                            int64_t k, int64_t n) {
  for (int64_t j = 0; j < n; j += NEAR)
    by_rows<ACCUMULATORS / NEAR>(m, [&](int64_t first, auto rows) {
      constexpr int M = rows;
      const Matrix from{x.row(first), x.stride};
      float* to = y + first * y_stride + j;
      if (n - j >= NEAR) {
        block_of_rows<M, NEAR>(from, MatrixOf<W>{w.row(j), w.stride}, to, y_stride, k, NEAR);
      } else {
        block_of_rows<M, 1>(from, MatrixOf<W>{w.row(j), w.stride}, to, y_stride, k, n - j);
      }
    });
}

// Columns of a packed w, or rows of the decoding cache, stored contiguously; as in calls.py.
constexpr int64_t PANEL = 32;
constexpr int64_t AHEAD = 4096;  // the distance of prefetches, in numbers

// Computes x [m, k] w [k, n] and calls f(row, first column, LANES numbers) on the results. w
// consists of panels [k, PANEL] that follow each other, and n is a multiple of PANEL. If x is
// bfloat16, so is w, and k is even. If x has eight bits, so has w, and k is a multiple of 4.
// Prefetches w at the distance `ahead`.
template <typename X, typename W, typename F>
void multiply_panels(MatrixOf<X> x, const W* w, int64_t m, int64_t k, int64_t n, int64_t ahead,
                     F f) {
  by_rows(m, [&](int64_t first, auto rows) {
    constexpr int M = rows, C = std::min<int>(WIDTH<M>, PANEL / LANES);
    const MatrixOf<X> from{x.row(first), x.stride};
    for (int64_t j = 0; j < n; j += PANEL)
      block_of_columns<M, C>(
          from, MatrixOf<W>{w + j * k, PANEL}, k, PANEL, ahead,
          [f, first, j](int64_t row, int64_t column, Vec v) { f(first + row, j + column, v); });
  });
}

// y [m, n] = x [m, k] w [k, n] for one panel w. If w is narrower than PANEL, x must be float32.
template <typename X = float, typename W = float>
void multiply_panel(MatrixOf<X> x, const W* w, float* y, int64_t y_stride, int64_t m, int64_t k,
                    int64_t n) {
  if (n == PANEL)
    return multiply_panels(x, w, m, k, n, AHEAD, [&](int64_t row, int64_t column, Vec v) {
      store(y + row * y_stride + column, v);
    });
  if constexpr (std::is_same_v<X, float>) {
    for (int64_t i = 0; i < m; ++i) std::fill(y + i * y_stride, y + i * y_stride + n, 0.0f);
    add_product(x, MatrixOf<W>{w, n}, y, y_stride, m, k, n, {k, PANEL});
  }
}

}  // namespace msllm
