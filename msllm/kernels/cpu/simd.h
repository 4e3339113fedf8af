// Vectors as wide as the registers of the CPU that this is compiled for, and tasks on XLA's
// threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace msllm {

namespace ffi = xla::ffi;

#if defined(__AVX512F__)
constexpr int LANES = 16, ACCUMULATORS = 20;  // of 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8, ACCUMULATORS = 12;  // of 16
#elif defined(__aarch64__)
constexpr int LANES = 4, ACCUMULATORS = 20;
#else
constexpr int LANES = 4, ACCUMULATORS = 12;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));

inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

inline Vec to_floats(Vec v) { return v; }

inline Vec broadcast(float x) { return x - Vec{}; }

inline Vec multiply_add(const float* x, Vec y, Vec sums) { return sums + *x * y; }

// The upper half of a float32.
struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  explicit BFloat16(float x) {  // rounds to nearest even
    uint32_t wide;
    std::memcpy(&wide, &x, sizeof x);
    bits = x != x ? 0x7fc0 : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
  }
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
  }
};

template <typename From, typename To>
void convert(const From* from, To* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = To(from[i]);
}

inline Vec load(const BFloat16* from) {
#if defined(__AVX512F__)  // compilers do not vectorize this conversion
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)),
                                16);
#elif defined(__AVX2__)
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#else
  Vec v;
  for (int i = 0; i < LANES; ++i) v[i] = from[i];
  return v;
#endif
}

inline Vec load(const int8_t* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
  Vec v;
  for (int i = 0; i < LANES; ++i) v[i] = from[i];
  return v;
#endif
}

// CPUs with AVX-512 BF16 multiply bfloat16 in pairs: two numbers of a row of x by those of two rows
// of w.
#if defined(__AVX512BF16__)
using Paired = BFloat16;

inline void store(BFloat16* to, Vec v) {
  const __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(to, &narrow, sizeof narrow);
}

// Two vectors of pairs from two rows: columns 0 to 15, and 16 to 31.
inline void load_pairs(const BFloat16* first, const BFloat16* second, Vec* pairs) {
  alignas(64) constexpr auto order = [] {
    struct {
      uint16_t of[2][32];
    } order{};
    for (int i = 0; i < 64; ++i) order.of[i / 32][i % 32] = i / 2 + i % 2 * 32;
    return order;
  }();
  const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  for (int i = 0; i < 2; ++i)
    pairs[i] = (Vec)_mm512_permutex2var_epi16(a, _mm512_load_si512(order.of[i]), b);
}

inline Vec multiply_add(const BFloat16* pair, Vec pairs, Vec sums) {
  int both;
  std::memcpy(&both, pair, sizeof both);
  return (Vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(both), (__m512bh)pairs);
}
#else
using Paired = float;
#endif

// CPUs with AVX-512 VNNI and VBMI multiply int8 in fours: four numbers of a row of x by those of
// four rows of w. One side must be unsigned. Attention weights are unsigned. For products with
// queries, the keys are made unsigned by adding 128.
#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
using Query8 = int8_t;
using Weight8 = uint8_t;

inline Vec to_floats(IntVec v) { return (Vec)_mm512_cvtepi32_ps((__m512i)v); }

inline void store(int8_t* to, Vec v) {
  _mm_storeu_si128((__m128i*)to, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32((__m512)v)));
}

inline void store(uint8_t* to, Vec v) {
  _mm_storeu_si128((__m128i*)to, _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32((__m512)v)));
}

// Two vectors of fours from four rows: columns 0 to 15, and 16 to 31.
inline void load_fours(const int8_t* from, int64_t stride, IntVec* fours) {
  alignas(64) constexpr auto order = [] {
    struct {
      uint8_t of[2][64];
    } order{};
    for (int i = 0; i < 128; ++i) order.of[i / 64][i % 64] = i / 4 + i % 4 * 32;
    return order;
  }();
  auto two_rows = [stride](const int8_t* from) {
    const __m256i first = _mm256_loadu_si256((const __m256i*)from),
                  second = _mm256_loadu_si256((const __m256i*)(from + stride));
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
  };
  const __m512i a = two_rows(from), b = two_rows(from + 2 * stride);
  for (int i = 0; i < 2; ++i)
    fours[i] = (IntVec)_mm512_permutex2var_epi8(a, _mm512_load_si512(order.of[i]), b);
}

inline IntVec without_sign(IntVec fours) { return fours ^ (IntVec{} + int(0x80808080)); }

template <typename X>
__m512i broadcast_four(const X* four) {
  int all;
  std::memcpy(&all, four, sizeof all);
  return _mm512_set1_epi32(all);
}

inline IntVec multiply_add(const int8_t* four, IntVec fours, IntVec sums) {
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)without_sign(fours),
                                     broadcast_four(four));
}

inline IntVec multiply_add(const uint8_t* four, IntVec fours, IntVec sums) {
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sums, broadcast_four(four), (__m512i)fours);
}
#else
using Query8 = float;
using Weight8 = float;
#endif

// The first `count` values, followed by zeros.
template <typename T>
Vec load(const T* from, int64_t count) {
  T some[LANES] = {};
  std::memcpy(some, from, sizeof(T) * count);
  return load(some);
}

template <int N>
struct Floats {
  typedef float Type __attribute__((vector_size(4 * N)));
};

