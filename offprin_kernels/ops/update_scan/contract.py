"""What every backend of ``update_scan`` is asked for and what it hands back: names, codes and layouts, no arithmetic.

The same numbers stand in ``csrc/kernels.h``; ``tests/ops/test_contract.py`` holds the two together.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ... import packing

DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class RuleCode(enum.IntEnum):
    BITWISE = 0  # bf16 values differ; +0 == -0; NaN == NaN
    ULP = 1  # distance on the ordered line of bf16 codes > threshold
    ETA = 2  # |b - a| > threshold * max(|a|, |b|), in fp32
    ATOL = 3  # |b - a| > threshold, in fp32
    STORAGE = 4  # stored bits differ: signed zeros and NaN payloads count


DEFAULT_ETA = 1e-3  # arXiv 2511.08567, Def. 2.1
MAX_RULES = 8  # of one scan


@dataclass(frozen=True)
class Rule:
    """When a coordinate counts as changed; :meth:`parse` builds one by name. ValueError for an unfit threshold."""

    code: RuleCode
    threshold: float = 0.0

    def __post_init__(self) -> None:
        name, threshold = self.code.name.lower(), float(self.threshold)
        if not math.isfinite(threshold) or threshold < 0:
            raise ValueError(f"threshold of rule {name!r} must be finite and not negative, got {threshold!r}")
        if self.code in (RuleCode.BITWISE, RuleCode.STORAGE) and threshold:
            raise ValueError(f"rule {name!r} takes no threshold (got {threshold!r}); use 'ulp', 'eta' or 'atol'")
        if self.code == RuleCode.ULP and threshold != int(threshold):
            raise ValueError(f"threshold of rule 'ulp' is a whole number of ULP, got {threshold!r}")
        # -0.0 and 0.0 are one rule, and so are 2 and 2.0
        object.__setattr__(self, "threshold", threshold + 0.0)

    @classmethod
    def parse(cls, rule: str | Rule, threshold: float | None = None) -> Rule:
        """``"bitwise"``, ``"ulp"``, ``"eta"``, ``"atol"`` or ``"storage"``, with its threshold.

        Raises ValueError for an unknown name, a missing, negative or non-finite threshold, a fractional number of
        ULP, or a threshold given to a rule that takes none.
        """
        if isinstance(rule, Rule):
            if threshold is not None:
                raise ValueError("threshold is already part of the Rule object; pass one or the other")
            return rule
        try:
            code = RuleCode[rule.upper()]
        except (KeyError, AttributeError):
            names = ", ".join(c.name.lower() for c in RuleCode)
            raise ValueError(f"unknown rule {rule!r}; choose one of {names}") from None
        if code in (RuleCode.BITWISE, RuleCode.STORAGE):
            if threshold is not None:
                raise ValueError(f"rule {rule!r} takes no threshold (got {threshold!r}); use 'ulp', 'eta' or 'atol'")
            return cls(code)
        if threshold is None:
            if code != RuleCode.ETA:
                raise ValueError(f"rule {rule!r} needs a threshold, such as {'1' if code == RuleCode.ULP else '1e-5'}")
            threshold = DEFAULT_ETA
        return cls(code, threshold)

    def __str__(self) -> str:
        name = self.code.name.lower()
        if self.code in (RuleCode.BITWISE, RuleCode.STORAGE):
            return name
        # six digits read better; where they would make two thresholds one, all digits stand
        short = f"{self.threshold:g}"
        return f"{name}({short if float(short) == self.threshold else repr(self.threshold)})"


def distinct(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules, for results that are keyed by ``str(rule)``. Raises ValueError where one occurs twice."""
    rules = tuple(rules)
    for rule in rules:
        if rules.count(rule) > 1:
            raise ValueError(f"rule {rule} is asked for twice; its counts come once, under its name")
    return rules


