// What mask_algebra.cpp and the mask kernels compiled once per instruction set share.
#pragma once
#include <pthread.h>

#include <cstdint>

#include "sizes.h"

namespace offprin::cpu {

constexpr int64_t WIDEST_VECTOR = 8;  // words in the widest vector: room for vector sums

// Each works on one task's part of the masks; sums are added to.
struct MaskKernels {
  void (*pack)(const uint8_t* dense, int64_t columns, uint64_t* words);
  void (*unpack)(const uint64_t* words, int64_t columns, uint8_t* dense);
  int64_t (*popcount)(const uint64_t* words, int64_t n);
  // Words [begin, begin + n) of every mask; sums is [pairs, WIDEST_VECTOR], pairs (i, j) with i <= j in row order
  void (*pairs)(const uint64_t* const* masks, int64_t count, int64_t begin, int64_t n, uint64_t* sums);
  // sums is [count + 1, WIDEST_VECTOR], entry 0 unused
  void (*agreement)(const uint64_t* const* masks, int64_t count, int64_t begin, int64_t n, uint64_t* sums);
  // `rows` rows of `columns` (at most STRIP) bits, `stride` words apart; counters is [STRIP], zeros before and after
  void (*columns)(const uint64_t* words, int64_t stride, int64_t rows, int64_t columns, uint8_t* counters,
                  int64_t* sums, pthread_mutex_t* lock);
};

namespace generic {
extern const MaskKernels mask_kernels;
}
namespace avx2 {
extern const MaskKernels mask_kernels;
}
namespace avx512 {
extern const MaskKernels mask_kernels;
}

}  // namespace offprin::cpu
