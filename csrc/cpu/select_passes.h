// The passes of lowrank_select: each makes every key anew, in tasks, and keeps counts or bits only.
#pragma once
#include <algorithm>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "../kernels.h"
#include "select_kernel.h"
#include "tasks.h"

namespace offprin::cpu {

constexpr int64_t BINS = 1 << 16;
constexpr int64_t UNIT = 1 << 16;          // flat indices whose equal keys are counted together
constexpr int64_t PANEL_FLOATS = 1 << 15;  // floats of a strip of columns: they stay in L2
constexpr uint32_t LARGEST = 0xFFFFFFFF;

inline const SelectKernels& select_kernels_for(Isa isa) {
#if OFFPRIN_X86
  if (isa == Isa::AVX512) return avx512::select_kernels;
  if (isa == Isa::AVX2) return avx2::select_kernels;
#endif
  (void)isa;
  return generic::select_kernels;
}

inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// What one thread works in: about 0.4 MiB.
struct Scratch {
  explicit Scratch(int64_t floats) : bins(BINS), store(static_cast<size_t>(floats + 16)) {
    // Vectors that cross cache lines would halve the speed of the product.
    panels = store.data() + (64 - reinterpret_cast<uintptr_t>(store.data()) % 64) % 64 / sizeof(float);
  }

  std::vector<uint32_t> bins;
  int64_t counted = 0;
  std::vector<float> store;
  float* panels;
  uint32_t keys[WIDEST_TILE * PIECE_KEYS] = {};
  uint64_t candidates[PIECE_KEYS];
};

// The keys below `first`, and those from first to last.
struct Bucket {
  uint32_t first, last;
  int64_t below, inside;
};

class Selection {
 public:
  Selection(const SelectKeys& source, Isa isa, int threads) : source_(source), kernels_(select_kernels_for(isa)) {
    total_ = source.rows * source.columns;
    // A strip is as wide as one piece, or as wide as L2 holds the factors of its columns.
    strip_ = PIECE_KEYS;
    if (source.source == KeySource::PRODUCT)
      strip_ = std::clamp<int64_t>(PANEL_FLOATS / std::max<int64_t>(source.rank, 1) / 64 * 64, 64, PIECE_KEYS);
    strip_ = std::min(strip_, round_up(source.columns, 64));
    // A thread for every 10 MiB of a matrix in fp32: what all of them work in stays below 5 % of it.
    const int64_t most = std::max<int64_t>(8, total_ * 4 / (10 << 20));
    threads_ = total_ < SMALL ? 1 : static_cast<int>(std::min<int64_t>(threads, most));
  }

  int64_t total() const { return total_; }

  // How many keys of the bucket there are for each (key - first) >> shift.
  std::vector<int64_t> histogram(const Bucket& bucket, int shift) {
    std::vector<int64_t> sums(BINS);
    each_piece([&](Scratch& mine, int64_t, int64_t, int64_t n, const uint32_t* keys) {
      if (mine.counted + n > LARGEST) empty(mine, sums);
      mine.counted += n;
      kernels_.histogram(keys, n, bucket.first, bucket.last, shift, mine.bins.data());
    });
    for (const auto& scratch : idle_) empty(*scratch, sums);
    return sums;
  }

  // How many keys of the bucket there are in each UNIT of flat indices.
  std::vector<int64_t> places(const Bucket& bucket) {
    std::vector<int64_t> sums(static_cast<size_t>(divide_up(total_, UNIT)));
    each_piece([&](Scratch&, int64_t row, int64_t column, int64_t n, const uint32_t* keys) {
      const int64_t flat = row * source_.columns + column, second = (flat / UNIT + 1) * UNIT - flat;
      int64_t found[2] = {0, 0};
      for (int64_t i = 0; i < n; ++i) found[i >= second] += keys[i] - bucket.first <= bucket.last - bucket.first;
      const std::lock_guard<std::mutex> hold(lock_);
      sums[static_cast<size_t>(flat / UNIT)] += found[0];
      if (n > second) sums[static_cast<size_t>(flat / UNIT + 1)] += found[1];
    });
    return sums;
  }

  // Writes every word; the candidates, at most `expected`, come in any order.
  int64_t mark(const Cut& cut, int64_t expected, uint64_t* words, std::vector<uint64_t>& candidates) {
    const int64_t row_words = row_bytes(source_.columns) / 8;
    int64_t set = 0;
    candidates.reserve(static_cast<size_t>(expected));
    each_piece([&](Scratch& mine, int64_t row, int64_t column, int64_t n, const uint32_t* keys) {
      const int64_t flat = row * source_.columns + column;
      const Marked found = kernels_.mark(keys, n, flat, cut, words + row * row_words + column / 64, mine.candidates);
      const std::lock_guard<std::mutex> hold(lock_);
      set += found.set;
      if (static_cast<int64_t>(candidates.size()) + found.candidates > expected) changed();
      candidates.insert(candidates.end(), mine.candidates, mine.candidates + found.candidates);
    });
    return set;
  }

