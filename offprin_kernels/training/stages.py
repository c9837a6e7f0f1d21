"""The three stages: pretrain a base, then tune it by reinforcement or by imitation. Read top to bottom.

Every random choice is drawn from the run's seed and the step, so a run that was interrupted goes on to the same bits.
"""

from __future__ import annotations

import copy
import random
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..bitmask import BitMask
from ..optim import MaskedAdamW
from . import adapters, objectives
from .gates import Gates
from .model import linear_weights, load_checkpoint, make_model, round_weights, save_checkpoint
from .rollout import Rollout, batch, sample
from .runs import Run
from .settings import RLVR, SFT, STAGES, Common, Pretrain, Tune
from .tasks import MARK, problems, reward

MICRO = 64  # sequences in a forward pass with gradients
PROBES = 64  # completions per step on which divergences are measured


def train(stage: str, settings: Common, out: str | Path, *, quiet: bool = True) -> Path:
    """Run a stage, or what is left of it; returns the final checkpoint's directory.

    Raises:
        ValueError: an unknown stage, a base or masks that do not fit. OutputError (a ValueError): ``out`` is taken.
    """
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}; choose from {', '.join(STAGES)}")
    torch.set_num_threads(settings.threads)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("this PyTorch sees no CUDA device; use --device cpu")
    # before the directory is made: a base that does not fit leaves nothing behind
    model, optimizer = prepared(settings)
    step = {"pretrain": pretrain, "rlvr": rlvr, "sft": sft}[stage](settings, model, optimizer)  # type: ignore[operator]
    run = Run(out, stage, settings, quiet=quiet)
    try:
        if not run.complete:
            run.resume(model, optimizer)
            for number in run.steps():
                # before the first step, for what is gained to be read off the log
                before = evaluate(model, settings)["accuracy"] if number == 0 and stage != "pretrain" else None
                row = step(number) | ({} if before is None else {"accuracy_before": before})
                if run.due(settings.eval_every):
                    row |= evaluate(model, settings)
                target = getattr(settings, "target", 0.0)
                run.finish_step(row, model, optimizer, stop=0 < target <= row.get("accuracy", -1.0))
            save_checkpoint(adapters.merged(model), run.root / "final")
    finally:
        run.close()
    return run.root / "final"


def prepared(settings: Common) -> tuple[torch.nn.Module, MaskedAdamW]:
    """Model and optimizer at the start of a stage."""
    masks = None
    if isinstance(settings, Pretrain):
        model = make_model(settings.size, settings.seed)
    else:
        assert isinstance(settings, Tune)
        model = load_checkpoint(settings.base)
        if settings.masks:
            masks = masks_for(model, settings.masks)
        if settings.masks or settings.linear_only:
            chosen = {id(weight) for weight in linear_weights(model).values()}
            for param in model.parameters():
                param.requires_grad_(id(param) in chosen)
        if settings.adapter:
            model = adapters.attach(model, settings.adapter, settings.rank, settings.alpha, settings.seed)
    model.to(settings.device)
    if settings.device != "cpu":
        round_weights(model)
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    optimizer = MaskedAdamW(
        named, lr=settings.lr, weight_decay=0.0, masks=masks, track_visible=True, seed=settings.seed,
        rounding="nearest" if settings.device == "cpu" else "master",
    )  # fmt: skip
    return model, optimizer


def masks_for(model: torch.nn.Module, path: str) -> dict[str, BitMask]:
    """The masks of the linear layers; those of other tensors are left aside. Raises ValueError where one is missing."""
    try:
        found, weights = BitMask.load(path), linear_weights(model)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"masks {path} cannot be read ({error}); make them with `offprin mask`") from None
    wrong = [name for name, weight in weights.items() if name not in found or found[name].shape != weight.shape]
    if wrong:
        raise ValueError(
            f"{path} holds masks of another model: {len(wrong)} of {len(weights)} linear layers have none of their "
            f"shape, {wrong[0]} first"
        )
    return {name: found[name] for name in weights}


