// Decoding of one row on a CPU: matrix products with few rows, attention of one row over the cache,
// and writing the row to the cache.

#include <array>
#include <cmath>
#include <numeric>
#include <vector>

#include "products.h"

namespace msllm {

using Array = ffi::Buffer<ffi::F32>;
using Result = ffi::Result<Array>;

// The number of columns in each task of a product, a multiple of `unit`, when `all` columns are
// shared among the threads.
int64_t columns_of_a_part(const ffi::ThreadPool& pool, int64_t all, int64_t multiplications_of_one,
                          int64_t unit) {
  const int64_t least = 1 << 16;  // a thread pays off from this many multiplications on
  const int64_t threads =
      std::clamp<int64_t>(all * multiplications_of_one / least, 1, pool.num_threads());
  // Several parts for each thread, because a thread may start late.
  const int64_t parts = threads > 1 ? 4 * threads : 1;
  return std::max<int64_t>(1, (all + parts * unit - 1) / (parts * unit)) * unit;
}

// `MatmulPacked` for the element type T.
template <typename T>
ffi::Error matmul_packed(ffi::ThreadPool& pool, ffi::AnyBuffer x, ffi::RemainingArgs ws,
                         ffi::RemainingRets ys) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  int64_t all = 0;
  for (size_t i = 0; i < ws.size(); ++i) {
    const ffi::AnyBuffer w = *ws.get<ffi::AnyBuffer>(i);
    if (w.dimensions()[0] != k || w.element_type() != x.element_type())
      return ffi::Error::InvalidArgument("the shapes or types of x and w do not match");
    all += w.dimensions()[1];
  }
  struct Part {
    const T* w;
    T* y;
    int64_t n, columns;
  };
  std::vector<Part> parts;
  const int64_t columns = columns_of_a_part(pool, all, m * k, PANEL);
  for (size_t i = 0; i < ws.size(); ++i) {
    const ffi::AnyBuffer from = *ws.get<ffi::AnyBuffer>(i);
    ffi::AnyBuffer to = **ys.get<ffi::AnyBuffer>(i);
    const int64_t n = from.dimensions()[1];
    const T* w = static_cast<const T*>(from.untyped_data());
    for (int64_t j = 0; j < n; j += columns)
      parts.push_back(
          {w + j * k, static_cast<T*>(to.untyped_data()) + j, n, std::min(columns, n - j)});
  }
  const T* given = static_cast<const T*>(x.untyped_data());
  std::vector<float> wide;
  if constexpr (!std::is_same_v<T, float>) {
    wide.resize(m * k);
    convert(given, wide.data(), m * k);
  }
  in_parallel(pool, parts.size(), [&](int64_t task) {
    const auto [w, y, n, columns] = parts[task];
    std::vector<float> sums(std::is_same_v<T, float> ? 0 : m * PANEL);
    for (int64_t j = 0; j < columns; j += PANEL) {
      const int64_t width = std::min(PANEL, columns - j);
      if constexpr (std::is_same_v<T, float>) {
        multiply_panel(Matrix{given, k}, w + j * k, y + j, n, m, k, width);
      } else {
        if (std::is_same_v<Paired, T> && width == PANEL && k % 2 == 0) {
          const MatrixOf<Paired> pairs{reinterpret_cast<const Paired*>(given), k};
          multiply_panel(pairs, w + j * k, sums.data(), PANEL, m, k, width);
        } else {
          multiply_panel(Matrix{wide.data(), k}, w + j * k, sums.data(), PANEL, m, k, width);
        }
        for (int64_t i = 0; i < m; ++i) convert(sums.data() + i * PANEL, y + i * n + j, width);
      }
    }
  });
  return ffi::Error::Success();
}

