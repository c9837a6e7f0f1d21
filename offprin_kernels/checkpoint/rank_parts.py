"""What one rank holds of a tensor: which classes its file may name, and where its part of the whole begins."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from . import inert
from .inert import Record
from .torch_zip import Stored, tensor_of

_TENSOR, _SHARD = "torch.distributed.tensor", "torch.distributed._shard"
ALLOWED = frozenset(
    {
        "builtins.getattr",
        "torch._tensor._rebuild_from_type_v2",
        # of buffers, and of tensors with attributes of their own
        "torch.Tensor",
        "torch._tensor.Tensor",
        *(f"torch.nn.parameter.{name}" for name in ("Parameter", "Buffer")),
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


def part_of(value: object) -> Part | None:
    """What a value of a state dict is; raises ValueError where it is a tensor that says too little."""
    stored = tensor_of(value)
    if stored is not None:
        return Part("plain", stored, stored.shape, (0,) * len(stored.shape))
    if not isinstance(value, Record) or value.kind() != "_rebuild_from_type_v2" or len(value.args) < 4:
        return None
    build, kind, made, state = value.args[:4]
    name = kind.name.rpartition(".")[2] if isinstance(kind, type) and issubclass(kind, Record) else ""
    if name == "DTensor":
        return _dtensor(made, state)
    if name == "ShardedTensor":
        return _sharded(state)
    if name in ("Tensor", "Parameter", "Buffer") and isinstance(build, type) and isinstance(made, tuple):
        stored = tensor_of(build(*made)) if issubclass(build, Record) else None
        return Part("plain", stored, stored.shape, (0,) * len(stored.shape)) if stored else None
    return None


def _dtensor(made: object, state: object) -> Part:
    # Attributes and slots: a parameter has both.
    fields: dict = {}
    for held in state if isinstance(state, tuple) else (state,):
        fields |= held if isinstance(held, dict) else {}
    # (class, dtype, shape, strides, ...)
    shape = inert.sizes_of(made[2]) if isinstance(made, tuple) and len(made) > 2 else None
    spec = fields.get("_spec")
    stored = tensor_of(fields.get("_local_tensor"))
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


def dtensor_offsets(part: Part, mesh: tuple[int, ...]) -> tuple[int, ...]:
    """Where a rank's part of a DTensor begins: each sharded axis is cut into equal pieces, the last ones shorter."""
    assert part.stored is not None
    sizes, offsets = list(part.shape), [0] * len(part.shape)
    for axis, cuts in _cuts(part, mesh).items():
        for dimension in cuts:
            piece = -(-sizes[axis] // mesh[dimension])
            start = min(piece * part.coordinate[dimension], sizes[axis])
            offsets[axis] += start
            sizes[axis] = min(piece, sizes[axis] - start)
    if tuple(sizes) != part.stored.shape:
        raise ValueError(f"a rank should hold {sizes} of it and holds {list(part.stored.shape)}")
    return tuple(offsets)


def _cuts(part: Part, mesh: tuple[int, ...]) -> dict[int, list[int]]:
    """Axis -> dimensions of the mesh that cut it, in the order in which they did.

    Plain shards cut from left to right. A ``_StridedShard`` cut after dimensions to its right: after as many of them as
    have its split factor as the product of their sizes (as torch's _maybe_convert_StridedShard_to_shard_order finds).
    """
    cuts: dict[int, list[int]] = defaultdict(list)
    for dimension in reversed(range(len(mesh))):
        placement = part.placements[dimension]
        kind, axis = placement.kind(), placement.args[0] if placement.args else placement.get("dim")
        if kind == "Replicate" or mesh[dimension] == 1:
            continue
        if kind not in ("Shard", "_StridedShard") or type(axis) is not int or not 0 <= axis < len(part.shape):
            raise ValueError(f"placement {kind[:80]} does not say which part of it a rank holds")
        factor, before, place = placement.get("split_factor") if kind == "_StridedShard" else 1, 1, 0
        while before != factor and place < len(cuts[axis]):
            before *= mesh[cuts[axis][place]]
            place += 1
        if before != factor:
            raise ValueError(f"a strided shard of split factor {inert.text(factor)} behind {before} pieces")
        cuts[axis].insert(place, dimension)
    return cuts