def generator(*key: object) -> torch.Generator:
    """Random numbers that depend on the key alone."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, key)).encode()))


def evaluate(model: torch.nn.Module, settings: Common) -> dict[str, float]:
    """Accuracy on held-out problems, the same for every run with this mixture: overall, by family and by style.

    ``worked`` is the share of answers that show any steps.
    """
    asked = problems(settings.eval_problems, "held-out", settings.tasks, held_out=True)
    model.eval()
    answers = sample(model, [p.prompt for p in asked], most=settings.most, generator=generator("evaluate")).texts()
    solved = [reward(problem, answer) > 0 for problem, answer in zip(asked, answers, strict=True)]
    found = {"accuracy": sum(solved) / len(solved)}
    for family in settings.tasks:
        own = [s for s, problem in zip(solved, asked, strict=True) if problem.family == family]
        if own:
            found[f"accuracy/{family}"] = sum(own) / len(own)
    worked = [bool(answer.rpartition(MARK)[0]) for answer in answers]
    found["worked"] = sum(worked) / len(worked)
    for style, name in ((True, "worked"), (False, "direct")):
        own = [s for s, w in zip(solved, worked, strict=True) if w == style]
        if own:
            found[f"accuracy/{name}"] = sum(own) / len(own)
    return found


# ---- imitation: pretrain and SFT


def imitate(model: torch.nn.Module, optimizer: MaskedAdamW, given: Rollout) -> dict[str, float]:
    """One step of cross-entropy on given completions, the mean over their tokens."""
    tokens = int(given.completion.sum())
    optimizer.zero_grad()
    loss = 0.0
    for rows in micro_batches(given, torch.arange(len(given.tokens))):
        part = given[rows]
        log_probs = objectives.log_probs_of(objectives.completion_logits(model, part), part)
        share = -(log_probs * part.completion.to(log_probs.device)).sum() / tokens
        share.backward()
        loss += float(share.detach())
    torch.nn.utils.clip_grad_norm_(optimizer.entries, 1.0)
    optimizer.step()
    return {"loss": loss, "tokens": int(given.present.sum())}


def pretrain(s: Pretrain, model: torch.nn.Module, optimizer: MaskedAdamW) -> Callable[[int], dict[str, Any]]:
    def step(number: int) -> dict[str, Any]:
        began = time.perf_counter()
        rate = s.lr * min(1.0, (number + 1) / 50) * max(0.05, 1 - number / s.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rng = random.Random(f"style/{s.seed}/{number}")
        asked = problems(s.batch, f"pretrain/{s.seed}/{number}", s.tasks)
        row = imitate(model, optimizer, batch([(p.prompt, p.solution(rng.random() < s.worked_share)) for p in asked]))
        return row | {"lr": rate, "tokens_per_second": row["tokens"] / (time.perf_counter() - began)}

    return step


def sft(s: SFT, model: torch.nn.Module, optimizer: MaskedAdamW) -> Callable[[int], dict[str, Any]]:
    gates = Gates(adapters.merged(model), s.k)
    base = copy.deepcopy(adapters.merged(model)).requires_grad_(False)

    def step(number: int) -> dict[str, Any]:
        asked = problems(s.batch, f"sft/{s.seed}/{number}", s.tasks)
        # watched on the model's own answers, as in reinforcement; it learns from given ones
        answers = sample(
            model, [p.prompt for p in asked[:PROBES]], most=s.most, generator=generator("sft", s.seed, number)
        )
        old = probe(model, answers)
        began = time.perf_counter()
        row = imitate(model, optimizer, batch([(p.prompt, p.solution()) for p in asked]))
        row["tokens_per_second"] = row["tokens"] / (time.perf_counter() - began)
        return row | watched(model, base, old, answers, optimizer, gates)

    return step


# ---- reinforcement


def rlvr(s: RLVR, model: torch.nn.Module, optimizer: MaskedAdamW) -> Callable[[int], dict[str, Any]]:
    gates = Gates(adapters.merged(model), s.k)
    base = copy.deepcopy(adapters.merged(model)).requires_grad_(False)

    def step(number: int) -> dict[str, Any]:
        clock = [time.perf_counter()]
        asked = [p for p in problems(s.prompts, f"rlvr/{s.seed}/{number}", s.tasks) for _ in range(s.samples)]
        sampled = sample(model, [p.prompt for p in asked], most=s.most, generator=generator("rlvr", s.seed, number))
        rewards = torch.tensor([reward(p, text) for p, text in zip(asked, sampled.texts(), strict=True)])
        advantage = objectives.advantages(rewards.view(s.prompts, s.samples))
        old = probe(model, sampled)
        clock.append(time.perf_counter())
        stepping = 0.0
        for prompts in torch.arange(s.prompts).chunk(s.minibatches):
            rows = (prompts[:, None] * s.samples + torch.arange(s.samples)).flatten()
            if s.objective == "dapo":
                # prompts whose completions are all right, or all wrong, teach nothing: DAPO's dynamic sampling, except
                # that no others are drawn in their place
                rows = rows[advantage.flatten()[rows] != 0]
            if len(rows):
                stepping += reinforce(s, model, base, optimizer, sampled, rows, advantage.flatten())
        clock.append(time.perf_counter())
        tokens = int(sampled.completion.sum())
        return {
            "reward": float(rewards.mean()),
            "tokens": tokens,
            "length": tokens / len(asked),
            "tokens_per_second": tokens / (clock[1] - clock[0]),
            "seconds": clock[2] - clock[0],
            "optimizer_share": stepping / (clock[2] - clock[0]),
            **watched(model, base, old, sampled, optimizer, gates),
            # nothing was stepped where all prompts were all right or all wrong
            **({} if stepping else {"visible_last_step": 0.0}),
        }

    return step


def reinforce(
    s: RLVR, model: torch.nn.Module, base: torch.nn.Module, optimizer: MaskedAdamW, sampled: Rollout,
    rows: torch.Tensor, advantage: torch.Tensor,
) -> float:  # fmt: skip
    """One step on some of the sampled sequences; returns the seconds that the optimizer took."""
    # DAPO weighs tokens alike, GRPO sequences
    total = float(sampled.completion[rows].sum()) if s.objective == "dapo" else None
    device = next(model.parameters()).device
    optimizer.zero_grad()
    for chosen in micro_batches(sampled, rows):
        part = sampled[chosen]
        new = objectives.log_probs_of(objectives.completion_logits(model, part), part)
        where, old = part.completion.to(device), part.log_probs.to(device)
        loss = objectives.policy_loss(
            new, old, advantage[chosen].to(device), where,
            clip_low=s.clip_low, clip_high=s.clip_high, total=total,
        )  # fmt: skip
        if s.kl_weight:
            with torch.no_grad():
                reference = objectives.log_probs_of(objectives.completion_logits(base, part), part)
            loss = loss + s.kl_weight * objectives.penalty(new, reference, where, total)
        (loss if total else loss * len(chosen) / len(rows)).backward()
    # over all coordinates, also those that a mask keeps in place: masked runs are clipped as dense ones are
    torch.nn.utils.clip_grad_norm_(optimizer.entries, 1.0)
    began = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - began


# ---- what both share


def micro_batches(rollout: Rollout, rows: torch.Tensor) -> list[torch.Tensor]:
    """Rows in batches of like length, so that little of a batch is padding."""
    lengths = rollout.present[rows].sum(-1)
    return list(rows[lengths.argsort(stable=True)].split(MICRO))


@torch.no_grad()
def probe(model: torch.nn.Module, rollout: Rollout) -> torch.Tensor:
    """Logits on the first completions: what divergences are measured from."""
    return objectives.completion_logits(model, rollout[:PROBES])


def watched(
    model: torch.nn.Module, base: torch.nn.Module, old: torch.Tensor, rollout: Rollout, optimizer: MaskedAdamW,
    gates: Gates,
) -> dict[str, float]:  # fmt: skip
    """The gates after a step. KL(new | old) and KL(new | base), nats per token, on answers sampled before it.

    ``visible_last_step`` is a share of all weights that train, and of the last optimizer step; what ``Gates`` measures
    is about linear layers, and since the start.
    """
    where = rollout[:PROBES].completion.to(old.device)
    new = probe(model, rollout)
    masked = sum(entry.count for entry in optimizer.entries.values())
    return {
        "kl_old": objectives.divergence(new, old, where),
        "kl_base": objectives.divergence(new, probe(base, rollout), where),
        "entropy": objectives.entropy(new, where),
        "visible_last_step": optimizer.visible_count() / masked,
        **gates.measure(adapters.merged(model)),
    }
