"""A parameter in a process: its name without wrappers, and what is held of it: all, or its shard of a DTensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..bitmask import BitMask

# What wrappers put into names: DDP, compile, FSDP, activation checkpointing.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def bare(name: str) -> str:
    """A parameter's name without what wrappers added to it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


@dataclass(frozen=True)
class Local:
    """Where a local tensor lies in its parameter."""

    shape: tuple[int, ...]  # of the local tensor
    start: tuple[int, ...]  # of its first element, per dimension, in the whole parameter
    whole: tuple[int, ...]  # shape of the whole parameter

    @property
    def complete(self) -> bool:
        return self.shape == self.whole

    @property
    def consecutive(self) -> bool:
        """Whether its coordinates are consecutive flat indices of the parameter: sharded in the first dimension."""
        return self.shape[1:] == self.whole[1:]

    @property
    def offset(self) -> int:
        """Flat index of its first coordinate in the whole parameter."""
        return sum(at * math.prod(self.whole[i + 1 :]) for i, at in enumerate(self.start))

    def part_of(self, mask: BitMask) -> BitMask:
        """The local part of a mask of the whole parameter."""
        if self.complete:
            return mask
        if self.consecutive and len(self.whole) > 1:
            rows = math.prod(self.whole[1:-1])
            part = mask[self.start[0] * rows : (self.start[0] + self.shape[0]) * rows]
            return BitMask(part.words, self.shape, check=False)
        dense = mask.to_dense()
        for dimension, (at, size) in enumerate(zip(self.start, self.shape, strict=True)):
            dense = dense.narrow(dimension, at, size)
        return BitMask.from_dense(dense)


def is_sharded(tensor: Any) -> bool:
    """Whether a parameter is a DTensor; importing torch.distributed is left to those who have one."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local_tensor(tensor: Any) -> torch.Tensor:
    """What this process holds of it, sharing memory."""
    # plain tensors first, for this is asked of each in every step
    kind = type(tensor)
    if kind is torch.nn.Parameter or kind is torch.Tensor:
        return tensor
    return tensor.to_local() if is_sharded(tensor) else tensor


def place(tensor: Any) -> Local:
    """Where this process' part of a parameter lies.

    Raises ValueError for a DTensor whose parts have to be summed first.
    """
    whole = tuple(tensor.shape)
    if not is_sharded(tensor):
        return Local(whole, (0,) * len(whole), whole)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError("a parameter with Partial placement cannot be stepped; redistribute it first")
    shape, start = compute_local_shape_and_global_offset(whole, tensor.device_mesh, tensor.placements)
    return Local(tuple(shape), tuple(start), whole)


def like(param: Any, local: torch.Tensor) -> torch.Tensor:
    """A DTensor placed as a parameter is, from every process' part."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )
