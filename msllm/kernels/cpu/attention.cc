// Blockwise attention of tables on a CPU, forward and backward (FlashAttention, arXiv 2205.14135,
// algorithms 1 and 4).
//
// A block of queries or keys is a run of cells: all streams of some rows. The lowest and highest
// row and segment of two blocks decide whether the pair of blocks has anything to compute, and
// whether every pair of cells in it is visible.

#include <cmath>
#include <vector>

#include "products.h"

namespace msllm {

using Floats32 = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using Result = ffi::Result<Floats32>;

// The approximate number of cells in a block of queries, so that its data stay in the cache.
constexpr int64_t QUERIES = 160;
// The score of a pair that is not visible. It is finite, because for a query that has seen no key
// yet, an infinite score would give inf - inf.
constexpr float MASKED = -1e30f;

struct Block {
  int64_t begin, cells;
  int64_t row_low = INT32_MAX, row_high = INT32_MIN, segment_low = INT32_MAX,
          segment_high = INT32_MIN;
  bool all = true;  // every cell is present
};

// Divides cells into blocks of `size`, given the row and segment of each cell. The segment of an
// absent cell is negative.
std::vector<Block> blocks_of(const int32_t* row, const int32_t* segment, int64_t cells,
                             int64_t size) {
  std::vector<Block> blocks;
  for (int64_t begin = 0; begin < cells; begin += size) {
    Block block{begin, std::min(size, cells - begin)};
    for (int64_t i = begin; i < begin + block.cells; ++i) {
      block.row_low = std::min<int64_t>(block.row_low, row[i]);
      block.row_high = std::max<int64_t>(block.row_high, row[i]);
      if (segment[i] < 0) {
        block.all = false;
      } else {
        block.segment_low = std::min<int64_t>(block.segment_low, segment[i]);
        block.segment_high = std::max<int64_t>(block.segment_high, segment[i]);
      }
    }
    blocks.push_back(block);
  }
  return blocks;
}

IntVec load(const int32_t* from) {
  IntVec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// The arguments of a call (msllm/model/attention/cpu.py), with B tables, N heads, K kv heads:
//   q [B, Lq, N, H]; k and v [B, Lk, K, H].
//   turned_k and turned_v [B, K, M, H, C]: transposed, in M blocks of C cells. A block consists of
//   complete rows and complete vectors.
//   row and segment of each cell, [B, Lq] for queries and [B, M * C] for keys.
//   lag [Sq, Sk].
//   own [Sq]: the index of each stream of the queries among the streams of the keys, or any number
//   out of range if the keys do not include it.
struct Inputs {
  Floats32 q, k_or_v, turned_k;
  Ints q_row, q_segment, k_row, k_segment, lag, own;
};

// The blocks of one table, and the visibility rule of msllm/streams.py: a cell sees itself, and
// cells of its segment that lie at least `lag` rows back.
class Table {
 public:
  Table(const Inputs& in, int64_t index)
      : q_streams_(in.lag.dimensions()[0]),
        q_row_(in.q_row.typed_data() + index * in.q_row.dimensions()[1]),
        q_segment_(in.q_segment.typed_data() + index * in.q_row.dimensions()[1]),
        k_row_(in.k_row.typed_data() + index * in.k_row.dimensions()[1]),
        k_segment_(in.k_segment.typed_data() + index * in.k_row.dimensions()[1]),
        own_(in.own.typed_data()) {
    const int64_t k_streams = in.lag.dimensions()[1], size = in.turned_k.dimensions()[4];
    const int64_t rows = std::max<int64_t>(1, QUERIES / q_streams_);
    queries = blocks_of(q_row_, q_segment_, in.q.dimensions()[1], rows * q_streams_);
    keys = blocks_of(k_row_, k_segment_, in.k_or_v.dimensions()[1], size);
    const int32_t* lag = in.lag.typed_data();
    const auto [least, most] = std::minmax_element(lag, lag + q_streams_ * k_streams);
    least_ = *least, most_ = *most;
    for (int64_t s = 0; s < q_streams_; ++s)
      for (int64_t j = 0; j < size; ++j) lags_.push_back(lag[s * k_streams + j % k_streams]);
    for (int64_t j = 0; j < size; ++j) stream_.push_back(j % k_streams);
  }

  bool some_visible(const Block& q, const Block& k) const {
    const bool earlier = k.row_low <= q.row_high - least_ && k.segment_low <= q.segment_high &&
                         q.segment_low <= k.segment_high;
    return earlier || (k.row_low <= q.row_high && q.row_low <= k.row_high);
  }

  bool all_visible(const Block& q, const Block& k) const {
    return k.row_high <= q.row_low - most_ && q.all && k.all && k.cells % LANES == 0 &&
           q.segment_low == q.segment_high && k.segment_low == k.segment_high &&
           q.segment_low == k.segment_low;
  }

  // For LANES keys of a block, starting at the j-th: whether the query sees them.
  IntVec visible(int64_t query, const Block& k, int64_t j) const {
    const int64_t stream = query % q_streams_;
    const IntVec row = load(k_row_ + k.begin + j), segment = load(k_segment_ + k.begin + j);
    const IntVec earlier = (row + load(&lags_[stream * stream_.size() + j]) <= q_row_[query]) &
                           (segment == q_segment_[query]);
    return earlier | ((row == q_row_[query]) & (load(&stream_[j]) == own_[stream]));
  }

  std::vector<Block> queries, keys;

 private:
  int64_t q_streams_, least_, most_;
  const int32_t *q_row_, *q_segment_, *k_row_, *k_segment_, *own_;
  // For each cell in a block of keys, its lag from each stream of the queries, and its stream.
  std::vector<int32_t> lags_, stream_;
};

std::vector<Table> tables_of(const Inputs& in) {
  std::vector<Table> tables;
  for (int64_t i = 0; i < in.q.dimensions()[0]; ++i) tables.emplace_back(in, i);
  return tables;
}

int64_t padded(const Block& keys) { return (keys.cells + LANES - 1) / LANES * LANES; }

// The product of a block of queries with a block of transposed keys or values [H, C], which is
// [q.cells, padded(k)].
void multiply_turned(Matrix x, const Block& q, const float* turned, int64_t stride, const Block& k,
                     int64_t size, float* out) {
  const int64_t width = padded(k);
  std::fill(out, out + q.cells * width, 0.0f);
  add_product(x, {turned, stride}, out, width, q.cells, size, width, CACHED, size * stride);
}

std::unique_ptr<float[]> numbers(int64_t count) {
  return std::unique_ptr<float[]>(new float[count]);
}

void scale_row(float* row, int64_t size, float by) {
  for (int64_t h = 0; h < size; ++h) row[h] *= by;
}

// The forward pass: out [B, Lq, N, H], and lse [B, Lq, N], the logarithm of the sum of e^score over
// the keys that a query sees.
ffi::Error Attention(ffi::ThreadPool pool, Floats32 q, Floats32 v, Floats32 turned_k, Ints q_row,
                     Ints q_segment, Ints k_row, Ints k_segment, Ints lag, Ints own, Result out,
                     Result lse) {
  const std::vector<Table> tables =
      tables_of({q, v, turned_k, q_row, q_segment, k_row, k_segment, lag, own});
  const int64_t heads = q.dimensions()[2], kv_heads = v.dimensions()[2], size = q.dimensions()[3];
  const int64_t q_cells = q.dimensions()[1], k_cells = v.dimensions()[1],
                block = turned_k.dimensions()[4];
  const int64_t length = turned_k.dimensions()[2] * block, all_heads = tables.size() * heads;
  const int64_t blocks = tables.front().queries.size(), stride = heads * size;
  const float scale = LOG2E / std::sqrt(float(size));  // scores are in base 2 here
  in_parallel(pool, all_heads * blocks, [&](int64_t task) {
    const int64_t b = task % all_heads / heads, head = task % heads,
                  kv_head = head / (heads / kv_heads);
    const Table& table = tables[b];
    // The last blocks of queries see the most keys and come first.
    const Block& queries = table.queries[blocks - 1 - task / all_heads];
    const int64_t at = (b * q_cells + queries.begin) * heads + head;
    float* sums = out->typed_data() + at * size;
    for (int64_t i = 0; i < queries.cells; ++i)
      std::fill(sums + i * stride, sums + i * stride + size, 0.0f);
    auto scores = numbers(queries.cells * (table.keys.front().cells + LANES));
    std::vector<float> most(queries.cells, MASKED), total(queries.cells);
    for (const Block& keys : table.keys) {
      if (!table.some_visible(queries, keys)) continue;
      const bool all = table.all_visible(queries, keys);
      const int64_t width = padded(keys);
      const float* turned =
          turned_k.typed_data() + ((b * kv_heads + kv_head) * length + keys.begin) * size;
      multiply_turned({q.typed_data() + at * size, stride}, queries, turned, block, keys, size,
                      scores.get());
      for (int64_t i = 0; i < queries.cells; ++i) {
        float* row = scores.get() + i * width;
        Vec highest = broadcast(most[i]), added{};
        for (int64_t j = 0; j < width; j += LANES) {
          Vec score = load(row + j) * scale;
          if (!all) score = table.visible(queries.begin + i, keys, j) ? score : broadcast(MASKED);
          highest = max(highest, score);
          store(row + j, score);
        }
        const float now = max(highest);
        for (int64_t j = 0; j < width; j += LANES) {
          Vec weight = exp2(load(row + j) - now);
          added += weight;
          store(row + j, weight);
        }
        if (now > most[i]) {
          const float kept = std::exp2(most[i] - now);
          scale_row(sums + i * stride, size, kept);
          total[i] *= kept;
          most[i] = now;
        }
        total[i] += sum(added);
      }
      const Matrix values{v.typed_data() + ((b * k_cells + keys.begin) * kv_heads + kv_head) * size,
                          kv_heads * size};
      add_product({scores.get(), width}, values, sums, stride, queries.cells, keys.cells, size,
                  CACHED);
    }
    for (int64_t i = 0; i < queries.cells; ++i) {
      scale_row(sums + i * stride, size, total[i] > 0 ? 1 / total[i] : 0);
      lse->typed_data()[at + i * heads] =
          total[i] > 0 ? most[i] / LOG2E + std::log(total[i]) : MASKED;
    }
  });
  return ffi::Error::Success();
}

// The backward pass: the gradients of q, k and v from the gradient of out. A task handles a kv
// head, or a share of its blocks of queries, with all of its keys.
ffi::Error AttentionGradients(ffi::ThreadPool pool, Floats32 q, Floats32 k, Floats32 turned_k,
                              Ints q_row, Ints q_segment, Ints k_row, Ints k_segment, Ints lag,
                              Ints own, Floats32 turned_v, Floats32 out, Floats32 lse,
                              Floats32 d_out, Result d_q, Result d_k, Result d_v) {
  const std::vector<Table> tables =
      tables_of({q, k, turned_k, q_row, q_segment, k_row, k_segment, lag, own});
  const int64_t heads = q.dimensions()[2], kv_heads = k.dimensions()[2], size = q.dimensions()[3],
                groups = heads / kv_heads;
  const int64_t q_cells = q.dimensions()[1], k_cells = k.dimensions()[1],
                block = turned_k.dimensions()[4];
  const int64_t length = turned_k.dimensions()[2] * block;
  const int64_t all_heads = tables.size() * kv_heads, stride = heads * size,
                k_stride = kv_heads * size;
  const int64_t of_all = k.element_count();
  const float scale = 1 / std::sqrt(float(size));
  // A head is divided into as many parts as keep all threads busy. Each part sums its own gradients
  // of keys and values.
  const int64_t parts = std::clamp<int64_t>((2 * pool.num_threads() - 1) / all_heads + 1, 1, 16);
  auto more = numbers((parts - 1) * of_all * 2);
  in_parallel(pool, all_heads * parts, [&](int64_t task) {
    const int64_t b = task % all_heads / kv_heads, kv_head = task % kv_heads,
                  part = task / all_heads;
    const Table& table = tables[b];
    const int64_t first_key = (b * k_cells * kv_heads + kv_head) * size;
    float* of_keys = (part ? more.get() + (part - 1) * of_all * 2 : d_k->typed_data()) + first_key;
    float* of_values = part ? of_keys + of_all : d_v->typed_data() + first_key;
    for (int64_t i = 0; i < k_cells; ++i)
      for (float* to : {of_keys, of_values})
        std::fill(to + i * k_stride, to + i * k_stride + size, 0.0f);
    const float* turned_keys = turned_k.typed_data() + (b * kv_heads + kv_head) * size * length;
    const float* turned_values = turned_v.typed_data() + (b * kv_heads + kv_head) * size * length;
    const int64_t largest = table.queries.front().cells * (table.keys.front().cells + LANES);
    auto scores = numbers(largest), slopes = numbers(largest),
         means = numbers(table.queries.front().cells);
    for (size_t n = part; n < table.queries.size(); n += parts)
      for (int64_t group = 0; group < groups; ++group) {
        const Block& queries = table.queries[n];
        const int64_t at = (b * q_cells + queries.begin) * heads + kv_head * groups + group;
        const Matrix from{q.typed_data() + at * size, stride},
            above{d_out.typed_data() + at * size, stride};
        float* of_queries = d_q->typed_data() + at * size;
        for (int64_t i = 0; i < queries.cells; ++i) {
          std::fill(of_queries + i * stride, of_queries + i * stride + size, 0.0f);
          means[i] = 0;
          for (int64_t h = 0; h < size; ++h)
            means[i] += above.row(i)[h] * out.typed_data()[at * size + i * stride + h];
        }
        for (const Block& keys : table.keys) {
          if (!table.some_visible(queries, keys)) continue;
          const bool all = table.all_visible(queries, keys);
          const int64_t width = padded(keys), key = keys.begin * k_stride;
          multiply_turned(from, queries, turned_keys + keys.begin * size, block, keys, size,
                          scores.get());
          multiply_turned(above, queries, turned_values + keys.begin * size, block, keys, size,
                          slopes.get());
          for (int64_t i = 0; i < queries.cells; ++i) {
            const float top = lse.typed_data()[at + i * heads] * LOG2E;
            for (int64_t j = 0; j < width; j += LANES) {
              float *score = scores.get() + i * width + j, *slope = slopes.get() + i * width + j;
              Vec weight = exp2(load(score) * (scale * LOG2E) - top);
              if (!all) weight = table.visible(queries.begin + i, keys, j) ? weight : Vec{};
              store(score, weight);
              store(slope, weight * (load(slope) - means[i]) * scale);
            }
          }
          const Matrix turned_weights{scores.get(), 1, width},
              turned_slopes{slopes.get(), 1, width};
          const Matrix these_keys{k.typed_data() + first_key + key, k_stride};
          add_product(turned_weights, above, of_values + key, k_stride, keys.cells, queries.cells,
                      size, CACHED);
          add_product(turned_slopes, from, of_keys + key, k_stride, keys.cells, queries.cells, size,
                      CACHED);
          add_product({slopes.get(), width}, these_keys, of_queries, stride, queries.cells,
                      keys.cells, size, CACHED);
        }
      }
  });
  const int64_t share = (of_all + 63) / 64;
  in_parallel(pool, parts > 1 ? 64 : 0, [&](int64_t task) {
    for (int64_t part = 0; part < parts - 1; ++part)
      for (int64_t i = task * share; i < std::min((task + 1) * share, of_all); ++i) {
        d_k->typed_data()[i] += more[part * of_all * 2 + i];
        d_v->typed_data()[i] += more[part * of_all * 2 + of_all + i];
      }
  });
  return ffi::Error::Success();
}

auto inputs() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Floats32>()
      .Arg<Floats32>()
      .Arg<Floats32>()
      .Arg<Ints>()
      .Arg<Ints>()
      .Arg<Ints>()
      .Arg<Ints>()
      .Arg<Ints>()
      .Arg<Ints>();
}

}  // namespace msllm

XLA_FFI_DEFINE_HANDLER_SYMBOL(msllm_attention, msllm::Attention,
                              msllm::inputs().Ret<msllm::Floats32>().Ret<msllm::Floats32>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(msllm_attention_gradients, msllm::AttentionGradients,
                              msllm::inputs()
                                  .Arg<msllm::Floats32>()
                                  .Arg<msllm::Floats32>()
                                  .Arg<msllm::Floats32>()
                                  .Arg<msllm::Floats32>()
                                  .Ret<msllm::Floats32>()
                                  .Ret<msllm::Floats32>()
                                  .Ret<msllm::Floats32>());