// The products y [M, N] of x [M, K] with each w [K, N], all float32 or all bfloat16, summed in
// float32. Each w is packed: panels [K, PANEL] of columns follow each other, and the last one may
// be narrower. The kernel reads them from start to end.
ffi::Error MatmulPacked(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs ws,
                        ffi::RemainingRets ys) {
  if (x.element_type() == ffi::F32) return matmul_packed<float>(pool, x, ws, ys);
  if (x.element_type() == ffi::BF16) return matmul_packed<BFloat16>(pool, x, ws, ys);
  return ffi::Error::InvalidArgument("x is not float32 or bfloat16");
}

// The product y [M, N] float32 of x [M, K] and the transpose of w [N, K], both float32 or both
// bfloat16.
ffi::Error MatmulTable(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, Result y) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1], n = y->dimensions()[1];
  if (k != w.dimensions()[1] || w.element_type() != x.element_type())
    return ffi::Error::InvalidArgument("the shapes or types of x and w do not match");
  const int64_t columns = columns_of_a_part(pool, n, m * k, NEAR);
  auto multiply = [&](const float* x, auto* w) {
    using W = std::remove_pointer_t<decltype(w)>;
    in_parallel(pool, (n + columns - 1) / columns, [&](int64_t task) {
      const int64_t first = task * columns, size = std::min(columns, n - first);
      float* to = y->typed_data() + first;
      for (int64_t i = 0; i < m; ++i) std::fill(to + i * n, to + i * n + size, 0.0f);
      add_product_transposed(Matrix{x, k}, MatrixOf<W>{w + first * k, k}, to, n, m, k, size);
    });
    return ffi::Error::Success();
  };
  if (x.element_type() == ffi::F32) return multiply(x.typed_data<float>(), w.typed_data<float>());
  if (x.element_type() != ffi::BF16)
    return ffi::Error::InvalidArgument("x is not float32 or bfloat16");
  std::vector<float> wide(m * k);
  convert(static_cast<const BFloat16*>(x.untyped_data()), wide.data(), m * k);
  return multiply(wide.data(), static_cast<BFloat16*>(w.untyped_data()));
}

// The arguments and results of `AttendRow`, below.
struct Row {
  const float* q;
  const bool* mask;
  const float* scales[2];  // of keys and of values, for int8
  float *top, *norm, *out;
  int64_t sessions, kv_heads, queries, of_head, streams, rows, size, filled;
  float masked;
};

// Turns a product with a query into a score in base 2: (product - zero) * unit.
struct Scores {
  float zero, unit;
};

// Converts a query to the type X in which keys are multiplied.
template <typename X>
Scores round_query(const float* from, X* to, int64_t size) {
  if constexpr (std::is_same_v<X, int8_t>) {
    Vec largest{};
    for (int64_t h = 0; h < size; h += LANES)
      largest = max(largest, max(load(from + h), -load(from + h)));
    const float one = max(largest) / 127;
    for (int64_t h = 0; h < size; h += LANES)
      store(to + h, load(from + h) * (one > 0 ? 1 / one : 0));
    // The product reads keys as unsigned numbers, which are 128 larger.
    return {128.0f * std::accumulate(to, to + size, 0), one * LOG2E};
  } else {
    convert(from, to, size);
    return {0, LOG2E};
  }
}

