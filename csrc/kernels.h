// The native API on one page: every launcher of offprin_kernels, on raw pointers and 64-bit sizes, free of any framework.
//
// A null output pointer means "not wanted". Outputs that are counts or sums are added to by nobody else and are fully
// overwritten. Codes and layouts are those of offprin_kernels/ops/*/contract.py (tests/ops/test_contract.py compares them).
#pragma once
#include <cstdint>

namespace offprin {

// ---- shared codes ---------------------------------------------------------------------------------------------------

enum Dtype : int32_t { BF16 = 0, FP16 = 1, FP32 = 2 };

enum RuleCode : int32_t { BITWISE = 0, ULP = 1, ETA = 2, ATOL = 3, STORAGE = 4 };

struct Rule {
  int32_t code;
  double threshold;  // whole ULP for ULP, rounded to fp32 for ETA and ATOL, ignored otherwise
};

constexpr int32_t MAX_RULES = 8;
constexpr int64_t UNDEFINED = -1;

enum Counter { SIGN_FLIPS, ZERO_TO_NONZERO, NONZERO_TO_ZERO, NAN_BASE, INF_BASE, NAN_TUNED, INF_TUNED, COUNTERS };
enum Norm { BASE_SQUARED, UPDATE_SQUARED, BASE_DOT_UPDATE, UPDATE_MAX, NORMS };
constexpr int64_t ULP_BINS = 18;
constexpr int64_t ULP_NAN_BIN = 17;
constexpr int64_t EXPONENT_BINS = 256;

// Bytes of one packed row: bits padded with zeros to a multiple of 64.
constexpr int64_t row_bytes(int64_t columns) { return (columns + 63) / 64 * 8; }

// ---- update_scan ----------------------------------------------------------------------------------------------------

struct UpdateScan {
  const void* base;   // [rows, columns], contiguous
  const void* tuned;  // [rows, columns], contiguous; an update to add to base where additive
  int32_t base_dtype;
  int32_t tuned_dtype;
  bool additive;
  int64_t rows;
  int64_t columns;
  int32_t rules;  // 1..MAX_RULES; rule[0] decides mask, rows, columns and changed exponents
  Rule rule[MAX_RULES];

  uint8_t* mask;                // [rows, row_bytes(columns)]
  int64_t* row_counts;          // [rows]
  int64_t* col_counts;          // [columns]
  int64_t* rule_counts;         // [rules, 2], never null
  int64_t* counters;            // [COUNTERS]
  bool transitions;             // fill SIGN_FLIPS .. NONZERO_TO_ZERO; they are 0 otherwise
  bool nonfinite;               // fill NAN_BASE .. INF_TUNED; they are 0 otherwise
  int64_t* ulp_histogram;       // [ULP_BINS]
  int64_t* exponent_histogram;  // [2, EXPONENT_BINS]
  double* norms;                // [2, NORMS]; row 1 UNDEFINED where both sources are bf16 and not additive
};

// ---- masked_adamw: tables of 64-bit integers and of floats, see ops/masked_adamw/contract.py -------------------------

namespace adamw {

constexpr int64_t BLOCK = 1024;

enum Rounding : int32_t { NEAREST = 0, STOCHASTIC = 1, KAHAN = 2, MASTER = 3 };

enum Slot {
  PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, EXTRA, MASK, PREFIX, COHORT, CHANGED, NUMEL, OFFSET, STREAM, HYPER, FIRST_COHORT,
  SLOTS
};
enum Hyper { DECAY, LERP, NEAR_GRAD, BETA2, SQUARE, EPS, SIGN, SCALE, HYPERS };
enum Cohort { STEP_SIZE, ROOT, COHORTS };

}  // namespace adamw

struct MaskedAdamw {
  const int64_t* slots;  // [tensors, SLOTS]
  const float* hypers;   // [*, HYPERS]
  const float* cohorts;  // [*, COHORTS]
  int64_t tensors;
  int32_t param_dtype, state_dtype;  // BF16 or FP32
  int32_t rounding;                  // of bf16 parameters
  int64_t* changes;                  // [tensors]: visible changes
};

namespace cpu {

// Instruction sets that the library carries: "generic", and on x86-64 "avx2" and "avx512".
enum class Isa : int32_t { GENERIC = 0, AVX2 = 1, AVX512 = 2 };

Isa best_isa();                 // the best one this processor has
bool supports(Isa isa);         // whether this processor has it

void update_scan(const UpdateScan& job, Isa isa, int threads);

// Reads `bytes`, a multiple of 4 MiB, and returns a checksum: the ceiling that benchmarks compare with.
uint64_t read_ceiling(const void* data, int64_t bytes, int threads);

// ---- mask_algebra: words are 64-bit, rows are row_bytes(columns) / 8 words, padding bits are zero -------------------

void mask_pack(const uint8_t* dense, int64_t rows, int64_t columns, uint64_t* words, Isa isa, int threads);
void mask_unpack(const uint64_t* words, int64_t rows, int64_t columns, uint8_t* dense, Isa isa, int threads);
// counts: [masks, masks]
void mask_pair_counts(const uint64_t* const* masks, int64_t count, int64_t words, int64_t* counts, Isa isa, int threads);
// counts: [masks + 1]; elements is rows x columns without padding
void mask_agreement(const uint64_t* const* masks, int64_t count, int64_t words, int64_t elements, int64_t* counts,
                    Isa isa, int threads);
void mask_row_counts(const uint64_t* words, int64_t rows, int64_t row_words, int64_t* counts, Isa isa, int threads);
void mask_col_counts(const uint64_t* words, int64_t rows, int64_t columns, int64_t* counts, Isa isa, int threads);

// ---- lowrank_select -------------------------------------------------------------------------------------------------

enum class KeySource : int32_t { PRODUCT = 0, WEIGHT = 1, HASH = 2 };

// The 32-bit key of every coordinate; a selection takes the smallest, and of equal ones those at the lowest flat index.
struct SelectKeys {
  KeySource source;
  int64_t rows, columns;

  // PRODUCT: 0x7FFFFFFF less the magnitude bits of sum_i left[row, i] * (values[i] * right[i, column])
  const float *left, *values, *right;
  int64_t rank;
  int64_t left_strides[2], right_strides[2];  // in elements

  // WEIGHT: the magnitude bits of weight [rows, columns], contiguous; 15 of them for bf16 and fp16
  const void* weight;
  int32_t dtype;

  // HASH: the top half of SplitMix64's output at the coordinate's flat index of a stream
  uint64_t stream;
};

// Sets exactly `count` bits. Throws std::invalid_argument where a product or weight is NaN or infinite, and
// std::runtime_error where the input changed between two passes over it.
void select(const SelectKeys& keys, int64_t count, uint64_t* words, Isa isa, int threads);

// ---- masked_adamw ---------------------------------------------------------------------------------------------------

// Steps every tensor in place.
void masked_adamw(const MaskedAdamw& job, Isa isa, int threads);

}  // namespace cpu

namespace cuda {

// Enqueues on `stream` and returns; outputs must be zeroed. Throws std::runtime_error with the CUDA error's text.
// Implements mask, row_counts and rule_counts; any other output pointer must be null.
void update_scan(const UpdateScan& job, void* stream);

}  // namespace cuda

}  // namespace offprin
