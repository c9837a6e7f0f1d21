// masked_adamw compiled for the compiler's baseline.
#include "../kernels.h"
#include "../numerics.h"
#include "adamw_kernel.h"
#include "simd_generic.h"

namespace offprin::cpu::generic {
constexpr bool PICKS = false;
template <typename P>
void pick(const P* from, uint64_t word, P* to) = delete;
template <typename P>
void put(const P* from, uint64_t word, P* to) = delete;

#include "adamw_kernel.inl"
}  // namespace offprin::cpu::generic
