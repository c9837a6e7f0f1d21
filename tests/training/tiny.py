"""The reference loop at its smallest: a decoder of two layers, problems of two digits, one thread."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from offprin_kernels.training import runs, stages
from offprin_kernels.training.model import make_model
from offprin_kernels.training.settings import RLVR, SFT, Pretrain, Size

SIZE = Size(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=48)
SHORT = {"steps": 4, "eval_every": 2, "eval_problems": 16, "save_every": 2, "most": 16, "threads": 1}
TASKS = {"reverse": range(2, 3), "sort": range(2, 3)}
TIMED = ("tokens_per_second", "seconds", "optimizer_share")


def pretrain(**given: Any) -> Pretrain:
    defaults = {"tasks": TASKS, "batch": 32, "lr": 1e-2, "worked_share": 0.0}
    return Pretrain(**{**SHORT, **defaults, **asdict(SIZE), **given})


def rlvr(base: Path, **given: Any) -> RLVR:
    defaults = {"tasks": TASKS, "prompts": 8, "samples": 4, "k": 4, "rank": 4, "lr": 1e-3}
    return RLVR(**{**SHORT, **defaults, "base": str(base), **given})


def sft(base: Path, **given: Any) -> SFT:
    defaults = {"tasks": TASKS, "batch": 8, "k": 4, "rank": 4}
    return SFT(**{**SHORT, **defaults, "base": str(base), **given})


def lively(seed: int = 0) -> torch.nn.Module:
    """A model that was never trained and yet has opinions: large random weights, so that context matters."""
    model = make_model(SIZE, seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            wide = parameter.dim() > 1
            parameter.copy_(torch.randn_like(parameter) * (0.3 if wide else 0.1) + (0 if wide else 1))
    return model


def rounding(model: torch.nn.Module, logits: torch.Tensor) -> float:
    """How far apart two orders of summation may put a logit: eps a term of the widest sum, in each of its layers."""
    sums = 2 + 4 * SIZE.layers  # one after another: embedding, attention, MLP, head
    return max(SIZE.hidden, SIZE.intermediate) * sums * torch.finfo(torch.float32).eps * float(logits.abs().max())


def rows(out: Path) -> list[dict[str, Any]]:
    """The log without what a clock says."""
    return [{key: value for key, value in row.items() if key not in TIMED} for row in runs.read_log(out)]


def ended(out: Path) -> tuple[Any, ...]:
    """All that a run leaves and that has to be the same each time: final weights, log, exact state."""
    state = torch.load(out / "state.pt", weights_only=True)
    exact = {name: tensor.numpy().tobytes() for name, tensor in state["model"].items()}
    moments = [
        {name: value.numpy().tobytes() for name, value in own.items()} for own in state["optimizer"]["state"].values()
    ]
    checkpoints = {path.parent.name: path.read_bytes() for path in sorted(out.glob("*/model.safetensors"))}
    return checkpoints, rows(out), exact, moments, state["step"], state["stopped"]


def spans(path: Path) -> dict[str, bytes]:
    """Bytes of each tensor of a safetensors file, read by hand."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {name: data[start + at["data_offsets"][0] : start + at["data_offsets"][1]] for name, at in header.items()}


def train_and_die(stage: str, settings: Any, out: Path, at: int, before: bool) -> None:
    """A run that is killed right before or after the ``at``-th file or directory takes its name; 0: never."""
    real, count = os.replace, 0

    def replace(source, target):
        nonlocal count
        count += 1
        if before and count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    stages.train(stage, settings, out)
