// The best instruction set of this processor among those compiled.

#include "instruction_set.h"

extern "C" MEGACPT_EXPORT int megacpt_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return ISA_AVX512;
  // Not every compiler can ask for F16C, but processors with FMA and AVX2 have it.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return ISA_AVX2;
#endif
  return ISA_BASELINE;
}
