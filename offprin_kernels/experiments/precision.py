"""Learning rate and storage precision against sparsity (arXiv 2511.08567, Sec. 2.3).

One run per learning rate and seed; its weights in fp32 are stored at several precisions beside the base, stored alike.
fp8 (e4m3) has one scale per tensor, the base's. The null: an isotropic update of the same norm, layer by layer.
"""

from __future__ import annotations

from typing import Any

import torch

from ..training.settings import RLVR
from .compare import Weights, base_weights, examine, isotropic, weights_of
from .lab import Job, Lab
from .results import Result, logarithmic

RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4)
STORAGE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def run(lab: Lab) -> Result:
    rates = RATES[-2:] if lab.quick else RATES
    jobs = {(rate, seed): at_rate(lab, rate, seed) for rate in rates for seed in lab.seeds[:2]}
    paths = dict(zip(jobs, lab.run(list(jobs.values())), strict=True))
    settings = lab.rlvr("rlvr", 0).settings
    base = base_weights(lab.base())
    rows: list[dict[str, Any]] = [{"rate": "base", **examine(lab.base(), lab.base(), settings, count=lab.asked)}]
    for (rate, seed), path in paths.items():
        tuned = weights_of(path, base)
        null = isotropic(base, tuned, seed)
        rows.append({
            "rate": rate, "seed": seed, **examine(lab.base(), path / "final", settings, count=lab.asked),
            "update": norm_ratio(base, tuned),
            **{name: sparsity(base, tuned, dtype) for name, dtype in STORAGE.items()},
            **{f"{name}_null": sparsity(base, null, dtype) for name, dtype in STORAGE.items()},
        })  # fmt: skip
    return Result(
        "Sparsity by learning rate and storage precision, linear layers",
        rows,
        {
            "rate": ("learning rate", "g"),
            "seed": ("seed", "d"),
            "accuracy": ("accuracy", ".3f"),
            "kl_answer": ("KL to base, per answer", ".3f"),
            "update": ("‖D‖/‖W‖", ".2e"),
            "fp32": ("sparsity, fp32", ".4f"),
            **{
                column: (heading, ".4f")
                for name in ("fp16", "bf16", "fp8")
                for column, heading in ((name, f"sparsity, {name}"), (f"{name}_null", "if isotropic"))
            },
        },
        draw=lambda figure: draw(figure, rows[1:]),
        size=(6, 3.6),
    )


def at_rate(lab: Lab, rate: float, seed: int) -> Job:
    """The default rate is that of the other experiments, and shared with them."""
    return lab.rlvr("rlvr" if rate == RLVR.lr else f"rlvr-lr{rate:g}", seed, lr=rate)


def sparsity(base: Weights, tuned: Weights, dtype: torch.dtype) -> float:
    """Share of weights whose stored values are equal; both sides are stored in ``dtype``."""
    equal = 0
    for name, weight in base.items():
        scale = float(weight.abs().max()) / torch.finfo(dtype).max if dtype == torch.float8_e4m3fn else 1.0
        # compared in fp32, which holds the values of every narrower type
        before, after = ((x / scale).to(dtype).float() for x in (weight, tuned[name]))
        equal += int((before == after).sum())
    return equal / sum(weight.numel() for weight in base.values())


def norm_ratio(base: Weights, tuned: Weights) -> float:
    update = sum(float((tuned[n] - base[n]).double().square().sum()) for n in base)
    return (update / sum(float(weight.double().square().sum()) for weight in base.values())) ** 0.5


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    axes = figure.subplots()
    rates = sorted({row["rate"] for row in rows})
    for color, name in enumerate(STORAGE):
        for key, style in ((name, "o-"), (f"{name}_null", ":")):
            values = [[row[key] for row in rows if row["rate"] == rate] for rate in rates]
            label = name if style == "o-" else None
            axes.plot(rates, [sum(own) / len(own) for own in values], style, color=f"C{color}", label=label)
    logarithmic(axes.xaxis)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("sparsity of linear layers")
    axes.set_title("dotted: an isotropic update of the same norm", fontsize=9)
    axes.legend(fontsize=8)
