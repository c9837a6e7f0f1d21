// The vector layer for AVX2 (with FMA, BMI, POPCNT). Twins: simd_avx512.h (which says what is what), simd_generic.h.
#pragma once
#include <immintrin.h>

#include <cstdint>

#define OFFPRIN_INLINE static inline __attribute__((always_inline, unused))

namespace offprin::cpu::avx2 {

using Codes = __m256i;
using Flags = __m256i;
using Bytes = __m256i;
using Words = __m256i;
constexpr int LANES = 16;
constexpr int WIDTH = 32;

OFFPRIN_INLINE Codes load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
// A load that happens once: left alone, the compiler loads again for every use, and unaligned loads are dear.
OFFPRIN_INLINE Codes load_once(const void* p) {
  Codes x = load(p);
  asm("" : "+x"(x));
  return x;
}
OFFPRIN_INLINE void store(void* p, Codes x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
OFFPRIN_INLINE Codes zero() { return _mm256_setzero_si256(); }
OFFPRIN_INLINE Codes splat(int code) { return _mm256_set1_epi16(static_cast<short>(code)); }
OFFPRIN_INLINE Codes subtract(Codes a, Codes b) { return _mm256_sub_epi16(a, b); }
OFFPRIN_INLINE Codes larger(Codes a, Codes b) { return _mm256_max_epu16(a, b); }
OFFPRIN_INLINE Codes smaller(Codes a, Codes b) { return _mm256_min_epu16(a, b); }
OFFPRIN_INLINE Codes sum_where(Codes which, Codes a, Codes b, Codes alternative) {
  return _mm256_blendv_epi8(alternative, _mm256_add_epi16(a, b), _mm256_srai_epi16(which, 15));
}

OFFPRIN_INLINE Flags equal(Codes a, Codes b) { return _mm256_cmpeq_epi16(a, b); }
OFFPRIN_INLINE Flags at_least(Codes a, Codes b) { return _mm256_cmpeq_epi16(_mm256_max_epu16(a, b), a); }
OFFPRIN_INLINE Codes only(Flags keep, Codes a) { return _mm256_and_si256(keep, a); }
OFFPRIN_INLINE Codes count_up(Codes counts, Flags where) { return _mm256_sub_epi16(counts, where); }
OFFPRIN_INLINE uint64_t word_half(Flags low, Flags high) {
  const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xD8);
  return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
}
OFFPRIN_INLINE uint64_t word(const Flags* f) { return word_half(f[0], f[1]) | word_half(f[2], f[3]) << 32; }

OFFPRIN_INLINE unsigned smallest(Codes a) {
  const __m128i half = _mm_min_epu16(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  return _mm_extract_epi16(_mm_minpos_epu16(half), 0);
}
OFFPRIN_INLINE unsigned largest(Codes a) { return 0xFFFF ^ smallest(a ^ splat(0xFFFF)); }
OFFPRIN_INLINE int64_t word_total(Words a) {
  const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  return _mm_cvtsi128_si64(half) + _mm_extract_epi64(half, 1);
}
OFFPRIN_INLINE int64_t byte_total(Bytes a) { return word_total(_mm256_sad_epu8(a, zero())); }
OFFPRIN_INLINE int64_t code_total(Codes a) {
  return byte_total(_mm256_and_si256(a, splat(0xFF))) + 256 * byte_total(_mm256_srli_epi16(a, 8));
}

OFFPRIN_INLINE Codes wrapped_distances(Codes a, Codes b) { return _mm256_abs_epi16(_mm256_sub_epi16(a, b)); }
OFFPRIN_INLINE Bytes pack_signed(Codes low, Codes high) { return _mm256_packs_epi16(low, high); }
OFFPRIN_INLINE Bytes steps_of(Bytes distances) {
  const __m256i of_low = _mm256_setr_epi8(0, 0, 1, 1, 3, 3, 3, 3, 7, 7, 7, 7, 7, 7, 7, 7, 0, 0, 1, 1, 3, 3, 3, 3, 7, 7,
                                          7, 7, 7, 7, 7, 7);
  const __m256i of_high = _mm256_setr_epi8(0, 15, 31, 31, 63, 63, 63, 63, 0, 0, 0, 0, 0, 0, 0, 0, 0, 15, 31, 31, 63, 63,
                                           63, 63, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(distances, 4), _mm256_set1_epi8(15));
  return _mm256_or_si256(_mm256_shuffle_epi8(of_low, distances), _mm256_shuffle_epi8(of_high, high));
}
OFFPRIN_INLINE Bytes exponents_of(const uint8_t* codes) {
  const __m256i low = _mm256_srli_epi16(_mm256_slli_epi16(load(codes), 1), 8);
  const __m256i high = _mm256_srli_epi16(_mm256_slli_epi16(load(codes + WIDTH), 1), 8);
  return _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xD8);
}
OFFPRIN_INLINE Bytes splat_byte(int byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }
OFFPRIN_INLINE Bytes subtract_bytes(Bytes a, Bytes b) { return _mm256_sub_epi8(a, b); }
OFFPRIN_INLINE Bytes add_saturated(Bytes a, Bytes b) { return _mm256_adds_epu8(a, b); }
OFFPRIN_INLINE Bytes lookup(const uint8_t* table, Bytes index) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), index);
}
// 0xFF in byte i where bit i is set
OFFPRIN_INLINE Bytes spread(uint32_t bits) {
  const __m256i which = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i copies = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), which);
  return _mm256_cmpeq_epi8(_mm256_and_si256(copies, bit), bit);
}
OFFPRIN_INLINE Bytes keep_bytes(Bytes a, uint64_t which) {
  return _mm256_and_si256(a, spread(static_cast<uint32_t>(which)));
}
OFFPRIN_INLINE uint64_t top_bits(Bytes a) { return static_cast<uint32_t>(_mm256_movemask_epi8(a)); }
template <int BIT>
OFFPRIN_INLINE int64_t count_bit(Bytes a) {
  return __builtin_popcount(static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(a, 7 - BIT))));
}

