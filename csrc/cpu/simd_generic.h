// The vector layer without intrinsics: GCC and Clang vectors of 16 bytes, which every processor's compiler lowers to
// what it has (SSE2, NEON, plain registers). Twins: simd_avx512.h (which says what is what), simd_avx2.h.
#pragma once
#include <cstdint>
#include <cstring>

#define OFFPRIN_INLINE static inline __attribute__((always_inline, unused))

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "masks are little-endian");

namespace offprin::cpu::generic {

typedef uint16_t Codes __attribute__((vector_size(16)));
typedef int16_t SignedCodes __attribute__((vector_size(16)));
typedef uint64_t Words __attribute__((vector_size(16)));
using Flags = Codes;
constexpr int LANES = 8;
constexpr int WIDTH = 16;

OFFPRIN_INLINE Codes load(const void* p) {
  Codes x;
  memcpy(&x, p, sizeof x);
  return x;
}
OFFPRIN_INLINE Codes load_once(const void* p) { return load(p); }
OFFPRIN_INLINE void store(void* p, Codes x) { memcpy(p, &x, sizeof x); }
OFFPRIN_INLINE Codes zero() { return Codes{}; }
OFFPRIN_INLINE Codes splat(int code) { return Codes{} + static_cast<uint16_t>(code); }
OFFPRIN_INLINE Codes subtract(Codes a, Codes b) { return a - b; }
OFFPRIN_INLINE Codes choose(Flags which, Codes yes, Codes no) { return (yes & which) | (no & ~which); }
OFFPRIN_INLINE Codes larger(Codes a, Codes b) { return choose((Flags)(a > b), a, b); }
OFFPRIN_INLINE Codes smaller(Codes a, Codes b) { return choose((Flags)(a > b), b, a); }
OFFPRIN_INLINE Codes sum_where(Codes which, Codes a, Codes b, Codes alternative) {
  return choose((Flags)((SignedCodes)which < 0), a + b, alternative);
}

OFFPRIN_INLINE Flags equal(Codes a, Codes b) { return (Flags)(a == b); }
OFFPRIN_INLINE Flags at_least(Codes a, Codes b) { return (Flags)(a >= b); }
OFFPRIN_INLINE Codes only(Flags keep, Codes a) { return keep & a; }
OFFPRIN_INLINE Codes count_up(Codes counts, Flags where) { return counts - where; }
OFFPRIN_INLINE uint64_t word(const Flags* f) {
  // Each multiplication gathers eight bytes of 0 or 1 into the top byte, in order.
  uint64_t result = 0;
  for (int i = 0; i < 64 / LANES; ++i) {
    uint64_t half[2];
    const Flags bit = f[i] & splat(1);
    memcpy(half, &bit, sizeof half);
    const uint64_t low = (half[0] * 0x0001000200040008u) >> 48, high = (half[1] * 0x0001000200040008u) >> 48;
    result |= ((low & 15) | (high & 15) << 4) << (8 * i);
  }
  return result;
}

OFFPRIN_INLINE unsigned smallest(Codes a) {
  unsigned least = a[0];
  for (int i = 1; i < LANES; ++i) least = a[i] < least ? a[i] : least;
  return least;
}
OFFPRIN_INLINE unsigned largest(Codes a) { return 0xFFFF ^ smallest(~a); }
OFFPRIN_INLINE int64_t code_total(Codes a) {
  int64_t sum = 0;
  for (int i = 0; i < LANES; ++i) sum += a[i];
  return sum;
}

OFFPRIN_INLINE Words load_words(const void* p) {
  Words x;
  memcpy(&x, p, sizeof x);
  return x;
}
OFFPRIN_INLINE void store_words(void* p, Words x) { memcpy(p, &x, sizeof x); }
OFFPRIN_INLINE Words zero_words() { return Words{}; }
OFFPRIN_INLINE int64_t word_total(Words a) { return static_cast<int64_t>(a[0] + a[1]); }
OFFPRIN_INLINE void full_add(Words& carry, Words& sum, Words a, Words b, Words c) {
  const Words half = a ^ b;
  carry = (a & b) | (half & c);
  sum = half ^ c;
}
OFFPRIN_INLINE Words bit_counts(Words a) {
  a = a - ((a >> 1) & 0x5555555555555555u);
  a = (a & 0x3333333333333333u) + ((a >> 2) & 0x3333333333333333u);
  a = (a + (a >> 4)) & 0x0F0F0F0F0F0F0F0Fu;
  a = a + (a >> 8);
  a = a + (a >> 16);
  return (a + (a >> 32)) & 0x7F;
}
OFFPRIN_INLINE Words add_words(Words a, Words b) { return a + b; }
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
  uint64_t eight[8];  // eight byte counters each
};
OFFPRIN_INLINE Counters load_counters(const uint8_t* p) {
  Counters c;
  memcpy(&c, p, sizeof c);
  return c;
}
OFFPRIN_INLINE void store_counters(uint8_t* p, Counters c) { memcpy(p, &c, sizeof c); }
OFFPRIN_INLINE Counters zero_counters() { return Counters{}; }
OFFPRIN_INLINE Counters add_bits(Counters c, uint64_t bits, int weight) {
  for (int i = 0; i < 8; ++i) {
    // Bit j of the byte becomes byte j, 0 or 1: keep bit j of copy j, then carry it to the copy's top.
    const uint64_t copies = ((bits >> (8 * i)) & 0xFF) * 0x0101010101010101u & 0x8040201008040201u;
    c.eight[i] += (((copies + 0x7F7F7F7F7F7F7F7Fu) >> 7) & 0x0101010101010101u) * static_cast<unsigned>(weight);
  }
  return c;
}
OFFPRIN_INLINE uint64_t nonzero_bytes(const void* p) {
  uint64_t result = 0;
  for (int i = 0; i < 8; ++i) {
    uint64_t x;
    memcpy(&x, static_cast<const uint8_t*>(p) + 8 * i, sizeof x);
    const uint64_t low = (x & 0x7F7F7F7F7F7F7F7Fu) + 0x7F7F7F7F7F7F7F7Fu;
    const uint64_t one = ((low | x) >> 7) & 0x0101010101010101u;
    result |= (one * 0x0102040810204080u >> 56) << (8 * i);
  }
  return result;
}

