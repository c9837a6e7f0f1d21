"""Learning rate and storage precision against sparsity (arXiv 2511.08567, Sec. 2.3).

One run per learning rate and seed; its weights in fp32 are stored at several precisions beside the base, which is bf16
and so exact in all but fp8. The null: an isotropic update of the same norm, layer by layer, rounded alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..training.model import linear_weights, load_checkpoint
from ..training.settings import RLVR
from .compare import accuracy
from .lab import Job, Lab
from .results import Result

RATES = (1e-5, 3e-5, 1e-4, 3e-4)
STORAGE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def run(lab: Lab) -> Result:
    rates = RATES[-2:] if lab.quick else RATES
    jobs = {(rate, seed): at_rate(lab, rate, seed) for rate in rates for seed in lab.seeds[:2]}
    paths = dict(zip(jobs, lab.run(list(jobs.values())), strict=True))
    base = {name: weight.detach() for name, weight in linear_weights(load_checkpoint(lab.base())).items()}
    rows = []
    for (rate, seed), path in paths.items():
        log = lab.log(path)
        tuned = weights_of(path, base)
        rows.append({
            "rate": rate, "seed": seed, "accuracy": accuracy(path), "kl_base": log[-1]["kl_base"],
            "update": norm_ratio(base, tuned),
            **{name: sparsity(base, tuned, dtype) for name, dtype in STORAGE.items()},
            "null": sparsity(base, isotropic(base, tuned, seed), torch.bfloat16),
        })  # fmt: skip
    return Result(
        "Sparsity by learning rate and storage precision, linear layers",
        rows,
        {
            "rate": ("learning rate", "g"),
            "seed": ("seed", "d"),
            "accuracy": ("held-out accuracy", ".3f"),
            "kl_base": ("KL to base", ".4f"),
            "update": ("‖D‖/‖W‖", ".2e"),
            **{name: (f"sparsity, {name}", ".4f") for name in STORAGE},
            "null": ("bf16, isotropic update of that norm", ".4f"),
        },
        draw=lambda figure: draw(figure, rows),
        size=(6, 3.6),
    )


def at_rate(lab: Lab, rate: float, seed: int) -> Job:
    """The default rate is that of the other experiments, and shared with them."""
    return lab.rlvr("rlvr" if rate == RLVR.lr else f"rlvr-lr{rate:g}", seed, lr=rate)


def weights_of(path: Path, names: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A run's weights in fp32, before they were stored."""
    state = torch.load(path / "state.pt", weights_only=True)["model"]
    return {name: state[name] for name in names}


def sparsity(base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], dtype: torch.dtype) -> float:
    """Share of weights whose stored values are equal; both sides are stored in ``dtype``."""
    # compared in fp32, which holds the values of every narrower type
    equal = sum(int((base[n].to(dtype).float() == tuned[n].to(dtype).float()).sum()) for n in base)
    return equal / sum(weight.numel() for weight in base.values())


def isotropic(base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The base and a Gaussian update of each layer's own norm."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in base.items():
        noise = torch.randn(weight.shape, generator=generator)
        found[name] = weight + noise * ((tuned[name] - weight).norm() / noise.norm())
    return found


def norm_ratio(base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor]) -> float:
    update = sum(float((tuned[n] - base[n]).double().square().sum()) for n in base)
    return (update / sum(float(weight.double().square().sum()) for weight in base.values())) ** 0.5


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    axes = figure.subplots()
    rates = sorted({row["rate"] for row in rows})
    for name in [*STORAGE, "null"]:
        values = [[row[name] for row in rows if row["rate"] == rate] for rate in rates]
        style = {"color": "black", "linestyle": "--"} if name == "null" else {"marker": "o"}
        label = "bf16, isotropic update" if name == "null" else name
        axes.plot(rates, [sum(own) / len(own) for own in values], label=label, **style)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("sparsity of linear layers")
    axes.legend(fontsize=8)
