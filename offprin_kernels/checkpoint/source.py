"""From what the user typed (directory, file or hub id) to the list of weight files, in a fixed order of preference."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from . import hub
from .errors import CheckpointError

TORCH_SUFFIXES = (".bin", ".pt", ".pth")
# What trainers leave beside the weights under the same suffixes.
NOT_MODELS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states", "trainer_state")


@dataclass(frozen=True)
class Source:
    """Where the weights lie. ``index`` maps tensor names to file names where an index says so."""

    root: Path
    revision: str | None
    paths: tuple[Path, ...]
    format: str  # "safetensors" or "torch"
    index_path: Path | None = None
    index: dict[str, str] = field(default_factory=dict)


def locate(source: str, download: bool = False) -> Source:
    """The files behind a directory, a file or a hub id. A local path wins over a hub id of the same name.

    Raises:
        CheckpointError: nothing there, no weights in it, or an index that is corrupt or names a missing shard.
    """
    path = Path(os.path.expanduser(source))
    # os.path rather than Path: a name that no file system could hold is simply not there.
    if source and os.path.isdir(path):
        return _in_directory(path, None)
    if source and os.path.exists(path):
        if path.name.endswith(".index.json"):
            return _indexed(path.parent, None, path, "torch" if ".bin." in path.name else "safetensors")
        if path.suffix == ".safetensors":
            return Source(path.parent, None, (path,), "safetensors")
        if path.suffix in TORCH_SUFFIXES:
            return Source(path.parent, None, (path,), "torch")
        raise CheckpointError(f"{path} is neither a directory nor a .safetensors, .bin, .pt or .pth file")
    if path.suffix == ".safetensors" or path.suffix in TORCH_SUFFIXES:
        raise CheckpointError(f"there is no file {path}; check the path")
    snapshot, revision = hub.resolve(source, download)
    return _in_directory(snapshot, revision)


def load_json(path: Path) -> dict[str, object]:
    """A JSON object from a file; raises CheckpointError where it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download or copy this file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object; download or copy this file again")
    return value


def _in_directory(root: Path, revision: str | None) -> Source:
    for index_name, single, suffixes, format in (
        ("model.safetensors.index.json", "model.safetensors", (".safetensors",), "safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin", TORCH_SUFFIXES, "torch"),
    ):
        if (root / index_name).exists():
            return _indexed(root, revision, root / index_name, format)
        if (root / single).exists():
            return Source(root, revision, (root / single,), format)
        found = [item for item in sorted(root.iterdir()) if item.suffix in suffixes and item.is_file()]
        models = tuple(item for item in found if not item.name.startswith(NOT_MODELS))
        if models:
            return Source(root, revision, models, format)
    what = "is empty" if not any(root.iterdir()) else "holds no weights"
    raise CheckpointError(f"{root} {what} (.safetensors, .bin, .pt or .pth); check the path or download it again")


def _indexed(root: Path, revision: str | None, index_path: Path, format: str) -> Source:
    weight_map = load_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no weight_map; download or copy this file again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise CheckpointError(f"{index_path} places tensor {name} in {shard!r}, which is no file beside it")
    shards = list(dict.fromkeys(weight_map.values()))
    for shard in shards:
        if not (root / shard).is_file():
            name = next(key for key, value in weight_map.items() if value == shard)
            raise CheckpointError(
                f"{index_path} names shard {shard} (tensor {name}, among others), which is missing; "
                f"download or copy that shard"
            )
    return Source(root, revision, tuple(root / shard for shard in sorted(shards)), format, index_path, weight_map)