OFFPRIN_INLINE void full_add(Words& carry, Words& sum, Words a, Words b, Words c) {
  const Words half = a ^ b;
  carry = (a & b) | (half & c);
  sum = half ^ c;
}
OFFPRIN_INLINE Bytes byte_counts(Words a) {
  const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2,
                                         2, 3, 2, 3, 3, 4);
  const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(a, splat_byte(15)));
  const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(a, 4), splat_byte(15)));
  return _mm256_add_epi8(low, high);
}
OFFPRIN_INLINE Words bit_counts(Words a) { return _mm256_sad_epu8(byte_counts(a), zero()); }
OFFPRIN_INLINE Words load_words(const void* p) { return load(p); }
OFFPRIN_INLINE void store_words(void* p, Words x) { store(p, x); }
OFFPRIN_INLINE Words zero_words() { return zero(); }
OFFPRIN_INLINE Words add_words(Words a, Words b) { return _mm256_add_epi64(a, b); }
// Set bits of a & b in N vectors, summed in the 64-bit lanes.
template <int N>
OFFPRIN_INLINE Words common_bits(const uint64_t* a, const uint64_t* b) {
  static_assert(8 * N <= 255, "byte sums must not overflow");
  Bytes sum = zero();
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) sum = _mm256_add_epi8(sum, byte_counts(load_words(a + 4 * i) & load_words(b + 4 * i)));
  return _mm256_sad_epu8(sum, zero());
}

