"""Agreement of runs in plain words: against the exponent-conditioned null, and which other nulls reach as far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..charts.agreement import NULL_COLUMN, jaccards
from ..charts.model import span
from ..charts.nulls import WHY_NOT, comparable
from ..tables import Tables
from .finding import CLEAR, SMALL_JACCARD, UNRESOLVED

OTHERS = (
    ("margin", "the densities of rows and columns alone"),
    ("isotropic", "isotropic updates of the same norms"),
)
LIMITS = f"z below {CLEAR:g} or less than {SMALL_JACCARD:g} apart"


@dataclass(frozen=True)
class Pair:
    jaccard: dict[str, float]  # observed, and by each null
    both: float  # weights that both changed
    changed: float  # by one, plus by the other
    deviation: float  # of the intersection under the exponent-conditioned null, standing for that of the others too

    def excess(self, null: str) -> float:
        return self.jaccard["observed"] - self.jaccard[null]

    def z(self, null: str) -> float:
        """Of the intersection; 0 where the null leaves no freedom."""
        expected = self.changed * self.jaccard[null] / (1 + self.jaccard[null])
        return (self.both - expected) / self.deviation if self.deviation else 0.0

    def side(self, null: str) -> int:
        """1 above the null, -1 below it, 0 where it cannot be told: the difference must be clear and not small."""
        if abs(self.z(null)) < CLEAR or abs(self.excess(null)) < SMALL_JACCARD:
            return 0
        return 1 if self.excess(null) > 0 else -1


def measured(tables: Tables) -> list[Pair]:
    """Pairs of runs whose masks are not both empty, and whose null is known."""
    rows, found = tables.pairs, []
    if rows is None:
        return []
    for a, b in dict.fromkeys(zip(rows.texts("run_a"), rows.texts("run_b"), strict=True)):
        of_pair = comparable(rows.where((rows.texts("run_a") == a) & (rows.texts("run_b") == b)), NULL_COLUMN)
        sums = {
            name: float(of_pair.numbers(name).sum())
            for name in ("intersection", "changed_a", "changed_b", "union", "intersection_exponent")
        }
        variance = float(of_pair.numbers("intersection_exponent_variance").sum())
        if np.isfinite(sums["intersection_exponent"]) and sums["union"] > 0:
            changed = sums["changed_a"] + sums["changed_b"]
            deviation = variance**0.5 if variance > 0 else 0.0
            found.append(Pair(jaccards(of_pair), sums["intersection"], changed, deviation))
    return found


def agreement(tables: Tables) -> list[str]:
    """Sentences of HTML; the first has the verdict."""
    found = measured(tables)
    if not found:
        return ["<b>Agreement of runs</b>: no pair changed anything in common tensors, or the nulls were not measured."]
    pairs = len(found)
    more, less = counts(found, "exponent")
    if more == pairs:
        verdict = "beyond what the exponents of the base bring"
    elif less == pairs:
        verdict = "less than the exponents of the base bring"
    elif more or less:
        verdict = f"beyond what exponents bring in {more} of {pairs} pairs, less in {less}, {UNRESOLVED} in the rest"
    else:
        verdict = f"{UNRESOLVED} ({LIMITS}), the null being what the exponents of the base bring"
    values, excess, z = (
        span(min(numbers), max(numbers), form.format)
        for numbers, form in (
            ([pair.jaccard["observed"] for pair in found], "{:.3f}"),
            ([pair.excess("exponent") for pair in found], "{:+.4f}"),
            ([pair.z("exponent") for pair in found], "{:+.1f}"),
        )
    )
    lines = [
        f"<b>Agreement of runs</b>: {verdict}. Jaccard index {values} over {pairs} pair{'s' if pairs > 1 else ''}, "
        f"excess over that null {excess}, z {z}.{isotropic(found) if more else ''}"
    ]
    if more or less:
        lines.append("z grows with the number of weights: judge by the excess.")
    assert tables.pairs is not None
    lost = len(tables.pairs) - len(comparable(tables.pairs, NULL_COLUMN))
    if lost:
        lines.append(f"{lost:,} of {len(tables.pairs):,} pairs of tensors are left out of all sums: {WHY_NOT}.")
    return [*lines, *(other(found, null, text) for null, text in OTHERS)]


def counts(found: list[Pair], null: str) -> tuple[int, int]:
    """Pairs above the null, and below it."""
    sides = [pair.side(null) for pair in found]
    return sides.count(1), sides.count(-1)


def isotropic(found: list[Pair]) -> str:
    """Whether agreement beyond exponents may be that of updates without any direction."""
    known = [pair for pair in found if np.isfinite(pair.jaccard["isotropic"])]
    if not known:
        return " Whether isotropic updates of the same norms agree as much was not measured."
    rest = len(known) - counts(known, "isotropic")[0]
    if not rest:
        return ""
    where = f"{rest} of {len(known)} pairs" if len(known) > 1 else "that pair"
    return f" But it is not above what isotropic updates of the same norms have in {where}."


def other(found: list[Pair], null: str, text: str) -> str:
    """Whether another null reaches what was observed."""
    known = [pair for pair in found if np.isfinite(pair.jaccard[null])]
    if not known:
        return f"What {text} would bring was not measured."
    above, below = counts(known, null)
    rest = len(known) - above - below
    if above == len(known):
        least = min(pair.excess(null) for pair in known)
        which = f" in all {len(known)} pairs, by at least" if len(known) > 1 else ", by"
        return f"It is above what {text} bring{which} {least:.4f}."
    if len(known) == 1:
        where = "It is below" if below else f"There is {UNRESOLVED} ({LIMITS}) to"
        return f"{where} what {text} bring: there that may be all there is."
    return (
        f"Against what {text} bring it is above in {above} of {len(known)} pairs and below in {below}; in {rest} there "
        f"is {UNRESOLVED} ({LIMITS}). Where it is not above, that may be all there is."
    )
