"""RLVR and SFT from one base, matched by held-out accuracy (arXiv 2511.08567, Fig. 4 and 5, Tab. 1).

SFT comes twice: with its own learning rate, and with RLVR's, because a step's size alone changes what bf16 shows.
"""

from __future__ import annotations

from typing import Any

from ..training.settings import RLVR
from .compare import accuracy, compare, divergence_from, linear
from .lab import Lab
from .results import Result

ARMS = ("rlvr", "sft", "sft-slow")


def run(lab: Lab) -> Result:
    base = lab.base()
    reinforced = lab.run([lab.rlvr("rlvr", seed) for seed in lab.seeds])
    goals = {seed: accuracy(path) for seed, path in zip(lab.seeds, reinforced, strict=True)}
    imitated = lab.run([
        job
        for seed in lab.seeds
        for job in (
            lab.sft("sft", seed, target=goals[seed]),
            lab.sft("sft-slow", seed, target=goals[seed], lr=RLVR.lr),
        )
    ])  # fmt: skip
    tuned = {path.name: path / "final" for path in [*reinforced, *imitated]}
    found = linear(compare(base, tuned, lab.results("paths") / "analysis", k=lab.k))
    rows = []
    for arm in ARMS:
        for seed in lab.seeds:
            path = lab.root / "runs" / f"{arm}-seed{seed}"
            rows.append({
                "run": path.name, "arm": arm, "seed": seed, "accuracy": accuracy(path),
                "steps": lab.log(path)[-1]["step"],
                "kl": divergence_from(base, path / "final", lab.rlvr("rlvr", seed).settings), **found[path.name],
            })  # fmt: skip
    return Result(
        "RLVR and SFT from one base, linear layers",
        rows,
        {
            "run": ("run", ""),
            "accuracy": ("held-out accuracy", ".3f"),
            "steps": ("steps", "d"),
            "kl": ("KL to base, own samples", ".4f"),
            "relative_update": ("‖D‖/‖W‖", ".2e"),
            "sparsity": ("sparsity, bf16", ".4f"),
            "nss": ("NSS", ".2e"),
            "nss_isotropic": ("NSS if isotropic", ".2e"),
            "left_degrees": ("angle U, °", ".3f"),
            "right_degrees": ("angle V, °", ".3f"),
            "resolution_degrees": ("resolution, °", ".4f"),
            "energy_both": ("energy in top k", ".4f"),
            "energy_both_isotropic": ("if isotropic", ".4f"),
            "principal_overlap": ("changed in principal", ".4f"),
            "principal_expected_exponent": ("by exponent", ".4f"),
            "principal_z_exponent": ("z", "+.1f"),
            "low_overlap": ("changed in low", ".4f"),
            "low_expected_exponent": ("by exponent", ".4f"),
            "low_z_exponent": ("z", "+.1f"),
        },
        [
            f"k = {lab.k}, masks of half of the weights. Medians over layers for NSS, angles and energy; pooled counts "
            "for sparsity and overlaps. SFT stops at the first evaluation that reaches the accuracy of RLVR with its "
            "seed, or after its last step. sft-slow has RLVR's learning rate."
        ],
        lambda figure: draw(figure, rows),
        size=(12, 3.6),
    )


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Four panels; a dot per seed, a dash for its null."""
    panels = (
        ("sparsity", None, "sparsity in bf16"),
        ("nss", "nss_isotropic", "spectral shift NSS"),
        ("energy_both", "energy_both_isotropic", "energy in top-k subspaces"),
        ("principal_overlap", "principal_expected_exponent", "changed weights in principal mask"),
    )
    for axes, (key, null, title) in zip(figure.subplots(1, 4), panels, strict=True):
        for place, arm in enumerate(ARMS):
            own = [row for row in rows if row["arm"] == arm]
            axes.plot([place] * len(own), [row[key] for row in own], "o", color=f"C{place}")
            if null:
                axes.plot([place + 0.25] * len(own), [row[null] for row in own], "_", color="black", markersize=12)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(ARMS)), ARMS, fontsize=8)
        axes.set_xlim(-0.5, len(ARMS) - 0.5)
        if key == "nss" or key == "energy_both":
            axes.set_yscale("log")
    figure.suptitle("A dot per seed; dashes: the null model", fontsize=9)
