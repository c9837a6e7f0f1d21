"""Where the base is: a copy of what this process holds, a tensor in memory, or a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch

from ..checkpoint import Checkpoint, canonical
from ..ops.update_scan.contract import DTYPE_CODES
from ..optim.local import Local, is_sharded, like, local_tensor, place
from ..packing import matrix_shape
from .spread import Spread, window


class Source(Protocol):
    """The base of one parameter."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the matrix view of this process' part, bf16, fp16 or fp32, on any device."""

    def lies_on(self, device: torch.device) -> bool:
        """Whether all rows can be had there without making anything."""

    def whole(self, param: Any, spread: Spread | None, mine: bool) -> torch.Tensor | None:
        """The whole base ``[m, n]``. All processes call it together; only where ``mine`` is something returned."""


class Copy:
    """A snapshot: 2 bytes a weight in bf16."""

    def __init__(self, param: Any, dtype: torch.dtype | None, keep: str) -> None:
        local = local_tensor(param).detach()
        device = torch.device("cpu") if keep == "cpu" else local.device
        held = local.to(device, dtype or local.dtype, copy=True, memory_format=torch.contiguous_format)
        self.local = held

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.local.view(matrix_shape(self.local.shape))[start:stop]

    def lies_on(self, device: torch.device) -> bool:
        return self.local.device == device

    def whole(self, param: Any, spread: Spread | None, mine: bool) -> torch.Tensor | None:
        if spread is None:
            return self.local.to(local_tensor(param).device)
        full = like(param, self.local.to(spread.mesh.device_type)).full_tensor()  # type: ignore[attr-defined]
        return full if mine else None


class Given:
    """A tensor of a state dict, whole on every process or sharded as the parameter is; it is not copied."""

    def __init__(self, name: str, param: Any, tensor: Any) -> None:
        if is_sharded(tensor):
            if not is_sharded(param) or (tensor.device_mesh, tensor.placements) != (
                param.device_mesh, param.placements,
            ):  # fmt: skip
                raise ValueError(f"{name}: the base is sharded otherwise than the parameter; call full_tensor() on it")
            local = tensor.to_local()
        else:
            local, at = tensor, place(param)
            for dimension, (start, size) in enumerate(zip(at.start, at.shape, strict=True)):
                # the start of an empty shard may lie behind the end
                local = local.narrow(dimension, min(start, local.shape[dimension]), size)
        now = local_tensor(param)
        if now.numel() and local.untyped_storage().data_ptr() == now.untyped_storage().data_ptr():
            raise ValueError(
                f"{name}: the base is the parameter's own memory, which training overwrites (state_dict() does not "
                "copy); leave base out, and a snapshot is taken"
            )
        self.tensor, self.local = tensor.detach(), local.detach()

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.local.reshape(matrix_shape(self.local.shape))[start:stop]

    def lies_on(self, device: torch.device) -> bool:
        return self.local.device == device and self.local.is_contiguous()

    def whole(self, param: Any, spread: Spread | None, mine: bool) -> torch.Tensor | None:
        full = self.tensor.full_tensor() if is_sharded(self.tensor) else self.tensor
        return full.to(local_tensor(param).device) if mine else None


class Stored:
    """A tensor of a checkpoint, read when it is asked for."""

    def __init__(self, name: str, checkpoint: Checkpoint, stored: str, at: Local) -> None:
        found = window(at)
        if found is None:
            raise ValueError(
                f"{name} is sharded along dimension 1 or higher of {len(at.whole)}; take a snapshot as base"
            )
        self.checkpoint, self.stored = checkpoint, stored
        self.first, self.end, self.left, self.right = found

    def rows(self, start: int, stop: int) -> torch.Tensor:
        found = self.checkpoint.read(self.stored, self.first + start, self.first + stop)
        return found[:, self.left : self.right]

    def lies_on(self, device: torch.device) -> bool:
        return False

    def whole(self, param: Any, spread: Spread | None, mine: bool) -> torch.Tensor | None:
        return self.checkpoint.read(self.stored).to(local_tensor(param).device) if mine else None


def sources(
    params: Mapping[str, Any],
    spreads: Mapping[str, Spread | None],
    base: Checkpoint | Mapping[str, torch.Tensor] | None,
    dtype: torch.dtype | None,
    keep: str,
) -> dict[str, Source]:
    """A source for every parameter. Raises ValueError where the base does not fit; all misfits are listed."""
    if base is None:
        return {name: Copy(param, dtype, keep) for name, param in params.items()}
    on_disk = isinstance(base, Checkpoint)
    shapes: dict[str, tuple[tuple[int, ...], str]]
    if isinstance(base, Checkpoint):
        dtypes = {"BF16", "F16", "F32"}
        shapes = {name: (tuple(info.shape), info.dtype) for name, info in base.tensors.items()}
    else:
        dtypes = {str(dtype) for dtype in DTYPE_CODES}
        shapes = {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in base.items()}
    partners = match(params, shapes)
    wrong = []
    for name, param in params.items():
        stored, spread = partners.get(name), spreads[name]
        if stored is None:
            wrong.append(f"{name}: the base has no such tensor")
        elif shapes[stored][0] != tuple(param.shape):
            wrong.append(f"{name}: the base is {shapes[stored][0]}, the parameter {tuple(param.shape)}")
        elif shapes[stored][1] not in dtypes:
            wrong.append(f"{name}: the base is {shapes[stored][1]}, which is not bf16, fp16 or fp32")
        elif spread is not None and spread.strided and (on_disk or not is_sharded(base[stored])):  # type: ignore[index]
            wrong.append(f"{name}: tensor parallelism and FSDP shard the same dimension; take a snapshot as base")
    if wrong:
        raise ValueError("the base does not fit the model:\n  " + "\n  ".join(wrong))
    found: dict[str, Source] = {}
    for name, param in params.items():
        if isinstance(base, Checkpoint):
            found[name] = Stored(name, base, partners[name], place(param))
        else:
            found[name] = Given(name, param, base[partners[name]])
    return found


def match(names: Iterable[str], available: Iterable[str]) -> dict[str, str]:
    """The base's name for each parameter that it has: the same, or the only one that differs in wrappers alone."""
    available = set(available)
    known: dict[str, list[str]] = {}
    for stored in available:
        known.setdefault(canonical(stored), []).append(stored)
    found = {}
    for name in names:
        alike = known.get(canonical(name), [])
        if name in available:
            found[name] = name
        elif len(alike) == 1:
            found[name] = alike[0]
    return found
