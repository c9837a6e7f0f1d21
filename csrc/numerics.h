// bf16 arithmetic on stored bits, for host and device: the C++ twin of offprin_kernels/numerics.py.
//
// Every function has internal linkage, so that a copy compiled for one instruction set is never linked into another.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define OFFPRIN_HD __host__ __device__ static inline
#else
#define OFFPRIN_HD static inline __attribute__((always_inline, unused))
#endif

namespace offprin {

constexpr uint32_t SIGN = 0x8000;
constexpr uint32_t MAGNITUDE = 0x7FFF;
constexpr uint32_t INFINITY_CODE = 0x7F80;
constexpr uint32_t SMALLEST_NORMAL = 0x0080;
constexpr uint32_t QUIET = 0x0040;
constexpr int MANTISSA_BITS = 7;

OFFPRIN_HD uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

OFFPRIN_HD float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// yes or no, without a branch: compilers do not vectorise loops in which floating-point arithmetic became conditional.
OFFPRIN_HD uint32_t select(bool which, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(which);
  return (yes & mask) | (no & ~mask);
}

OFFPRIN_HD float bf16_to_fp32(uint32_t code) { return float_of(code << 16); }

// To nearest, ties to even; NaN stays NaN (quieted, sign and payload top kept).
OFFPRIN_HD uint16_t round_to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const uint32_t quieted = (bits >> 16) | QUIET;
  return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? quieted : rounded);
}

// Exact; NaN is quieted, as the processors' own conversions do.
OFFPRIN_HD float fp16_to_fp32(uint32_t half) {
  const uint32_t exponent = (half >> 10) & 31, mantissa = half & 0x3FF;
  const uint32_t normal = ((exponent + 112) << 23) | (mantissa << 13);
  const uint32_t special = 0x7F800000 | (mantissa << 13) | (mantissa != 0 ? 0x400000 : 0);
  // A subnormal half is mantissa * 2^-24, a normal fp32 number: flush-to-zero cannot touch it.
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(mantissa)) * 5.9604644775390625e-8f);
  const uint32_t magnitude = select(exponent == 0, subnormal, select(exponent == 31, special, normal));
  return float_of(magnitude | ((half & SIGN) << 16));
}

// a + b with the first NaN's payload kept: which one an add instruction keeps depends on the operand order chosen by
// the compiler.
OFFPRIN_HD float add_fp32(float a, float b) {
  const uint32_t sum = bits_of(a + b), a_bits = bits_of(a), b_bits = bits_of(b);
  const bool a_nan = (a_bits & 0x7FFFFFFF) > 0x7F800000, b_nan = (b_bits & 0x7FFFFFFF) > 0x7F800000;
  return float_of(select(a_nan, a_bits | 0x400000, select(b_nan, b_bits | 0x400000, sum)));
}

OFFPRIN_HD bool is_nan_code(uint32_t code) { return (code & MAGNITUDE) > INFINITY_CODE; }

OFFPRIN_HD bool is_inf_code(uint32_t code) { return (code & MAGNITUDE) == INFINITY_CODE; }

OFFPRIN_HD bool is_finite_code(uint32_t code) { return (code & MAGNITUDE) < INFINITY_CODE; }

// On the ordered integer line neighbours differ by one, and +0 and -0 are both 0.
OFFPRIN_HD int32_t ordered(uint32_t code) {
  const int32_t magnitude = static_cast<int32_t>(code & MAGNITUDE);
  return (code & SIGN) != 0 ? -magnitude : magnitude;
}

OFFPRIN_HD int32_t ulp_distance(uint32_t a, uint32_t b) {
  const int32_t difference = ordered(a) - ordered(b);
  return difference < 0 ? -difference : difference;
}

// Whether two fp32 values differ: +0 == -0, NaN == NaN.
OFFPRIN_HD bool values_differ(float a, float b) { return (a != b) & !((a != a) & (b != b)); }

// Whether |b - a| > threshold, or > threshold * max(|a|, |b|) where relative; Inf against anything else is a change.
OFFPRIN_HD bool values_apart(float a, float b, float threshold, bool relative) {
  const float a_size = float_of(bits_of(a) & 0x7FFFFFFF), b_size = float_of(bits_of(b) & 0x7FFFFFFF);
  const float larger = a_size > b_size ? a_size : b_size;
  const float bound = relative ? threshold * larger : threshold;
  const float distance = float_of(bits_of(b - a) & 0x7FFFFFFF);
  const bool infinite = (bits_of(a_size) == 0x7F800000) | (bits_of(b_size) == 0x7F800000);
  return ((a != a) != (b != b)) | (distance > bound) | (infinite & (a != b) & (a == a) & (b == b));
}

// ---- fp32 masters kept as a bf16 weight and its low 16 bits -----------------------------------------------------------

// To nearest, ties away from zero. NaN becomes the quiet NaN of its sign, whose low half is 0: any other could look like
// a number.
OFFPRIN_HD void split_master(float x, uint16_t& code, uint16_t& low) {
  const uint32_t stored = bits_of(x);
  const bool is_nan = (stored & 0x7FFFFFFF) > 0x7F800000;
  const uint32_t bits = is_nan ? (stored & 0x80000000) | 0x7FC00000 : stored;
  code = static_cast<uint16_t>((bits + 0x8000) >> 16);
  low = static_cast<uint16_t>(bits);
}

// What split_master took apart, exactly (NaN: quieted).
OFFPRIN_HD float join_master(uint32_t code, uint32_t low) { return float_of((code << 16) + low - ((low >> 15) << 16)); }

// Up in magnitude with the discarded fraction's probability; noise: 0..65535. Inf stays, NaN is quieted; values beyond
// the largest bf16 may become Inf, as when rounding to nearest.
OFFPRIN_HD uint16_t round_stochastic(float x, uint32_t noise) {
  const uint32_t bits = bits_of(x);
  const uint32_t kept = (bits >> 16) | ((bits & 0x7FFFFFFF) > 0x7F800000 ? QUIET : 0);
  return static_cast<uint16_t>((bits & 0x7F800000) == 0x7F800000 ? kept : (bits + noise) >> 16);
}

// Whether two bf16 codes are different values: +0 and -0 are one, and so are all NaN.
OFFPRIN_HD bool visibly_differ(uint32_t a, uint32_t b) {
  const bool both_zero = ((a | b) & MAGNITUDE) == 0;
  return (a != b) & !both_zero & !(is_nan_code(a) & is_nan_code(b));
}

// ---- counter-based random bits ------------------------------------------------------------------------------------

// The 64 bits at a place of the SplitMix64 stream that starts at state `stream`.
OFFPRIN_HD uint64_t splitmix64(uint64_t stream, uint64_t index) {
  uint64_t z = stream + index * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

}  // namespace offprin
