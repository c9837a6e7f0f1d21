"""What a measurement says: numbers of one tensor, and sums over all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np

from ..geometry import Energy
from ..nulls import isotropic_changed

SHARES = tuple(field.name for field in fields(Energy))


@dataclass(frozen=True)
class TensorChange:
    """How a parameter differs from its base, over all processes. Counts are exact, on bf16 values, rule ``bitwise``."""

    name: str
    shape: tuple[int, ...]
    linear: bool  # the weight of a linear layer, by its name and shape
    changed: int
    sign_flips: int
    zero_to_nonzero: int
    nonzero_to_zero: int
    nonfinite: int  # NaN and Inf among the present values
    base_norm: float  # ||W0||_F
    update_norm: float  # ||D||_F
    update_max: float  # max |D|
    energy: Energy | None  # shares are 0 where D is; None where they were not asked for
    basis_degrees: float | None  # bound on the angle between the subspaces used and the true ones
    exponents: np.ndarray  # int64 [256]: coordinates of the base by the exponent field of their bf16 value
    rounded: bool  # the parameter is stored as bf16

    @property
    def total(self) -> int:
        """Coordinates compared."""
        return math.prod(self.shape)

    @property
    def visible_fraction(self) -> float:
        """changed / total (0 for an empty tensor)."""
        return self.changed / self.total if self.total else 0.0

    @property
    def sparsity(self) -> float:
        """1 - changed / total."""
        return 1.0 - self.visible_fraction

    @property
    def relative_update(self) -> float:
        """||D||_F / ||W0||_F; 0 where both are 0."""
        return ratio(self.update_norm, self.base_norm)

    @property
    def expected_changed(self) -> float:
        """Changed coordinates of an isotropic Gaussian update of the same norm, rounded to bf16 (nulls.rounding).

        NaN for parameters that are not stored as bf16: they lie anywhere between its values, and not on them.
        """
        if not self.rounded:
            return math.nan
        return float(isotropic_changed(self.exponents, self.update_norm).sum())


def ratio(update: float, base: float) -> float:
    return update / base if base else (math.inf if update else update)


def summary(changes: Iterable[TensorChange]) -> dict[str, float]:
    """Sums over tensors, under the keys that :meth:`UpdateWatch.measure` lists."""
    changes = list(changes)
    found = sums(changes, "")
    linear = [change for change in changes if change.linear]
    if linear:
        found |= sums(linear, "linear/")
    energies = [change.energy for change in changes if change.energy is not None]
    if energies:
        found |= layer_energies(changes)
        for share in SHARES:
            found[f"energy/mean/{share}"] = sum(getattr(energy, share) for energy in energies) / len(energies)
    return found


def layer_energies(changes: Iterable[TensorChange]) -> dict[str, float]:
    """Energies of each layer that has them, under the keys of :meth:`UpdateWatch.measure`."""
    return {
        f"energy/{change.name}/{share}": getattr(change.energy, share)
        for change in changes
        if change.energy is not None
        for share in SHARES
    }


def sums(changes: list[TensorChange], prefix: str) -> dict[str, float]:
    changed, total = (sum(getattr(change, name) for change in changes) for name in ("changed", "total"))
    update, base = (
        math.sqrt(sum(getattr(change, name) ** 2 for change in changes)) for name in ("update_norm", "base_norm")
    )
    largest = [change.update_max for change in changes]
    found = {
        "changed": changed,
        "total": total,
        "visible_fraction": changed / total if total else 0.0,
        "sparsity": 1.0 - changed / total if total else 1.0,
        "relative_update": ratio(update, base),
        "update_max": math.nan if any(map(math.isnan, largest)) else max(largest, default=0.0),
        "sign_flips": sum(change.sign_flips for change in changes),
        "nonfinite": sum(change.nonfinite for change in changes),
    }
    return {f"{prefix}{key}": value for key, value in found.items()}
