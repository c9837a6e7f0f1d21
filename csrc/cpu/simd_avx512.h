// The vector layer for AVX-512 (F, BW, VL, DQ, VBMI, VPOPCNTDQ). Twins: simd_avx2.h, simd_generic.h.
//
// Codes: 16-bit lanes. Flags: one truth value per lane of Codes. Bytes: the same register seen as bytes.
// Words: 64-bit lanes. Counters: 64 byte counters, one for each bit of a word.
#pragma once
#include <immintrin.h>

#include <cstdint>

#define OFFPRIN_INLINE static inline __attribute__((always_inline, unused))

namespace offprin::cpu::avx512 {

using Codes = __m512i;
using Flags = __mmask32;
using Bytes = __m512i;
using Words = __m512i;
constexpr int LANES = 32;  // codes in a vector
constexpr int WIDTH = 64;  // bytes in a vector

OFFPRIN_INLINE Codes load(const void* p) { return _mm512_loadu_si512(p); }
// A load that happens once: left alone, the compiler loads again for every use, and unaligned loads are dear.
OFFPRIN_INLINE Codes load_once(const void* p) {
  Codes x = load(p);
  asm("" : "+v"(x));
  return x;
}
OFFPRIN_INLINE void store(void* p, Codes x) { _mm512_storeu_si512(p, x); }
OFFPRIN_INLINE Codes zero() { return _mm512_setzero_si512(); }
OFFPRIN_INLINE Codes splat(int code) { return _mm512_set1_epi16(static_cast<short>(code)); }
OFFPRIN_INLINE Codes subtract(Codes a, Codes b) { return _mm512_sub_epi16(a, b); }
OFFPRIN_INLINE Codes larger(Codes a, Codes b) { return _mm512_max_epu16(a, b); }
OFFPRIN_INLINE Codes smaller(Codes a, Codes b) { return _mm512_min_epu16(a, b); }
// a + b where the top bit of `which` is set, else the alternative
OFFPRIN_INLINE Codes sum_where(Codes which, Codes a, Codes b, Codes alternative) {
  return _mm512_mask_add_epi16(alternative, _mm512_movepi16_mask(which), a, b);
}

OFFPRIN_INLINE Flags equal(Codes a, Codes b) { return _mm512_cmpeq_epi16_mask(a, b); }
OFFPRIN_INLINE Flags at_least(Codes a, Codes b) { return _mm512_cmpge_epu16_mask(a, b); }
OFFPRIN_INLINE Codes only(Flags keep, Codes a) { return _mm512_maskz_mov_epi16(keep, a); }
OFFPRIN_INLINE Codes count_up(Codes counts, Flags where) {
  return _mm512_mask_add_epi16(counts, where, counts, splat(1));
}
OFFPRIN_INLINE uint64_t word(const Flags* f) { return f[0] | static_cast<uint64_t>(f[1]) << 32; }

OFFPRIN_INLINE unsigned smallest(Codes a) {
  const __m256i half = _mm256_min_epu16(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  const __m128i quarter = _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return _mm_extract_epi16(_mm_minpos_epu16(quarter), 0);
}
OFFPRIN_INLINE unsigned largest(Codes a) { return 0xFFFF ^ smallest(a ^ splat(0xFFFF)); }
OFFPRIN_INLINE int64_t word_total(Words a) { return _mm512_reduce_add_epi64(a); }
OFFPRIN_INLINE int64_t code_total(Codes a) {
  const Codes low = _mm512_and_si512(a, _mm512_set1_epi32(0xFFFF));
  return _mm512_reduce_add_epi32(_mm512_add_epi32(low, _mm512_srli_epi32(a, 16)));
}

// |a - b| in 16 bits that wrap: for bf16 codes, none NaN, 0x80 to 0x8000 where the signs differ, else the ULP distance.
OFFPRIN_INLINE Codes wrapped_distances(Codes a, Codes b) { return _mm512_abs_epi16(_mm512_sub_epi16(a, b)); }
// 16-bit lanes as signed bytes, those from 127 to 0x7FFF as 127; eight of `low` and eight of `high` by turns.
OFFPRIN_INLINE Bytes pack_signed(Codes low, Codes high) { return _mm512_packs_epi16(low, high); }
// Bit j is set from 2^(j+1) on, for distances up to 127; 0x80 gives 0.
OFFPRIN_INLINE Bytes steps_of(Bytes distances) {
  struct Table {
    uint8_t steps[64];
    constexpr Table() : steps{} {
      for (int i = 0; i < 64; ++i)
        for (int j = 0; j < 6; ++j) steps[i] |= static_cast<uint8_t>((i >> j != 0) << j);
    }
  };
  static constexpr Table table;
  // The lookup takes six bits, so that what a shift of 16-bit lanes brings in from the neighbour does not matter.
  return _mm512_permutexvar_epi8(_mm512_srli_epi16(distances, 1), _mm512_loadu_si512(table.steps));
}
// Exponent fields of 64 codes, in order.
OFFPRIN_INLINE Bytes exponents_of(const uint8_t* codes) {
  const __m512i at = _mm512_set1_epi64(0x3727170737271707);
  const __m512i low = _mm512_multishift_epi64_epi8(at, load(codes));
  const __m512i both = _mm512_mask_multishift_epi64_epi8(low, 0xF0F0F0F0F0F0F0F0, at, load(codes + WIDTH));
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15), both);
}
OFFPRIN_INLINE Bytes splat_byte(int byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
OFFPRIN_INLINE Bytes subtract_bytes(Bytes a, Bytes b) { return _mm512_sub_epi8(a, b); }
OFFPRIN_INLINE Bytes add_saturated(Bytes a, Bytes b) { return _mm512_adds_epu8(a, b); }
// table[low 4 bits], or 0 where the top bit is set
OFFPRIN_INLINE Bytes lookup(const uint8_t* table, Bytes index) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), index);
}
OFFPRIN_INLINE Bytes keep_bytes(Bytes a, uint64_t which) { return _mm512_maskz_mov_epi8(which, a); }
OFFPRIN_INLINE uint64_t top_bits(Bytes a) { return _mm512_movepi8_mask(a); }
template <int BIT>
OFFPRIN_INLINE int64_t count_bit(Bytes a) {
  return __builtin_popcountll(_mm512_test_epi8_mask(a, splat_byte(1 << BIT)));
}