// `AttendRow` for keys and values of type T. Keys are multiplied by queries of type X, values by
// weights of type Y.
template <typename X, typename Y, typename T>
void attend_row(ffi::ThreadPool& pool, const Row& in, const T* keys, const T* values) {
  constexpr int64_t NARROW = sizeof(float) / sizeof(Y);  // weights in the memory of one float
  static constexpr bool SCALED = std::is_same_v<T, int8_t>;
  const int64_t queries = in.queries, streams = in.streams, rows = in.rows, size = in.size;
  const int64_t end = std::clamp<int64_t>(in.filled, 1, rows),
                seen = (end + PANEL - 1) / PANEL * PANEL;
  const int64_t depth = (end + NARROW - 1) / NARROW * NARROW;
  in_parallel(pool, in.sessions * in.kv_heads, [&](int64_t task) {
    const bool* visible = in.mask + task / in.kv_heads * in.of_head * streams * rows;
    float *most = in.top + task * queries, *total = in.norm + task * queries,
          *sums = in.out + task * queries * size;
    std::fill(most, most + queries, in.masked);
    std::fill(total, total + queries, 0.0f);
    std::fill(sums, sums + queries * size, 0.0f);
    auto query = std::make_unique<X[]>(queries * size);
    std::vector<Scores> scores_of(queries);
    for (int64_t i = 0; i < queries; ++i)
      scores_of[i] = round_query(in.q + (task * queries + i) * size, &query[i * size], size);
    auto scores = std::make_unique<float[]>(ROWS * seen),
         weighted = std::make_unique<float[]>(ROWS * size);
    // Weights overwrite the scores that have been read.
    const auto weights = reinterpret_cast<Y*>(scores.get());
    // An online softmax over the streams keeps the scores of a few queries in the CPU's cache. Each
    // product prefetches what the next one reads: the product with keys prefetches values, and the
    // product with values prefetches keys.
    for (int64_t s = 0; s < streams; ++s)
      by_rows(queries, [&](int64_t first, int64_t count) {
        const int64_t cell = (task * streams + s) * rows;
        const T *key = keys + cell * size, *value = values + cell * size;
        const float* key_scale = SCALED ? in.scales[0] + cell : nullptr;
        const float* value_scale = SCALED ? in.scales[1] + cell : nullptr;
        struct Asking {
          Vec highest;
          const bool* sees;
          Scores scores;
        };
        std::array<Asking, ROWS> asking;
        for (int64_t i = 0; i < count; ++i) {
          const bool* sees = visible + ((first + i) % in.of_head * streams + s) * rows;
          asking[i] = {broadcast(most[first + i]), sees, scores_of[first + i]};
        }
        auto take = [by = asking.data(), key_scale, to = scores.get(), seen, masked = in.masked](
                        int64_t i, int64_t r, Vec product) {
          Vec score = (product - by[i].scores.zero) * by[i].scores.unit;
          if constexpr (SCALED) score *= load(key_scale + r);
          score = choose(by[i].sees + r, score, masked);
          by[i].highest = max(by[i].highest, score);
          store(to + i * seen + r, score);
        };
        multiply_panels(MatrixOf<X>{&query[first * size], size}, key, count, size, seen,
                        value - key, take);
        float unit[ROWS], kept[ROWS];
        for (int64_t i = 0; i < count; ++i) {
          float *row = &scores[i * seen], before = most[first + i];
          Vec added{}, largest{};
          const float now = max(asking[i].highest);
          Y* weights_of_row = weights + i * NARROW * seen;
          for (int64_t r = 0; r < seen; r += LANES) {
            const Vec below = load(row + r) - now;
            Vec weight = NARROW > 1 ? rough_exp2(below) : exp2(below);
            added += weight;
            if constexpr (SCALED) weight *= load(value_scale + r);
            if constexpr (NARROW == 4) {
              largest = max(largest, weight);
              store(row + r, weight);
            } else {
              store(weights_of_row + r, weight);
            }
          }
          unit[i] = 1;
          if constexpr (NARROW == 4) {
            unit[i] = max(largest) / 255;
            for (int64_t r = 0; r < seen; r += LANES)
              store(weights_of_row + r, load(row + r) * (unit[i] > 0 ? 1 / unit[i] : 0));
          }
          kept[i] = std::exp2(before - now);
          total[first + i] = total[first + i] * kept[i] + sum(added);
          most[first + i] = now;
        }
        std::fill(&weighted[0], &weighted[count * size], 0.0f);
        add_product(MatrixOf<Y>{weights, NARROW * seen}, MatrixOf<T>{value, size}, weighted.get(),
                    size, count, depth, size, {depth, CACHED.tile}, 0, key - value + rows * size);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t h = 0; h < size; ++h) {
            float& sum = sums[(first + i) * size + h];
            sum = sum * kept[i] + weighted[i * size + h] * unit[i];
          }
      });
    for (int64_t i = 0; i < queries; ++i) most[i] /= LOG2E;
  });
}

