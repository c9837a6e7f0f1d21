"""How a DTensor lies on its processes, and the few collectives that put their numbers together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..optim.local import Local, is_sharded


@dataclass(frozen=True)
class Spread:
    """Along which dimensions of a device mesh a parameter is cut into shards; along the others it is replicated."""

    mesh: Any  # torch.distributed.DeviceMesh
    cuts: tuple[tuple[int, int], ...]  # (dimension of the mesh, dimension of the tensor that it cuts)
    strided: bool  # shards are not consecutive rows, as where tensor parallelism and FSDP cut the same dimension

    @property
    def cut_dimensions(self) -> set[int]:
        """Dimensions of the tensor that are cut."""
        return {dimension for _, dimension in self.cuts}

    @property
    def key(self) -> tuple[Any, tuple[int, ...]]:
        """Parameters of equal key are summed over the same processes."""
        return self.mesh, tuple(dimension for dimension, _ in self.cuts)

    @property
    def first(self) -> bool:
        """Whether this process is the one, among those it sums with, that adds what all of them know."""
        return all(self.mesh.get_local_rank(dimension) == 0 for dimension, _ in self.cuts)

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all shards."""
        return self._reduced(tensor, "SUM")

    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Maximum over all shards."""
        return self._reduced(tensor, "MAX")

    def _reduced(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        import torch.distributed as dist

        tensor = tensor.to(self.mesh.device_type).contiguous()
        for dimension, _ in self.cuts:
            dist.all_reduce(tensor, getattr(dist.ReduceOp, how), group=self.mesh.get_group(dimension))
        return tensor

    def owns(self, index: int) -> bool:
        """Whether the index-th of many jobs, dealt out over the mesh, is this process'."""
        return self.mesh.get_rank() == int(self.mesh.mesh.flatten()[index % self.mesh.size()])

    def hand_out(self, tensor: torch.Tensor, index: int) -> torch.Tensor:
        """What the owner of the index-th job has, on every process of the mesh; shapes and dtypes must agree."""
        import torch.distributed as dist

        tensor = tensor.to(self.mesh.device_type).contiguous()
        owner = unravel(index % self.mesh.size(), self.mesh.mesh.shape)
        # along one dimension after the other: after the last, it has reached everyone
        for dimension, at in enumerate(owner):
            source = list(self.mesh.get_coordinate())
            source[dimension] = at
            dist.broadcast(tensor, int(self.mesh.mesh[tuple(source)]), group=self.mesh.get_group(dimension))
        return tensor


def unravel(index: int, shape: Sequence[int]) -> list[int]:
    return [index // math.prod(shape[i + 1 :]) % size for i, size in enumerate(shape)]


def spread_of(name: str, param: Any) -> Spread | None:
    """None for a parameter that this process holds whole. Raises ValueError for one whose parts are addends."""
    if not is_sharded(param):
        return None
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(f"{name} has Partial placement; redistribute it before it is measured")
    # a strided shard does not call itself a shard in every version of PyTorch
    cut = [(i, placement) for i, placement in enumerate(param.placements) if not placement.is_replicate()]
    if not cut:
        return None
    strided = any("Strided" in type(placement).__name__ for _, placement in cut)
    return Spread(param.device_mesh, tuple((i, placement.dim % param.ndim) for i, placement in cut), strided)


def window(place: Local) -> tuple[int, int, int, int] | None:
    """(first row, end row, first column, end column) of a local tensor in the whole one's matrix view.

    None where it is no such rectangle: more than two dimensions, cut in another than the first.
    """
    if len(place.whole) == 0:
        return 0, 1, 0, 1
    if len(place.whole) == 1:
        return 0, 1, place.start[0], place.start[0] + place.shape[0]
    if len(place.whole) > 2 and not place.consecutive:
        return None
    inner = math.prod(place.whole[1:-1])
    column = place.start[-1]
    return place.start[0] * inner, (place.start[0] + place.shape[0]) * inner, column, column + place.shape[-1]
