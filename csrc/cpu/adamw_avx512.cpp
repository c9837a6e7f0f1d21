// masked_adamw compiled for AVX-512.
#include "../kernels.h"
#include "../numerics.h"
#include "adamw_kernel.h"
#include "simd_avx512.h"

namespace offprin::cpu::avx512 {
#include "adamw_kernel.inl"
}  // namespace offprin::cpu::avx512
