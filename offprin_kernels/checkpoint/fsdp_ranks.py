"""One file per rank, as verl and others write FSDP models: ``model_world_size_N_rank_R.pt``.

Each is a ``torch.save`` of a state dict whose values are DTensors, ShardedTensors or plain tensors; every one says, or
its mesh says, which part of the whole it is. The pickles are read as inert records: no process group, no device, no
class of torch is needed, and the bytes of the shards are then read by ranges.
"""

from __future__ import annotations

import functools
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from . import dtypes, inert
from .chunks import Chunk, Chunked, Place
from .errors import CheckpointError
from .rank_parts import ALLOWED, Part, dtensor_offsets, part_of
from .rows import Contents, Rows, Span, TensorInfo
from .storage import FileInfo, Files, file_info
from .torch_file import DAMAGE, WRAPPERS, first_line
from .torch_zip import NotPlain, Stored, Zip

NAME = re.compile(r"model_world_size_(?P<world>\d+)_rank_(?P<rank>\d+)\.pt")
REMEDY = "copy the missing files, or save the checkpoint again"
COMPARED = 1 << 23  # bytes compared at a time where checksums cannot tell


def rank_files(root: Path) -> tuple[Path, ...]:
    """The files of all ranks in order, or none where there is not one.

    Raises:
        CheckpointError: a rank is missing, or files of two worlds lie there.
    """
    found = {(int(m["world"]), int(m["rank"])): item for item in root.iterdir() if (m := NAME.fullmatch(item.name))}
    worlds = sorted({world for world, _ in found})
    if not found:
        return ()
    if len(worlds) > 1:
        raise CheckpointError(f"{root} holds files of {' and '.join(map(str, worlds))} ranks; keep those of one save")
    missing = [rank for rank in range(worlds[0]) if (worlds[0], rank) not in found]
    if missing:
        listed = ", ".join(map(str, missing[:8])) + (" and more" if len(missing) > 8 else "")
        raise CheckpointError(f"{root} lacks rank {listed} of {worlds[0]} (model_world_size_*_rank_*.pt); {REMEDY}")
    extra = [rank for world, rank in found if rank >= world]
    if extra:
        raise CheckpointError(f"{root} holds a file of rank {extra[0]} of {worlds[0]}, which cannot be; {REMEDY}")
    return tuple(found[worlds[0], rank] for rank in range(worlds[0]))


def load(paths: Sequence[Path]) -> Contents:
    """Opens the files of all ranks, in the order of the ranks; reads their pickles and no weights.

    Raises:
        CheckpointError: a file that is damaged or would run code, a tensor that a rank lacks, ranks that contradict
            each other, or a placement that does not say what a rank holds.
    """
    files = tuple(file_info(path, "fsdp") for path in paths)
    zips, states, ignored = [], [], {}
    for path in paths:
        archive, state, others = _read(path)
        zips.append(archive)
        states.append(state)
        ignored.update(dict.fromkeys(others))
    for path, state in zip(paths, states, strict=True):
        # Every name against the first rank's, both ways.
        for here, there, other in ((states[0], state, path), (state, states[0], paths[0])):
            lost = next((name for name in here if name not in there), None)
            if lost is not None:
                raise CheckpointError(f"{other} lacks tensor {lost}, which other ranks hold; {REMEDY}")
    if not states[0]:
        raise CheckpointError(f"{paths[0]} holds no tensors under names; give the directory of the model")
    joined = _Join(files, zips)
    tensors = [joined.tensor(name, [state[name] for state in states]) for name in states[0]]
    return Contents(files, tensors, list(ignored), joined.notes(), {})


def _read(path: Path) -> tuple[Zip, dict[str, Part], list[str]]:
    """The zip, the parts by name, and the names of what is no tensor."""
    parts: dict[str, Part] = {}
    ignored: list[str] = []
    try:
        archive = Zip(path)
        state = archive.load(ALLOWED)
        if not isinstance(state, dict):
            raise ValueError("it holds no state dict")
        for name, value in _unwrapped(state, ignored).items():
            part = part_of(value)
            if part is None or not isinstance(name, str):
                ignored.append(name if isinstance(name, str) else inert.text(name))
            elif "_flat_param" in name:
                raise CheckpointError(
                    f"{path} holds flattened parameters ({name}), whose names and shapes are not in it; save with "
                    f"FSDP's sharded or full state dict"
                )
            else:
                parts[name] = part
    except CheckpointError:
        raise
    except inert.Forbidden as error:
        raise CheckpointError(
            f"{path} names {first_line(error)}, holds more than tensors and could run code when loaded; nothing of it "
            f"was run; save its state dict again where you trust it"
        ) from None
    except NotPlain as error:
        raise CheckpointError(f"{path} cannot be read by ranges: {error}") from None
    except (*DAMAGE, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a PyTorch checkpoint ({first_line(error)}); download or copy this file again"
        ) from None
    return archive, parts, ignored


