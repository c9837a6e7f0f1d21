"""Agreement of runs in plain words: against the exponent-conditioned null, and which other nulls reach as far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..charts.agreement import jaccards
from ..charts.model import span
from ..tables import Tables

CLEAR = 3.0  # standard deviations from which a difference is called one
OTHERS = (
    ("margin", "the densities of rows and columns alone"),
    ("isotropic", "isotropic updates of the same norms"),
)


@dataclass(frozen=True)
class Pair:
    jaccard: dict[str, float]  # observed, and by each null
    z: float  # of the intersection, against the exponent-conditioned null

    @property
    def excess(self) -> float:
        return self.jaccard["observed"] - self.jaccard["exponent"]


def measured(tables: Tables) -> list[Pair]:
    """Pairs of runs whose masks are not both empty, and whose null is known."""
    rows, found = tables.pairs, []
    if rows is None:
        return []
    for a, b in dict.fromkeys(zip(rows.texts("run_a"), rows.texts("run_b"), strict=True)):
        of_pair = rows.where((rows.texts("run_a") == a) & (rows.texts("run_b") == b))
        both, null, variance = (
            float(of_pair.numbers(name).sum())
            for name in ("intersection", "intersection_exponent", "intersection_exponent_variance")
        )
        if np.isfinite(null) and of_pair.numbers("union").sum() > 0:
            found.append(Pair(jaccards(of_pair), (both - null) / variance**0.5 if variance > 0 else 0.0))
    return found


def agreement(tables: Tables) -> list[str]:
    """Sentences of HTML; the first has the verdict."""
    found = measured(tables)
    if not found:
        return ["<b>Agreement of runs</b>: no pair changed anything in common tensors, or the nulls were not measured."]
    scores, pairs = [pair.z for pair in found], len(found)
    more, less = sum(z >= CLEAR for z in scores), sum(z <= -CLEAR for z in scores)
    if more == pairs:
        verdict = "beyond what the exponents of the base bring"
    elif less == pairs:
        verdict = "less than the exponents of the base bring"
    elif more or less:
        verdict = f"beyond what exponents bring in {more} of {pairs} pairs, less in {less}, no difference in the rest"
    else:
        verdict = f"not to be told from what the exponents of the base bring: z is small (below {CLEAR:g})"
    values, excess, z = (
        span(min(numbers), max(numbers), form.format)
        for numbers, form in (
            ([pair.jaccard["observed"] for pair in found], "{:.3f}"),
            ([pair.excess for pair in found], "{:+.4f}"),
            (scores, "{:+.1f}"),
        )
    )
    lines = [
        f"<b>Agreement of runs</b>: {verdict}. Jaccard index {values} over {pairs} pair{'s' if pairs > 1 else ''}, "
        f"excess over that null {excess}, z {z}.{isotropic(found) if more else ''}"
    ]
    if more or less:
        lines.append("z grows with the number of weights: judge by the excess.")
    return [*lines, *(other(found, null, text) for null, text in OTHERS)]


def isotropic(found: list[Pair]) -> str:
    """Whether agreement beyond exponents may be that of updates without any direction."""
    known = [pair for pair in found if np.isfinite(pair.jaccard["isotropic"])]
    if not known:
        return " Whether isotropic updates of the same norms agree as much was not measured."
    reached = sum(pair.jaccard["isotropic"] >= pair.jaccard["observed"] for pair in known)
    if not reached:
        return ""
    where = f"{reached} of {len(known)} pairs" if len(known) > 1 else "that pair"
    return f" But isotropic updates of the same norms agree as much in {where}."


def other(found: list[Pair], null: str, text: str) -> str:
    """Whether another null reaches what was observed."""
    known = [pair for pair in found if np.isfinite(pair.jaccard[null])]
    if not known:
        return f"What {text} would bring was not measured."
    reached = sum(pair.jaccard[null] >= pair.jaccard["observed"] for pair in known)
    if reached:
        where = f"{reached} of {len(known)} pairs" if len(known) > 1 else "the pair"
        return f"But {text} bring as much in {where}: there that may be all there is."
    least = min(pair.jaccard["observed"] - pair.jaccard[null] for pair in known)
    which = f" in all {len(known)} pairs, by at least" if len(known) > 1 else ", by"
    return f"It is above what {text} bring{which} {least:.4f}."
