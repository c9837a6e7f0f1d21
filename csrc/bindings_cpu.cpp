// The Python module offprin_kernels._cpu: integers for pointers in, nothing of PyTorch.
#include <cstdlib>
#include <tuple>

#include "bindings.h"

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

std::vector<const uint64_t*> pointers(const std::vector<uintptr_t>& addresses) {
  std::vector<const uint64_t*> result;
  for (const uintptr_t address : addresses) result.push_back(pointer<const uint64_t>(address));
  return result;
}

void update_scan(const UpdateScan& job, int threads) {
  const cpu::Isa isa = chosen();
  const py::gil_scoped_release release;
  cpu::update_scan(job, isa, threads);
}

uint64_t read_ceiling(uintptr_t data, int64_t bytes, int threads) {
  const py::gil_scoped_release release;
  return cpu::read_ceiling(pointer<const void>(data), bytes, threads);
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

using Strides = std::pair<int64_t, int64_t>;

cpu::SelectKeys select_keys(cpu::KeySource source, int64_t rows, int64_t columns) {
  cpu::SelectKeys keys{};
  keys.source = source;
  keys.rows = rows;
  keys.columns = columns;
  return keys;
}

void select_product(uintptr_t left, Strides left_strides, uintptr_t values, uintptr_t right, Strides right_strides,
                    int64_t rows, int64_t columns, int64_t rank, int64_t count, uintptr_t words, int threads) {
  const cpu::Isa isa = chosen();
  const py::gil_scoped_release release;
  cpu::SelectKeys keys = select_keys(cpu::KeySource::PRODUCT, rows, columns);
  keys.left = pointer<const float>(left);
  keys.values = pointer<const float>(values);
  keys.right = pointer<const float>(right);
  keys.rank = rank;
  std::tie(keys.left_strides[0], keys.left_strides[1]) = left_strides;
  std::tie(keys.right_strides[0], keys.right_strides[1]) = right_strides;
  cpu::select(keys, count, pointer<uint64_t>(words), isa, threads);
}

void select_weight(uintptr_t weight, int32_t dtype, int64_t rows, int64_t columns, int64_t count, uintptr_t words,
                   int threads) {
  const cpu::Isa isa = chosen();
  const py::gil_scoped_release release;
  cpu::SelectKeys keys = select_keys(cpu::KeySource::WEIGHT, rows, columns);
  keys.weight = pointer<const void>(weight);
  keys.dtype = dtype;
  cpu::select(keys, count, pointer<uint64_t>(words), isa, threads);
}

void select_hash(int64_t stream, int64_t rows, int64_t columns, int64_t count, uintptr_t words, int threads) {
  const cpu::Isa isa = chosen();
  const py::gil_scoped_release release;
  cpu::SelectKeys keys = select_keys(cpu::KeySource::HASH, rows, columns);
  keys.stream = static_cast<uint64_t>(stream);
  cpu::select(keys, count, pointer<uint64_t>(words), isa, threads);
}

void masked_adamw(uintptr_t slots, uintptr_t hypers, uintptr_t cohorts, int64_t tensors, int32_t param_dtype,
                  int32_t state_dtype, int32_t rounding, uintptr_t changes, int threads) {
  const cpu::Isa isa = chosen();
  const py::gil_scoped_release release;
  MaskedAdamw job{};
  job.slots = pointer<const int64_t>(slots);
  job.hypers = pointer<const float>(hypers);
  job.cohorts = pointer<const float>(cohorts);
  job.tensors = tensors;
  job.param_dtype = param_dtype;
  job.state_dtype = state_dtype;
  job.rounding = rounding;
  job.changes = pointer<int64_t>(changes);
  cpu::masked_adamw(job, isa, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "SIMD kernels for the CPU, on raw pointers";
  module.def("isa", isa_name, "Instruction set in use: OFFPRIN_CPU_ISA, else the best one");
  module.def("isas", supported, "Instruction sets that this processor has");
  module.def("read_ceiling", read_ceiling, "Reads memory and returns a checksum: the ceiling of benchmarks");
  py::class_<UpdateScan>(module, "UpdateScan", py::module_local()).def(py::init(&update_scan_job));
  module.def("update_scan", update_scan);
  module.def("mask_pack", mask_pack);
  module.def("mask_unpack", mask_unpack);
  module.def("mask_pair_counts", mask_pair_counts);
  module.def("mask_agreement", mask_agreement);
  module.def("mask_row_counts", mask_row_counts);
  module.def("mask_col_counts", mask_col_counts);
  module.def("select_product", select_product);
  module.def("select_weight", select_weight);
  module.def("select_hash", select_hash);
  module.def("masked_adamw", masked_adamw);
}
