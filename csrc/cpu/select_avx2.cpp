// lowrank_select compiled for AVX2.
#include "../kernels.h"
#include "../numerics.h"
#include "select_kernel.h"
#include "simd_avx2.h"

namespace offprin::cpu::avx2 {
#include "select_kernel.inl"
}  // namespace offprin::cpu::avx2