// Attention of one row of each session over a block of the cache (`attend` in
// msllm/decode/cache.py).
//
// Arguments:
//   q [B, K, Q, H], where Q = (heads of a kv head) * queries.
//   keys [B, K, S, R / PANEL, H, PANEL], in float32, int8, or the bits of bfloat16.
//   values [B, K, S, R / PANEL, PANEL, H], in the type of the keys.
//   mask [B, queries, S, R].
//   filled []: rows of the block from this index on are not visible.
//   scales: for int8, those of keys and of values, [B, K, S, R] each.
// Results:
//   top and norm [B, K, Q, 1]: the highest score, and the sum of e^(score - top).
//   out [B, K, Q, H]: the sum of the values weighted by e^(score - top).
ffi::Error AttendRow(ffi::ThreadPool pool, float masked, Array q, ffi::AnyBuffer keys,
                     ffi::AnyBuffer values, ffi::Buffer<ffi::PRED> mask,
                     ffi::Buffer<ffi::S32> filled, ffi::RemainingArgs scales, Result top,
                     Result norm, Result out) {
  const auto shape = keys.dimensions();
  Row row{q.typed_data(),    mask.typed_data(),  {},
          top->typed_data(), norm->typed_data(), out->typed_data()};
  row.sessions = shape[0], row.kv_heads = shape[1], row.streams = shape[2],
  row.rows = shape[3] * PANEL, row.size = shape[4];
  row.queries = q.dimensions()[2], row.of_head = mask.dimensions()[1],
  row.filled = filled.typed_data()[0], row.masked = masked;
  if (shape[5] != PANEL || mask.dimensions()[3] != row.rows)
    return ffi::Error::InvalidArgument("keys are not in panels");
  if (scales.size() != (keys.element_type() == ffi::S8 ? 2 : 0))
    return ffi::Error::InvalidArgument("only int8 has scales");
  for (size_t i = 0; i < scales.size(); ++i) row.scales[i] = scales.get<Array>(i)->typed_data();
  auto attend = [&](auto x, auto y, auto number) {
    using T = decltype(number);
    const auto *k = static_cast<const T*>(keys.untyped_data()),
               *v = static_cast<const T*>(values.untyped_data());
    attend_row<decltype(x), decltype(y)>(pool, row, k, v);
    return ffi::Error::Success();
  };
  const bool narrow = row.size % (2 * LANES) == 0;
  switch (keys.element_type()) {
    case ffi::F32:
      return attend(float(), float(), float());
    case ffi::S8:
      return narrow ? attend(Query8(), Weight8(), int8_t()) : attend(float(), float(), int8_t());
    case ffi::U16:
      return narrow ? attend(Paired(), Paired(), BFloat16()) : attend(float(), float(), BFloat16());
    default:
      return ffi::Error::InvalidArgument("keys are not float32, int8, or the bits of bfloat16");
  }
}

// A number as the cache stores it; for int8 in units of `one`.
template <typename T>
T stored(float x, float one) {
  if constexpr (std::is_same_v<T, int8_t>) {
    const float rounded = std::nearbyint(x / one);
    return std::abs(rounded) <= 127 ? rounded : 0;  // 0 if `rounded` is NaN or infinite
  } else {
    return T(x);
  }
}

