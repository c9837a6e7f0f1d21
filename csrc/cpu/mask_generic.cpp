// mask_algebra compiled for portable C++.
#include "mask_kernel.h"
#include "simd_generic.h"

namespace offprin::cpu::generic {
#include "column_counters.inl"
#include "mask_kernel.inl"
}  // namespace offprin::cpu::generic
