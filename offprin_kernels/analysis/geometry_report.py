"""Geometry of updates as the tables that ``offprin analyze --metrics`` prints."""

from __future__ import annotations

from .schema import ENERGY_COLUMNS, NULLS, SHIFTS
from .text import percent, scientific, table

# Matrices left out that are named.
LISTED = 5
BOUND_NAMES = {
    "mirsky": "NSS <= |D|/|W0| (Mirsky)",
    "mirsky_k": "NSS, top k <= |D|/|W0_k| (Mirsky)",
    "weyl": "shift of a value <= ||D|| (Weyl)",
    "wedin": "angle <= asin(||D||/(gap-||D||)) (Wedin)",
    "ky_fan": "shift of top-k sum <= k ||D|| (Ky Fan)",
}


def geometry_text(found: dict, options: dict) -> list[str]:
    """Tables of one run's geometry, a line per kind of linear layer; what is below resolution is not a number."""
    groups = [*found["by_kind"].items(), ("linear layers", found["all"])]
    some = found["all"]["matrices"]
    lines = [f"{found['run']}: geometry of {some} linear layers, {dimensions(found['all'], options)}"]
    if some and "spectrum" in options["metrics"]:
        shift = SHIFTS[options["nss"]]
        rows = [
            (
                name,
                *(
                    text
                    for side in ("left", "right")
                    for text in (degrees(group[f"{side}_degrees"], group), null(group[f"{side}_degrees_isotropic"]))
                ),
                f"{group['resolved']}/{group['matrices']}",
                *(scientific(group[key]) for key in (shift.observed, shift.isotropic, shift.mirsky)),
            )
            for name, group in groups
        ]
        header = (
            "median over matrices", "left angle", "isotropic", "right angle", "isotropic", "resolved", shift.title,
            "isotropic", "at most",
        )  # fmt: skip
        lines.append(table(header, rows))
        bounds = [
            (
                BOUND_NAMES[name],
                percent(bound["largest_share"]),
                percent(bound["median_share"]),
                f"{bound['exceeded']}/{bound['matrices']}",
            )
            for name, bound in found["all"]["bounds"].items()
            if bound["matrices"]
        ]
        lines.append(table(("observed as a share of its bound", "largest", "median", "exceeded"), bounds))
        if found["all"]["not_converged"]:
            lines.append(f"{found['all']['not_converged']} matrices missed the tolerance: their resolution is coarser")
    if some and "energy" in options["metrics"]:
        columns = [column for column in ENERGY_COLUMNS if not column.endswith("_z")]
        shares = [(name, *(percent(group[column]) for column in columns)) for name, group in groups]
        sides = (head for side in ("left", "right", "both") for head in (side, "isotropic", "& rounded"))
        lines.append(table(("update energy in top k", *sides), shares))
    if some and "masks" in options["metrics"]:
        what = f"changed weights in, alpha = {options['alpha']}"
        overlaps = overlap_rows(found["all"]["overlaps"])
        nulls = ("if uniform", "if by exponent", "if by margins", "if isotropic")
        lines.append(table((what, "share", *nulls, "excess", "z (exponent)"), overlaps))
        without = some - found["all"]["overlaps"]["low"]["isotropic_matrices"]
        if 0 < without < some:
            lines.append(f"  if isotropic: without {without} matrices that have no such null")
    if found["skipped"]["names"]:
        lines.append(f"  {len(found['skipped']['names'])} tensors skipped: {found['skipped']['why']}")
    for entry in found["left_out"][:LISTED]:
        lines.append(f"  left out: {entry['name']}: {entry['why']}")
    if len(found["left_out"]) > LISTED:
        lines.append(f"  and {len(found['left_out']) - LISTED} more left out; geometry.parquet lists all")
    return lines


def dimensions(group: dict, options: dict) -> str:
    """The k that was asked for, and where matrices have fewer dimensions, what they had."""
    smallest, asked = group.get("k_smallest", options["k"]), options["k"]
    return f"k = {asked}" if smallest == asked else f"k = {asked} or as many as a matrix has, {smallest} at least"


def overlap_rows(overlaps: dict) -> list[tuple[str, ...]]:
    return [
        (
            f"{kind} mask",
            percent(found["overlap"]),
            *(percent(found[f"expected_{null}"]) for null in NULLS),
            percent(found["excess"]),
            f"{found['z_exponent']:+.1f}",
        )
        for kind, found in overlaps.items()
    ]


def degrees(value: float | None, group: dict) -> str:
    return f"< {number(group['resolution_degrees'])}" if value is None else number(value)


def null(angle: float | None) -> str:
    return "-" if angle is None else number(angle)


def number(angle: float) -> str:
    """Three decimals, or two digits of what would be 0.000."""
    return f"{angle:.3f}" if angle >= 0.001 or not angle else f"{angle:.1e}"
