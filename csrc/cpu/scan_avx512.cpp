// update_scan compiled for AVX-512.
#include "../numerics.h"
#include "scan_kernel.h"
#include "simd_avx512.h"

namespace offprin::cpu::avx512 {
#include "column_counters.inl"
#include "scan_norms.inl"
#include "scan_stages.inl"
#include "scan_bytes.inl"
#include "scan_kernel.inl"
}  // namespace offprin::cpu::avx512
