"""``update_scan``: one pass over two weight tensors that tells which stored bf16 values differ, and how.

The op works on raw tensors; :mod:`offprin_kernels.updates` gives it names and types.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch

from ... import packing
from ..._backend import choose
from ..._library import functional_op
from . import contract
from .contract import DTYPE_CODES, MAX_RULES, Output, Rule, RuleCode, ScanTensors

__all__ = ["BACKENDS", "MAX_RULES", "Output", "Rule", "RuleCode", "ScanTensors", "check_tensors", "scan"]

BACKENDS = ("triton", "cpu", "reference", "cuda")  # in order of preference


def scan(
    base: torch.Tensor,
    tuned: torch.Tensor,
    rules: Sequence[Rule] = (Rule(RuleCode.BITWISE),),
    outputs: Output = Output.MASK,
    *,
    additive: bool = False,
    mask_out: torch.Tensor | None = None,
    backend: str | None = None,
) -> ScanTensors:
    """Compare two tensors in bf16 storage in one pass.

    Args:
        base: weights, any shape (leading dimensions are flattened: rows x last dimension), bf16, fp16 or fp32.
        tuned: same shape, any of these dtypes; moved to the base's device if it is elsewhere.
        rules: when a coordinate counts as changed, at most MAX_RULES. ``rules[0]`` decides mask, rows, columns and
            changed exponents; the others are only counted.
        outputs: what to compute besides the counts; what is not asked for costs nothing.
        additive: ``tuned`` is an update: compare ``base`` with ``base + tuned`` (added in fp32, rounded once).
        mask_out: packed words to write the mask into (uint8 ``[m, row_bytes(n)]``, contiguous, on the base's device)
            instead of fresh memory, whose page faults cost a fifth of a large scan on the CPU.
        backend: force one of ``reference``, ``cpu``, ``triton``, ``cuda``.

    Returns:
        :class:`ScanTensors` on the base's device. Counts are exact; float sums have a fixed order and fp64 accuracy.

    Raises:
        TypeError: no tensor, or a dtype that is not bf16, fp16 or fp32.
        ValueError: unequal shapes, meta tensors, no rule or too many, or the rule ``storage`` with ``additive``.
        BackendUnavailable: a forced backend that cannot run here.

    Source: arXiv 2511.08567, sections 2.1 and 3.6, appendix E.
    """
    check_tensors(base, tuned, additive)
    if not rules:
        raise ValueError("at least one rule is needed")
    if len(rules) > MAX_RULES:
        raise ValueError(f"one scan takes at most {MAX_RULES} rules, got {len(rules)}; scan again for the others")
    if additive and any(rule.code is RuleCode.STORAGE for rule in rules):
        raise ValueError("rule 'storage' compares stored bits, and a sum has none yet; use 'bitwise' with additive")
    flat = [value for rule in rules for value in (float(rule.code.value), rule.threshold)]
    tuned = tuned.to(base.device)
    base, tuned = base.detach().contiguous(), tuned.detach().contiguous()
    if mask_out is None:
        return ScanTensors(*_scan(base, tuned, flat, outputs.value, additive, backend or ""))
    check_mask_out(mask_out, base)
    outputs |= Output.MASK
    return ScanTensors(mask_out, *_scan_into(base, tuned, mask_out, flat, outputs.value, additive, backend or ""))


def check_tensors(base: torch.Tensor, tuned: torch.Tensor, additive: bool = False) -> None:
    """Raises TypeError or ValueError where the two cannot be compared; names them as the caller knows them."""
    first, second = ("weight", "update") if additive else ("base", "tuned")
    for name, tensor in ((first, base), (second, tuned)):
        if not isinstance(tensor, torch.Tensor):
            remedy = "use torch.from_numpy" if type(tensor).__module__ == "numpy" else "pass a torch.Tensor"
            raise TypeError(f"{name} is {type(tensor).__module__}.{type(tensor).__qualname__}; {remedy}")
        if tensor.dtype not in DTYPE_CODES:
            raise TypeError(f"{name} is {tensor.dtype}; weights are compared in bfloat16, float16 or float32")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} has layout {tensor.layout}; dense tensors are needed, call .to_dense() first")
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device: it has a shape but no values to compare; load it first")
    if base.shape != tuned.shape:
        shapes = f"{first} has shape {tuple(base.shape)} and {second} {tuple(tuned.shape)}"
        raise ValueError(f"{shapes}; they must be equal")


def check_mask_out(mask: torch.Tensor, base: torch.Tensor) -> None:
    m, n = packing.matrix_shape(base.shape)
    wanted = (m, packing.row_bytes(n))
    if mask.dtype != torch.uint8 or tuple(mask.shape) != wanted or not mask.is_contiguous():
        raise ValueError(f"mask_out must be a contiguous uint8 tensor of shape {wanted}")
    if mask.device != base.device:
        raise ValueError(f"mask_out is on {mask.device} and base on {base.device}; allocate it there")


def run(
    base: torch.Tensor,
    tuned: torch.Tensor,
    rules: list[float],
    outputs: int,
    additive: bool,
    backend: str,
    mask: torch.Tensor | None = None,
) -> ScanTensors:
    # chosen here and not by the caller, so that a compiled graph holds no look-up of files or environment
    chosen = choose(base.device, BACKENDS, backend)
    parsed = [Rule(RuleCode(int(code)), threshold) for code, threshold in zip(rules[::2], rules[1::2], strict=True)]
    module = {"reference": ".reference", "cpu": ".native", "cuda": ".native", "triton": ".triton_kernel"}[chosen]
    implementation = importlib.import_module(module, __package__)
    function = implementation.scan_cuda if chosen == "cuda" else implementation.scan
    return function(base, tuned, parsed, Output(outputs), additive, mask)


# Custom ops take plain tuples of known length: the fields of ScanTensors, with the mask and without it.
T = torch.Tensor
Eight = tuple[T, T, T, T, T, T, T, T]
Seven = tuple[T, T, T, T, T, T, T]


@functional_op("update_scan")
def _scan(base: T, tuned: T, rules: list[float], outputs: int, additive: bool, backend: str) -> Eight:
    return tuple(run(base, tuned, rules, outputs, additive, backend))  # type: ignore[return-value]


@_scan.register_fake
def _(base: T, tuned: T, rules: list[float], outputs: int, additive: bool, backend: str) -> Eight:
    return tuple(contract.allocate(base, tuned, len(rules) // 2, Output(outputs), additive))  # type: ignore[return-value]


@torch.library.custom_op("offprin::update_scan_into", mutates_args=("mask",))
def _scan_into(base: T, tuned: T, mask: T, rules: list[float], outputs: int, additive: bool, backend: str) -> Seven:
    return tuple(run(base, tuned, rules, outputs, additive, backend, mask)[1:])  # type: ignore[return-value]


@_scan_into.register_fake
def _(base: T, tuned: T, mask: T, rules: list[float], outputs: int, additive: bool, backend: str) -> Seven:
    found = contract.allocate(base, tuned, len(rules) // 2, Output(outputs), additive, mask)
    return tuple(found[1:])  # type: ignore[return-value]
