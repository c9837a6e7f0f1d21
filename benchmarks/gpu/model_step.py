"""A step of a model's many tensors against one of a single flat tensor of the same size: what the launches cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch

from offprin_kernels.optim import MaskedAdamW

from ..registry import STEP_OPERATIONS, masked_step_traffic
from . import masked_adamw, timing

# the layers of Qwen3-8B at a quarter of their width, and one norm more: 400 tensors, 0.5 G weights
LAYERS, WIDTH, WIDE, VOCABULARY, HEAD = 36, 1024, 3072, 32768, 128
BAR = 1.15
ROUNDS_IN_A_ROW = 7  # of 20 steps each


def shapes_of(layers: int = LAYERS, width: int = WIDTH, wide: int = WIDE, vocabulary: int = VOCABULARY) -> list:
    layer = [
        (width, width), (width // 4, width), (width // 4, width), (width, width),  # q, k, v, o
        (wide, width), (wide, width), (width, wide),  # gate, up, down
        (width,), (width,), (HEAD,), (HEAD,),  # norms
    ]  # fmt: skip
    return [(vocabulary, width), *layer * layers, (width,), (width,), (vocabulary, width)]


def slower(what: str, ms: Mapping[str, Sequence[float]], bar: float | None = None) -> dict:
    value = statistics.median(a / b for a, b in zip(ms["many"], ms["flat"], strict=True))
    return timing.ratio(what, value, bar, at_most=True, peer=ms["flat"])


def run(device: str = "cuda", shapes: list | None = None, rounds: int = timing.ROUNDS) -> dict:
    """The slice ``model_step``."""
    place, found = torch.device(device), []
    shapes = shapes or shapes_of()
    weights = sum(math.prod(shape) for shape in shapes)
    torch.manual_seed(0)
    for dtype, rounding in ((torch.bfloat16, "master"), (torch.float32, "nearest")):
        masked_adamw.check(masked_adamw.Case("full", dtype, rounding, None, None), place)
        whole = masked_adamw.parameters(dtype, [(weights,)], place)
        params = masked_adamw.parameters(dtype, shapes, place)
        # the same values in both, so that they can be compared; parts of a flat tensor lie anywhere
        sizes = [math.prod(shape) for shape in shapes]
        gradient = torch.randn(weights, device=place).mul_(1e-3).to(dtype)
        whole[0].grad = gradient
        parts = zip(whole[0].detach().split(sizes), gradient.split(sizes), params, strict=True)
        for part, own, param in parts:
            param.detach().copy_(part.view(param.shape))
            param.grad = own.view(param.shape).clone()
        backend = masked_adamw.backend_of(place)
        many, flat = (MaskedAdamW(given, rounding=rounding, backend=backend) for given in (params, whole))
        for _ in range(2):
            many.step()
            flat.step()
        if not torch.equal(torch.cat([p.detach().flatten() for p in params]), whole[0].detach()):
            raise RuntimeError(f"{len(shapes)} tensors step otherwise than one of their size")
        steps: dict[str, timing.Run] = {
            "many": lambda _, o=many: o.step(),  # type: ignore[misc]
            "flat": lambda _, o=flat: o.step(),  # type: ignore[misc]
        }
        ms = timing.turns(steps, place, rounds)
        wall = timing.in_a_row(steps, place, min(rounds, ROUNDS_IN_A_ROW))
        name = str(dtype).removeprefix("torch.")
        row = timing.row(
            "masked_adamw", f"{len(shapes)} tensors, {rounding}", backend,
            {"tensors": len(shapes), "weights": weights, "dtype": name}, ms["many"],
            nbytes=masked_step_traffic(weights, None, dtype.itemsize, extra=2 if rounding == "master" else 0).total,
            operations=STEP_OPERATIONS * weights,
        )  # fmt: skip
        timing.compare(
            row,
            slower("times the step of one flat tensor", ms, BAR),
            slower("times its wall time, of steps that follow each other", wall),
        )
        found.append(row)
        del many, flat, params, whole
    return {"rows": found}
