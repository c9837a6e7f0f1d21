// masked_adamw compiled for AVX2.
#include "../kernels.h"
#include "../numerics.h"
#include "adamw_kernel.h"
#include "simd_avx2.h"

namespace offprin::cpu::avx2 {
constexpr bool PICKS = false;
template <typename P>
void pick(const P* from, uint64_t word, P* to) = delete;
template <typename P>
void put(const P* from, uint64_t word, P* to) = delete;

#include "adamw_kernel.inl"
}  // namespace offprin::cpu::avx2
