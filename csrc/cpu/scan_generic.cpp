// update_scan compiled for portable C++.
#include "../numerics.h"
#include "scan_kernel.h"
#include "simd_generic.h"

namespace offprin::cpu::generic {
#include "column_counters.inl"
#include "scan_norms.inl"
#include "scan_stages.inl"
#include "scan_plain.inl"
#include "scan_kernel.inl"
}  // namespace offprin::cpu::generic
