// The best instruction set of this processor among those compiled.

#include "instruction_set.h"

#if defined(__x86_64__)
#include <cpuid.h>

// Asked of the processor itself: __builtin_cpu_supports knows this name in newer compilers alone. The system's part, that
// it keeps the registers, is that of AVX2.
static bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

extern "C" MEGACPT_EXPORT int megacpt_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return ISA_AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) return ISA_AVX2;
#endif
  return ISA_BASELINE;
}
