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
from dataclasses import dataclass
from pathlib import Path

from . import dtypes, inert
from .errors import CheckpointError
from .inert import Record
from .rows import Chunk, Chunked, Contents, Place, Rows, TensorInfo
from .storage import FileInfo, Files, file_info
from .torch_file import DAMAGE, first_line
from .torch_zip import Stored, Zip, tensor_of

NAME = re.compile(r"model_world_size_(?P<world>\d+)_rank_(?P<rank>\d+)\.pt")
REMEDY = "copy the missing files, or save the checkpoint again"
COMPARED = 1 << 23  # bytes compared at a time where checksums cannot tell
_TENSOR, _SHARD = "torch.distributed.tensor", "torch.distributed._shard"
ALLOWED = frozenset(
    {
        "builtins.getattr",
        "torch._tensor._rebuild_from_type_v2",
        "torch._utils._rebuild_wrapper_subclass",
        "_io.BytesIO",
        f"{_TENSOR}.DTensor",
        *(f"{_TENSOR}.{inner}DTensor" for inner in ("_api.", "api.")),
        *(f"{_TENSOR}._dtensor_spec.{name}" for name in ("DTensorSpec", "TensorMeta", "ShardOrderEntry")),
        *(f"{_TENSOR}.placement_types.{name}" for name in ("Shard", "Replicate", "Partial", "_StridedShard")),
        # torch 2.4 and before
        "torch.distributed._tensor.api.DTensor",
        "torch.distributed._tensor.placement_types.DTensorSpec",
        "torch.distributed._tensor.placement_types.TensorMeta",
        "torch.distributed._tensor._dtensor_spec.DTensorSpec",
        "torch.distributed._tensor._dtensor_spec.TensorMeta",
        *(
            f"torch.distributed._tensor.placement_types.{name}"
            for name in ("Shard", "Replicate", "Partial", "_Partial")
        ),
        "torch.distributed.device_mesh.DeviceMesh",
        "torch.distributed._mesh_layout._MeshLayout",
        "torch.distributed._mesh_layout._FlatLayout",
        f"{_SHARD}.sharded_tensor.api.ShardedTensor",
        f"{_SHARD}.sharded_tensor.shard.Shard",
        f"{_SHARD}.metadata.ShardMetadata",
        *(
            f"{_SHARD}.sharded_tensor.metadata.{name}"
            for name in ("ShardedTensorMetadata", "TensorProperties", "MEM_FORMAT_ENCODING")
        ),
        f"{_SHARD}.sharding_spec.chunk_sharding_spec.ChunkShardingSpec",
        f"{_SHARD}.sharding_spec.api.EnumerableShardingSpec",
        "torch.distributed.remote_device._remote_device",
    }
)


@dataclass(frozen=True)
class Part:
    """What one rank holds of one tensor. Of a DTensor, offsets follow only when the size of the mesh is known."""

    kind: str  # "plain", "dtensor" or "sharded"
    stored: Stored | None  # None: this rank holds nothing of it
    shape: tuple[int, ...]
    offsets: tuple[int, ...] = ()
    placements: tuple[Record, ...] = ()
    coordinate: tuple[int, ...] = ()


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
    ignored = []
    try:
        archive = Zip(path)
        state = archive.load(ALLOWED)
        if not isinstance(state, dict):
            raise ValueError("it holds no state dict")
        for name, value in state.items():
            part = _part(value)
            if part is None or not isinstance(name, str):
                ignored.append(str(name))
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
    except (*DAMAGE, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a PyTorch checkpoint ({first_line(error)}); download or copy this file again"
        ) from None
    return archive, parts, ignored


def _part(value: object) -> Part | None:
    """What a value of a state dict is; raises ValueError where it is a tensor that says too little."""
    stored = tensor_of(value)
    if stored is not None:
        return Part("plain", stored, stored.shape, (0,) * len(stored.shape))
    if not isinstance(value, Record) or value.kind() != "_rebuild_from_type_v2" or len(value.args) < 4:
        return None
    _, kind, made, state = value.args[:4]
    name = kind.name.rpartition(".")[2] if isinstance(kind, type) and issubclass(kind, Record) else ""
    if name == "DTensor":
        return _dtensor(made, state)
    if name == "ShardedTensor":
        return _sharded(state)
    return None


