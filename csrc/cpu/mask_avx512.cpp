// mask_algebra compiled for AVX-512.
#include "mask_kernel.h"
#include "simd_avx512.h"

namespace offprin::cpu::avx512 {
#include "column_counters.inl"
#include "mask_kernel.inl"
}  // namespace offprin::cpu::avx512
