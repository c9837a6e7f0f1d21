// What select.cpp and the selection kernels compiled once per instruction set share.
//
// A selection takes the coordinates with the smallest 32-bit keys; what they are is said beside SelectKeys in kernels.h.
#pragma once
#include <cstdint>

namespace offprin::cpu {

constexpr int64_t PIECE_KEYS = 1024;  // keys of one row that are made and used at once, a multiple of 64
constexpr int64_t WIDEST_TILE = 8;    // rows of the tallest tile of a product

// Which coordinates are in: those with a key below `first`, and of the keys first..last those at flat indices below
// `known`. From there up to `open` they are candidates.
struct Cut {
  uint32_t first, last;
  int64_t known, open;
};

struct Marked {
  int64_t set, candidates;
};

struct SelectKernels {
  int64_t tile_rows;    // rows that `product` makes at once
  int64_t panel_width;  // columns of one panel, a divisor of 64
  // Keys of tile_rows rows, `stride` apart: rows[r][i * step] are the factors of row r, panels [columns / panel_width,
  // rank, panel_width] those of the columns, a multiple of panel_width.
  void (*product)(const float* const* rows, int64_t step, const float* panels, int64_t rank, int64_t columns,
                  uint32_t* keys, int64_t stride);
  void (*weights)(const void* weight, int32_t dtype, int64_t n, uint32_t* keys);
  void (*hashes)(uint64_t stream, uint64_t index, int64_t n, uint32_t* keys);
  // Counts keys first..last by (key - first) >> shift.
  void (*histogram)(const uint32_t* keys, int64_t n, uint32_t first, uint32_t last, int shift, uint32_t* bins);
  // Bits of at most PIECE_KEYS keys that begin at a flat index; candidates are (key - first) << 48 | flat index.
  Marked (*mark)(const uint32_t* keys, int64_t n, int64_t flat, const Cut& cut, uint64_t* words, uint64_t* candidates);
};

namespace generic {
extern const SelectKernels select_kernels;
}
namespace avx2 {
extern const SelectKernels select_kernels;
}
namespace avx512 {
extern const SelectKernels select_kernels;
}

}  // namespace offprin::cpu
