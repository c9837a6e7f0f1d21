// masked_adamw compiled for AVX2.
#include "../kernels.h"
#include "../numerics.h"
#include "adamw_kernel.h"
#include "simd_avx2.h"

namespace offprin::cpu::avx2 {
#include "adamw_kernel.inl"
}  // namespace offprin::cpu::avx2
