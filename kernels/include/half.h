#pragma once
// Convert runs of halves to floats and back, with the CPU's conversion instructions if it has them: with integer
// arithmetic a half-precision add takes more than twice as long (1.3 million elements, one thread: 820 against 350 us).

#include <cstdint>

#include "element.h"

#ifdef FASTPROMPT_TARGET_CLONES
#include <immintrin.h>
#endif

namespace fastprompt {

/// Floats in a caller's buffer between conversions: three such buffers fit in the first-level cache.
constexpr int64_t kHalfBlock = 512;

#ifdef FASTPROMPT_TARGET_CLONES

// Every CPU with AVX2 has F16C, which older compilers cannot ask for by name. (Clones: x86-64, and the toolchain
// can ask the CPU at all.)
inline const bool has_f16c = __builtin_cpu_supports("avx2");

__attribute__((target("avx,f16c"))) inline int64_t load_halves_f16c(const Half* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  return i;
}

__attribute__((target("avx,f16c"))) inline int64_t store_halves_f16c(const float* from, Half* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
  return i;
}

#else

constexpr bool has_f16c = false;
inline int64_t load_halves_f16c(const Half*, float*, int64_t) { return 0; }
inline int64_t store_halves_f16c(const float*, Half*, int64_t) { return 0; }

#endif

inline void load_halves(const Half* from, float* to, int64_t count) {
  for (int64_t i = has_f16c ? load_halves_f16c(from, to, count) : 0; i < count; ++i) {
    to[i] = Element<Half>::load(from[i]);
  }
}

inline void store_halves(const float* from, Half* to, int64_t count) {
  for (int64_t i = has_f16c ? store_halves_f16c(from, to, count) : 0; i < count; ++i) {
    to[i] = Element<Half>::store(from[i]);
  }
}

}  // namespace fastprompt
