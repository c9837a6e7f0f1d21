// masked_adamw compiled for AVX-512.
#include "../kernels.h"
#include "../numerics.h"
#include "adamw_kernel.h"
#include "simd_avx512.h"

namespace offprin::cpu::avx512 {

constexpr bool PICKS = true;

// Moves the values at the set bits of a word together, to `to` on, and writes up to a vector more. Reads these only.
OFFPRIN_INLINE void pick(const float* from, uint64_t word, float* to) {
#pragma GCC unroll 4
  for (int i = 0; i < 64; i += 16) {
    const __mmask16 which = static_cast<__mmask16>(word >> i);
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(which, _mm512_maskz_loadu_ps(which, from + i)));
    to += __builtin_popcount(which);
  }
}

OFFPRIN_INLINE void pick(const uint16_t* from, uint64_t word, uint16_t* to) {
#pragma GCC unroll 2
  for (int i = 0; i < 64; i += 32) {
    const __mmask32 which = static_cast<__mmask32>(word >> i);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi16(which, _mm512_maskz_loadu_epi16(which, from + i)));
    to += __builtin_popcount(which);
  }
}

// The inverse; writes these only.
OFFPRIN_INLINE void put(const float* from, uint64_t word, float* to) {
#pragma GCC unroll 4
  for (int i = 0; i < 64; i += 16) {
    const __mmask16 which = static_cast<__mmask16>(word >> i);
    _mm512_mask_storeu_ps(to + i, which, _mm512_maskz_expand_ps(which, _mm512_loadu_ps(from)));
    from += __builtin_popcount(which);
  }
}

OFFPRIN_INLINE void put(const uint16_t* from, uint64_t word, uint16_t* to) {
#pragma GCC unroll 2
  for (int i = 0; i < 64; i += 32) {
    const __mmask32 which = static_cast<__mmask32>(word >> i);
    _mm512_mask_storeu_epi16(to + i, which, _mm512_maskz_expand_epi16(which, _mm512_loadu_si512(from)));
    from += __builtin_popcount(which);
  }
}

#include "adamw_kernel.inl"
}  // namespace offprin::cpu::avx512
