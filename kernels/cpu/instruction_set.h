// Which instruction sets the row functions are compiled for, and which of them this processor has.
#pragma once

// The last one is for products of bytes alone (packed_linear.cpp); others take what comes before it.
enum InstructionSet { ISA_BASELINE = 0, ISA_AVX2 = 1, ISA_AVX512 = 2, ISA_AVX512VNNI = 3 };

// Calls the row function of the instruction set. On other processors than x86 only the baseline is compiled.
#if defined(__x86_64__)
#define MEGACPT_ON_ISA(isa, call)                            \
  ((isa) >= ISA_AVX512 ? megacpt::avx512::call               \
   : (isa) == ISA_AVX2 ? megacpt::avx2::call : megacpt::baseline::call)
#else
#define MEGACPT_ON_ISA(isa, call) ((void)(isa), megacpt::baseline::call)
#endif

// Only what Python calls leaves the library.
#define MEGACPT_EXPORT __attribute__((visibility("default")))
