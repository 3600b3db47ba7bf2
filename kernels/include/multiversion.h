#pragma once
// FASTPROMPT_CLONES compiles AVX-512, AVX2 and baseline versions of a function; one is selected when the library loads.

#if !defined(FASTPROMPT_TARGET_CLONES)  // set by CMakeLists.txt where the toolchain can build them
#define FASTPROMPT_CLONES
#elif defined(__clang__)  // clang 14 takes architecture levels too, and then runs the baseline
#define FASTPROMPT_CLONES __attribute__((target_clones("avx512bw", "avx2", "default")))
#else  // gcc 12 dispatches on avx512f but not on avx512bw, which 16-bit elements need
#define FASTPROMPT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif

// Function bodies must be inlined: a call from a clone would run baseline code.
#define FASTPROMPT_INLINE __attribute__((always_inline)) inline
