// The Python module offprin_kernels._cuda: device pointers and a stream as integers in, nothing of PyTorch.
#include "bindings.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels, on raw device pointers and a stream";
  py::class_<offprin::UpdateScan>(module, "UpdateScan", py::module_local()).def(py::init(&offprin::update_scan_job));
  module.def("update_scan", [](const offprin::UpdateScan& job, uintptr_t stream) {
    const py::gil_scoped_release release;
    offprin::cuda::update_scan(job, offprin::pointer<void>(stream));
  });
}
