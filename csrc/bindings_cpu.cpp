// The Python module offprin_kernels._cpu: integers for pointers in, nothing of PyTorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace py = pybind11;
using namespace offprin;

namespace {

constexpr std::pair<const char*, cpu::Isa> ISAS[] = {
    {"generic", cpu::Isa::GENERIC}, {"avx2", cpu::Isa::AVX2}, {"avx512", cpu::Isa::AVX512}};

std::vector<std::string> supported() {
  std::vector<std::string> names;
  for (const auto& [name, isa] : ISAS)
    if (cpu::supports(isa)) names.push_back(name);
  return names;
}

// The instruction set to use: OFFPRIN_CPU_ISA, else the best one. A forced one that cannot run is an error.
cpu::Isa chosen() {
  const char* forced = std::getenv("OFFPRIN_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return cpu::best_isa();
  std::string known;
  for (const auto& [name, isa] : ISAS) {
    if (forced == std::string(name) && cpu::supports(isa)) return isa;
    if (cpu::supports(isa)) known += (known.empty() ? "" : ", ") + std::string(name);
  }
  throw std::runtime_error("OFFPRIN_CPU_ISA=" + std::string(forced) + " cannot run on this processor; it has " + known);
}

std::string isa_name() {
  const cpu::Isa isa = chosen();
  for (const auto& [name, candidate] : ISAS)
    if (candidate == isa) return name;
  return "";
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::vector<const uint64_t*> pointers(const std::vector<uintptr_t>& addresses) {
  std::vector<const uint64_t*> result;
  for (const uintptr_t address : addresses) result.push_back(pointer<const uint64_t>(address));
  return result;
}

// Fields in the order of struct UpdateScan; rules as (code, threshold) pairs.
void update_scan(uintptr_t base, uintptr_t tuned, int32_t base_dtype, int32_t tuned_dtype, bool additive, int64_t rows,
                 int64_t columns, const std::vector<std::pair<int32_t, double>>& rules, uintptr_t mask,
                 uintptr_t row_counts, uintptr_t col_counts, uintptr_t rule_counts, uintptr_t counters,
                 bool transitions, bool nonfinite, uintptr_t ulp_histogram, uintptr_t exponent_histogram,
                 uintptr_t norms, int threads) {
  if (rules.empty() || rules.size() > MAX_RULES)
    throw std::invalid_argument("update_scan takes 1 to " + std::to_string(MAX_RULES) + " rules, got " +
                                std::to_string(rules.size()));
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
  const cpu::Isa isa = chosen();
  const py::gil_scoped_release release;
  cpu::update_scan(job, isa, threads);
}

void mask_pack(uintptr_t dense, int64_t rows, int64_t columns, uintptr_t words, int threads) {
  const cpu::Isa isa = chosen();
  const py::gil_scoped_release release;
  cpu::mask_pack(pointer<const uint8_t>(dense), rows, columns, pointer<uint64_t>(words), isa, threads);
}

void mask_unpack(uintptr_t words, int64_t rows, int64_t columns, uintptr_t dense, int threads) {
  const cpu::Isa isa = chosen();
  const py::gil_scoped_release release;
  cpu::mask_unpack(pointer<const uint64_t>(words), rows, columns, pointer<uint8_t>(dense), isa, threads);
}

void mask_pair_counts(const std::vector<uintptr_t>& masks, int64_t words, uintptr_t counts, int threads) {
  const cpu::Isa isa = chosen();
  const auto list = pointers(masks);
  const py::gil_scoped_release release;
  cpu::mask_pair_counts(list.data(), static_cast<int64_t>(list.size()), words, pointer<int64_t>(counts), isa, threads);
}

void mask_agreement(const std::vector<uintptr_t>& masks, int64_t words, int64_t elements, uintptr_t counts,
                    int threads) {
  const cpu::Isa isa = chosen();
  const auto list = pointers(masks);
  const py::gil_scoped_release release;
  cpu::mask_agreement(list.data(), static_cast<int64_t>(list.size()), words, elements, pointer<int64_t>(counts), isa,
                      threads);
}

void mask_row_counts(uintptr_t words, int64_t rows, int64_t row_words, uintptr_t counts, int threads) {
  const cpu::Isa isa = chosen();
  const py::gil_scoped_release release;
  cpu::mask_row_counts(pointer<const uint64_t>(words), rows, row_words, pointer<int64_t>(counts), isa, threads);
}

void mask_col_counts(uintptr_t words, int64_t rows, int64_t columns, uintptr_t counts, int threads) {
  const cpu::Isa isa = chosen();
  const py::gil_scoped_release release;
  cpu::mask_col_counts(pointer<const uint64_t>(words), rows, columns, pointer<int64_t>(counts), isa, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "SIMD kernels for the CPU, on raw pointers";
  module.def("isa", isa_name, "Instruction set in use: OFFPRIN_CPU_ISA, else the best one");
  module.def("isas", supported, "Instruction sets that this processor has");
  module.def("update_scan", update_scan);
  module.def("mask_pack", mask_pack);
  module.def("mask_unpack", mask_unpack);
  module.def("mask_pair_counts", mask_pair_counts);
  module.def("mask_agreement", mask_agreement);
  module.def("mask_row_counts", mask_row_counts);
  module.def("mask_col_counts", mask_col_counts);
}
