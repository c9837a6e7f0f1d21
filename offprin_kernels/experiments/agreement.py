"""Five RLVR runs from one base: do they change the same weights? (arXiv 2511.08567, Fig. 2 and 3, Tab. 2)

Three runs differ in their seed (and so in problems and samples), one in its objective, one in the tasks it sees.
Agreement is counted at the end, by kind of layer and by kind of pair, and at every checkpoint that was kept; of the
changed weights, and of the unchanged ones, which tell more where most have changed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..bitmask import BitMask
from ..checkpoint import Checkpoint
from .compare import compare, examine
from .lab import Lab
from .results import Result

Pair = dict[str, Any]  # a row of pairs.parquet
OTHER = {"rlvr-grpo-seed3": "GRPO", "rlvr-one-task-seed4": "one task"}


def run(lab: Lab) -> Result:
    paths = lab.run([
        *(lab.rlvr("rlvr", seed) for seed in (0, 1, 2)),
        lab.rlvr("rlvr-grpo", 3, objective="grpo"),
        lab.rlvr("rlvr-one-task", 4, tasks=lab.one_task),
    ])  # fmt: skip
    out, base = lab.results("agreement"), lab.base()
    final = compare(base, ends(paths, "final"), out / "analysis", k=lab.k, metrics=("masks",), save_masks=True)
    pairs = linear_pairs(out / "analysis")
    rows = [agreement(kind, pairs, lambda pair, kind=kind: pair["kind"] == kind)  # type: ignore[misc]
            for kind in dict.fromkeys(pair["kind"] for pair in pairs)]  # fmt: skip
    rows.append(agreement("all linear", pairs, lambda pair: True))
    rows += [agreement(f"all linear, {what}", pairs, lambda pair, what=what: type_of(pair) == what)  # type: ignore[misc]
             for what in dict.fromkeys(map(type_of, pairs))]  # fmt: skip
    growth = []
    for step in sorted(path.name for path in paths[0].glob("step-*") if path.suffix == ""):
        folder = out / "analysis-of-a-step"
        summary = compare(base, ends(paths, step), folder, k=lab.k, metrics=("masks",))
        agreed = agreement("all linear", linear_pairs(folder), lambda pair: True)
        sparsity = float(np.mean([run["linear"]["sparsity"] for run in summary["runs"]]))
        growth.append({**agreed, "step": int(step.removeprefix("step-")), "sparsity": sparsity})
    votes = {key: final["consensus"][key] for key in ("coordinates", "expected_uniform", "expected_exponent")}
    settings = lab.rlvr("rlvr", 0).settings
    solved = {path.name: examine(base, path / "final", settings, count=lab.asked)["accuracy"] for path in paths}
    return Result(
        "Agreement of five RLVR runs",
        rows,
        {
            "group": ("layers", ""),
            "pairs": ("pairs", "d"),
            "jaccard": ("Jaccard, changed", ".4f"),
            "uniform": ("if uniform", ".4f"),
            "exponent": ("by exponent", ".4f"),
            "margin": ("by rows and columns", ".4f"),
            "excess": ("excess over exponent", "+.4f"),
            "range": ("over pairs", ""),
            "kept": ("Jaccard, unchanged", ".4f"),
            "kept_uniform": ("unchanged if uniform", ".4f"),
            "kept_exponent": ("unchanged by exponent", ".4f"),
        },
        [
            "Means over the pairs of runs and the layers of a kind; the range is that of the pairs' means.",
            f"Accuracy on the whole mixture: {', '.join(f'{name} {value:.3f}' for name, value in solved.items())}.",
            f"Weights changed in j of 5 runs, all compared tensors: {votes['coordinates']}; if masks were independent "
            f"within each exponent: {[round(x) for x in votes['expected_exponent']]}.",
            "By step: " + "; ".join(f"{g['step']}: {g['jaccard']:.4f} ({g['exponent']:.4f} by exponent), unchanged "
                                    f"{g['kept']:.4f} ({g['kept_exponent']:.4f}), sparsity {g['sparsity']:.3f}"
                                    for g in growth) + ".",
        ],
        lambda figure: draw(figure, rows, growth, votes, consensus_map(paths, out / "analysis", base)),
        size=(13, 3.6),
        data={"growth": growth, "consensus": votes},
    )  # fmt: skip


def ends(paths: list[Path], checkpoint: str) -> dict[str, Path]:
    return {path.name: path / checkpoint for path in paths}


def linear_pairs(analysis: Path) -> list[Pair]:
    """Pairs of runs, a row for each linear layer in which either changed anything."""
    import pyarrow.parquet as pq

    return [row for row in pq.read_table(analysis / "pairs.parquet").to_pylist() if row["linear"] and row["union"]]


def type_of(pair: Pair) -> str:
    """What two runs differ in beside their seeds."""
    others = sorted(OTHER[name] for name in (pair["run_a"], pair["run_b"]) if name in OTHER)
    return f"with {' and '.join(others)}" if others else "other seeds"


def agreement(group: str, pairs: list[Pair], chosen: Callable[[Pair], bool]) -> dict[str, Any]:
    """Means over the layers of each pair of runs, then over the pairs."""
    by_pair: dict[tuple[str, str], list[dict[str, float]]] = {}
    for pair in filter(chosen, pairs):
        by_pair.setdefault((pair["run_a"], pair["run_b"]), []).append(statistics_of(pair))
    means = [{key: float(np.mean([own[key] for own in layers])) for key in layers[0]} for layers in by_pair.values()]
    excess = [mean["excess"] for mean in means]
    return {"group": group, "pairs": len(means), **{key: float(np.mean([m[key] for m in means])) for key in means[0]},
            "range": f"{min(excess):+.4f} to {max(excess):+.4f}"}  # fmt: skip


def statistics_of(pair: Pair) -> dict[str, float]:
    """Of one layer: agreement of the changed, and of the unchanged weights, beside what chance gives."""
    total, a, b = pair["total"], pair["changed_a"], pair["changed_b"]

    def kept(both: float) -> float:
        # unchanged in both, over unchanged in either
        return (total - (a + b - both)) / (total - both) if total > both else 1.0

    return {
        "jaccard": pair["jaccard"],
        "uniform": pair["jaccard_bernoulli"],
        "exponent": pair["jaccard_exponent"],
        "margin": pair["jaccard_margin"],
        "excess": pair["excess_over_exponent"],
        "kept": kept(pair["intersection"]),
        "kept_uniform": kept(a * b / total),
        "kept_exponent": kept(pair["intersection_exponent"]),
    }


def consensus_map(paths: list[Path], analysis: Path, base: str) -> tuple[str, np.ndarray]:
    """In how many runs each weight of one layer changed: V of the middle layer, where the paper sees stripes."""
    masks = [BitMask.load(analysis / "masks" / f"{path.name}.safetensors") for path in paths]
    names = sorted(name for name in Checkpoint.open(base).tensors if name.endswith("v_proj.weight"))
    name = names[len(names) // 2]
    return name, np.sum([mask[name].to_dense().numpy() for mask in masks], axis=0)


def draw(figure: Any, rows: list[dict], growth: list[dict], votes: dict[str, list], found: tuple[str, np.ndarray]):
    bars, lines, histogram, stripes = figure.subplots(1, 4)
    rows = [row for row in rows if "," not in row["group"]]
    at = np.arange(len(rows))
    bars.bar(at, [row["jaccard"] for row in rows], color="C0")
    bars.plot(at, [row["exponent"] for row in rows], "_", color="black", markersize=14, label="by exponent")
    bars.plot(at, [row["uniform"] for row in rows], "_", color="red", markersize=14, label="if uniform")
    bars.set_xticks(at, [row["group"].removesuffix("_proj") for row in rows], rotation=60, fontsize=8)
    bars.set_title("Jaccard index by kind of layer", fontsize=9)
    bars.legend(fontsize=7, loc="lower right")
    steps = [g["step"] for g in growth]
    for key, label, style in (("jaccard", "changed", "C0o-"), ("exponent", "by exponent", "C0--"),
                              ("kept", "unchanged", "C1o-"), ("kept_exponent", "by exponent", "C1--")):  # fmt: skip
        lines.plot(steps, [g[key] for g in growth], style, label=label)
    lines.set_xlabel("step", fontsize=8)
    lines.set_title("Jaccard index over training", fontsize=9)
    lines.legend(fontsize=7)
    runs = np.arange(len(votes["coordinates"]))
    histogram.bar(runs, votes["coordinates"], color="C0", label="observed")
    histogram.plot(runs, votes["expected_exponent"], "_", color="black", markersize=16, label="by exponent")
    histogram.set_title("weights changed in j runs", fontsize=9)
    histogram.legend(fontsize=7)
    name, consensus = found
    image = stripes.imshow(consensus, cmap="viridis", vmin=0, vmax=len(votes["coordinates"]) - 1, aspect="auto")
    stripes.set_title(name.removeprefix("model.").removesuffix(".weight"), fontsize=8)
    figure.colorbar(image, ax=stripes, label="runs")