def _dtensor(made: object, state: object) -> Part:
    fields = next((part for part in state if isinstance(part, dict)), {}) if isinstance(state, tuple) else state
    # (class, dtype, shape, strides, ...)
    shape = inert.sizes_of(made[2]) if isinstance(made, tuple) and len(made) > 2 else None
    spec = fields.get("_spec") if isinstance(fields, dict) else None
    stored = tensor_of(fields.get("_local_tensor")) if isinstance(fields, dict) else None
    mesh = spec.get("mesh") if isinstance(spec, Record) else None
    placements = spec.get("placements") if isinstance(spec, Record) else None
    coordinate = inert.sizes_of(mesh.get("_coordinate_on_dim")) if isinstance(mesh, Record) else None
    if shape is None or stored is None or not isinstance(placements, list | tuple) or coordinate is None:
        raise ValueError("a DTensor without shape, local tensor, placements or the rank's coordinate")
    if len(placements) != len(coordinate) or not all(isinstance(item, Record) for item in placements):
        raise ValueError(f"a DTensor with {len(placements)} placements on a mesh of {len(coordinate)} dimensions")
    return Part("dtensor", stored, shape, (), tuple(placements), coordinate)


def _sharded(state: object) -> Part:
    # (local shards, metadata, process group, sharding spec, init_rrefs)
    shards, metadata = state[:2] if isinstance(state, tuple) and len(state) >= 2 else (None, None)
    shape = inert.sizes_of(metadata.get("size")) if isinstance(metadata, Record) else None
    if shape is None or not isinstance(shards, list) or len(shards) > 1:
        raise ValueError("a ShardedTensor without shape, or with several shards on one rank")
    if not shards:
        return Part("sharded", None, shape)
    where = shards[0].get("metadata") if isinstance(shards[0], Record) else None
    stored = tensor_of(shards[0].get("tensor")) if isinstance(shards[0], Record) else None
    offsets = inert.sizes_of(where.get("shard_offsets")) if isinstance(where, Record) else None
    if stored is None or offsets is None:
        raise ValueError("a shard without tensor or offsets")
    return Part("sharded", stored, shape, offsets)


class _Join:
    """Puts the parts of all ranks together, tensor by tensor."""

    def __init__(self, files: tuple[FileInfo, ...], zips: Sequence[Zip]) -> None:
        self.files, self.zips = files, zips
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
        try:
            chunks, owner = self._chunks(name, parts)
            rows = Chunked(first.shape, chunks)
        except ValueError as error:
            raise CheckpointError(
                f"{self.files[0].path.parent}: the ranks do not hold tensor {name} of shape {list(first.shape)} whole: "
                f"{error}; {REMEDY}"
            ) from None
        nbytes = dtypes.byte_size(dtype, first.shape)
        offset = chunks[0].place().offset if chunks else 0
        return TensorInfo(name, dtype, first.shape, nbytes, owner, offset), rows

    def _chunks(self, name: str, parts: Sequence[Part]) -> tuple[list[Chunk], int]:
        """One chunk for each part of the tensor, replicas once, and the rank that holds the first."""
        if parts[0].kind == "plain":
            self._check_replicas(name, parts)
            self.plain += 1
            parts = parts[:1]
        if parts[0].kind == "dtensor":
            if len({len(part.coordinate) for part in parts}) > 1:
                raise ValueError("its meshes differ between the ranks")
            mesh = tuple(max(sizes) + 1 for sizes in zip(*(part.coordinate for part in parts), strict=True))
        found: dict[tuple[int, ...], tuple[int, Chunk]] = {}
        for rank, part in enumerate(parts):
            if part.stored is None or 0 in part.stored.shape:
                continue
            offsets = _dtensor_offsets(part, mesh) if part.kind == "dtensor" else part.offsets
            place = Place(self.zips[rank].place(part.stored), part.stored.strides)
            found.setdefault(offsets, (rank, Chunk(rank, offsets, part.stored.shape, functools.partial(_known, place))))
        ordered = [found[offsets] for offsets in sorted(found)]
        return [chunk for _, chunk in ordered], ordered[0][0] if ordered else 0

    def _check_replicas(self, name: str, parts: Sequence[Part]) -> None:
        """Plain tensors of one name must be one tensor: shards of some other making would pass for it unseen."""
        first, source = parts[0].stored, self.zips[0]
        assert first is not None
        files: Files | None = None
        for rank in range(1, len(parts)):
            other, archive = parts[rank].stored, self.zips[rank]
            assert other is not None
            if other.shape != first.shape:
                raise ValueError(f"it has shape {list(other.shape)} in rank {rank}")
            if source.covers(first) and archive.covers(other) and source.crc[first.key] == archive.crc[other.key]:
                continue
            files = files or Files(self.files, "auto")
            if not (first.contiguous and other.contiguous) or not _same_bytes(
                files,
                name,
                rank,
                (source.place(first), archive.place(other)),
                dtypes.byte_size(first.dtype, first.shape),
            ):
                raise ValueError(
                    f"rank {rank} holds other numbers than rank 0 under this name, and neither says which part it is"
                )


