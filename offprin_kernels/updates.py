"""Which weights visibly changed between two tensors: the public face of the ``update_scan`` op."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .bitmask import BitMask
from .ops import update_scan as op
from .ops.update_scan import Output, Rule, contract


@dataclass(frozen=True)
class Norms:
    """Squared norms and their kin over all coordinates (fp64; fixed summation order; NaN or Inf propagate)."""

    base_squared: float  # ||W0||_F^2
    update_squared: float  # ||D||_F^2, D = W+ - W0
    base_dot_update: float  # <W0, D>
    update_max: float  # max |D|, in fp32


@dataclass(frozen=True)
class UpdateScan:
    """What one pass over (base, tuned) found. Results stay on the device until they are asked for.

    Anything that was not among the requested outputs is None.
    """

    shape: torch.Size
    rules: tuple[Rule, ...]
    outputs: Output
    raw: op.ScanTensors

    @property
    def total(self) -> int:
        """Coordinates compared."""
        return self.shape.numel()

    @property
    def changed(self) -> int:
        """Changed coordinates under ``rules[0]``, in bf16 storage."""
        return int(self.raw.rule_counts[0, 0])

    @property
    def sparsity(self) -> float:
        """1 - changed / total (1 for an empty tensor). Source: arXiv 2511.08567, section 2.1."""
        return 1.0 - self.changed / self.total if self.total else 1.0

    @property
    def counts(self) -> dict[str, int]:
        """Changed coordinates under every rule asked for, in bf16 storage, keyed by ``str(rule)``."""
        return {str(rule): int(n) for rule, n in zip(self.rules, self.raw.rule_counts[:, 0].tolist(), strict=True)}

    @property
    def uncast_counts(self) -> dict[str, int] | None:
        """The same on the values before rounding to bf16; None where both sides are bf16. ``ulp`` has none."""
        counts = self.raw.rule_counts[:, 1].tolist()
        found = {str(rule): n for rule, n in zip(self.rules, counts, strict=True) if n != contract.UNDEFINED}
        return found or None

    @property
    def mask(self) -> BitMask | None:
        """Changed coordinates under ``rules[0]``."""
        return BitMask(self.raw.mask, self.shape, check=False) if Output.MASK in self.outputs else None

    @property
    def row_counts(self) -> torch.Tensor | None:
        """Changed coordinates per row, int64 ``[rows]`` (leading dimensions flattened)."""
        return self.raw.row_counts if Output.ROWS in self.outputs else None

    @property
    def col_counts(self) -> torch.Tensor | None:
        """Changed coordinates per column, int64 ``[columns]``."""
        return self.raw.col_counts if Output.COLUMNS in self.outputs else None

    def _counter(self, index: int, wanted: Output) -> int | None:
        return int(self.raw.counters[index]) if wanted in self.outputs else None

    @property
    def sign_flips(self) -> int | None:
        """Coordinates nonzero on both sides whose sign changed."""
        return self._counter(contract.SIGN_FLIPS, Output.TRANSITIONS)

    @property
    def zero_to_nonzero(self) -> int | None:
        return self._counter(contract.ZERO_TO_NONZERO, Output.TRANSITIONS)

    @property
    def nonzero_to_zero(self) -> int | None:
        return self._counter(contract.NONZERO_TO_ZERO, Output.TRANSITIONS)

    @property
    def nan_base(self) -> int | None:
        return self._counter(contract.NAN_BASE, Output.NONFINITE)

    @property
    def inf_base(self) -> int | None:
        return self._counter(contract.INF_BASE, Output.NONFINITE)

    @property
    def nan_tuned(self) -> int | None:
        return self._counter(contract.NAN_TUNED, Output.NONFINITE)

    @property
    def inf_tuned(self) -> int | None:
        return self._counter(contract.INF_TUNED, Output.NONFINITE)

    @property
    def ulp_histogram(self) -> torch.Tensor | None:
        """int64 ``[18]``: bin 0 distance 0, bin j distances in [2^(j-1), 2^j) ULP, bin 17 NaN against a number."""
        return self.raw.ulp_histogram if Output.ULP_HISTOGRAM in self.outputs else None

    @property
    def exponent_histogram(self) -> torch.Tensor | None:
        """int64 ``[2, 256]`` by the base's exponent field: all coordinates, changed coordinates."""
        return self.raw.exponent_histogram if Output.EXPONENT_HISTOGRAM in self.outputs else None

    @property
    def norms(self) -> Norms | None:
        """Norms of the bf16 values."""
        return Norms(*self.raw.norms[0].tolist()) if Output.NORMS in self.outputs else None

    @property
    def uncast_norms(self) -> Norms | None:
        """Norms of the values before rounding to bf16; None where both sides are bf16."""
        if Output.NORMS not in self.outputs or self.uncast_counts is None:
            return None
        return Norms(*self.raw.norms[1].tolist())


