"""Every published definition of "sparsity" and of "rotation" side by side, for each run.

Papers use these words for different numbers; here each stands with its formula, source, counts and published range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from .published import ANGLE, LATER, NORM_RATIO, NORM_RATIO_SQUARED, NOTHING, NSS, PAPER, SPARSITY, Range
from .tables import Frame, Tables
from .text import percent, scientific, table

ALL, LINEAR = "all compared", "linear layers"
Ranges = tuple[Range | None, Range | None]


@dataclass(frozen=True)
class Row:
    """One definition, one run, one set of tensors.

    ``numerator / denominator`` are exact counts (of weights; of matrices for medians). ``value`` is None where it was
    not measured or lies below resolution; ``note`` then says which. ``rlvr`` and ``sft`` are published ranges, the
    flags tell whether the value lies inside.
    """

    run: str
    group: str  # sparsity | rotation
    definition: str
    formula: str
    source: str
    column: str
    scope: str
    tensors: int
    value: float | None
    unit: str  # share | degrees | ratio
    numerator: int | None
    denominator: int | None
    counted: str  # what numerator and denominator count
    note: str
    rlvr: str | None = None
    inside_rlvr: bool | None = None
    sft: str | None = None
    inside_sft: bool | None = None

    @property
    def shown(self) -> str:
        """The value as text, or why there is none."""
        if self.value is None:
            return self.note or "not measured"
        if self.unit == "share":
            return percent(self.value)
        return f"{self.value:.3f}\N{DEGREE SIGN}" if self.unit == "degrees" else scientific(self.value)


@dataclass(frozen=True)
class Sparsity:
    """A rule under which a weight counts as changed; ``uncast`` compares the values as they are stored."""

    definition: str
    formula: str
    source: str
    rule: str
    uncast: bool = False
    ranges: Ranges = NOTHING


@dataclass(frozen=True)
class Rotation:
    """A number of each matrix, of which the median over matrices is reported."""

    definition: str
    formula: str
    source: str
    column: str
    unit: str
    ranges: Ranges = NOTHING
    of: Callable[[np.ndarray], np.ndarray] | None = None  # the value, made of the column's


EARLIER = f"earlier papers (see {PAPER}, E.1)"
SPARSITIES = (
    Sparsity("bitwise, bf16", "bf16(w+) = bf16(w0), +0 = -0", f"{PAPER}, 2.1", "bitwise", ranges=SPARSITY),
    Sparsity("bitwise, as stored", "w+ = w0", f"{PAPER}, 2.1, without the cast", "bitwise", uncast=True),
    Sparsity(
        "eta 1e-3, bf16", "|w+ - w0| <= 1e-3 max(|w+|, |w0|)", f"{PAPER}, Def. 2.1", "eta(0.001)", ranges=SPARSITY
    ),
    Sparsity(
        "eta 1e-3, as stored", "the same on un-cast values", f"{PAPER}, Def. 2.1, without the cast", "eta(0.001)", True
    ),
    *(
        Sparsity(f"atol {t}, {text}", f"|w+ - w0| <= {t}", EARLIER, f"atol({float(t):g})", uncast)
        for t in ("1e-5", "1e-8")
        for text, uncast in (("bf16", False), ("as stored", True))
    ),
)
ANGLES = f"{PAPER}, 3.2; range {LATER}"
MEDIANS = f"{PAPER}, 3.2; the published ranges are not of medians"
ENERGY = f"after {PAPER}, 3.2 and 4.1; an energy is a squared norm"
ROTATIONS = (
    Rotation("largest left angle", "max_i acos s_i(U0_k' U+_k)", ANGLES, "left_degrees", "degrees", ANGLE),
    Rotation("largest right angle", "max_i acos s_i(V0_k' V+_k)", ANGLES, "right_degrees", "degrees", ANGLE),
    Rotation("median left angle", "median_i acos s_i(U0_k' U+_k)", MEDIANS, "left_median_degrees", "degrees"),
    Rotation("median right angle", "median_i acos s_i(V0_k' V+_k)", MEDIANS, "right_median_degrees", "degrees"),
    Rotation("NSS, full spectrum", "||s(W+) - s(W0)|| / ||s(W0)||", ANGLES, "nss", "ratio", NSS),
    Rotation("NSS, top k", "the same over the k largest", f"{PAPER}, 3.2", "nss_k", "ratio"),
    Rotation(
        "norm ratio", "||D||_F / ||W0||_F: a ratio of norms", "norms of DeepScaleR, layer 13",
        "relative_update", "ratio", NORM_RATIO,
    ),
    Rotation(
        "energy ratio", "||D||_F^2 / ||W0||_F^2: the norm ratio squared", "norms of DeepScaleR, layer 13",
        "relative_update", "ratio", NORM_RATIO_SQUARED, np.square,
    ),
    Rotation("energy share, left", "||U_k'D||^2 / ||D||^2", ENERGY, "energy_left", "share"),
    Rotation("norm ratio, left", "||U_k'D|| / ||D||, its root", ENERGY, "energy_left", "ratio", of=np.sqrt),
    Rotation("energy share, right", "||D V_k||^2 / ||D||^2", ENERGY, "energy_right", "share"),
    Rotation("norm ratio, right", "||D V_k|| / ||D||, its root", ENERGY, "energy_right", "ratio", of=np.sqrt),
    Rotation("energy share, both sides", "||U_k'D V_k||^2 / ||D||^2", ENERGY, "energy_both", "share"),
    Rotation("norm ratio, both sides", "||U_k'D V_k|| / ||D||, its root", ENERGY, "energy_both", "ratio", of=np.sqrt),
)  # fmt: skip


def reconcile(tables: Tables) -> list[Row]:
    """All definitions for every run, run by run. Tables and summary are enough; nothing is re-read."""
    return [row for run in tables.runs for row in (*sparsity_rows(tables, run), *rotation_rows(tables, run))]


def sparsity_rows(tables: Tables, run: str) -> Iterator[Row]:
    every = tables.tensors.where(tables.tensors.texts("run") == run)
    linear = every.where(every.texts("linear") == True)  # noqa: E712
    for rule in SPARSITIES:
        for scope, frame in ((ALL, every), (LINEAR, linear)):
            yield sparsity_row(rule, run, scope, frame)


def sparsity_row(rule: Sparsity, run: str, scope: str, frame: Frame) -> Row:
    """Kept over compared, as integers. Un-cast counts are those of bf16 values where both sides are stored so."""
    cast, uncast = f"changed_{rule.rule}", f"changed_uncast_{rule.rule}"
    totals, changed = frame.values("total"), frame.values(cast)
    where, note = cast, ""
    if rule.uncast:
        where = f"{uncast}; {cast} where bf16"
        dtypes = zip(frame.values("base_dtype"), frame.values("tuned_dtype"), strict=True)
        stored = [base == tuned == "BF16" for base, tuned in dtypes]
        changed = [c if s else u for c, u, s in zip(changed, frame.values(uncast), stored, strict=True)]
        if len(frame) and all(stored):
            note = "all stored in bf16: equal to the line for bf16"
    counted = len(frame) > 0 and all(count is not None for count in changed)
    kept = sum(totals) - sum(changed) if counted else None
    value = kept / sum(totals) if kept is not None and sum(totals) else None
    if not counted and len(frame):
        name, _, threshold = rule.rule.rstrip(")").partition("(")
        option = f"{name}:{threshold_text(threshold)}" if threshold else name
        note = f"not counted: add --also {option}"
    return Row(
        run, "sparsity", rule.definition, rule.formula, rule.source, where, scope, len(frame), value, "share",
        kept, sum(totals) if counted else None, "weights kept of compared", note, **flags(rule.ranges, value),
    )  # fmt: skip


def threshold_text(threshold: str) -> str:
    """As in the help of ``--also``: 1e-3, not 0.001 or 1e-03."""
    mantissa, _, exponent = f"{float(threshold):.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def rotation_rows(tables: Tables, run: str) -> Iterator[Row]:
    empty = tables.tensors.where(np.zeros(len(tables.tensors), dtype=bool))
    of_run = tables.tensors.where((tables.tensors.texts("run") == run) & (tables.tensors.texts("linear") == True))  # noqa: E712
    geometry = tables.geometry
    matrices = empty if geometry is None else geometry.where(geometry.texts("run") == run)
    for rotation in ROTATIONS:
        yield rotation_row(rotation, run, of_run if rotation.column == "relative_update" else matrices)


def rotation_row(rotation: Rotation, run: str, frame: Frame) -> Row:
    """The median over matrices. An angle below resolution counts as the smallest, so that it is never left out."""
    found = frame.numbers(rotation.column)
    angle = rotation.unit == "degrees"
    metric = "spectrum" if angle or rotation.column.startswith("nss") else "energy"
    # an angle is null where it is not resolved; that the metric was asked for shows in the resolution
    asked = np.isfinite(frame.numbers("resolution_degrees")) if angle else np.isfinite(found)
    measured, known = int(asked.sum()), int(np.isfinite(found).sum())
    note, value, limit = "", None, None
    if not measured:
        left_out = rotation.column == "nss" and np.isfinite(frame.numbers("nss_k")).any()
        note = f"not measured: {'--nss full' if left_out else f'add --metrics {metric}'}"
    else:
        ordered = np.where(np.isfinite(found[asked]), found[asked], -np.inf)
        middle = float(np.median(ordered))
        if np.isfinite(middle):
            value = float(rotation.of(np.array(middle))) if rotation.of else middle
        if angle:
            resolution = float(frame.numbers("resolution_degrees")[asked].max())
            limit = resolution if value is None else None
            note = f"below resolution (< {resolution:.3f}\N{DEGREE SIGN})"
            note = note if value is None else f"resolution {resolution:.3f}\N{DEGREE SIGN} or better"
    return Row(
        run, "rotation", rotation.definition, rotation.formula, rotation.source, rotation.column, LINEAR, measured,
        value, rotation.unit, known, measured, "matrices with a value; the value is their median", note,
        **flags(rotation.ranges, value, limit),
    )  # fmt: skip


def flags(ranges: Ranges, value: float | None, limit: float | None = None) -> dict:
    """Published ranges as text, and whether the value lies inside each.

    Without a value there is no flag, but where its ``limit``, the resolution that it lies below, decides.
    """
    result: dict = {}
    for name, found in zip(("rlvr", "sft"), ranges, strict=True):
        result[name] = found.text if found else None
        inside = found.holds(value) if found and value is not None else None
        if found and value is None and limit is not None:
            inside = found.holds_below(limit)
        result[f"inside_{name}"] = inside
    return result


def verdict(published: str | None, inside: bool | None) -> str:
    """A published range and the flag, as one cell of a table."""
    if published is None:
        return "none published"
    return published if inside is None else f"{published}: {'inside' if inside else 'outside'}"


def as_records(rows: list[Row]) -> list[dict]:
    """Plain dictionaries, for JSON or a data frame."""
    return [asdict(row) | {"shown": row.shown} for row in rows]


def render(rows: list[Row]) -> str:
    """Terminal tables, one per run."""
    parts = []
    for run in dict.fromkeys(row.run for row in rows):
        lines = [
            (
                row.definition,
                row.scope,
                row.shown,
                "-" if row.numerator is None else f"{row.numerator:,} / {row.denominator:,}",
                str(row.tensors),
                verdict(row.rlvr, row.inside_rlvr),
                verdict(row.sft, row.inside_sft),
            )
            for row in rows
            if row.run == run
        ]
        header = ("definition", "of", "value", "counts", "tensors", "published, RLVR", "published, SFT")
        parts.append(f"{run}: what papers call sparsity and rotation\n{table(header, lines)}")
    return "\n\n".join(parts)
