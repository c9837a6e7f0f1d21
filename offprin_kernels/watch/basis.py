"""Principal subspaces of base weights: computed once, shared between processes, kept in a file for resumed runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import save_safetensors_atomic
from ..ops.subspace import topk_svd
from ..optim.local import local_tensor, place
from .sources import Source
from .spread import Spread, window

FORMAT = "offprin-basis-1"
HEADER = 4096  # bytes of what owners tell about a layer, or why they failed


@dataclass(frozen=True)
class Factors:
    """Top-k singular vectors of one base weight ``[m, n]``."""

    u: torch.Tensor  # fp32 [m, k], or the rows that this process has of the weight
    s: torch.Tensor  # fp32 [k]
    vh: torch.Tensor  # fp32 [k, n], or the columns
    degrees: float  # bound on the angle to the true subspaces
    digest: str  # of the weight

    @property
    def k(self) -> int:
        return self.s.shape[0]


@dataclass(frozen=True)
class Layer:
    """A weight whose factors are wanted."""

    name: str
    param: Any
    spread: Spread | None
    source: Source


@dataclass(frozen=True)
class Wanted:
    """Which factors: ``k`` or as many as a layer has, certified to ``tol_degrees``, of weights in ``dtype``."""

    k: int
    tol_degrees: float
    dtype: torch.dtype
    file: Path | None  # to read them from where it exists, or else to write


def build(layers: Sequence[Layer], wanted: Wanted) -> dict[str, Factors]:
    """Factors of every layer, cut to what this process holds of it.

    Sharded weights are gathered one after the other and dealt out, a whole one per process at a time; all processes
    then have the same bits. Raises ValueError, on all of them, for a file that does not fit or a base with NaN or Inf.
    """
    writes = wanted.file is not None and not wanted.file.exists() and rank() == 0
    to_save: dict[str, Factors] = {}
    found: dict[str, Factors] = {}
    for group in rounds(layers):
        mine: dict[int, Factors | str] = {}
        held = {}
        for index, layer in enumerate(group):
            owner = layer.spread is None or layer.spread.owns(index)
            weight = layer.source.whole(layer.param, layer.spread, owner)
            if weight is not None:
                held[index] = weight
        for index, weight in held.items():
            try:
                mine[index] = factors(group[index].name, weight.to(wanted.dtype), wanted)
            except ValueError as error:
                mine[index] = f"{group[index].name}: {error}"
        held.clear()
        for index, layer in enumerate(group):
            full = shared(layer, index, mine.pop(index, None), wanted)
            if writes:
                to_save[layer.name] = full
            found[layer.name] = cut(full, layer)
    if writes and to_save and wanted.file is not None:
        save(to_save, wanted)
    return found


def rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def rounds(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Layers of one mesh, as many as it has processes; others one by one."""
    meshes: dict[Any, list[Layer]] = {}
    for layer in layers:
        meshes.setdefault(layer.spread and layer.spread.mesh, []).append(layer)
    for mesh, members in meshes.items():
        size = mesh.size() if mesh is not None else 1
        for start in range(0, len(members), size):
            yield members[start : start + size]


def factors(name: str, weight: torch.Tensor, wanted: Wanted) -> Factors:
    """From the file where there is one, else computed. Raises ValueError where either fails."""
    mark = digest(weight)
    k = min(wanted.k, *weight.shape)
    if wanted.file is not None and wanted.file.exists():
        return loaded(name, wanted.file, mark, tuple(weight.shape), k, wanted.tol_degrees)
    top = topk_svd(weight, k, tol_degrees=wanted.tol_degrees)
    return Factors(top.U, top.S, top.Vh, float(top.error_degrees), mark)


def digest(weight: torch.Tensor) -> str:
    """SHA-256 of dtype, shape and values."""
    told = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode())
    told.update(weight.cpu().contiguous().view(torch.uint8).numpy().data)
    return told.hexdigest()


def shared(layer: Layer, index: int, mine: Factors | str | None, wanted: Wanted) -> Factors:
    """The owner's factors, on every process."""
    spread = layer.spread
    if spread is None:
        if isinstance(mine, str):
            raise ValueError(mine)
        assert mine is not None
        return mine
    m, n = layer.param.shape
    k = min(wanted.k, m, n)
    told: dict[str, Any] = {}
    if isinstance(mine, str):
        told = {"error": mine[: HEADER // 7]}
    elif mine is not None:
        told = {"degrees": mine.degrees, "digest": mine.digest}
    header = torch.tensor(list(json.dumps(told).encode().ljust(HEADER)), dtype=torch.uint8)
    told = json.loads(bytes(spread.hand_out(header, index).tolist()))
    if "error" in told:
        raise ValueError(told["error"])
    sent = {}
    for field, shape in (("u", (m, k)), ("s", (k,)), ("vh", (k, n))):
        # not every process has something to tell; all have the shape
        own = getattr(mine, field) if isinstance(mine, Factors) else torch.empty(shape)
        sent[field] = spread.hand_out(own, index)
    return Factors(sent["u"], sent["s"], sent["vh"], told["degrees"], told["digest"])


def cut(full: Factors, layer: Layer) -> Factors:
    """What this process needs of them."""
    device = local_tensor(layer.param).device
    u, vh = full.u, full.vh
    if layer.spread is not None:
        found = window(place(layer.param))
        assert found is not None
        first, end, left, right = found
        u, vh = u[first:end].clone(), vh[:, left:right].clone()
    return Factors(u.to(device), full.s, vh.to(device), full.degrees, full.digest)


def save(found: dict[str, Factors], wanted: Wanted) -> None:
    assert wanted.file is not None
    tensors = {f"{name}.{field}": getattr(f, field) for name, f in found.items() for field in ("u", "s", "vh")}
    layers = {name: {"degrees": f.degrees, "digest": f.digest} for name, f in found.items()}
    metadata = {"format": FORMAT, "tol_degrees": repr(wanted.tol_degrees), "layers": json.dumps(layers)}
    save_safetensors_atomic(wanted.file, tensors, metadata)


def loaded(name: str, path: Path, mark: str, shape: tuple[int, ...], k: int, tol_degrees: float) -> Factors:
    """One layer's factors from a file. Raises ValueError for one of another base, k, shape or accuracy."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is no basis of an UpdateWatch; name another file")
            told = json.loads(metadata["layers"]).get(name)
            if told is None:
                raise ValueError(f"{path} has no basis of this layer; name another file")
            u, s, vh = (file.get_tensor(f"{name}.{field}") for field in ("u", "s", "vh"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None
    if (u.shape[0], vh.shape[1]) != shape:
        raise ValueError(f"{path} is of a {u.shape[0]} x {vh.shape[1]} weight, the base is {shape[0]} x {shape[1]}")
    if u.shape[1] != k:
        raise ValueError(f"{path} has k = {u.shape[1]}, not {k}; name another file")
    if told["digest"] != mark:
        raise ValueError(
            f"{path} is of another base; a resumed run needs base=, the checkpoint that training began from"
        )
    if float(metadata["tol_degrees"]) > tol_degrees:
        raise ValueError(f"{path} was computed to {metadata['tol_degrees']} degrees, not {tol_degrees}")
    return Factors(u, s, vh, told["degrees"], told["digest"])
