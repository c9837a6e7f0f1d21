"""An intervention on a checkpoint on disk: shards are copied as they are, and the copies' attention is changed."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..checkpoint import Checkpoint, CheckpointError
from ..checkpoint.dtypes import TORCH
from ..checkpoint.source import load_json
from . import verify as checks
from .attention import attention_layers, choose_layers, heads_of
from .record import FILE, Intervention, draw
from .transform import touches, transformed

VERIFY = ("auto", "always", "never")
# Files of weights, in whatever format, that the new directory must not show beside its own.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".index.json")


@dataclass(frozen=True)
class Report:
    """What was written and how it was verified; ``skipped`` says why the logits were not compared."""

    record: Intervention
    layers: tuple[checks.LayerCheck, ...]
    logits: checks.LogitCheck | None
    skipped: str | None


def write(
    checkpoint: Checkpoint,
    kind: str,
    out: str | Path,
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    verify: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Write a copy of a model with its attention rotated or permuted, verify it, and only then give it its name.

    Names, dtypes, shards, metadata and every other byte of the shards stay; config and tokenizer files at the top level
    are copied. ``intervention.json`` in the new directory holds the record and the verification, and as ``earlier`` the
    source's own such file; :func:`undo` takes back the last. Memory: the attention of one layer before and after; with
    the logits compared, the model in fp32.

    Args:
        checkpoint: an opened directory of safetensors files with ``config.json``.
        kind: ``"rotate"`` or ``"permute"``.
        out: the directory to make; it must not exist, or be empty.
        layers: numbers of layers; None for all.
        seed: 0 <= seed < 2^63.
        verify: compare logits ``"always"``, ``"never"``, or ``"auto"``: where transformers is installed and the model
            fits into memory in fp32. Each layer's attention is compared in any case.
        progress: called with bytes done, :func:`size` in all.

    Raises:
        ValueError: bad input, as in :func:`rotate`. VerificationError (a ValueError): the function was not preserved.
        CheckpointError (a ValueError): a file that cannot be read. OSError: the copy cannot be written.
        In all cases, and when interrupted, nothing is left at ``out``.
    """
    if verify not in VERIFY:
        raise ValueError(f"unknown verify {verify!r}; choose one of {', '.join(VERIFY)}")
    if Path(checkpoint.source).expanduser().is_file():
        raise ValueError(f"{checkpoint.source} is a file; give the model's directory")
    config = checkpoint.config
    if not config:
        raise ValueError(f"{checkpoint.root} has no config.json, which says how many heads there are")
    if any(file.format != "safetensors" for file in checkpoint.files):
        raise ValueError(f"{checkpoint.source} holds PyTorch files; save the model as safetensors first")
    shapes = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    places = attention_layers(config, shapes)
    chosen = choose_layers(layers, places)
    record = draw(kind, seed, chosen, heads_of(config))
    skipped = _why_no_logits(checkpoint, verify)
    target = _target(checkpoint, Path(out))
    earlier = load_json(checkpoint.root / FILE) if (checkpoint.root / FILE).is_file() else None
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    try:
        _copy(checkpoint, temporary, progress)
        _change(checkpoint, temporary, record)
        copy = Checkpoint.open(temporary)
        results = []
        for layer in chosen:
            before, after = (
                {rest: c.read(name).view(shapes[name][1]) for rest, name in places[layer].items()}
                for c in (checkpoint, copy)
            )
            eps = config.get("rms_norm_eps")
            results.append(
                checks.check_layer(before, after, record, layer, float(eps) if isinstance(eps, float) else 1e-6)
            )
        copy.close()
        logits = None
        if skipped is None:
            stored = {shapes[name][0] for layer in chosen for name in places[layer].values()}
            rounding = max(torch.finfo(TORCH[tag]).eps for tag in stored) / 2
            try:
                logits = checks.check_logits(checkpoint.root, temporary, record, rounding)
            except (KeyboardInterrupt, checks.VerificationError):
                raise
            except Exception as error:
                if verify == "always":
                    raise ValueError(f"transformers cannot run the model to compare logits: {_line(error)}") from None
                skipped = f"transformers cannot run the model: {_line(error)}"
        report = Report(record, tuple(results), logits, skipped)
        record.save(temporary / FILE, _notes(checkpoint, report, earlier))
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return report


