"""Checkpoints made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from offprin_kernels.checkpoint import Checkpoint, CheckpointError, Pairing, pair


def bf16(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict | None = None) -> Path:
    """A directory with one model.safetensors, written by the safetensors library."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_sharded(folder: Path, shards: list[dict[str, torch.Tensor]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, tensors in enumerate(shards):
        shard = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / shard)
        weight_map.update(dict.fromkeys(tensors, shard))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def raw(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def refused(action: Callable[[], object]) -> str | None:
    """The message of a CheckpointError, or None where the action went well; anything else is raised."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return None


def pair_of(folder: Path, base: dict, tuned: dict, configs: tuple = (None, None), **options) -> Pairing:
    """Pairing of two sets of tensors that were written to disk; checks what holds for every pairing."""
    one = Checkpoint.open(save(folder / "base", base, configs[0]))
    two = Checkpoint.open(save(folder / "tuned", tuned, configs[1]))
    return checked(one, two, **options)


def checked(one: Checkpoint, two: Checkpoint, **options) -> Pairing:
    pairing = pair(one, two, **options)
    for side, checkpoint in (("base", one), ("tuned", two)):
        assert [entry.name for entry in pairing.ledger if entry.side == side] == list(checkpoint.tensors)
    compared = {entry.name for entry in pairing.ledger if entry.side == "base" and entry.status in COMPARED}
    assert compared == {found.base.name for found in pairing.pairs}
    for found in pairing.pairs:
        assert (found.base.rows, found.base.columns) == (found.tuned.rows, found.tuned.columns)
    for entry in pairing.ledger:
        assert entry.reason or entry.status == "compared", entry
    assert sum(sum(counts.values()) for counts in pairing.counts().values()) == len(pairing.ledger)
    return pairing


COMPARED = ("compared", "cast", "partial")


def status(pairing: Pairing, side: str, name: str) -> str:
    return next(entry.status.value for entry in pairing.ledger if (entry.side, entry.name) == (side, name))


def reason(pairing: Pairing, side: str, name: str) -> str:
    return next(entry.reason for entry in pairing.ledger if (entry.side, entry.name) == (side, name))