struct Counters {
  __m256i low, high;
};
OFFPRIN_INLINE Counters load_counters(const uint8_t* p) { return {load(p), load(p + 32)}; }
OFFPRIN_INLINE void store_counters(uint8_t* p, Counters c) {
  store(p, c.low);
  store(p + 32, c.high);
}
OFFPRIN_INLINE Counters zero_counters() { return {zero(), zero()}; }
OFFPRIN_INLINE Counters add_bits(Counters c, uint64_t bits, int weight) {
  const __m256i low = _mm256_and_si256(spread(static_cast<uint32_t>(bits)), splat_byte(weight));
  const __m256i high = _mm256_and_si256(spread(static_cast<uint32_t>(bits >> 32)), splat_byte(weight));
  return {_mm256_add_epi8(c.low, low), _mm256_add_epi8(c.high, high)};
}
OFFPRIN_INLINE uint64_t zero_half(const uint8_t* p) { return top_bits(_mm256_cmpeq_epi8(load(p), zero())); }
OFFPRIN_INLINE uint64_t nonzero_bytes(const void* p) {
  const uint8_t* bytes = static_cast<const uint8_t*>(p);
  return ~(zero_half(bytes) | zero_half(bytes + 32) << 32);
}

// ---- floating point -------------------------------------------------------------------------------------------------

using Floats = __m256;
using Doubles = __m256d;
constexpr int DOUBLES = 4;

OFFPRIN_INLINE Floats even_values(Codes a) { return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)); }
OFFPRIN_INLINE Floats odd_values(Codes a) {
  return _mm256_castsi256_ps(_mm256_and_si256(a, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
}
OFFPRIN_INLINE void store_floats(float* p, Floats a) { _mm256_storeu_ps(p, a); }
OFFPRIN_INLINE Floats subtract_floats(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
OFFPRIN_INLINE int64_t count_larger(Floats a, float bound) {
  const Floats size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a);
  return __builtin_popcount(_mm256_movemask_ps(_mm256_cmp_ps(size, _mm256_set1_ps(bound), _CMP_GT_OQ)));
}
OFFPRIN_INLINE Words larger_size(Words largest, Floats a) {
  return _mm256_max_epu32(largest, _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7FFFFFFF)));
}
OFFPRIN_INLINE Words larger_number(Words largest, Floats a) { return larger_size(largest, a); }
OFFPRIN_INLINE unsigned largest_size(Words a) {
  __m128i half = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4E));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xB1));
  return static_cast<unsigned>(_mm_cvtsi128_si32(half));
}
OFFPRIN_INLINE Doubles load_doubles(const double* p) { return _mm256_loadu_pd(p); }
OFFPRIN_INLINE void store_doubles(double* p, Doubles a) { _mm256_storeu_pd(p, a); }
OFFPRIN_INLINE Doubles widen(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
OFFPRIN_INLINE Doubles subtract_doubles(Doubles a, Doubles b) { return _mm256_sub_pd(a, b); }
OFFPRIN_INLINE Doubles fused(Doubles a, Doubles b, Doubles sum) { return _mm256_fmadd_pd(a, b, sum); }
OFFPRIN_INLINE Doubles unfused(Doubles a, Doubles b, Doubles sum) { return _mm256_add_pd(_mm256_mul_pd(a, b), sum); }

// ---- selection ------------------------------------------------------------------------------------------------------

constexpr int PRODUCT_ROWS = 6;

OFFPRIN_INLINE Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
OFFPRIN_INLINE Floats zero_floats() { return _mm256_setzero_ps(); }
OFFPRIN_INLINE Floats splat_float(float x) { return _mm256_set1_ps(x); }
OFFPRIN_INLINE Floats fused_floats(Floats a, Floats b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }
OFFPRIN_INLINE void store_largest_first(uint32_t* p, Floats a) {
  store(p, _mm256_andnot_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7FFFFFFF)));
}
OFFPRIN_INLINE uint64_t up_to(const uint32_t* keys, uint32_t bound) {
  const __m256i limit = _mm256_set1_epi32(static_cast<int>(bound));
  uint64_t result = 0;
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m256i key = load(keys + 8 * i), within = _mm256_cmpeq_epi32(_mm256_min_epu32(key, limit), key);
    result |= static_cast<uint64_t>(_mm256_movemask_ps(_mm256_castsi256_ps(within))) << (8 * i);
  }
  return result;
}

}  // namespace offprin::cpu::avx2
