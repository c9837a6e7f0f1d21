"""Checkpoints of the loop, compared by ``offprin analyze``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..analysis import plan as planning
from ..analysis import run
from ..checkpoint import Checkpoint
from ..ops.update_scan import Rule
from ..training import objectives
from ..training.model import load_checkpoint
from ..training.rollout import sample
from ..training.runs import read_log
from ..training.settings import Common
from ..training.stages import generator
from ..training.tasks import problems

EVERYTHING = ("spectrum", "masks", "energy")


def compare(
    base: str | Path, tuned: Mapping[str, Path], out: Path, *, k: int, metrics: tuple[str, ...] = EVERYTHING,
    save_masks: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Summary of an analysis (the content of ``summary.json``) of several runs; tables and masks lie in ``out``."""
    options = planning.Options((Rule.parse("bitwise"),), save_masks=save_masks, metrics=metrics, k=k)
    checkpoints = [Checkpoint.open(str(path)) for path in (base, *tuned.values())]
    plan = planning.make_plan(checkpoints[0], checkpoints[1:], options, list(tuned))
    command = ["offprin", "analyze", str(base), *map(str, tuned.values())]
    return run.analyze(plan, out, command=command, device=torch.device("cpu"), overwrite=True).summary


def accuracy(run_directory: Path) -> float:
    """Held-out accuracy at the last evaluation."""
    return [row["accuracy"] for row in read_log(run_directory) if "accuracy" in row][-1]


@torch.no_grad()
def divergence_from(base: str | Path, tuned: Path, settings: Common) -> float:
    """KL(tuned | base) in nats per token, on the tuned model's own answers to held-out problems."""
    model, reference = load_checkpoint(tuned).eval(), load_checkpoint(base).eval()
    asked = problems(256, "held-out", settings.tasks, held_out=True)
    answers = sample(model, [p.prompt for p in asked], most=settings.most, generator=generator("divergence"))
    new, old = (objectives.completion_logits(each, answers) for each in (model, reference))
    return objectives.divergence(new, old, answers.completion)


def linear(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By run: what it did to linear layers, beside the nulls, in one flat row."""
    found = {}
    for totals, geometry in zip(summary["runs"], summary["geometry"], strict=True):
        everything = geometry["all"]
        row = {
            "sparsity": totals["linear"]["sparsity"],
            "relative_update": totals["linear"]["relative_update"],
            **{key: everything.get(key) for key in (
                "nss", "nss_isotropic", "left_degrees", "right_degrees", "resolution_degrees",
                "energy_both", "energy_both_isotropic",
            )},
        }  # fmt: skip
        for kind, overlap in everything["overlaps"].items():
            row |= {f"{kind}_{key}": overlap[key] for key in ("overlap", "expected_exponent", "z_exponent", "density")}
        found[totals["run"]] = row
    return found