// ---- selection ------------------------------------------------------------------------------------------------------

typedef float Floats __attribute__((vector_size(16)));
constexpr int PRODUCT_ROWS = 4;

OFFPRIN_INLINE Floats load_floats(const float* p) {
  Floats x;
  memcpy(&x, p, sizeof x);
  return x;
}
OFFPRIN_INLINE Floats zero_floats() { return Floats{}; }
OFFPRIN_INLINE Floats splat_float(float x) { return Floats{x, x, x, x}; }
// One instruction on arm64. A call for each lane on x86-64 before AVX2: slow, but the same bits as everywhere.
OFFPRIN_INLINE Floats fused_floats(Floats a, Floats b, Floats sum) {
  return Floats{__builtin_fmaf(a[0], b[0], sum[0]), __builtin_fmaf(a[1], b[1], sum[1]),
                __builtin_fmaf(a[2], b[2], sum[2]), __builtin_fmaf(a[3], b[3], sum[3])};
}
OFFPRIN_INLINE void store_largest_first(uint32_t* p, Floats a) {
  for (int i = 0; i < 4; ++i) {
    uint32_t bits;
    const float x = a[i];
    memcpy(&bits, &x, sizeof bits);
    p[i] = ~bits & 0x7FFFFFFF;
  }
}
OFFPRIN_INLINE uint64_t up_to(const uint32_t* keys, uint32_t bound) {
  uint64_t result = 0;
  for (int i = 0; i < 64; ++i) result |= static_cast<uint64_t>(keys[i] <= bound) << i;
  return result;
}

}  // namespace offprin::cpu::generic