def _same_bytes(files: Files, name: str, rank: int, places: tuple[int, int], nbytes: int) -> bool:
    for start in range(0, nbytes, COMPARED):
        size = min(COMPARED, nbytes - start)
        one, other = (
            files.read(file, place + start, size, name) for file, place in zip((0, rank), places, strict=True)
        )
        if not one.equal(other):
            return False
    return True


def _dtensor_offsets(part: Part, mesh: tuple[int, ...]) -> tuple[int, ...]:
    """Where a rank's part of a DTensor begins: each sharded dimension is cut into equal pieces, the last ones shorter.

    A ``_StridedShard`` was cut after the plain shards of its dimension that come behind it in the mesh.
    """
    assert part.stored is not None
    sizes, offsets = list(part.shape), [0] * len(part.shape)
    straight = [d for d, placement in enumerate(part.placements) if placement.kind() != "_StridedShard"]
    strided = [d for d in reversed(range(len(mesh))) if d not in straight]
    for dimension in (*straight, *strided):
        placement, ranks, number = part.placements[dimension], mesh[dimension], part.coordinate[dimension]
        kind, axis = placement.kind(), _axis(placement)
        if kind == "Replicate" or ranks == 1:
            continue
        if kind not in ("Shard", "_StridedShard") or type(axis) is not int or not 0 <= axis < len(sizes):
            raise ValueError(f"placement {kind} does not say which part of it a rank holds")
        if kind == "_StridedShard":
            behind = [mesh[d] for d in straight if d > dimension and _axis(part.placements[d]) == axis and mesh[d] > 1]
            cut = 1
            for size in behind:
                cut *= size
            if placement.get("split_factor") != cut:
                raise ValueError(f"a strided shard of split factor {placement.get('split_factor')} behind {cut} pieces")
        piece = -(-sizes[axis] // ranks)
        start = min(piece * number, sizes[axis])
        offsets[axis] += start
        sizes[axis] = min(piece, sizes[axis] - start)
    if tuple(sizes) != part.stored.shape:
        raise ValueError(f"a rank should hold {sizes} of it and holds {list(part.stored.shape)}")
    return tuple(offsets)


def _known(place: Place) -> Place:
    return place


def _axis(placement: Record) -> object:
    return placement.args[0] if placement.args else placement.get("dim")


def _words(part: Part) -> str:
    dtype = f"{part.stored.dtype} " if part.stored else ""
    return f"a {part.kind} tensor, {dtype}of shape {list(part.shape)}"
