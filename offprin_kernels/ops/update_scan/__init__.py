"""``update_scan``: one pass over two weight tensors that tells which stored bf16 values differ, and how.

The op works on raw tensors; :mod:`offprin_kernels.updates` gives it names and types.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch

from ..._backend import choose
from . import contract
from .contract import DTYPE_CODES, Output, Rule, RuleCode, ScanTensors

__all__ = ["BACKENDS", "Output", "Rule", "RuleCode", "ScanTensors", "scan"]

BACKENDS = ("triton", "cpu", "reference", "cuda")  # in order of preference


def scan(
    base: torch.Tensor,
    tuned: torch.Tensor,
    rules: Sequence[Rule] = (Rule(RuleCode.BITWISE),),
    outputs: Output = Output.MASK,
    *,
    additive: bool = False,
    backend: str | None = None,
) -> ScanTensors:
    """Compare two tensors in bf16 storage in one pass.

    Args:
        base: weights, any shape (leading dimensions are flattened: rows x last dimension), bf16, fp16 or fp32.
        tuned: same shape, any of these dtypes; moved to the base's device if it is elsewhere.
        rules: when a coordinate counts as changed. ``rules[0]`` decides mask, rows, columns and changed exponents;
            the others are only counted.
        outputs: what to compute besides the counts; what is not asked for costs nothing.
        additive: ``tuned`` is an update: compare ``base`` with ``base + tuned`` (added in fp32, rounded once).
        backend: force one of ``reference``, ``cpu``, ``triton``, ``cuda``.

    Returns:
        :class:`ScanTensors` on the base's device. Counts are exact; float sums have a fixed order and fp64 accuracy.

    Raises:
        TypeError: a dtype that is not bf16, fp16 or fp32.
        ValueError: unequal shapes, no rule, or the rule ``storage`` together with ``additive``.
        BackendUnavailable: a forced backend that cannot run here.

    Source: arXiv 2511.08567, sections 2.1 and 3.6, appendix E.
    """
    for name, tensor in (("base", base), ("tuned", tuned)):
        if tensor.dtype not in DTYPE_CODES:
            raise TypeError(f"{name} is {tensor.dtype}; update_scan compares bfloat16, float16 and float32 weights")
        if tensor.layout != torch.strided:
            raise TypeError(
                f"{name} has layout {tensor.layout}; update_scan needs dense tensors, call .to_dense() first"
            )
    if base.shape != tuned.shape:
        raise ValueError(f"base has shape {tuple(base.shape)} and tuned {tuple(tuned.shape)}; they must be equal")
    if not rules:
        raise ValueError("at least one rule is needed")
    if additive and any(rule.code is RuleCode.STORAGE for rule in rules):
        raise ValueError("rule 'storage' compares stored bits, and a sum has none yet; use 'bitwise' with additive")
    flat = [value for rule in rules for value in (float(rule.code.value), rule.threshold)]
    tuned = tuned.to(base.device)
    out = _scan(base.detach().contiguous(), tuned.detach().contiguous(), flat, outputs.value, additive, backend or "")
    return ScanTensors(*out)


Eight = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]


@torch.library.custom_op("offprin::update_scan", mutates_args=())
def _scan(
    base: torch.Tensor, tuned: torch.Tensor, rules: list[float], outputs: int, additive: bool, backend: str
) -> Eight:
    # chosen here and not by the caller, so that a compiled graph holds no look-up of files or environment
    chosen = choose(base.device, BACKENDS, backend)
    parsed = [Rule(RuleCode(int(code)), threshold) for code, threshold in zip(rules[::2], rules[1::2], strict=True)]
    module = {"reference": ".reference", "cpu": ".native", "cuda": ".native", "triton": ".triton_kernel"}[chosen]
    implementation = importlib.import_module(module, __package__)
    function = implementation.scan_cuda if chosen == "cuda" else implementation.scan
    found: ScanTensors = function(base, tuned, parsed, Output(outputs), additive)
    return tuple(found)  # type: ignore[return-value]  # custom ops take no NamedTuple


@_scan.register_fake
def _(base: torch.Tensor, tuned: torch.Tensor, rules: list[float], outputs: int, additive: bool, backend: str) -> Eight:
    return tuple(contract.allocate(base, tuned, len(rules) // 2, Output(outputs), additive))  # type: ignore[return-value]
