"""RLVR and SFT from one base, matched by held-out accuracy (arXiv 2511.08567, Fig. 4 and 5, Tab. 1).

SFT comes twice: with its own learning rate, and with RLVR's, because a step's size alone changes what bf16 shows. Each
run's null is the base with a Gaussian update of the run's norm in each layer, stored and analysed alike.
"""

from __future__ import annotations

import shutil
from typing import Any

from ..training.settings import RLVR
from .compare import compare, examine, linear, optimizer_steps, save_isotropic
from .lab import Lab
from .results import Result, logarithmic

ARMS = ("rlvr", "sft", "sft-slow")


def run(lab: Lab) -> Result:
    base = lab.base()
    reinforced = lab.run([lab.rlvr("rlvr", seed) for seed in lab.seeds])
    # by the runs' own evaluations; what the table shows is asked of other problems
    goals = {seed: lab.evaluated(path) for seed, path in zip(lab.seeds, reinforced, strict=True)}
    imitated = lab.run([
        job
        for seed in lab.seeds
        for job in (
            lab.sft("sft", seed, target=goals[seed]),
            lab.sft("sft-slow", seed, target=goals[seed], lr=RLVR.lr),
        )
    ])  # fmt: skip
    settings = lab.rlvr("rlvr", 0).settings
    tuned = {path.name: path / "final" for path in [*reinforced, *imitated]}
    folder = lab.results("paths") / "isotropic"
    shutil.rmtree(folder, ignore_errors=True)
    nulls = {
        f"{path.name}-isotropic": save_isotropic(base, path, folder / path.name, seed)
        for seed, path in enumerate([*reinforced, *imitated])
    }
    found = linear(compare(base, {**tuned, **nulls}, lab.results("paths") / "analysis", k=lab.k))
    rows: list[dict[str, Any]] = [{"run": "base", "arm": "base", **examine(base, base, settings, count=lab.asked)}]
    for arm in ARMS:
        for seed in lab.seeds:
            path = lab.root / "runs" / f"{arm}-seed{seed}"
            null = found[f"{path.name}-isotropic"]
            rows.append({
                "run": path.name, "arm": arm, "seed": seed, "steps": optimizer_steps(path),
                **examine(base, path / "final", settings, count=lab.asked), **found[path.name],
                "sparsity_null": null["sparsity"], "nss_null": null["nss"], "left_null": null["left_degrees"],
            })  # fmt: skip
    return Result(
        "RLVR and SFT from one base, linear layers",
        rows,
        {
            "run": ("run", ""),
            "steps": ("optimizer steps", "d"),
            "accuracy": ("accuracy", ".3f"),
            "worked": ("answers with steps", ".2f"),
            "kl_answer": ("KL to base, per answer", ".3f"),
            "kl_first": ("of it, first token", ".2f"),
            "relative_update": ("‖D‖/‖W‖", ".2e"),
            "sparsity": ("sparsity, bf16", ".4f"),
            "sparsity_null": ("if isotropic", ".4f"),
            "nss": ("NSS", ".2e"),
            "nss_null": ("if isotropic", ".2e"),
            "left_degrees": ("angle U, °", ".2f"),
            "left_null": ("if isotropic", ".2f"),
            "resolution_degrees": ("resolution, °", ".3f"),
            "energy_both": ("energy in top k", ".4f"),
            "energy_both_isotropic": ("if isotropic", ".4f"),
            "principal_overlap": ("changed in principal", ".4f"),
            "principal_expected_exponent": ("principal by exponent", ".4f"),
            "principal_z_exponent": ("principal z", "+.1f"),
            "low_overlap": ("changed in low", ".4f"),
            "low_expected_exponent": ("low by exponent", ".4f"),
            "low_z_exponent": ("low z", "+.1f"),
        },
        [
            f"k = {lab.k}, masks of half of the weights. Medians over layers for NSS, angles and energy; pooled counts "
            "for sparsity and overlaps. Accuracy and divergence on held-out problems that no stage's evaluation asked. "
            "SFT stops at the first of its evaluations that reaches RLVR's last with the same seed, or after its last "
            "step. sft-slow has RLVR's learning rate."
        ],
        lambda figure: draw(figure, rows[1:]),
        size=(12, 3.6),
    )


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Four panels; a dot per seed, a dash for its null."""
    panels = (
        ("sparsity", "sparsity_null", "sparsity in bf16"),
        ("nss", "nss_null", "spectral shift NSS"),
        ("energy_both", "energy_both_isotropic", "energy in top-k subspaces"),
        ("principal_overlap", "principal_expected_exponent", "changed weights in principal mask"),
    )
    for axes, (key, null, title) in zip(figure.subplots(1, 4), panels, strict=True):
        for place, arm in enumerate(ARMS):
            own = [row for row in rows if row["arm"] == arm]
            axes.plot([place] * len(own), [row[key] for row in own], "o", color=f"C{place}")
            axes.plot([place + 0.25] * len(own), [row[null] for row in own], "_", color="black", markersize=12)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(ARMS)), ARMS, fontsize=8)
        axes.set_xlim(-0.5, len(ARMS) - 0.5)
        if key in ("nss", "energy_both"):
            logarithmic(axes.yaxis)
    figure.suptitle("A dot per seed; dashes: its null (isotropic; by exponent for the mask)", fontsize=9)