// Reduces the lanes of a vector by f, halving it each time.
template <int N = LANES, typename F>
float fold(typename Floats<N>::Type v, F f) {
  if constexpr (N == 2) {
    return f(v[0], v[1]);
  } else {
    typename Floats<N / 2>::Type halves[2];
    std::memcpy(halves, &v, sizeof v);
    return fold<N / 2>(f(halves[0], halves[1]), f);
  }
}

inline float sum(Vec v) {
  return fold(v, [](auto a, auto b) { return a + b; });
}

// Selects within each group of four lanes: 0 to 3 name lanes of a, 4 to 7 lanes of b.
template <int... FOUR, int... LANE>
Vec in_fours(Vec a, Vec b, std::integer_sequence<int, FOUR...>,
             std::integer_sequence<int, LANE...>) {
  constexpr int from[] = {FOUR...};
#if defined(__clang__)
  return __builtin_shufflevector(
      a, b, (LANE / 4 * 4 + from[LANE % 4] % 4 + from[LANE % 4] / 4 * LANES)...);
#else
  return __builtin_shuffle(
      a, b, IntVec{(LANE / 4 * 4 + from[LANE % 4] % 4 + from[LANE % 4] / 4 * LANES)...});
#endif
}

template <int... FOUR>
Vec in_fours(Vec a, Vec b) {
  return in_fours(a, b, std::integer_sequence<int, FOUR...>(),
                  std::make_integer_sequence<int, LANES>());
}

using Four = Floats<4>::Type;

template <int N = LANES>
Four add_fours(typename Floats<N>::Type v) {
  if constexpr (N == 4) {
    return v;
  } else {
    typename Floats<N / 2>::Type halves[2];
    std::memcpy(&halves, &v, sizeof v);
    return add_fours<N / 2>(halves[0] + halves[1]);
  }
}

// The sums of four vectors, in less than half the instructions of four separate sums.
inline Four sums(const Vec (&v)[4]) {
  const Vec first = in_fours<0, 4, 1, 5>(v[0], v[1]) + in_fours<2, 6, 3, 7>(v[0], v[1]);
  const Vec second = in_fours<0, 4, 1, 5>(v[2], v[3]) + in_fours<2, 6, 3, 7>(v[2], v[3]);
  return add_fours(in_fours<0, 1, 4, 5>(first, second) + in_fours<2, 3, 6, 7>(first, second));
}

inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);  // compilers emit two instructions for this
#elif defined(__AVX__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

inline float max(Vec v) {
  return fold(v, [](auto a, auto b) { return a > b ? a : b; });
}

// For each lane `a` if its byte is not 0, else `b`.
inline Vec choose(const bool* where, Vec a, float b) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __m128i bytes = _mm_loadu_si128((const __m128i*)where);
  return (Vec)_mm512_mask_mov_ps((__m512)broadcast(b), _mm_test_epi8_mask(bytes, bytes), (__m512)a);
#else
  uint8_t bytes[16] = {};
  std::memcpy(bytes, where, LANES);
#if defined(__AVX2__)  // compilers do not vectorize this conversion
  const IntVec wide = (IntVec)_mm256_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
#else
  IntVec wide;
  for (int i = 0; i < LANES; ++i) wide[i] = bytes[i];
#endif
  return wide != 0 ? a : broadcast(b);
#endif
}

constexpr float LOG2E = 1.44269504f;

// 2^x for x <= 0, with a relative error of 2e-7; 0 from -127 on. The polynomial is that of Cephes
// (S. Moshier), exp2f.
inline Vec exp2(Vec x) {
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the lowest bits.
  const Vec magic = broadcast(12582912.0f);
  x = max(x, broadcast(-127.0f));
  const Vec shifted = x + magic, r = x - (shifted - magic);
  Vec p = broadcast(1.535336188319500e-4f);
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  return (Vec)((IntVec)p + ((IntVec)shifted << 23));
}

// `exp2` for results that are rounded to eight bits, with a relative error of 9e-5. The result is
// exactly 1 for x = 0.
inline Vec rough_exp2(Vec x) {
#if defined(__AVX512DQ__)
  // r is x - floor(x); scalef multiplies by 2^floor(x).
  const Vec r = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
  Vec p = broadcast(7.706704e-2f);
  p = p * r + 2.2764499e-1f;
  p = p * r + 6.9511679e-1f;
  p = p * r + 1.0f;
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  return exp2(x);
#endif
}

// Calls f(0), ..., f(tasks - 1) on this thread and on the threads of the pool that are free. This
// thread runs every task that no other thread has started, so several threads of one pool can call
// this at the same time.
template <typename F>
void in_parallel(ffi::ThreadPool& pool, int64_t tasks, F f) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, tasks, &f] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < tasks;) {
      f(i);
      if (shared->done.fetch_add(1) + 1 == tasks) {
        std::lock_guard lock(shared->mutex);
        shared->all_done.notify_all();
      }
    }
  };
  for (int64_t i = 1; i < std::min<int64_t>(tasks, pool.num_threads()); ++i)
    pool.Schedule([work] { work(); });
  work();
  for (int i = 0; i < 100 && shared->done.load() < tasks; ++i)
    std::this_thread::yield();  // cheaper than sleeping and waking up
  std::unique_lock lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done.load() >= tasks; });
}

}  // namespace msllm