def size(checkpoint: Checkpoint) -> int:
    """Bytes of progress: every shard once."""
    return sum(file.size for file in checkpoint.files)


def _target(checkpoint: Checkpoint, out: Path) -> Path:
    """Where to write, links resolved. Raises ValueError where something is there already, or it is in the source."""
    target, source = out.resolve(), checkpoint.root.resolve()
    if target == source or source in target.parents:
        raise ValueError(f"{out} is the source {checkpoint.root} or lies in it; choose another --out")
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{out} is not empty; choose another --out, or empty it")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{out} is a file; choose another --out")
    return target


def _copy(checkpoint: Checkpoint, target: Path, progress: Callable[[int], None] | None) -> None:
    """Shards, index, config and tokenizer; other formats of the weights, hidden files and folders stay behind."""
    for item in sorted(checkpoint.root.iterdir()):
        if item.is_file() and not item.name.startswith(".") and not item.name.endswith(WEIGHTS) and item.name != FILE:
            _copy_file(item, target / item.name)
    index = checkpoint.root / "model.safetensors.index.json"
    if index.is_file():
        _copy_file(index, target / index.name)
    for file in checkpoint.files:
        place = target / file.path.relative_to(checkpoint.root)
        place.parent.mkdir(parents=True, exist_ok=True)
        _copy_file(file.path, place)
        if place.stat().st_size != file.size:
            raise CheckpointError(f"{file.path} changed while it was copied; wait until it is written and start again")
        if progress:
            progress(file.size)


def _copy_file(source: Path, target: Path) -> None:
    with open(source, "rb") as old, open(target, "wb") as new:
        shutil.copyfileobj(old, new, 1 << 24)
        new.flush()
        os.fsync(new.fileno())


def _change(checkpoint: Checkpoint, target: Path, record: Intervention) -> None:
    """Overwrite the attention in the copies, tensor by tensor, at the same places."""
    for index, file in enumerate(checkpoint.files):
        changed = [i for i in checkpoint.tensors.values() if i.file == index and touches(record, i.name, i.shape)]
        with open(target / file.path.relative_to(checkpoint.root), "r+b") as copy:
            for info in changed:
                new = transformed(info.name, checkpoint.read(info.name).view(info.shape), record)
                copy.seek(info.offset)
                copy.write(new.contiguous().view(torch.uint8).numpy().data)
            copy.flush()
            os.fsync(copy.fileno())


def _why_no_logits(checkpoint: Checkpoint, verify: str) -> str | None:
    """Why logits are not compared, or None where they are. Raises ValueError where they must be and cannot."""
    if verify == "never":
        return "not asked for"
    if importlib.util.find_spec("transformers") is None:
        if verify == "always":
            raise ValueError("--verify always needs transformers; pip install 'offprin-kernels[hf]'")
        return "transformers is not installed"
    # fp32, and room for the stored weights while they are converted.
    needed = sum(8 * info.rows * info.columns for info in checkpoint.tensors.values())
    available = _available()
    if verify == "auto" and available is not None and needed > available:
        return f"the model takes {needed / 2**30:.1f} GiB in fp32, and {available / 2**30:.1f} are free"
    return None


def _available() -> int | None:
    """Bytes of memory that are free or can be freed; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def _notes(checkpoint: Checkpoint, report: Report, earlier: dict[str, object] | None) -> dict[str, Any]:
    """What the file says beside the record."""
    return {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "offprin_kernels": __version__,
        "verification": {
            "layers": [asdict(one) for one in report.layers],
            "logits": asdict(report.logits) if report.logits else None,
            "logits_skipped": report.skipped,
        },
        **({"earlier": earlier} if earlier else {}),
    }


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
