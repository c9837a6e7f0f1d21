"""LoRA and PiSSA across learning rates (arXiv 2511.08567, Fig. 10): the principal start against the usual one."""

from __future__ import annotations

from typing import Any

from .compare import accuracy, compare, linear
from .lab import Lab
from .masked import mean
from .results import Result

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
    rows = []
    for (kind, rate, seed), path in paths.items():
        log = lab.log(path)
        rows.append({"adapter": kind, "rate": rate, "seed": seed, "accuracy": accuracy(path),
                     "reward": mean([row["reward"] for row in log[-10:]]),
                     "worst": min(mean([row["reward"] for row in log[i : i + 5]]) for i in range(max(1, len(log) - 4))),
                     "kl_base": log[-1]["kl_base"], **found[path.name]})  # fmt: skip
    return Result(
        "LoRA and PiSSA by learning rate",
        rows,
        {
            "adapter": ("adapter", ""),
            "rate": ("learning rate", "g"),
            "seed": ("seed", "d"),
            "accuracy": ("held-out accuracy", ".3f"),
            "reward": ("reward, last ten steps", "+.3f"),
            "worst": ("worst five steps", "+.3f"),
            "kl_base": ("KL to base", ".4f"),
            "relative_update": ("‖D‖/‖W‖", ".2e"),
            "nss": ("NSS", ".2e"),
            "nss_isotropic": ("NSS if isotropic", ".2e"),
            "left_degrees": ("angle U, °", ".3f"),
            "resolution_degrees": ("resolution, °", ".4f"),
            "energy_both": ("energy in top k", ".4f"),
            "energy_both_isotropic": ("if isotropic", ".4f"),
        },
        [f"Rank 8, alpha 8, on all linear layers; k = {lab.k}. PiSSA's factors come from `topk_svd`."],
        lambda figure: draw(figure, rows),
        size=(9, 3.6),
    )


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    panels = (("accuracy", "held-out accuracy"), ("kl_base", "KL to the base"), ("energy_both", "energy in top k"))
    for axes, (key, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for color, kind in enumerate(KINDS):
            own = [row for row in rows if row["adapter"] == kind]
            rates = sorted({row["rate"] for row in own})
            axes.plot(rates, [mean([r[key] for r in own if r["rate"] == rate]) for rate in rates], color=f"C{color}")
            axes.plot([row["rate"] for row in own], [row[key] for row in own], "o", color=f"C{color}", label=kind)
        if key == "energy_both":
            axes.axhline(mean([row["energy_both_isotropic"] for row in rows]), color="black", linestyle=":")
        if key == "kl_base":
            axes.set_yscale("log")
        axes.set_xscale("log")
        axes.set_xlabel("learning rate", fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=7)
