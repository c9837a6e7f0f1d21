// masked_adamw compiled for the compiler's baseline.
#include "../kernels.h"
#include "../numerics.h"
#include "adamw_kernel.h"
#include "simd_generic.h"

namespace offprin::cpu::generic {
#include "adamw_kernel.inl"
}  // namespace offprin::cpu::generic
