// mask_algebra: cuts packed masks into tasks and merges their integer sums.
#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <vector>

#include "../kernels.h"
#include "mask_kernel.h"
#include "tasks.h"

namespace offprin::cpu {
namespace {

constexpr int64_t PIECE = 1 << 15;  // words of one task (256 KiB)

const MaskKernels& kernels_for(Isa isa) {
#if OFFPRIN_X86
  if (isa == Isa::AVX512) return avx512::mask_kernels;
  if (isa == Isa::AVX2) return avx2::mask_kernels;
#endif
  (void)isa;
  return generic::mask_kernels;
}

int64_t row_words(int64_t columns) { return row_bytes(columns) / 8; }

// Calls body(row, column, columns) for stretches of rows, in tasks of about a million elements.
template <typename Body>
void each_stretch(int64_t rows, int64_t columns, int threads, const Body& body) {
  constexpr int64_t TASK = 1 << 20;
  const int64_t stretch = std::clamp<int64_t>((columns + 63) / 64 * 64, 64, TASK), across = divide_up(columns, stretch);
  const int64_t batch = std::max<int64_t>(1, TASK / stretch), count = rows * across;
  if (rows * columns < SMALL) threads = 1;
  parallel_for(divide_up(count, batch), threads, [&](int64_t task) {
    for (int64_t i = task * batch; i < std::min(count, (task + 1) * batch); ++i) {
      const int64_t column = i % across * stretch;
      body(i / across, column, std::min(stretch, columns - column));
    }
  });
}

// Calls body(begin, n) for pieces of a flat range of words.
template <typename Body>
void each_piece(int64_t words, int64_t masks, int threads, const Body& body) {
  if (words * masks * 64 < SMALL) threads = 1;
  parallel_for(divide_up(words, PIECE), threads,
               [&](int64_t task) { body(task * PIECE, std::min(PIECE, words - task * PIECE)); });
}

}  // namespace

void mask_pack(const uint8_t* dense, int64_t rows, int64_t columns, uint64_t* words, Isa isa, int threads) {
  const MaskKernels& k = kernels_for(isa);
  each_stretch(rows, columns, threads, [&](int64_t row, int64_t column, int64_t n) {
    k.pack(dense + row * columns + column, n, words + row * row_words(columns) + column / 64);
  });
}

void mask_unpack(const uint64_t* words, int64_t rows, int64_t columns, uint8_t* dense, Isa isa, int threads) {
  const MaskKernels& k = kernels_for(isa);
  each_stretch(rows, columns, threads, [&](int64_t row, int64_t column, int64_t n) {
    k.unpack(words + row * row_words(columns) + column / 64, n, dense + row * columns + column);
  });
}

void mask_pair_counts(const uint64_t* const* masks, int64_t count, int64_t words, int64_t* counts, Isa isa,
                      int threads) {
  const MaskKernels& k = kernels_for(isa);
  std::fill_n(counts, count * count, int64_t{0});
  std::mutex lock;
  each_piece(words, count, threads, [&](int64_t begin, int64_t n) {
    std::vector<uint64_t> sums(static_cast<size_t>(count * (count + 1) / 2 * WIDEST_VECTOR));
    k.pairs(masks, count, begin, n, sums.data());
    const std::lock_guard<std::mutex> hold(lock);
    const uint64_t* sum = sums.data();
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = i; j < count; ++j, sum += WIDEST_VECTOR)
        counts[i * count + j] += static_cast<int64_t>(std::accumulate(sum, sum + WIDEST_VECTOR, uint64_t{0}));
  });
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < i; ++j) counts[i * count + j] = counts[j * count + i];
}

void mask_agreement(const uint64_t* const* masks, int64_t count, int64_t words, int64_t elements, int64_t* counts,
                    Isa isa, int threads) {
  const MaskKernels& k = kernels_for(isa);
  std::fill_n(counts, count + 1, int64_t{0});
  std::mutex lock;
  each_piece(words, count, threads, [&](int64_t begin, int64_t n) {
    std::vector<uint64_t> sums(static_cast<size_t>((count + 1) * WIDEST_VECTOR));
    k.agreement(masks, count, begin, n, sums.data());
    const std::lock_guard<std::mutex> hold(lock);
    for (size_t i = 0; i < sums.size(); ++i) counts[i / WIDEST_VECTOR] += static_cast<int64_t>(sums[i]);
  });
  // Padding bits vote for nobody: the coordinates without a vote are what is left.
  counts[0] = elements;
  for (int64_t votes = 1; votes <= count; ++votes) counts[0] -= counts[votes];
}

void mask_row_counts(const uint64_t* words, int64_t rows, int64_t row_words, int64_t* counts, Isa isa, int threads) {
  const MaskKernels& k = kernels_for(isa);
  clear(counts, rows, threads);
  each_stretch(rows, 64 * row_words, threads, [&](int64_t row, int64_t column, int64_t n) {
    const int64_t part = k.popcount(words + row * row_words + column / 64, n / 64);
    // Stretches of one row may be counted by several threads.
    __atomic_fetch_add(counts + row, part, __ATOMIC_RELAXED);
  });
}

void mask_col_counts(const uint64_t* words, int64_t rows, int64_t columns, int64_t* counts, Isa isa, int threads) {
  constexpr int64_t TASK_ROWS = 1 << 10;
  const MaskKernels& k = kernels_for(isa);
  clear(counts, columns, threads);
  if (rows * columns < SMALL) threads = 1;
  // Narrow masks: as many elements per task as in a full strip.
  const int64_t task_rows = std::max(TASK_ROWS, TASK_ROWS * STRIP / std::max<int64_t>(columns, 1));
  const int64_t across = divide_up(columns, STRIP);
  ColumnLocks locks;
  parallel_for(divide_up(rows, task_rows) * across, threads, [&](int64_t task) {
    const int64_t row = task / across * task_rows, column = task % across * STRIP;
    const std::unique_ptr<uint8_t[]> counters(new uint8_t[STRIP]());
    k.columns(words + row * row_words(columns) + column / 64, row_words(columns), std::min(task_rows, rows - row),
              std::min(STRIP, columns - column), counters.get(), counts + column, locks.of_column(column));
  });
}

}  // namespace offprin::cpu