def _unwrapped(state: dict, ignored: list[str]) -> dict:
    """The state dict itself, where a rank's file holds it under a name such as "model"."""
    for _ in range(3):
        inner = [key for key in WRAPPERS if isinstance(state.get(key), dict)]
        if len(inner) != 1 or any(part_of(value) is not None for value in state.values()):
            break
        ignored.extend(key if isinstance(key, str) else inert.text(key) for key in state if key != inner[0])
        state = state[inner[0]]
    return state


class _Join:
    """Puts the parts of all ranks together, tensor by tensor."""

    def __init__(self, files: tuple[FileInfo, ...], zips: Sequence[Zip]) -> None:
        self.files, self.zips, self.reading = files, zips, Files(files, "auto")
        self.plain = 0

    def notes(self) -> list[str]:
        held = f"{self.plain} tensors are whole and equal in all {len(self.files)} ranks; read from rank 0"
        return [held] if self.plain and len(self.files) > 1 else []

    def tensor(self, name: str, parts: Sequence[Part]) -> tuple[TensorInfo, Rows]:
        first = parts[0]
        dtype = next((part.stored.dtype for part in parts if part.stored), "F32")
        for rank, part in enumerate(parts):
            if (part.kind, part.shape) != (first.kind, first.shape) or (part.stored and part.stored.dtype != dtype):
                raise CheckpointError(
                    f"{self.files[rank].path}: tensor {name} is {_words(part)} and in rank 0 {_words(first)}; {REMEDY}"
                )
        if dtype not in dtypes.BITS:
            # Named, and refused when it is read.
            return TensorInfo(name, dtype, first.shape, 0, 0, 0), Span()
        try:
            chunks, owner = self._chunks(name, parts)
            rows = Chunked(first.shape, chunks)
        except (ValueError, LookupError) as error:
            raise CheckpointError(
                f"{self.files[0].path.parent}: the ranks do not hold tensor {name} of shape {list(first.shape)} whole: "
                f"{error}; {REMEDY}"
            ) from None
        nbytes = dtypes.byte_size(dtype, first.shape)
        offset = chunks[0].place().offset if chunks else 0
        return TensorInfo(name, dtype, first.shape, nbytes, owner, offset), rows

    def _chunks(self, name: str, parts: Sequence[Part]) -> tuple[list[Chunk], int]:
        """One chunk for each part of the tensor, replicas once, and the rank that holds the first."""
        if parts[0].kind == "dtensor":
            if len({len(part.coordinate) for part in parts}) > 1:
                raise ValueError("its meshes differ between the ranks")
            mesh = tuple(max(sizes) + 1 for sizes in zip(*(part.coordinate for part in parts), strict=True))
        self.plain += parts[0].kind == "plain"
        found: dict[tuple[int, ...], Chunk] = {}
        for rank, part in enumerate(parts):
            if part.stored is None or 0 in part.stored.shape:
                continue
            offsets = dtensor_offsets(part, mesh) if part.kind == "dtensor" else part.offsets
            place = Place(self.zips[rank].place(part.stored), part.stored.strides)
            chunk = Chunk(rank, offsets, part.stored.shape, functools.partial(_known, place))
            first = found.setdefault(offsets, chunk)
            if first is not chunk:
                self._check_replica(name, parts, first, chunk)
        ordered = [found[offsets] for offsets in sorted(found)]
        return ordered, ordered[0].file if ordered else 0

    def _check_replica(self, name: str, parts: Sequence[Part], first: Chunk, other: Chunk) -> None:
        """Ranks that hold one part must hold the same: shards of some other making would pass for it unseen."""
        if first.sizes != other.sizes:
            raise ValueError(f"it has shape {list(other.sizes)} in rank {other.file}")
        one, two = (parts[chunk.file].stored for chunk in (first, other))
        assert one is not None and two is not None
        known = self.zips[first.file].checksum(one)
        if known is not None and known == self.zips[other.file].checksum(two):
            return
        if not self._same(name, one, first, other):
            who = f"rank {other.file} holds other numbers than rank {first.file}"
            if parts[0].kind == "plain":
                raise ValueError(f"{who} under this name, and neither says which part it is")
            raise ValueError(f"{who} for the part at {list(first.offsets)}, which both say that they hold")

    def _same(self, name: str, stored: Stored, first: Chunk, other: Chunk) -> bool:
        """Whether two chunks are equal, byte by byte."""
        nbytes = dtypes.byte_size(stored.dtype, stored.shape)
        info = TensorInfo(name, stored.dtype, stored.shape, nbytes, first.file, 0)
        zeros = (0,) * len(stored.shape)
        rows = [Chunked(stored.shape, [Chunk(chunk.file, zeros, chunk.sizes, chunk.place)]) for chunk in (first, other)]
        step = max(1, COMPARED * info.rows // nbytes)
        for start in range(0, info.rows, step):
            stop = min(start + step, info.rows)
            one, two = (held.read(self.reading, info, start, stop, None).view(torch.uint8) for held in rows)
            if not one.equal(two):
                return False
        return True


def _known(place: Place) -> Place:
    return place


def _words(part: Part) -> str:
    dtype = f"{part.stored.dtype} " if part.stored else ""
    return f"a {part.kind} tensor, {dtype}of shape {list(part.shape)}"
