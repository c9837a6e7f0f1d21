"""Five RLVR runs from one base: do they change the same weights? (arXiv 2511.08567, Fig. 2 and 3, Tab. 2)

Runs differ in seed (and so in problems and samples), one in its objective, one in the tasks it sees. Agreement is
counted at the end, by kind of layer, and at every checkpoint that was kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..bitmask import BitMask
from ..checkpoint import Checkpoint
from .compare import compare
from .lab import Lab
from .results import Result


def run(lab: Lab) -> Result:
    paths = lab.run([
        *(lab.rlvr("rlvr", seed) for seed in (0, 1, 2)),
        lab.rlvr("rlvr-grpo", 3, objective="grpo"),
        lab.rlvr("rlvr-one-task", 4, tasks=lab.one_task),
    ])  # fmt: skip
    out, base = lab.results("agreement"), lab.base()
    final = compare(base, ends(paths, "final"), out / "analysis", k=lab.k, metrics=("masks",), save_masks=True)
    rows = by_kind(out / "analysis")
    growth = []
    for step in sorted(path.name for path in paths[0].glob("step-*") if path.suffix == ""):
        folder = out / "analysis-of-a-step"
        summary = compare(base, ends(paths, step), folder, k=lab.k, metrics=("masks",))
        agreed = by_kind(folder)[-1]
        sparsity = float(np.mean([run["linear"]["sparsity"] for run in summary["runs"]]))
        growth.append({**agreed, "step": int(step.removeprefix("step-")), "sparsity": sparsity})
    consensus = final["consensus"]
    votes = {key: consensus[key] for key in ("coordinates", "expected_uniform", "expected_exponent")}
    return Result(
        "Agreement of five RLVR runs",
        rows,
        {
            "kind": ("layers", ""),
            "jaccard": ("Jaccard", ".4f"),
            "jaccard_bernoulli": ("if uniform", ".4f"),
            "jaccard_exponent": ("by exponent", ".4f"),
            "jaccard_margin": ("by rows and columns", ".4f"),
            "excess_over_exponent": ("excess over exponent", "+.4f"),
        },
        [
            "Means over the ten pairs of runs and the layers of a kind.",
            f"Weights changed in j of 5 runs, all compared tensors: {votes['coordinates']}; if masks were independent "
            f"within each exponent: {[round(x) for x in votes['expected_exponent']]}.",
            "By step: " + "; ".join(f"{g['step']}: {g['jaccard']:.4f} ({g['jaccard_exponent']:.4f} by exponent), "
                                    f"sparsity {g['sparsity']:.3f}" for g in growth) + ".",
        ],
        lambda figure: draw(figure, rows, growth, votes, consensus_map(paths, out / "analysis", base)),
        size=(13, 3.6),
        data={"growth": growth, "consensus": votes},
    )  # fmt: skip


def ends(paths: list[Path], checkpoint: str) -> dict[str, Path]:
    return {path.name: path / checkpoint for path in paths}


def by_kind(analysis: Path) -> list[dict[str, Any]]:
    """Means over pairs of runs and the layers of a kind, and over all linear layers, last."""
    import pyarrow.parquet as pq

    pairs = [row for row in pq.read_table(analysis / "pairs.parquet").to_pylist() if row["linear"] and row["union"]]
    keys = ("jaccard", "jaccard_bernoulli", "jaccard_exponent", "jaccard_margin", "excess_over_exponent")
    kinds = [*dict.fromkeys(row["kind"] for row in pairs), "all linear"]
    rows = []
    for kind in kinds:
        own = [row for row in pairs if kind in (row["kind"], "all linear")]
        rows.append({"kind": kind, **{key: float(np.mean([row[key] for row in own])) for key in keys}})
    return rows


def consensus_map(paths: list[Path], analysis: Path, base: str) -> tuple[str, np.ndarray]:
    """In how many runs each weight of one layer changed: V of the middle layer, where the paper sees stripes."""
    masks = [BitMask.load(analysis / "masks" / f"{path.name}.safetensors") for path in paths]
    names = sorted(name for name in Checkpoint.open(base).tensors if name.endswith("v_proj.weight"))
    name = names[len(names) // 2]
    return name, np.sum([mask[name].to_dense().numpy() for mask in masks], axis=0)


def draw(figure: Any, rows: list[dict], growth: list[dict], votes: dict[str, list], found: tuple[str, np.ndarray]):
    bars, lines, histogram, stripes = figure.subplots(1, 4)
    at = np.arange(len(rows))
    bars.bar(at, [row["jaccard"] for row in rows], color="C0")
    bars.plot(at, [row["jaccard_exponent"] for row in rows], "_", color="black", markersize=14, label="by exponent")
    bars.plot(at, [row["jaccard_bernoulli"] for row in rows], "_", color="red", markersize=14, label="if uniform")
    bars.set_xticks(at, [row["kind"].removesuffix("_proj") for row in rows], rotation=60, fontsize=8)
    bars.set_title("Jaccard index by kind of layer", fontsize=9)
    bars.legend(fontsize=7)
    steps = [g["step"] for g in growth]
    for key, label, style in (("jaccard", "observed", "o-"), ("jaccard_exponent", "by exponent", "k--"),
                              ("jaccard_bernoulli", "if uniform", "r:")):  # fmt: skip
        lines.plot(steps, [g[key] for g in growth], style, label=label)
    lines.set_xlabel("step", fontsize=8)
    lines.set_title("over training", fontsize=9)
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
