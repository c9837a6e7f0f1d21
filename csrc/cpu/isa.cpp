// Which instruction sets this processor has, among those the library is compiled for.
#include "../kernels.h"

namespace offprin::cpu {

bool supports(Isa isa) {
#if OFFPRIN_X86
  // Exactly the flags that setup.py compiles *_avx2.cpp and *_avx512.cpp with.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("lzcnt");
  if (isa == Isa::AVX2) return avx2;
  if (isa == Isa::AVX512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512bitalg");
#endif
  return isa == Isa::GENERIC;
}

Isa best_isa() { return supports(Isa::AVX512) ? Isa::AVX512 : supports(Isa::AVX2) ? Isa::AVX2 : Isa::GENERIC; }

}  // namespace offprin::cpu
