"""Geometry of updates as the tables that ``offprin analyze --metrics`` prints."""

from __future__ import annotations

from .schema import ENERGY_COLUMNS
from .text import percent, scientific, table


def geometry_text(found: dict, options: dict) -> list[str]:
    """Tables of one run's geometry, a line per kind of linear layer; what is below resolution is not a number."""
    groups = [*found["by_kind"].items(), ("linear layers", found["all"])]
    lines = [f"{found['run']}: geometry of {found['all']['matrices']} linear layers, k = {options['k']}"]
    if not found["all"]["matrices"]:
        return lines
    if "spectrum" in options["metrics"]:
        rows = [
            (
                name,
                degrees(group["left_degrees"], group),
                degrees(group["right_degrees"], group),
                f"{group['resolved']}/{group['matrices']}",
                *(scientific(group[key]) for key in ("nss", "nss_isotropic", "nss_mirsky")),
            )
            for name, group in groups
        ]
        header = ("median over matrices", "left angle", "right angle", "resolved", "NSS", "if isotropic", "at most")
        lines.append(table(header, rows))
        if found["all"]["not_converged"]:
            lines.append(f"{found['all']['not_converged']} matrices missed the tolerance: their resolution is coarser")
    if "energy" in options["metrics"]:
        shares = [(name, *(percent(group[column]) for column in ENERGY_COLUMNS)) for name, group in groups]
        sides = ("left", "if isotropic", "right", "if isotropic", "both", "if isotropic")
        lines.append(table(("update energy in top k", *sides), shares))
    if "masks" in options["metrics"]:
        what = f"changed weights in, alpha = {options['alpha']}"
        overlaps = overlap_rows(found["all"]["overlaps"])
        lines.append(table((what, "share", "if uniform", "if by exponent", "z"), overlaps))
    for entry in found["left_out"][:5]:
        lines.append(f"  left out: {entry['name']}: {entry['why']}")
    return lines


def overlap_rows(overlaps: dict) -> list[tuple[str, ...]]:
    return [
        (
            f"{kind} mask",
            percent(found["overlap"]),
            percent(found["expected_uniform"]),
            percent(found["expected_exponent"]),
            f"{found['z_exponent']:+.1f}",
        )
        for kind, found in overlaps.items()
    ]


def degrees(value: float | None, group: dict) -> str:
    return f"< {group['resolution_degrees']:.3f}" if value is None else f"{value:.3f}"
