"""RLVR confined to masks of equal size, against all linear layers (arXiv 2511.08567, Fig. 9, Tab. 4).

Each mask holds half of every linear layer; the safe one, larger by nature, is thinned at random to that size. The rest
of the model stays, in the dense arm too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..bitmask import BitMask
from ..masks import count_for, low_magnitude_mask, principal_mask, random_mask, safe_mask
from ..ops.subspace import topk_svd
from ..training.model import linear_weights, load_checkpoint
from .compare import compare, examine, linear
from .lab import Lab
from .results import Result

KINDS = ("principal", "non-principal", "low", "safe", "random")
ALPHA = 0.5


def run(lab: Lab) -> Result:
    files = make_masks(lab)
    seeds = lab.seeds[:2]
    jobs = {("dense", seed): lab.rlvr("rlvr-linear", seed, linear_only=True) for seed in seeds}
    for kind in KINDS:
        jobs |= {(kind, seed): lab.rlvr(f"rlvr-{kind}", seed, masks=str(files[kind])) for seed in seeds}
    paths = dict(zip(jobs, lab.run(list(jobs.values())), strict=True))
    tuned = {path.name: path / "final" for path in paths.values()}
    found = linear(compare(lab.base(), tuned, lab.results("masked") / "analysis", k=lab.k))
    settings = lab.rlvr("rlvr", 0).settings
    rows: list[dict[str, Any]] = [{"mask": "base", **examine(lab.base(), lab.base(), settings, count=lab.asked)}]
    logs = {key: lab.log(path) for key, path in paths.items()}
    for (kind, seed), path in paths.items():
        rows.append({"mask": kind, "seed": seed, "reward": mean([row["reward"] for row in logs[kind, seed][-10:]]),
                     **examine(lab.base(), path / "final", settings, count=lab.asked), **found[path.name]})  # fmt: skip
    return Result(
        "RLVR confined to masks of half of the weights",
        rows,
        {
            "mask": ("mask", ""),
            "seed": ("seed", "d"),
            "accuracy": ("accuracy", ".3f"),
            "reward": ("reward, last ten steps", "+.3f"),
            "kl_answer": ("KL to base, per answer", ".3f"),
            "relative_update": ("‖D‖/‖W‖", ".2e"),
            "sparsity": ("sparsity, bf16", ".4f"),
            "nss": ("NSS", ".2e"),
            "nss_isotropic": ("NSS if isotropic", ".2e"),
            "energy_both": ("energy in top k", ".4f"),
            "energy_both_isotropic": ("if isotropic", ".4f"),
        },
        [f"k = {lab.k}; masks of {ALPHA:.0%} of each linear layer; dense: all linear layers, and nothing else."],
        lambda figure: draw(figure, logs),
        size=(9, 3.6),
    )


def make_masks(lab: Lab) -> dict[str, Path]:
    """A file of masks per kind, made from the base alone; a file that is there stays."""
    folder = lab.results("masked") / "masks"
    folder.mkdir(exist_ok=True)
    files = {kind: folder / f"{kind}.safetensors" for kind in KINDS}
    if all(path.exists() for path in files.values()):
        return files
    masks: dict[str, dict[str, BitMask]] = {kind: {} for kind in KINDS}
    for number, (name, weight) in enumerate(linear_weights(load_checkpoint(lab.base())).items()):
        weight = weight.detach()
        factors = topk_svd(weight, lab.k)
        principal = principal_mask(factors, weight.shape, ALPHA)
        masks["principal"][name] = principal
        masks["non-principal"][name] = ~principal
        masks["low"][name] = low_magnitude_mask(weight, ALPHA)
        masks["safe"][name] = thinned(safe_mask(weight, factors, ALPHA), ALPHA, seed=number)
        masks["random"][name] = random_mask(weight.shape, ALPHA, seed=number)
    for kind, path in files.items():
        BitMask.save(masks[kind], path)
    return files


def thinned(mask: BitMask, alpha: float, seed: int) -> BitMask:
    """Some of a mask's coordinates, drawn at random: as many as ``alpha`` of all."""
    dense = mask.to_dense()
    inside = dense.flatten().nonzero()[:, 0]
    order = torch.randperm(len(inside), generator=torch.Generator().manual_seed(seed))
    kept = torch.zeros(dense.numel(), dtype=torch.bool)
    kept[inside[order[: count_for(alpha, dense.numel())]]] = True
    return BitMask.from_dense(kept.view(dense.shape))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def draw(figure: Any, logs: dict[tuple[str, int], list[dict[str, Any]]]) -> None:
    kinds = list(dict.fromkeys(kind for kind, _ in logs))
    for axes, key, title in zip(figure.subplots(1, 2), ("kl_base", "reward"), ("KL to the base, nats per token",
                                "reward, mean of ten steps"), strict=True):  # fmt: skip
        for color, kind in enumerate(kinds):
            runs = [[row[key] for row in log] for (own, _), log in logs.items() if own == kind]
            curve = [mean([mean(run[max(0, i - 9) : i + 1]) for run in runs]) for i in range(len(runs[0]))]
            axes.plot(range(1, len(curve) + 1), curve, color=f"C{color}", label=kind)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.legend(fontsize=7)
