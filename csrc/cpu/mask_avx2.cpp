// mask_algebra compiled for AVX2.
#include "mask_kernel.h"
#include "simd_avx2.h"

namespace offprin::cpu::avx2 {
#include "column_counters.inl"
#include "mask_kernel.inl"
}  // namespace offprin::cpu::avx2
