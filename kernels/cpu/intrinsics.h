// The instructions of x86 by their names, for what vector types cannot say, and loops without a loop.
#pragma once

#if defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 finds such in its own header, where it is meant
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

// Before a loop of few turns, to keep what it goes through in registers: compilers give up on nests of them.
#if defined(__clang__)
#define MEGACPT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define MEGACPT_UNROLL _Pragma("GCC unroll 16")
#endif