// Writes one row of each session into a block of the cache, converted as by `store` in
// msllm/decode/cache.py.
//
// Arguments:
//   at [B]: the row of the block to write in each session. Nothing is written if it is outside of
//   the block.
//   k and v [B, 1, S, K, H]: the new row.
//   old: the keys [B, K, S, R / PANEL, H, PANEL] and values [B, K, S, R / PANEL, PANEL, H] of the
//   block, in float32, int8, or the bits of bfloat16. For int8 each is followed by its scales,
//   [B, K, S, R].
// Results: the block, in the same memory.
ffi::Error WriteRow(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> at, Array k, Array v,
                    ffi::RemainingArgs old, ffi::RemainingRets block) {
  for (size_t i = 0; i < block.size(); ++i)
    if ((*old.get<ffi::AnyBuffer>(i)).untyped_data() !=
        (**block.get<ffi::AnyBuffer>(i)).untyped_data())
      return ffi::Error::Internal("a block of the cache was copied");
  const int64_t half = block.size() / 2;  // the number of arrays of keys, and of values
  const ffi::AnyBuffer keys = **block.get<ffi::AnyBuffer>(0),
                       values = **block.get<ffi::AnyBuffer>(half);
  const auto shape = keys.dimensions();
  if (shape[5] != PANEL)
    return ffi::Error::InvalidArgument("a block of the cache is not in panels");
  const int64_t kv_heads = shape[1], heads = shape[0] * kv_heads, streams = shape[2],
                rows = shape[3] * PANEL, size = shape[4];
  float* scales[2] = {};
  for (int64_t i = 0; i < 2 && half == 2; ++i)
    scales[i] = (**block.get<Array>(i * half + 1)).typed_data();

  auto write = [&](auto number) {
    using T = decltype(number);
    auto put = [&](const float* row, T* to, float* scale, int64_t head, int64_t place,
                   int64_t first, int64_t step) {
      for (int64_t s = 0; s < streams; ++s) {
        const float* from =
            row + ((head / kv_heads * streams + s) * kv_heads + head % kv_heads) * size;
        const int64_t cell = (head * streams + s) * rows;
        float one = 1;
        if (scale) {
          float largest = 0;
          for (int64_t h = 0; h < size; ++h) {
            const float x = std::abs(from[h]);
            if (!(x <= largest) && largest == largest) largest = x;  // keeps a NaN
          }
          one = scale[cell + place] = largest * (1.0f / 127);
        }
        T* panel = to + (cell + place / PANEL * PANEL) * size + first;
        for (int64_t h = 0; h < size; ++h) panel[h * step] = stored<T>(from[h], one);
      }
    };
    // A thread pays off from this many numbers on. That is few, because the numbers of a key are
    // far apart in memory.
    const int64_t least = 1 << 9;
    const int64_t parts = std::clamp<int64_t>(k.element_count() / least, 1, heads);
    in_parallel(pool, parts, [&](int64_t task) {
      for (int64_t head = task * heads / parts; head < (task + 1) * heads / parts; ++head) {
        const int64_t place = at.typed_data()[head / kv_heads], inside = place % PANEL;
        if (place < 0 || place >= rows) continue;
        put(k.typed_data(), static_cast<T*>(keys.untyped_data()), scales[0], head, place, inside,
            PANEL);
        put(v.typed_data(), static_cast<T*>(values.untyped_data()), scales[1], head, place,
            inside * size, 1);
      }
    });
    return ffi::Error::Success();
  };
  switch (keys.element_type()) {
    case ffi::F32:
      return write(float());
    case ffi::S8:
      return write(int8_t());
    case ffi::U16:
      return write(BFloat16());
    default:
      return ffi::Error::InvalidArgument(
          "a block of the cache is not float32, int8, or the bits of bfloat16");
  }
}

}  // namespace msllm

XLA_FFI_DEFINE_HANDLER_SYMBOL(msllm_matmul_packed, msllm::MatmulPacked,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(msllm_matmul_table, msllm::MatmulTable,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<msllm::Array>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(msllm_attend_row, msllm::AttendRow,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<float>("masked")
                                  .Arg<msllm::Array>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::PRED>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<msllm::Array>()
                                  .Ret<msllm::Array>()
                                  .Ret<msllm::Array>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(msllm_write_row, msllm::WriteRow,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<msllm::Array>()
                                  .Arg<msllm::Array>()
                                  .RemainingArgs()
                                  .RemainingRets());