class Output(enum.IntFlag):
    """Outputs that can be asked for. The number of changed coordinates always comes."""

    MASK = 1
    ROWS = 2
    COLUMNS = 4
    TRANSITIONS = 8
    NONFINITE = 16
    ULP_HISTOGRAM = 32
    EXPONENT_HISTOGRAM = 64
    NORMS = 128

    @classmethod
    def parse(cls, outputs: str | Iterable[str] | Output) -> Output:
        """``"all"``, one name, or several: mask, rows, columns, transitions, nonfinite, ulp_histogram, ..."""
        if isinstance(outputs, Output):
            return outputs
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        flags = cls(0)
        for name in names:
            if name == "all":
                return cls.all()
            try:
                flags |= cls[name.upper()]
            except (KeyError, AttributeError):
                known = ", ".join(member.lower() for member in cls.__members__)
                raise ValueError(f"unknown output {name!r}; choose from all, {known}") from None
        return flags

    @classmethod
    def all(cls) -> Output:
        return cls(255)


UNDEFINED = -1  # an un-cast count or norm that has no meaning for this pair of dtypes or this rule

# Rows of `counters`.
SIGN_FLIPS, ZERO_TO_NONZERO, NONZERO_TO_ZERO, NAN_BASE, INF_BASE, NAN_TUNED, INF_TUNED = range(7)
COUNTERS = 7

# Columns of `norms`; row 0 is on the bf16 values, row 1 on the un-cast values.
BASE_SQUARED, UPDATE_SQUARED, BASE_DOT_UPDATE, UPDATE_MAX = range(4)
NORMS = 4

# ulp_histogram: bin 0 holds distance 0, bin j distances in [2^(j-1), 2^j), the last bin NaN against a number.
ULP_BINS = 18
ULP_NAN_BIN = 17

EXPONENT_BINS = 256  # row 0: all coordinates, row 1: changed ones, by the exponent field of the base's bf16 value


class ScanTensors(NamedTuple):
    """Raw results, on the inputs' device. What was not asked for is an empty tensor."""

    mask: torch.Tensor  # uint8 [m, row_bytes(n)]
    row_counts: torch.Tensor  # int64 [m]
    col_counts: torch.Tensor  # int64 [n]
    rule_counts: torch.Tensor  # int64 [rules, 2]: on bf16 values, on un-cast values (or UNDEFINED)
    counters: torch.Tensor  # int64 [COUNTERS]
    ulp_histogram: torch.Tensor  # int64 [ULP_BINS]
    exponent_histogram: torch.Tensor  # int64 [2, EXPONENT_BINS]
    norms: torch.Tensor  # float64 [2, NORMS]; row 1 is UNDEFINED where both sources are bf16


def has_uncast(base: torch.dtype, tuned: torch.dtype, additive: bool) -> bool:
    """Whether an un-cast comparison exists beside the one in bf16 storage."""
    return additive or base != torch.bfloat16 or tuned != torch.bfloat16


def allocate(
    base: torch.Tensor,
    tuned: torch.Tensor,
    rules: int,
    outputs: Output,
    additive: bool,
    mask: torch.Tensor | None = None,
    fill: bool = True,
) -> ScanTensors:
    """Result tensors for one scan, zeroed; with ``fill=False`` left uninitialised. ``mask`` is used where given."""
    m, n = packing.matrix_shape(base.shape)

    def tensor(shape: tuple[int, ...], wanted: bool, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        make = packing.zeros if fill else packing.empty
        return make(shape if wanted else (0,) * len(shape), dtype, base.device)

    return ScanTensors(
        mask=tensor((m, packing.row_bytes(n)), Output.MASK in outputs, torch.uint8) if mask is None else mask,
        row_counts=tensor((m,), Output.ROWS in outputs),
        col_counts=tensor((n,), Output.COLUMNS in outputs),
        rule_counts=tensor((rules, 2), True),
        counters=tensor((COUNTERS,), bool(outputs & (Output.TRANSITIONS | Output.NONFINITE))),
        ulp_histogram=tensor((ULP_BINS,), Output.ULP_HISTOGRAM in outputs),
        exponent_histogram=tensor((2, EXPONENT_BINS), Output.EXPONENT_HISTOGRAM in outputs),
        norms=tensor((2, NORMS), Output.NORMS in outputs, torch.float64),
    )
