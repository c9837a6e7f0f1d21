"""``update_scan`` in the compiled libraries: pointer marshalling, nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import _native
from ..._backend import BackendUnavailable, threads
from ...packing import matrix_shape
from . import contract as c


def arguments(
    base: torch.Tensor,
    tuned: torch.Tensor,
    rules: Sequence[c.Rule],
    outputs: c.Output,
    additive: bool,
    out: c.ScanTensors,
) -> tuple[object, ...]:
    """The fields of ``UpdateScan`` in ``csrc/kernels.h``, in order; the address 0 means "not wanted"."""
    m, n = matrix_shape(base.shape)

    def address(tensor: torch.Tensor, wanted: bool) -> int:
        return tensor.data_ptr() if wanted else 0

    transitions, nonfinite = c.Output.TRANSITIONS in outputs, c.Output.NONFINITE in outputs
    return (
        base.data_ptr(),
        tuned.data_ptr(),
        c.DTYPE_CODES[base.dtype],
        c.DTYPE_CODES[tuned.dtype],
        additive,
        m,
        n,
        [(int(rule.code), rule.threshold) for rule in rules],
        address(out.mask, c.Output.MASK in outputs),
        address(out.row_counts, c.Output.ROWS in outputs),
        address(out.col_counts, c.Output.COLUMNS in outputs),
        out.rule_counts.data_ptr(),
        address(out.counters, transitions or nonfinite),
        transitions,
        nonfinite,
        address(out.ulp_histogram, c.Output.ULP_HISTOGRAM in outputs),
        address(out.exponent_histogram, c.Output.EXPONENT_HISTOGRAM in outputs),
        address(out.norms, c.Output.NORMS in outputs),
    )


def scan(
    base: torch.Tensor,
    tuned: torch.Tensor,
    rules: Sequence[c.Rule],
    outputs: c.Output,
    additive: bool,
    mask: torch.Tensor | None = None,
) -> c.ScanTensors:
    out = c.allocate(base, tuned, len(rules), outputs, additive, mask, fill=False)
    library = _native.library("cpu")
    library.update_scan(library.UpdateScan(*arguments(base, tuned, rules, outputs, additive, out)), threads())
    return out


def scan_cuda(
    base: torch.Tensor,
    tuned: torch.Tensor,
    rules: Sequence[c.Rule],
    outputs: c.Output,
    additive: bool,
    mask: torch.Tensor | None = None,
) -> c.ScanTensors:
    if outputs & ~(c.Output.MASK | c.Output.ROWS):
        raise BackendUnavailable("backend 'cuda' makes counts, mask and rows only; use backend='triton' for the rest")
    library = _native.library("cuda")
    with torch.cuda.device(base.device):
        # Its kernels add to their outputs, so these start at zero.
        out = c.allocate(base, tuned, len(rules), outputs, additive, mask)
        stream = torch.cuda.current_stream(base.device).cuda_stream
        library.update_scan(library.UpdateScan(*arguments(base, tuned, rules, outputs, additive, out)), stream)
    return out