def update_scan(
    base: torch.Tensor,
    tuned: torch.Tensor,
    rule: str | Rule = "bitwise",
    threshold: float | None = None,
    *,
    also: str | Rule | Sequence[str | Rule | tuple[str, float]] = (),
    outputs: str | Iterable[str] | Output = "all",
    backend: str | None = None,
) -> UpdateScan:
    """Compare two weight tensors in bf16 storage, in one pass over both.

    Args:
        base: weights before training, any shape, bf16, fp16 or fp32. Sources that are not bf16 are rounded to bf16
            (nearest even) first, and the un-cast comparison is reported beside.
        tuned: weights after training, same shape; its dtype may differ. Moved to the base's device where it is not.
        rule: ``"bitwise"`` (values differ; +0 = -0, NaN = NaN), ``"ulp"`` (distance > threshold, whole ULP),
            ``"eta"`` (|w+ - w0| > threshold * max(|w+|, |w0|); default 1e-3), ``"atol"`` (|w+ - w0| > threshold) or
            ``"storage"`` (stored bits differ, for lossless patches). NaN against a number is a change under each.
        threshold: of the rule; ULP for ``"ulp"``, relative for ``"eta"``, in weight units for ``"atol"``.
        also: further rules to count in the same pass, as names or ``(name, threshold)``; at most seven, all different.
        outputs: ``"all"`` or some of ``mask, rows, columns, transitions, nonfinite, ulp_histogram,
            exponent_histogram, norms``. What is not asked for costs nothing; the counts always come.
        backend: force ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; never falls back.

    Returns:
        :class:`UpdateScan`. Counts are exact integers; sums are deterministic and accurate to fp64 level.

    Raises:
        TypeError: not a tensor; dtype other than bf16, fp16, fp32.
        ValueError: unequal shapes; meta tensors; unknown rule or output; a negative, missing or fractional threshold;
            a rule that is asked for twice.
        BackendUnavailable: the forced backend cannot run here.

    Source: arXiv 2511.08567, Def. 2.1, section 2.1 and appendix E.
    """
    first = Rule.parse(rule, threshold)
    items = [also] if isinstance(also, (str, Rule)) else also
    rest = [Rule.parse(*item) if isinstance(item, tuple) else Rule.parse(item) for item in items]
    rules = contract.distinct([first, *rest])
    flags = Output.parse(outputs)
    raw = op.scan(base, tuned, rules, flags, backend=backend)
    return UpdateScan(base.shape, rules, flags, raw)


def update_mask(
    base: torch.Tensor,
    tuned: torch.Tensor,
    rule: str | Rule = "bitwise",
    threshold: float | None = None,
    *,
    out: BitMask | None = None,
    backend: str | None = None,
) -> BitMask:
    """The set of coordinates that changed between two weight tensors, in bf16 storage.

    Arguments, errors and source as in :func:`update_scan`. Returns a :class:`BitMask` of the tensors' shape: one bit
    per weight. With ``out``, a mask of that shape is overwritten and returned: who compares again and again (a training
    loop, say) then saves the page faults of fresh memory. ValueError where its shape or device differs.

    >>> update_mask(torch.ones(2, 3), torch.tensor([[1.0, 2, 1], [1, 1, 1.001]])).count()
    1
    """
    op.check_tensors(base, tuned)
    if out is not None and out.shape != base.shape:
        raise ValueError(f"out has shape {tuple(out.shape)} and base {tuple(base.shape)}; they must be equal")
    rules = (Rule.parse(rule, threshold),)
    raw = op.scan(base, tuned, rules, Output.MASK, mask_out=None if out is None else out.words, backend=backend)
    return BitMask(raw.mask, base.shape, check=False) if out is None else out


def visible(weight: torch.Tensor, update: torch.Tensor, *, backend: str | None = None) -> BitMask:
    """Where an update would show in bf16 storage: ``bf16(weight + update) != bf16(weight)``.

    Args:
        weight: weights held at their training precision, any shape, fp32, fp16 or bf16.
        update: change about to be applied, same shape, any of these dtypes (weight units, not relative).
        backend: as in :func:`update_scan`.

    Returns:
        :class:`BitMask`. The sum is taken in fp32 and rounded once, to nearest even; nothing of the weight's size is
        made. An update shows from about half a ULP of the weight on.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`update_scan`.

    Source: arXiv 2511.08567, section 3.6 (Gate III).
    """
    raw = op.scan(weight, update, (Rule(op.RuleCode.BITWISE),), Output.MASK, additive=True, backend=backend)
    return BitMask(raw.mask, weight.shape, check=False)
