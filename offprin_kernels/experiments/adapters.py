"""LoRA and PiSSA across learning rates (arXiv 2511.08567, Fig. 10): the principal start against the usual one."""

from __future__ import annotations

from typing import Any

from .compare import compare, examine, linear
from .lab import Lab
from .masked import mean
from .results import Result, logarithmic

KINDS = ("lora", "pissa")
RATES = (3e-4, 1e-3, 3e-3)


def run(lab: Lab) -> Result:
    rates, seeds = (RATES[1:], lab.seeds[:1]) if lab.quick else (RATES, lab.seeds[:2])
    jobs = {
        (kind, rate, seed): lab.rlvr(f"rlvr-{kind}-lr{rate:g}", seed, adapter=kind, lr=rate)
        for kind in KINDS for rate in rates for seed in seeds
    }  # fmt: skip
    paths = dict(zip(jobs, lab.run(list(jobs.values())), strict=True))
    tuned = {path.name: path / "final" for path in paths.values()}
    found = linear(compare(lab.base(), tuned, lab.results("adapters") / "analysis", k=lab.k))
    settings = lab.rlvr("rlvr", 0).settings
    rows: list[dict[str, Any]] = [{"adapter": "base", **examine(lab.base(), lab.base(), settings, count=lab.asked)}]
    for (kind, rate, seed), path in paths.items():
        rewards = [row["reward"] for row in lab.log(path)]
        smooth = [mean(rewards[i : i + 5]) for i in range(max(1, len(rewards) - 4))]
        rows.append({"adapter": kind, "rate": rate, "seed": seed, "reward": smooth[-1],
                     "fall": max(smooth) - smooth[-1],
                     **examine(lab.base(), path / "final", settings, count=lab.asked), **found[path.name]})  # fmt: skip
    return Result(
        "LoRA and PiSSA by learning rate",
        rows,
        {
            "adapter": ("adapter", ""),
            "rate": ("learning rate", "g"),
            "seed": ("seed", "d"),
            "accuracy": ("accuracy", ".3f"),
            "reward": ("reward, last five steps", "+.3f"),
            "fall": ("below its best five", ".3f"),
            "kl_answer": ("KL to base, per answer", ".3f"),
            "relative_update": ("‖D‖/‖W‖", ".2e"),
            "nss": ("NSS", ".2e"),
            "nss_isotropic": ("NSS if isotropic", ".2e"),
            "left_degrees": ("angle U, °", ".2f"),
            "resolution_degrees": ("resolution, °", ".3f"),
            "energy_both": ("energy in top k", ".4f"),
            "energy_both_isotropic": ("if isotropic", ".4f"),
        },
        [f"Rank 8, alpha 8, on all linear layers; k = {lab.k}. PiSSA's factors come from `topk_svd`."],
        lambda figure: draw(figure, rows[1:]),
        size=(12, 3.6),
    )


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    panels = (
        ("rate", "accuracy", "accuracy"),
        ("relative_update", "accuracy", "accuracy by size of the update"),
        ("rate", "kl_answer", "KL to the base, per answer"),
        ("rate", "energy_both", "energy in top k"),
    )
    for axes, (x, y, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for color, kind in enumerate(KINDS):
            own = [row for row in rows if row["adapter"] == kind]
            axes.plot([row[x] for row in own], [row[y] for row in own], "o", color=f"C{color}", label=kind)
        if y == "energy_both":
            axes.axhline(mean([row["energy_both_isotropic"] for row in rows]), color="black", linestyle=":")
        if y == "kl_answer":
            logarithmic(axes.yaxis)
        logarithmic(axes.xaxis)
        axes.set_xlabel("learning rate" if x == "rate" else "‖D‖/‖W‖", fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=7)