// Full adder on bits: sum is a ^ b ^ c, carry the majority.
OFFPRIN_INLINE void full_add(Words& carry, Words& sum, Words a, Words b, Words c) {
  carry = _mm512_ternarylogic_epi64(a, b, c, 0xE8);
  sum = _mm512_ternarylogic_epi64(a, b, c, 0x96);
}
OFFPRIN_INLINE Words bit_counts(Words a) { return _mm512_popcnt_epi64(a); }
OFFPRIN_INLINE Words load_words(const void* p) { return load(p); }
OFFPRIN_INLINE void store_words(void* p, Words x) { store(p, x); }
OFFPRIN_INLINE Words zero_words() { return zero(); }
OFFPRIN_INLINE Words add_words(Words a, Words b) { return _mm512_add_epi64(a, b); }
// Set bits of a & b in N vectors, summed in the 64-bit lanes.
template <int N>
OFFPRIN_INLINE Words common_bits(const uint64_t* a, const uint64_t* b) {
  Words sum = zero_words();
  constexpr int STEP = sizeof(Words) / sizeof(uint64_t);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
    sum = add_words(sum, bit_counts(load_words(a + STEP * i) & load_words(b + STEP * i)));
  return sum;
}

struct Counters {
  __m512i v;
};
OFFPRIN_INLINE Counters load_counters(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
OFFPRIN_INLINE void store_counters(uint8_t* p, Counters c) { _mm512_storeu_si512(p, c.v); }
OFFPRIN_INLINE Counters zero_counters() { return {_mm512_setzero_si512()}; }
OFFPRIN_INLINE Counters add_bits(Counters c, uint64_t bits, int weight) {
  return {_mm512_mask_add_epi8(c.v, bits, c.v, splat_byte(weight))};
}
OFFPRIN_INLINE uint64_t nonzero_bytes(const void* p) {
  const __m512i bytes = _mm512_loadu_si512(p);
  return _mm512_test_epi8_mask(bytes, bytes);
}

// ---- floating point -------------------------------------------------------------------------------------------------

using Floats = __m512;
using Doubles = __m512d;
constexpr int DOUBLES = 8;

OFFPRIN_INLINE Floats even_values(Codes a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
OFFPRIN_INLINE Floats odd_values(Codes a) {
  return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
}
OFFPRIN_INLINE void store_floats(float* p, Floats a) { _mm512_storeu_ps(p, a); }
OFFPRIN_INLINE Floats subtract_floats(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
// How many magnitudes exceed the bound; none that is NaN.
OFFPRIN_INLINE int64_t count_larger(Floats a, float bound) {
  return __builtin_popcount(_mm512_cmp_ps_mask(_mm512_abs_ps(a), _mm512_set1_ps(bound), _CMP_GT_OQ));
}
// Larger of the magnitudes; as integers, where NaN outranks Inf and so survives.
OFFPRIN_INLINE Words larger_size(Words largest, Floats a) {
  return _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7FFFFFFF)));
}
// The same where none is NaN.
OFFPRIN_INLINE Words larger_number(Words largest, Floats a) {
  constexpr int OF_MAGNITUDES = 3, WITHOUT_SIGN = 2 << 2;
  return _mm512_castps_si512(_mm512_range_ps(_mm512_castsi512_ps(largest), a, OF_MAGNITUDES | WITHOUT_SIGN));
}
OFFPRIN_INLINE unsigned largest_size(Words a) { return _mm512_reduce_max_epu32(a); }
OFFPRIN_INLINE Doubles load_doubles(const double* p) { return _mm512_loadu_pd(p); }
OFFPRIN_INLINE void store_doubles(double* p, Doubles a) { _mm512_storeu_pd(p, a); }
OFFPRIN_INLINE Doubles widen(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
OFFPRIN_INLINE Doubles subtract_doubles(Doubles a, Doubles b) { return _mm512_sub_pd(a, b); }
OFFPRIN_INLINE Doubles fused(Doubles a, Doubles b, Doubles sum) { return _mm512_fmadd_pd(a, b, sum); }
OFFPRIN_INLINE Doubles unfused(Doubles a, Doubles b, Doubles sum) { return _mm512_add_pd(_mm512_mul_pd(a, b), sum); }

// ---- selection ------------------------------------------------------------------------------------------------------

constexpr int PRODUCT_ROWS = 8;  // rows of a tile of a product: two vectors of sums for each stay in registers

OFFPRIN_INLINE Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
OFFPRIN_INLINE Floats zero_floats() { return _mm512_setzero_ps(); }
OFFPRIN_INLINE Floats splat_float(float x) { return _mm512_set1_ps(x); }
OFFPRIN_INLINE Floats fused_floats(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }
// 0x7FFFFFFF less the magnitude bits: small where the magnitude is large
OFFPRIN_INLINE void store_largest_first(uint32_t* p, Floats a) {
  store(p, _mm512_andnot_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7FFFFFFF)));
}
// Bit i is set where keys[i] <= bound, for 64 keys.
OFFPRIN_INLINE uint64_t up_to(const uint32_t* keys, uint32_t bound) {
  const __m512i limit = _mm512_set1_epi32(static_cast<int>(bound));
  uint64_t result = 0;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint64_t>(_mm512_cmple_epu32_mask(load(keys + 16 * i), limit)) << (16 * i);
  return result;
}

}  // namespace offprin::cpu::avx512
