// lowrank_select compiled for the compiler's baseline.
#include "../kernels.h"
#include "../numerics.h"
#include "select_kernel.h"
#include "simd_generic.h"

namespace offprin::cpu::generic {
#include "select_kernel.inl"
}  // namespace offprin::cpu::generic
