"""From what the user typed (directory, file or hub id) to the list of weight files, in a fixed order of preference."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from . import fsdp_ranks, hub, inert, refused
from .adapter import WEIGHTS as ADAPTER_WEIGHTS
from .adapter_config import CONFIG as ADAPTER_CONFIG
from .dcp import METADATA
from .errors import CheckpointError
from .json_file import load_json

TORCH_SUFFIXES = (".bin", ".pt", ".pth")
# What trainers leave beside the weights under the same suffixes.
# Beside an adapter's files these are a model of its own.
WHOLE_MODEL = re.compile(r"model.*\.safetensors(?:\.index\.json)?|pytorch_model\.bin(?:\.index\.json)?")
NOT_MODELS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states", "trainer_state")


@dataclass(frozen=True)
class Source:
    """Where the weights lie. ``index`` maps tensor names to file names where an index says so."""

    root: Path
    revision: str | None
    paths: tuple[Path, ...]
    format: str  # "safetensors", "torch", "dcp", "fsdp" or "peft"
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
        if path.name in ADAPTER_WEIGHTS and (path.parent / ADAPTER_CONFIG).is_file():
            return Source(path.parent, None, (path,), "peft")
        if path.name == METADATA:
            return _in_directory(path.parent, None)
        if path.suffix == ".safetensors":
            return Source(path.parent, None, (path,), "safetensors")
        rank = fsdp_ranks.NAME.fullmatch(path.name)
        if rank and int(rank["world"]) > 1:
            raise CheckpointError(
                f"{path} is the part of rank {rank['rank']} of {rank['world']}; give the directory with those of all"
            )
        if path.suffix in TORCH_SUFFIXES:
            return Source(path.parent, None, (path,), "fsdp" if rank else "torch")
        refused.check_file(path)
        raise CheckpointError(f"{path} is neither a directory nor a .safetensors, .bin, .pt or .pth file")
    if path.suffix == ".safetensors" or path.suffix in TORCH_SUFFIXES:
        raise CheckpointError(f"there is no file {path}; check the path")
    snapshot, revision = hub.resolve(source, download)
    return _in_directory(snapshot, revision)


def _in_directory(root: Path, revision: str | None) -> Source:
    found = _weights(root, revision)
    if found is not None:
        return found
    refused.check_directory(root)
    names = sorted(item.name for item in root.iterdir())
    what = "holds no weights" if names else "is empty"
    below = [name for name in names if (root / name).is_dir() and _weights_below(root / name)]
    if below:
        raise CheckpointError(
            f"{root} {what} itself, but {' and '.join(below[:4])} below it {'does' if len(below) == 1 else 'do'}; "
            f"give {root / below[0]}"
        )
    raise CheckpointError(f"{root} {what} (.safetensors, .bin, .pt or .pth); check the path or download it again")


def _weights(root: Path, revision: str | None) -> Source | None:
    """The weights of a directory in the first of the known formats that it holds, or None."""
    if (root / ADAPTER_CONFIG).is_file() and not any(WHOLE_MODEL.fullmatch(item.name) for item in root.iterdir()):
        for name in ADAPTER_WEIGHTS:
            if (root / name).is_file():
                return Source(root, revision, (root / name,), "peft")
    safetensors = _of_format(root, revision, "model.safetensors", (".safetensors",), "safetensors")
    if safetensors is not None and not _only_adapter(safetensors):
        return safetensors
    whole = _of_format(root, revision, "pytorch_model.bin", (), "torch")
    if whole is not None:
        return whole
    listed = Source(root, revision, (root / METADATA,), "dcp") if (root / METADATA).is_file() else None
    if listed is not None and any(root.glob("*.distcp")):
        return listed
    ranks = fsdp_ranks.rank_files(root)
    if ranks:
        return Source(root, revision, ranks, "fsdp")
    # Other programs keep files called .metadata too; without chunks beside it, it is believed last.
    return _of_format(root, revision, "pytorch_model.bin", TORCH_SUFFIXES, "torch") or listed


def _of_format(root: Path, revision: str | None, single: str, suffixes: tuple[str, ...], format: str) -> Source | None:
    index = root / f"{single}.index.json"
    if index.exists():
        return _indexed(root, revision, index, format)
    if (root / single).exists():
        return Source(root, revision, (root / single,), format)
    found = [item for item in sorted(root.iterdir()) if item.suffix in suffixes and item.is_file()]
    models = tuple(item for item in found if not item.name.startswith(NOT_MODELS) and not refused.is_state(item.name))
    return Source(root, revision, models, format) if models else None


def _only_adapter(source: Source) -> bool:
    return all(path.name in ADAPTER_WEIGHTS for path in source.paths) and (source.root / ADAPTER_CONFIG).is_file()


def _weights_below(folder: Path) -> bool:
    try:
        return _weights(folder, None) is not None
    except CheckpointError:
        # Weights that cannot be opened as they are; the error comes when they are asked for.
        return True
    except OSError:
        return False


def _indexed(root: Path, revision: str | None, index_path: Path, format: str) -> Source:
    weight_map = load_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no weight_map; download or copy this file again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise CheckpointError(
                f"{index_path} places tensor {name} in {inert.text(shard)}, which is no file beside it"
            )
    shards = list(dict.fromkeys(weight_map.values()))
    for shard in shards:
        # os.path rather than Path: a name that no file system could hold is missing too.
        if not os.path.isfile(root / shard):
            name = next(key for key, value in weight_map.items() if value == shard)
            raise CheckpointError(
                f"{index_path} names shard {shard[:80]} (tensor {name}, among others), which is missing; "
                f"download or copy that shard"
            )
    return Source(root, revision, tuple(root / shard for shard in sorted(shards)), format, index_path, weight_map)
