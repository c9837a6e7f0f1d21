// update_scan compiled for AVX2.
#include "../numerics.h"
#include "scan_kernel.h"
#include "simd_avx2.h"

namespace offprin::cpu::avx2 {
#include "column_counters.inl"
#include "scan_norms.inl"
#include "scan_stages.inl"
#include "scan_bytes.inl"
#include "scan_kernel.inl"
}  // namespace offprin::cpu::avx2
