"""``lowrank_select``: exactly ``count`` coordinates of a matrix, as packed bits, with no dense matrix of what decides.

Largest entries of a low-rank reconstruction, smallest entries of a weight, or a seeded random set. Equal entries at the
threshold are taken from the lowest flat index on (row-major). Results are packed masks, ``uint8 [rows,
row_bytes(columns)]`` with padding bits zero; :mod:`offprin_kernels.masks` gives them names and types.

Every backend selects by radix over integer keys, counted on one pass and compared on another; none sorts the matrix.
Source: arXiv 2511.08567, sections 4.2 and 5.1; the low-rank selection is that of LIFT, arXiv 2506.00772.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from ..._backend import choose
from ..._library import functional_op
from ...packing import matrix_shape, row_bytes
from .contract import DTYPE_CODES, stream

__all__ = ["BACKENDS", "select_lowrank", "select_random", "select_smallest"]

BACKENDS = ("triton", "cpu", "reference")  # in order of preference


def select_lowrank(
    left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, count: int, *, backend: str | None = None
) -> torch.Tensor:
    """The ``count`` largest entries, by magnitude, of ``left @ diag(values) @ right``.

    An entry is, in fp32, the sum over i of ``left[row, i] * (values[i] * right[i, column])``. In the CPU library its
    bits, and so the mask, do not depend on threads or instruction set: it is one chain of fused multiply-adds. Between
    backends the order of the sum differs, and so may entries within rounding of the threshold.

    Args:
        left: fp32 ``[m, k]``, any strides.
        values: fp32 ``[k]``.
        right: fp32 ``[k, n]``, on the same device.
        count: 0 to m * n.
        backend: force one of ``reference``, ``cpu``, ``triton``.

    Returns:
        uint8 ``[m, row_bytes(n)]`` on the factors' device. Extra memory on the CPU: about 0.4 MiB per thread and, while
        coordinates at the threshold are told apart, at most a sixty-fourth of the fp32 matrix.

    Raises:
        TypeError: a factor that is not fp32.
        ValueError: shapes or devices that do not fit, a count out of range, a factor with NaN or Inf (named), or a
            product that overflows fp32.
        RuntimeError: factors that changed while the op ran.
        BackendUnavailable: a forced backend that cannot run here.
    """
    factors = {"left": left, "values": values, "right": right}
    for name, factor in factors.items():
        if factor.dtype != torch.float32:
            raise TypeError(f"{name} is {factor.dtype}; select_lowrank takes float32 factors, call .float() first")
        if factor.device != left.device:
            raise ValueError(f"left is on {left.device} and {name} on {factor.device}; move one with .to()")
    shapes = ", ".join(f"{name} {tuple(factor.shape)}" for name, factor in factors.items())
    if left.dim() != 2 or values.dim() != 1 or right.dim() != 2 or not left.shape[1] == len(values) == len(right):
        raise ValueError(f"factors must be left [m, k], values [k] and right [k, n]; got {shapes}")
    check_count(count, left.shape[0] * right.shape[1])
    return _select_lowrank(left.detach(), values.detach().contiguous(), right.detach(), count, backend or "")


def select_smallest(weight: torch.Tensor, count: int, *, backend: str | None = None) -> torch.Tensor:
    """The ``count`` smallest entries of a weight, by exact magnitude (the stored bits without the sign; -0 equals +0).

    Args:
        weight: bf16, fp16 or fp32, any shape: leading dimensions are flattened into rows (a vector is one row).
        count: 0 to the number of elements.
        backend: force one of ``reference``, ``cpu``, ``triton``.

    Returns:
        uint8 ``[m, row_bytes(n)]`` on the weight's device; the same on every backend.

    Raises:
        TypeError: another dtype or a sparse layout.
        ValueError: a count out of range, or a weight with NaN or Inf.
        RuntimeError: a weight that changed while the op ran.
        BackendUnavailable: a forced backend that cannot run here.
    """
    if weight.dtype not in DTYPE_CODES or weight.layout != torch.strided:
        raise TypeError(
            f"weight is {weight.dtype}, {weight.layout}; select_smallest takes dense bfloat16, float16, float32"
        )
    check_count(count, weight.numel())
    return _select_smallest(weight.detach().contiguous(), count, backend or "")


def select_random(
    rows: int, columns: int, count: int, seed: int, *, device: torch.device | str = "cpu", backend: str | None = None
) -> torch.Tensor:
    """``count`` coordinates, each set of that size equally likely: those with the smallest hash of (seed, flat index).

    The hash is SplitMix64's, 32 bits of it; the set depends on rows * columns, count and seed alone, not on backend,
    device or threads, and a larger count contains a smaller one.

    Args:
        rows, columns: shape of the matrix.
        count: 0 to rows * columns.
        seed: 0 to 2^63 - 1.
        device: where the mask is made.
        backend: force one of ``reference``, ``cpu``, ``triton``.

    Returns:
        uint8 ``[rows, row_bytes(columns)]`` on ``device``.

    Raises:
        ValueError: a negative size, a seed or count out of range.
        BackendUnavailable: a forced backend that cannot run here.
    """
    if rows < 0 or columns < 0:
        raise ValueError(f"a matrix of {rows} x {columns} does not exist; sizes start at 0")
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed must lie in 0 .. 2^63 - 1, got {seed}")
    check_count(count, rows * columns)
    return _select_random(rows, columns, count, seed, torch.device(device), backend or "")


def check_count(count: int, total: int) -> None:
    if not 0 <= count <= total:
        raise ValueError(f"count must lie in 0 .. {total}, the number of coordinates, got {count}")


def implementation(device: torch.device, backend: str) -> ModuleType:
    """Chosen inside the ops, not by callers, so that a compiled graph holds no look-up of files or environment."""
    chosen = choose(device, BACKENDS, backend)
    module = {"reference": ".reference", "cpu": ".native", "triton": ".triton_kernel"}[chosen]
    return importlib.import_module(module, __package__)


@functional_op("select_lowrank")
def _select_lowrank(
    left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, count: int, backend: str
) -> torch.Tensor:
    for name, factor in (("left", left), ("values", values), ("right", right)):
        # The extremes are NaN where any element is, and take no memory of the factor's size.
        if factor.numel() and not bool(torch.stack(torch.aminmax(factor)).isfinite().all()):
            raise ValueError(f"{name} holds NaN or Inf; the largest entries of the product are undefined")
    return implementation(left.device, backend).select_lowrank(left, values, right, count)


@_select_lowrank.register_fake
def _(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, count: int, backend: str) -> torch.Tensor:
    return left.new_empty((left.shape[0], row_bytes(right.shape[1])), dtype=torch.uint8)


@functional_op("select_smallest")
def _select_smallest(weight: torch.Tensor, count: int, backend: str) -> torch.Tensor:
    return implementation(weight.device, backend).select_smallest(weight, count)


@_select_smallest.register_fake
def _(weight: torch.Tensor, count: int, backend: str) -> torch.Tensor:
    m, n = matrix_shape(weight.shape)
    return weight.new_empty((m, row_bytes(n)), dtype=torch.uint8)


@functional_op("select_random")
def _select_random(rows: int, columns: int, count: int, seed: int, device: torch.device, backend: str) -> torch.Tensor:
    return implementation(device, backend).select_random(rows, columns, count, stream(seed), device)


@_select_random.register_fake
def _(rows: int, columns: int, count: int, seed: int, device: torch.device, backend: str) -> torch.Tensor:
    return torch.empty((rows, row_bytes(columns)), dtype=torch.uint8, device=device)
