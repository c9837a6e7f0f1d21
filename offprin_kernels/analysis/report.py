"""The readable table that ``offprin analyze`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import cost
from .cost import Rates
from .geometry_report import geometry_text
from .plan import Plan
from .summary import ledger
from .text import percent, scientific, table

# Cosine of base and tuned weights below which they are hardly related; fine-tuning leaves it above 0.99.
RELATED = 0.9


def run_table(run: dict) -> str:
    """Totals of one run: every kind of module, linear layers, everything."""
    header = ("", "tensors", "weights", "changed", "sparsity", "sign flips", "|D|/|W0|")
    groups = [*run["by_kind"].items(), ("linear layers", run["linear"]), ("all compared", run["all"])]
    rows = [
        (
            name,
            str(total["tensors"]),
            f"{total['total']:,}",
            f"{total['changed']:,}",
            percent(total["sparsity"]),
            f"{total['sign_flips']:,}",
            scientific(total["relative_update"]),
        )
        for name, total in groups
    ]
    return table(header, rows)


def rules_text(run: dict) -> str:
    """The other definitions of changed, side by side, and the un-cast counts where sources were not bf16."""
    parts = []
    for rule, counts in run["all"]["rules"].items():
        share = percent(1 - counts["changed"] / run["all"]["total"]) if run["all"]["total"] else "-"
        text = f"{rule} {share}"
        if counts["changed_uncast"] is not None:
            uncast, of = counts["changed_uncast"], counts["total_uncast"]
            text += f" (un-cast {percent(1 - uncast / of if of else None)} of {of:,})"
        parts.append(text)
    text = "sparsity by rule: " + ", ".join(parts)
    return "\n".join([text, *isotropic_text(run["all"])])


def isotropic_text(totals: dict) -> list[str]:
    """Sparsity of an isotropic update, beside that of the tensors that have this null; nothing for no update."""
    of, left_out = totals["isotropic_total"], totals["tensors"] - totals["isotropic_tensors"]
    if not of or not totals["changed"]:
        return []
    text = f"an isotropic update of these norms would give {percent(1 - totals['changed_isotropic'] / of)}"
    if left_out:
        text += (
            f" (not known of {left_out} of {totals['tensors']} tensors; the others have "
            f"{percent(1 - totals['isotropic_observed'] / of)})"
        )
    return [text]


def pairs_table(pairs: Sequence[dict]) -> str:
    """Agreement of runs, pooled over coordinates, always beside its null models."""
    header = (
        "runs", "Jaccard", "if uniform", "if by exponent", "if by margins", "if isotropic", "excess", "lift",
        "z (exponent)",
    )  # fmt: skip
    rows, apart, notes = [], [], []
    for pair in pairs:
        pooled, title = pair["pooled"], f"{pair['run_a']} ~ {pair['run_b']}"
        if pooled is None:
            apart.append(f"{title}: no tensor in common")
            continue
        rows.append(
            (
                title,
                f"{pooled['jaccard']:.4f}",
                f"{pooled['jaccard_bernoulli']:.4f}",
                f"{pooled['jaccard_exponent']:.4f}",
                f"{pooled['jaccard_margin']:.4f}",
                "-" if pooled["jaccard_isotropic"] is None else f"{pooled['jaccard_isotropic']:.4f}",
                f"{pooled['excess_over_exponent']:+.4f}",
                "-" if pooled["lift"] is None else f"{pooled['lift']:.3f}",
                f"{pooled['z_exponent']:+.1f}",
            )
        )
        if 0 < pair["isotropic_tensors"] < pair["tensors"]:
            notes.append(
                f"{title}, if isotropic: over {pair['isotropic_tensors']} of {pair['tensors']} tensors, which have "
                f"J = {pair['jaccard_of_these']:.4f}"
            )
    return "\n".join([*([table(header, rows)] if rows else []), *notes, *apart])


def consensus_table(consensus: dict) -> str:
    """How many runs changed a coordinate, observed and under independence."""
    runs, total = consensus["runs"], max(1, consensus["total"])
    header = (f"changed by exactly j of {runs} runs", "share", "if uniform", "if by exponent")
    shares = zip(consensus["coordinates"], consensus["expected_uniform"], consensus["expected_exponent"], strict=True)
    return table(header, [(f"j = {j}", *(percent(n / total, 2) for n in row)) for j, row in enumerate(shares)])


def ledger_text(ledger: dict, limit: int = 8) -> list[str]:
    """How many tensors of each side met which fate, and the first few that were not compared."""
    lines = []
    for side, counts in ledger["counts"].items():
        lines.append(f"{side} tensors: " + ", ".join(f"{n} {status}" for status, n in counts.items() if n))
    told = [
        entry
        for entry in ledger["entries"]
        if entry["reason"] and entry["status"] in ("unmatched", "refused", "partial", "tied")
    ]
    for entry in told[:limit]:
        lines.append(f"  {entry['status']}: {entry['side']} {entry['name']}: {entry['reason']}")
    if len(told) > limit:
        lines.append(f"  and {len(told) - limit} more; summary.json lists all")
    return lines


def render(summary: dict, root: Path) -> str:
    """The whole terminal report."""
    lines = []
    for run in summary["runs"]:
        lines += ["", f"{run['run']} against the base", run_table(run), rules_text(run)]
        if run["flagged_nonfinite"]:
            names = ", ".join(run["flagged_nonfinite"][:5])
            lines.append(
                f"WARNING: NaN or Inf in {len(run['flagged_nonfinite'])} tensors ({names}); left out of the norms"
            )
        cosine = run["linear"]["cosine"] if run["linear"]["tensors"] else run["all"]["cosine"]
        if cosine is not None and cosine < RELATED:
            lines.append(
                f"WARNING: cosine {cosine:.3f} between base and {run['run']}: it does not look tuned from this base, "
                "and then nothing here means what it says"
            )
        lines += ledger_text(summary["ledger"][run["run"]])
    for found in summary["geometry"] or ():
        lines += ["", *geometry_text(found, summary["options"])]
    if summary["pairs"]:
        lines += ["", "Agreement of update masks (all coordinates pooled)", pairs_table(summary["pairs"])]
    if summary["consensus"]:
        consensus = summary["consensus"]
        lines += ["", f"Consensus ({consensus['total']:,} weights that all runs share)", consensus_table(consensus)]
    state = "complete" if summary["complete"] else "PARTIAL: some tensors could not be compared (see above)"
    lines += ["", f"{state}; results in {root}"]
    return "\n".join(lines).lstrip("\n")


def plan_dict(plan: Plan) -> dict:
    """What ``--dry-run --json`` prints."""
    runs = []
    for run, (name, pairing) in enumerate(zip(plan.names, plan.pairings, strict=True)):
        units = [(unit, partner) for unit in plan.units for r, partner in unit.partners if r == run]
        runs.append(
            {
                "run": name,
                "tensors": len(units),
                "total": sum(unit.total for unit, _ in units),
                "bytes": sum(unit.rows * partner.tuned.stored_row_bytes for unit, partner in units),
                "ledger": ledger(pairing),
            }
        )
    return {
        "complete": plan.complete,
        "runs": runs,
        "bytes": plan.nbytes,
        "parts": len(plan.parts),
        "peak_bytes": plan.peak_bytes,
    }


def forecast(plan: Plan, bandwidth: float | None = None, gemm_rate: float | None = None, ranks: int = 1) -> dict:
    """Operations, and time at given rates, shared by ``ranks`` processes as their claims will share it.

    Args:
        bandwidth: GB/s that one process reads; None: the rate of docs/scale.md.
        gemm_rate: TFLOP/s of fp32 products of one process; None: likewise.

    Raises ValueError for rates that are not positive.
    """
    if ranks < 1 or any(rate is not None and not rate > 0 for rate in (bandwidth, gemm_rate)):
        raise ValueError("--bandwidth, --gemm-rate and --ranks must be positive")
    known = Rates()
    rates = Rates(
        bandwidth * 1e9 if bandwidth else known.read,
        gemm_rate * 1e12 if gemm_rate else known.flops,
    )
    costs = [sum(cost.seconds(plan.units[u], plan.options, rates) for u in part) for part in plan.parts]
    loads = [0.0] * ranks
    for part in sorted(costs, reverse=True):
        least = loads.index(min(loads))
        loads[least] += part
    return {
        "flops": sum(cost.flops(unit, plan.options) for unit in plan.units),
        "ranks": ranks,
        "read_bytes_per_second": rates.read,
        "flops_per_second": rates.flops,
        "seconds_reading": plan.nbytes / rates.read / ranks,
        "seconds": max(loads),
        "seconds_of_ranks": loads,
    }


def render_plan(plan: Plan, told: dict) -> str:
    """``--dry-run`` for people."""
    found = plan_dict(plan)
    rows = [(r["run"], str(r["tensors"]), f"{r['total']:,}", gigabytes(r["bytes"])) for r in found["runs"]]
    lines = [
        table(("run", "tensors", "weights", "to read"), rows),
        f"with the base, read once: {gigabytes(found['bytes'])} in {found['parts']} parts",
        f"memory: about {gigabytes(found['peak_bytes'])} per process, beside an interpreter that has loaded PyTorch",
        f"to compute: {told['flops'] / 1e12:.3f} TFLOP (fp64 operations count for two)",
        f"time: about {duration(told['seconds'])} with {told['ranks']} process{'es' if told['ranks'] > 1 else ''} "
        f"at {told['read_bytes_per_second'] / 1e9:g} GB/s and {told['flops_per_second'] / 1e12:g} TFLOP/s each "
        f"({duration(told['seconds_reading'])} of it reading)",
    ]
    for run in found["runs"]:
        lines += [f"{run['run']}:", *("  " + line for line in ledger_text(run["ledger"]))]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3f} GB"
