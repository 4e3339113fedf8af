// What decoding a row needs on a CPU: products of few rows, and attention of one row over the cache.

#include <cmath>

#include "products.h"

namespace msllm {

using Array = ffi::Buffer<ffi::F32>;
using Result = ffi::Result<Array>;

// x [M, K], w [K, N] (axis 0) or [N, K] (axis 1) -> y [M, N]. Each thread makes some columns of y.
ffi::Error Product(ffi::ThreadPool pool, int64_t axis, Array x, Array w, Result y) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1], n = y->dimensions()[1], stride = w.dimensions()[1];
  if (k != w.dimensions()[axis]) return ffi::Error::InvalidArgument("x and w do not fit together");
  const float *from = x.typed_data(), *weights = w.typed_data();
  float* to = y->typed_data();
  const int64_t least = 1 << 16;  // multiplications that are worth another thread
  const int64_t wanted = std::min<int64_t>(4 * pool.num_threads(), std::max<int64_t>(1, m * k * n / least));
  const int64_t align = 4 * LANES, columns = ((n + wanted - 1) / wanted + align - 1) / align * align;
  in_parallel(pool, (n + columns - 1) / columns, [&](int64_t task) {
    const int64_t first = task * columns, size = std::min(columns, n - first);
    for (int64_t i = 0; i < m; ++i) std::fill(to + i * n + first, to + i * n + first + size, 0.0f);
    if (axis == 0) {
      add_product({from, k}, {weights + first, stride}, to + first, n, m, k, size, STREAMED, size);
    } else {
      add_product_transposed({from, k}, {weights + first * stride, stride}, to + first, n, m, k, size);
    }
  });
  return ffi::Error::Success();
}

// One row of each session over a block of the cache, see `attend` in msllm/cache.py. Each thread takes some kv heads.
//
//   q [B, K, Q, H], Q = (heads of a kv head) * queries; keys and values [B, K, H, S, R]; mask [B, queries, S, R];
//   filled []: rows of the block from here on are not visible.
//   -> top and norm [B, K, Q, 1]: highest score, sum of e^(score - top); out [B, K, Q, H]: values weighted by these.
ffi::Error AttendRow(ffi::ThreadPool pool, float masked, Array q, Array keys, Array values, ffi::Buffer<ffi::PRED> mask,
                     ffi::Buffer<ffi::S32> filled, Result top, Result norm, Result out) {
  const auto shape = keys.dimensions();
  const int64_t kv_heads = shape[1], size = shape[2], streams = shape[3], rows = shape[4];
  const int64_t queries = q.dimensions()[2], of_head = mask.dimensions()[1];
  const int64_t end = std::clamp<int64_t>(filled.typed_data()[0], 1, rows);
  const int64_t seen = std::min(rows, (end + LANES - 1) / LANES * LANES);
  in_parallel(pool, shape[0] * kv_heads, [&](int64_t task) {
    const float* query = q.typed_data() + task * queries * size;
    const float* key = keys.typed_data() + task * size * streams * rows;
    const float* value = values.typed_data() + task * size * streams * rows;
    const bool* visible = mask.typed_data() + task / kv_heads * of_head * streams * rows;
    float *most = top->typed_data() + task * queries, *total = norm->typed_data() + task * queries;
    float* sums = out->typed_data() + task * queries * size;
    std::fill(most, most + queries, masked);
    std::fill(total, total + queries, 0.0f);
    std::fill(sums, sums + queries * size, 0.0f);
    const int64_t padded = (seen + LANES - 1) / LANES * LANES;
    auto scores = std::make_unique<float[]>(ROWS * padded);
    for (int64_t s = 0; s < streams; ++s)  // with an online softmax: the scores of some queries and one stream stay close
      by_rows(queries, [&](int64_t first, int64_t count) {
        std::fill(scores.get(), scores.get() + count * padded, 0.0f);
        const Matrix k{key + s * rows, streams * rows}, v{value + s * rows, streams * rows};
        add_product({query + first * size, size}, k, scores.get(), padded, count, size, seen, STREAMED, rows);
        for (int64_t i = first; i < first + count; ++i) {
          float* row = scores.get() + (i - first) * padded;
          const bool* of_row = visible + (i % of_head * streams + s) * rows;
          Vec highest = broadcast(most[i]), added{};
          for (int64_t r = 0; r < seen; r += LANES) {
            Vec score = choose(of_row + r, seen - r, load(row + r), masked);
            highest = max(highest, score);
            store(row + r, score);
          }
          const float now = max(highest);
          for (int64_t r = 0; r < seen; r += LANES) {
            Vec weight = exp2((load(row + r) - now) * LOG2E);
            added += weight;
            store(row + r, weight);
          }
          if (now > most[i]) {
            const float kept = std::exp2((most[i] - now) * LOG2E);
            for (int64_t h = 0; h < size; ++h) sums[i * size + h] *= kept;
            total[i] *= kept;
            most[i] = now;
          }
          total[i] += sum(added);
        }
        add_product_transposed({scores.get(), padded}, v, sums + first * size, size, count, seen, size);
      });
  });
  return ffi::Error::Success();
}

}  // namespace msllm

XLA_FFI_DEFINE_HANDLER_SYMBOL(msllm_product, msllm::Product,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<int64_t>("axis")
                                  .Arg<msllm::Array>()
                                  .Arg<msllm::Array>()
                                  .Ret<msllm::Array>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(msllm_attend_row, msllm::AttendRow,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<float>("masked")
                                  .Arg<msllm::Array>()
                                  .Arg<msllm::Array>()
                                  .Arg<msllm::Array>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::PRED>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<msllm::Array>()
                                  .Ret<msllm::Array>()
                                  .Ret<msllm::Array>());
