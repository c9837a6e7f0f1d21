// What both Python modules share: integers for pointers, and the job that update_scan takes.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace offprin {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Fields in the order of struct UpdateScan; rules as (code, threshold) pairs; the address 0 means "not wanted".
inline UpdateScan update_scan_job(uintptr_t base, uintptr_t tuned, int32_t base_dtype, int32_t tuned_dtype,
                                  bool additive, int64_t rows, int64_t columns,
                                  const std::vector<std::pair<int32_t, double>>& rules, uintptr_t mask,
                                  uintptr_t row_counts, uintptr_t col_counts, uintptr_t rule_counts, uintptr_t counters,
                                  bool transitions, bool nonfinite, uintptr_t ulp_histogram,
                                  uintptr_t exponent_histogram, uintptr_t norms) {
  if (rules.empty() || rules.size() > MAX_RULES) {
    throw std::invalid_argument("update_scan takes 1 to " + std::to_string(MAX_RULES) + " rules, got " +
                                std::to_string(rules.size()));
  }
  UpdateScan job{};
  job.base = pointer<const void>(base);
  job.tuned = pointer<const void>(tuned);
  job.base_dtype = base_dtype;
  job.tuned_dtype = tuned_dtype;
  job.additive = additive;
  job.rows = rows;
  job.columns = columns;
  for (const auto& [code, threshold] : rules) job.rule[job.rules++] = {code, threshold};
  job.mask = pointer<uint8_t>(mask);
  job.row_counts = pointer<int64_t>(row_counts);
  job.col_counts = pointer<int64_t>(col_counts);
  job.rule_counts = pointer<int64_t>(rule_counts);
  job.counters = pointer<int64_t>(counters);
  job.transitions = transitions;
  job.nonfinite = nonfinite;
  job.ulp_histogram = pointer<int64_t>(ulp_histogram);
  job.exponent_histogram = pointer<int64_t>(exponent_histogram);
  job.norms = pointer<double>(norms);
  return job;
}

}  // namespace offprin