  [[noreturn]] static void changed() {
    throw std::runtime_error("lowrank_select counted differently in two passes; its input changed while it ran");
  }

 private:
  // Calls body(scratch, row, column, n, keys) for pieces of rows that cover the matrix.
  template <typename Body>
  void each_piece(const Body& body) {
    constexpr int64_t TASK = 1 << 17;
    const bool product = source_.source == KeySource::PRODUCT;
    const int64_t width = product ? strip_ : std::min(round_up(source_.columns, 64), TASK);
    // Enough rows for the packing of a strip's factors to cost little.
    const int64_t height = product ? std::max<int64_t>(256, TASK / strip_) : std::max<int64_t>(1, TASK / width);
    const int64_t across = divide_up(source_.columns, width);
    parallel_for(divide_up(source_.rows, height) * across, threads_, [&](int64_t task) {
      const int64_t row = task / across * height, column = task % across * width;
      const int64_t rows = std::min(height, source_.rows - row), n = std::min(width, source_.columns - column);
      std::unique_ptr<Scratch> mine = take();
      if (product)
        product_rows(*mine, row, rows, column, n, body);
      else
        plain_rows(*mine, row, rows, column, n, body);
      give(std::move(mine));
    });
  }

  template <typename Body>
  void plain_rows(Scratch& mine, int64_t row, int64_t rows, int64_t column, int64_t columns, const Body& body) {
    const int64_t size = source_.dtype == FP32 ? 4 : 2;
    for (int64_t r = row; r < row + rows; ++r) {
      for (int64_t c = column; c < column + columns; c += strip_) {
        const int64_t n = std::min(strip_, column + columns - c), flat = r * source_.columns + c;
        if (source_.source == KeySource::WEIGHT)
          kernels_.weights(static_cast<const uint8_t*>(source_.weight) + flat * size, source_.dtype, n, mine.keys);
        else
          kernels_.hashes(source_.stream, static_cast<uint64_t>(flat), n, mine.keys);
        body(mine, r, c, n, mine.keys);
      }
    }
  }

  template <typename Body>
  void product_rows(Scratch& mine, int64_t row, int64_t rows, int64_t column, int64_t columns, const Body& body) {
    const int64_t whole = pack(mine, column, columns);
    for (int64_t top = row; top < row + rows; top += kernels_.tile_rows) {
      const int64_t last = std::min(top + kernels_.tile_rows, row + rows) - 1;
      const float* factors[WIDEST_TILE];
      // Rows that a tile has too many repeat the last one.
      for (int64_t r = 0; r < kernels_.tile_rows; ++r)
        factors[r] = source_.left + std::min(top + r, last) * source_.left_strides[0];
      kernels_.product(factors, source_.left_strides[1], mine.panels, source_.rank, whole, mine.keys, strip_);
      for (int64_t r = top; r <= last; ++r) body(mine, r, column, columns, mine.keys + (r - top) * strip_);
    }
  }

  // values[i] * right[i, column] of a strip, panel by panel; returns its columns, rounded up to whole panels.
  int64_t pack(Scratch& mine, int64_t column, int64_t columns) {
    const int64_t width = kernels_.panel_width, whole = round_up(columns, width);
    for (int64_t c = 0; c < whole; c += width) {
      float* panel = mine.panels + c * source_.rank;
      const int64_t n = std::min(width, columns - c);
      for (int64_t i = 0; i < source_.rank; ++i, panel += width) {
        const float* right = source_.right + i * source_.right_strides[0] + (column + c) * source_.right_strides[1];
        for (int64_t j = 0; j < n; ++j) panel[j] = source_.values[i] * right[j * source_.right_strides[1]];
        std::fill(panel + n, panel + width, 0.0f);
      }
    }
    return whole;
  }

  void empty(Scratch& scratch, std::vector<int64_t>& sums) {
    const std::lock_guard<std::mutex> hold(lock_);
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += scratch.bins[i];
    std::fill(scratch.bins.begin(), scratch.bins.end(), 0u);
    scratch.counted = 0;
  }

  std::unique_ptr<Scratch> take() {
    {
      const std::lock_guard<std::mutex> hold(lock_);
      if (!idle_.empty()) {
        std::unique_ptr<Scratch> scratch = std::move(idle_.back());
        idle_.pop_back();
        return scratch;
      }
    }
    return std::make_unique<Scratch>(source_.source == KeySource::PRODUCT ? strip_ * source_.rank : 0);
  }

  void give(std::unique_ptr<Scratch> scratch) {
    const std::lock_guard<std::mutex> hold(lock_);
    idle_.push_back(std::move(scratch));
  }

  const SelectKeys& source_;
  const SelectKernels& kernels_;
  int64_t total_, strip_;
  int threads_;
  std::mutex lock_;
  std::vector<std::unique_ptr<Scratch>> idle_;
};

}  // namespace offprin::cpu
