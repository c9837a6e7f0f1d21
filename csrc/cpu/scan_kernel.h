// What update_scan.cpp (tasks, threads, merging) and the kernels compiled once per instruction set share: plain data.
#pragma once
#include <pthread.h>

#include <cstdint>

#include "../kernels.h"
#include "sizes.h"

namespace offprin::cpu {

constexpr int64_t BLOCK = 2048;                // elements worked on at a time, so that every stage finds them in L1
constexpr int64_t BLOCK_WORDS = BLOCK / 64;    // words of mask for one block
constexpr int ROWS_AT_ONCE = 7;                // rows that column counters take at a time
constexpr int NORM_LANES = 16;                 // partial sums of a norm, the same under every instruction set

// A rectangle of the matrices: the unit of work, and of the fixed order of float sums.
struct Cell {
  int64_t row_begin, row_end, column_begin, column_end;
};

// What one cell adds up. Everything but the norms is an integer, so cells may be merged in any order.
struct Tally {
  int64_t rules[MAX_RULES][2];
  int64_t counters[COUNTERS];
  int64_t at_least[16];  // coordinates whose ULP distance is >= 2^j; NaN against a number is not among them
  int64_t nan_against_number;
  int64_t exponents[2][EXPONENT_BINS];
  double norms[2][NORMS];
};

// Memory of one task, reused from cell to cell.
struct alignas(64) Scratch {
  uint16_t codes[2][BLOCK];     // base and tuned in bf16 storage, where they cannot be used in place
  float values[2][BLOCK];       // the same before rounding
  float rounded[2][BLOCK];      // the same after rounding, in fp32
  uint16_t distances[BLOCK];    // in ULP
  uint64_t bitwise[BLOCK_WORDS + 1];
  uint64_t other[BLOCK_WORDS + 1];
  uint64_t row[BLOCK_WORDS];
  uint64_t waiting[ROWS_AT_ONCE][STRIP / 64];  // words of rows that are not in the counters yet
  // Changed rows of each column since they were last emptied. Unaligned, each store would touch two lines.
  alignas(64) uint8_t column_counters[STRIP];
};

// Adds one cell to `tally` (its norms are set) and to the job's mask, row and column counts; `column_lock` guards the
// last.
namespace generic {
void scan_cell(const UpdateScan& job, const Cell& cell, Tally& tally, Scratch& scratch, pthread_mutex_t* column_lock);
}
namespace avx2 {
void scan_cell(const UpdateScan& job, const Cell& cell, Tally& tally, Scratch& scratch, pthread_mutex_t* column_lock);
}
namespace avx512 {
void scan_cell(const UpdateScan& job, const Cell& cell, Tally& tally, Scratch& scratch, pthread_mutex_t* column_lock);
}

}  // namespace offprin::cpu
