// Vectors as wide as the registers of the CPU that this is compiled for, and work shared among XLA's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <utility>

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

inline Vec broadcast(float x) { return x - Vec{}; }

// The first `count` values; zeros behind them.
inline Vec load(const float* from, int64_t count) {
  Vec v{};
  std::memcpy(&v, from, 4 * count);
  return v;
}

template <int N>
struct Floats {
  typedef float Type __attribute__((vector_size(4 * N)));
};

template <int N = LANES>
float sum(typename Floats<N>::Type v) {
  if constexpr (N == 2) {
    return v[0] + v[1];
  } else {
    typename Floats<N / 2>::Type halves[2];
    std::memcpy(halves, &v, sizeof v);
    return sum<N / 2>(halves[0] + halves[1]);
  }
}

// `a` where the byte of a lane is not 0, else `b`.
inline Vec choose(const bool* where, int64_t count, Vec a, float b) {
  typedef uint8_t Bytes __attribute__((vector_size(LANES)));
  Bytes bytes{};
  if (count >= LANES) {
    std::memcpy(&bytes, where, LANES);
  } else {
    std::memcpy(&bytes, where, count);
  }
  return __builtin_convertvector(bytes, IntVec) != 0 ? a : broadcast(b);
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

inline float max(Vec v) {
  float highest = v[0];
  for (int i = 1; i < LANES; ++i) highest = std::max(highest, v[i]);
  return highest;
}

// e^x for x <= 0, with a relative error of 2e-7 (the polynomial of Cephes, S. Moshier); 0 below -87.
inline Vec exp(Vec x) {
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the lowest bits
  Vec shifted = x * 1.44269504f + magic, n = shifted - magic;
  Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  IntVec power = (IntVec)p + (((IntVec)shifted - (IntVec)magic) << 23);
  return x > -87.0f ? (Vec)power : Vec{};
}

// Calls f(0), ..., f(tasks - 1), on this thread and on those of the pool that come to it. Waits for no task that nobody
// has begun, so threads of one pool can do this at the same time.
template <typename F>
void in_parallel(ffi::ThreadPool& pool, int64_t tasks, F f) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, tasks, &f] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < tasks;) {
      f(i);
      shared->done.fetch_add(1);
    }
  };
  for (int64_t i = 1; i < std::min<int64_t>(tasks, pool.num_threads()); ++i) pool.Schedule([work] { work(); });
  work();
  while (shared->done.load() < tasks) std::this_thread::yield();
}

}  // namespace msllm
