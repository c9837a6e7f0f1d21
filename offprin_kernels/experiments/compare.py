"""Checkpoints of the loop, compared by ``offprin analyze`` and examined on problems that no evaluation has seen."""

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
from ..training.model import linear_weights, load_checkpoint, save_checkpoint
from ..training.rollout import sample
from ..training.settings import Common
from ..training.stages import generator
from ..training.tasks import MARK, Problem, problems, reward

EVERYTHING = ("spectrum", "masks", "energy")
Weights = dict[str, torch.Tensor]


def compare(
    base: str | Path, tuned: Mapping[str, Path], out: Path, *, k: int, metrics: tuple[str, ...] = EVERYTHING,
    save_masks: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Summary of an analysis (the content of ``summary.json``) of several runs; tables and masks lie in ``out``."""
    options = planning.Options((Rule.parse("bitwise"),), save_masks=save_masks, metrics=metrics, k=k)
    checkpoints = [Checkpoint.open(str(path)) for path in (base, *tuned.values())]
    plan = planning.make_plan(checkpoints[0], checkpoints[1:], options, list(tuned))
    command = ["offprin", "analyze", str(base), *map(str, tuned.values())]
    summary = run.analyze(plan, out, command=command, device=torch.device("cpu"), overwrite=True).summary
    assert summary is not None  # one process finishes what it began
    return summary


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


# ---- behaviour


def fresh(settings: Common, count: int) -> list[Problem]:
    """Held-out problems that the stages' own evaluations, which may decide when to stop, do not ask.

    Small sizes, of which there are few, are rarer among them. Raises ValueError where none are left.
    """
    asked = {p.prompt for p in problems(settings.eval_problems, "held-out", settings.tasks, held_out=True)}
    drawn = problems(4 * count, "fresh", settings.tasks, held_out=True)
    found = [problem for problem in drawn if problem.prompt not in asked][:count]
    if not found:
        raise ValueError("the evaluations ask every held-out problem of these tasks; take larger sizes")
    return found


@torch.no_grad()
def examine(base: str | Path, tuned: str | Path, settings: Common, *, count: int = 1024) -> dict[str, float]:
    """What a checkpoint answers to fresh problems, at temperature 1, and how far that is from the base.

    ``accuracy``; ``worked``, the share of answers with steps; ``length`` in tokens; ``kl``, KL(tuned | base) in nats
    per token, ``kl_answer``, per answer, and ``kl_first``, the share of it that lies on the first token.
    """
    model, reference = load_checkpoint(tuned).eval(), load_checkpoint(base).eval()
    asked = fresh(settings, count)
    answers = sample(model, [p.prompt for p in asked], most=settings.most, generator=generator("examine"))
    texts, where = answers.texts(), answers.completion
    p, q = (objectives.completion_logits(each, answers).log_softmax(-1) for each in (model, reference))
    kl = ((p.exp() * (p - q)).sum(-1) * where).double()
    total = float(kl.sum())
    return {
        "accuracy": sum(reward(problem, text) > 0 for problem, text in zip(asked, texts, strict=True)) / len(asked),
        "worked": sum(bool(text.rpartition(MARK)[0]) for text in texts) / len(asked),
        "length": float(where.sum()) / len(asked),
        "kl": total / float(where.sum()),
        "kl_answer": total / len(asked),
        "kl_first": float(kl[:, 0].sum()) / total if total else 0.0,
    }


# ---- weights in full precision, and random ones in their place


def weights_of(run_directory: Path, names: Weights) -> Weights:
    """A run's weights in fp32, before they were stored."""
    state = torch.load(run_directory / "state.pt", weights_only=True)["model"]
    return {name: state[name] for name in names}


def optimizer_steps(run_directory: Path) -> int:
    """Steps that the optimizer took; a round of sampling may have several, or none."""
    state = torch.load(run_directory / "state.pt", weights_only=True)["optimizer"]["state"]
    return max(int(own["steps"].max()) for own in state.values())


def base_weights(base: str | Path) -> Weights:
    return {name: weight.detach() for name, weight in linear_weights(load_checkpoint(base)).items()}


def isotropic(base: Weights, tuned: Weights, seed: int) -> Weights:
    """The base and, on every layer, a Gaussian update with the norm of the tuned one's."""
    source = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in base.items():
        noise = torch.randn(weight.shape, generator=source)
        found[name] = weight + noise * ((tuned[name] - weight).norm() / noise.norm())
    return found


@torch.no_grad()
def save_isotropic(base: str | Path, run_directory: Path, path: Path, seed: int) -> Path:
    """A checkpoint whose linear layers took an isotropic update of the run's norm; the null of everything."""
    model = load_checkpoint(base)
    weights = {name: weight.detach() for name, weight in linear_weights(model).items()}
    null = isotropic(weights, weights_of(run_directory, weights), seed)
    for name, weight in weights.items():
        weight.copy_(null[name])
    save_checkpoint(model, path)
    return path
