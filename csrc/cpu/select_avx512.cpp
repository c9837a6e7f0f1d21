// lowrank_select compiled for AVX-512.
#include "../kernels.h"
#include "../numerics.h"
#include "select_kernel.h"
#include "simd_avx512.h"

namespace offprin::cpu::avx512 {
#include "select_kernel.inl"
}  // namespace offprin::cpu::avx512
