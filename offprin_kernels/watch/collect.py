"""What all processes see together: projections and sums over the shards, and the tensors' numbers made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..geometry import Energy
from .basis import Factors
from .change import TensorChange
from .look import SLAB, Column, Look, Watched
from .spread import Spread


@dataclass(frozen=True)
class Member:
    """A projection of which every shard has an addend."""

    spread: Spread
    factors: Factors
    row: torch.Tensor
    by_rows: bool  # the weight is cut into rows, and this is U^T D; else D V
    part: torch.Tensor


def collect(watched: list[Watched], looks: list[Look]) -> list[TensorChange]:
    """Every tensor's numbers. Collective for sharded ones: two small sums per mesh, and one of projections."""
    project(watched, looks)
    spreads = [each.spread for each in watched]
    sums = together(spreads, [found.row for found in looks], "total")
    largest = together(spreads, [found.largest for found in looks], "largest")
    if any(each.exponents is None for each in watched):
        counts = together(spreads, [found.exponents for found in looks], "total")
        for each, count in zip(watched, counts, strict=True):
            each.exponents = count.numpy()
    return [change(*each) for each in zip(watched, sums, largest, strict=True)]


def project(watched: list[Watched], looks: list[Look]) -> None:
    """Squared norms of the projections go into the rows.

    Of a weight cut into rows, D V is at hand in parts and U^T D is a sum over the shards, and of one cut into columns
    the other way round. What is known after that sum, one process enters.
    """
    groups: dict[Any, list[Member]] = {}
    for each, found in zip(watched, looks, strict=True):
        factors, down, across = each.factors, found.down, found.across
        if factors is None or down is None or across is None:
            continue
        cut = each.spread.cut_dimensions if each.spread is not None else set()
        if 0 not in cut:
            found.row[Column.LEFT] = squared(down)
        if 1 not in cut:
            found.row[Column.RIGHT] = squared(across)
        if each.spread is None:
            found.row[Column.BOTH] = squared(down @ factors.vh.mT)
        else:
            member = Member(each.spread, factors, found.row, 0 in cut, down if 0 in cut else across)
            groups.setdefault(each.spread.key, []).append(member)
    for members in groups.values():
        for batch in batches(members):
            spread = batch[0].spread
            summed = spread.total(torch.cat([member.part.flatten() for member in batch]))
            if spread.first:
                wholes = summed.split([member.part.numel() for member in batch])
                for member, whole in zip(batch, wholes, strict=True):
                    enter(member, whole.view(member.part.shape).to(member.part.device))


def enter(member: Member, whole: torch.Tensor) -> None:
    row, factors = member.row, member.factors
    row[Column.LEFT if member.by_rows else Column.RIGHT] = squared(whole)
    row[Column.BOTH] = squared(whole @ factors.vh.mT if member.by_rows else factors.u.mT @ whole)


def batches(members: list[Member]) -> list[list[Member]]:
    """Projections that are summed together: at least one, and no more than SLAB elements."""
    found: list[list[Member]] = []
    size = 0
    for member in members:
        count = member.part.numel()
        if not found or size + count > SLAB:
            found.append([])
            size = 0
        found[-1].append(member)
        size += count
    return found


def squared(x: torch.Tensor) -> torch.Tensor:
    """Squared norm in fp64, without a copy in fp64."""
    return torch.linalg.vector_norm(x, dtype=torch.float64) ** 2


def together(spreads: list[Spread | None], values: list[torch.Tensor], how: str) -> list[torch.Tensor]:
    """Values of one shape, a tensor each, reduced over the processes that hold parts; one collective per mesh. CPU."""
    groups: dict[Any, list[int]] = {}
    for index, (spread, value) in enumerate(zip(spreads, values, strict=True)):
        groups.setdefault((spread and spread.key, value.device), []).append(index)
    found: dict[int, torch.Tensor] = {}
    for members in groups.values():
        spread = spreads[members[0]]
        stacked = torch.stack([values[index] for index in members])
        reduced = stacked if spread is None else getattr(spread, how)(stacked)
        found.update(zip(members, reduced.cpu(), strict=True))
    return [found[index] for index in range(len(values))]


def change(watched: Watched, sums: torch.Tensor, largest: torch.Tensor) -> TensorChange:
    assert watched.exponents is not None
    values = sums.tolist()
    energy = None
    if watched.factors is not None:
        (m, n), k = watched.shape, watched.factors.k
        left, right, both = (
            share(values[column], values[Column.UPDATE]) for column in (Column.LEFT, Column.RIGHT, Column.BOTH)
        )
        energy = Energy(left, right, both, k / m, k / n, k * k / (m * n))
    return TensorChange(
        name=watched.name,
        shape=watched.shape,
        linear=watched.linear,
        changed=int(values[Column.CHANGED]),
        sign_flips=int(values[Column.SIGN_FLIPS]),
        zero_to_nonzero=int(values[Column.TO_NONZERO]),
        nonzero_to_zero=int(values[Column.TO_ZERO]),
        nonfinite=int(values[Column.NONFINITE]),
        base_norm=math.sqrt(values[Column.BASE]),
        update_norm=math.sqrt(values[Column.UPDATE]),
        update_max=float(largest.to(torch.int32).view(torch.float32)),
        energy=energy,
        basis_degrees=watched.factors.degrees if watched.factors is not None else None,
        exponents=watched.exponents,
        rounded=watched.rounded,
    )


def share(part: float, total: float) -> float:
    return part / total if total else 0.0
