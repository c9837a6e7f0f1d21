// update_scan: cuts the matrices into cells, runs a kernel over them on all threads, merges results in a fixed order.
#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "pages.h"
#include "scan_kernel.h"
#include "tasks.h"

namespace offprin::cpu {
namespace {

constexpr int64_t CELL = 1 << 19;  // elements of a cell (2 MiB of bf16 pairs); part of the order of float sums

// How the matrices are cut. It depends on their shape alone.
struct Grid {
  int64_t rows, columns, cell_rows, cell_columns, down, across;

  Grid(int64_t m, int64_t n) : rows(m), columns(n) {
    cell_columns = std::clamp<int64_t>(columns, 1, STRIP);
    cell_rows = std::clamp<int64_t>(CELL / cell_columns, 1, std::max<int64_t>(rows, 1));
    down = columns == 0 ? 0 : divide_up(rows, cell_rows);
    across = divide_up(columns, cell_columns);
  }

  int64_t cells() const { return down * across; }

  Cell cell(int64_t i) const {
    const int64_t row = i / across * cell_rows, column = i % across * cell_columns;
    return {row, std::min(row + cell_rows, rows), column, std::min(column + cell_columns, columns)};
  }
};

using Kernel = void (*)(const UpdateScan&, const Cell&, Tally&, Scratch&, pthread_mutex_t*);

Kernel kernel_for(Isa isa) {
#if OFFPRIN_X86
  if (isa == Isa::AVX512) return avx512::scan_cell;
  if (isa == Isa::AVX2) return avx2::scan_cell;
#endif
  (void)isa;
  return generic::scan_cell;
}

void merge_counts(Tally& into, const Tally& from) {
  const auto add = [](int64_t* sums, const int64_t* more, size_t count) {
    for (size_t i = 0; i < count; ++i) sums[i] += more[i];
  };
  add(into.rules[0], from.rules[0], 2 * MAX_RULES);
  add(into.counters, from.counters, COUNTERS);
  add(into.at_least, from.at_least, std::size(from.at_least));
  add(into.exponents[0], from.exponents[0], 2 * EXPONENT_BINS);
  into.nan_against_number += from.nan_against_number;
}

// Sums in the order of the cells; the maximum keeps NaN.
void merge_norms(double* into, const double* from) {
  for (int i = 0; i < UPDATE_MAX; ++i) into[i] += from[i];
  const double largest = into[UPDATE_MAX], more = from[UPDATE_MAX];
  if (largest == largest && !(more <= largest)) into[UPDATE_MAX] = more;
}

struct NormPair {
  double row[2][NORMS];
};

void write_results(const UpdateScan& job, const Tally& sum, const std::vector<NormPair>& norms) {
  const bool uncast = job.additive || job.base_dtype != BF16 || job.tuned_dtype != BF16;
  for (int32_t r = 0; r < job.rules; ++r) {
    job.rule_counts[2 * r] = sum.rules[r][0];
    job.rule_counts[2 * r + 1] = uncast && job.rule[r].code != ULP ? sum.rules[r][1] : UNDEFINED;
  }
  if (job.counters != nullptr) std::copy_n(sum.counters, COUNTERS, job.counters);
  if (job.exponent_histogram != nullptr) std::copy_n(sum.exponents[0], 2 * EXPONENT_BINS, job.exponent_histogram);
  if (job.ulp_histogram != nullptr) {
    const int64_t* reach = sum.at_least;
    job.ulp_histogram[0] = job.rows * job.columns - reach[0] - sum.nan_against_number;
    for (int j = 1; j < ULP_NAN_BIN; ++j) job.ulp_histogram[j] = reach[j - 1] - (j < 16 ? reach[j] : 0);
    job.ulp_histogram[ULP_NAN_BIN] = sum.nan_against_number;
  }
  if (job.norms != nullptr) {
    NormPair total{};
    for (const NormPair& pair : norms)
      for (int k = 0; k < 2; ++k) merge_norms(total.row[k], pair.row[k]);
    if (!uncast) std::fill_n(total.row[1], static_cast<int>(NORMS), static_cast<double>(UNDEFINED));
    std::copy_n(total.row[0], 2 * NORMS, job.norms);
  }
}

}  // namespace

void update_scan(const UpdateScan& job, Isa isa, int threads) {
  const Grid grid(job.rows, job.columns);
  if (job.rows * job.columns < SMALL) threads = 1;
  if (job.row_counts != nullptr && grid.across != 1) clear(job.row_counts, job.rows, threads);
  if (job.col_counts != nullptr) clear(job.col_counts, job.columns, threads);

  // Cells of flat tensors are small: a task takes several.
  const int64_t cells_per_task = std::max<int64_t>(1, CELL / (grid.cell_rows * grid.cell_columns));
  const Kernel kernel = kernel_for(isa);
  std::vector<NormPair> norms(job.norms != nullptr ? static_cast<size_t>(grid.cells()) : 0);
  Tally sum{};
  std::mutex sum_lock;
  ColumnLocks locks;
  parallel_for(divide_up(grid.cells(), cells_per_task), threads, [&](int64_t task) {
    const std::unique_ptr<Scratch> scratch(new Scratch);
    if (job.col_counts != nullptr) std::fill_n(scratch->column_counters, STRIP, uint8_t{0});
    Tally tally{};
    const int64_t end = std::min(grid.cells(), (task + 1) * cells_per_task);
    for (int64_t i = task * cells_per_task; i < end; ++i) {
      const Cell cell = grid.cell(i);
      const int64_t mask_row = row_bytes(job.columns);
      if (job.mask != nullptr && grid.across == 1)
        prepare_pages(job.mask + cell.row_begin * mask_row, (cell.row_end - cell.row_begin) * mask_row);
      kernel(job, cell, tally, *scratch, locks.of_column(cell.column_begin));
      if (job.norms != nullptr) std::copy_n(tally.norms[0], 2 * NORMS, norms[static_cast<size_t>(i)].row[0]);
    }
    const std::lock_guard<std::mutex> hold(sum_lock);
    merge_counts(sum, tally);
  });
  write_results(job, sum, norms);
}

}  // namespace offprin::cpu
