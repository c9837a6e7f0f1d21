"""Masks that a checkpoint's own weights decide, for all its linear layers: what ``offprin mask`` writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from .. import masks, packing
from ..bitmask import FORMAT
from ..checkpoint import Checkpoint, is_linear
from ..checkpoint.reader import TensorInfo
from ..checkpoint.write import SafetensorsWriter

KINDS = masks.KINDS
DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class MaskOptions:
    """Which masks. ``k`` and ``tol_degrees`` matter to principal, non-principal and safe masks only."""

    kind: str
    alpha: float = 0.5
    k: int = 128
    seed: int = 0
    tol_degrees: float = 0.05
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}; choose one of {', '.join(KINDS)}")
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        masks.count_for(self.alpha, 1)

    @property
    def needs_factors(self) -> bool:
        return self.kind in ("principal", "non-principal", "safe")


@dataclass(frozen=True)
class MaskReport:
    """What was written: coordinates in the masks and in all, and matrices whose factors missed the tolerance."""

    tensors: int
    total: int
    inside: int
    not_converged: tuple[tuple[str, float], ...]  # (name, error in degrees)


def chosen(checkpoint: Checkpoint, options: MaskOptions) -> list[TensorInfo]:
    """Linear layers that the globs leave, in file order. Raises ValueError for none, or for one without numbers."""

    def hit(globs: Sequence[str], name: str) -> bool:
        return any(fnmatchcase(name, glob) for glob in globs)

    found = [
        info
        for name, info in checkpoint.tensors.items()
        if is_linear(name, info.shape)
        and (not options.include or hit(options.include, name))
        and not hit(options.exclude, name)
    ]
    for glob in options.include:
        if not any(fnmatchcase(info.name, glob) for info in found):
            raise ValueError(f"{checkpoint.source} has no linear layer that --include {glob} leaves; check the names")
    if not found:
        raise ValueError(f"{checkpoint.source} has no linear layer that --exclude leaves")
    for info in found:
        if info.dtype not in DTYPES:
            raise ValueError(
                f"{checkpoint.path_of(info.name)}: tensor {info.name} has dtype {info.dtype}, and masks need bf16, "
                "fp16 or fp32; save it in one of these, or --exclude it"
            )
    return found


def write_masks(
    checkpoint: Checkpoint,
    options: MaskOptions,
    out: str | Path,
    *,
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] | None = None,
) -> MaskReport:
    """Write one mask per linear layer into a safetensors file that :meth:`BitMask.load` reads; whole or not at all.

    A tensor that holds a matrix per expert gets a mask of its shape, made matrix by matrix.

    Raises:
        ValueError: bad options, nothing to do, a weight with NaN or Inf (named).
        CheckpointError: a file cannot be read. OSError: the masks cannot be written.
    """
    tensors = chosen(checkpoint, options)
    layout = {info.name: ("U8", (info.rows, packing.row_bytes(info.columns))) for info in tensors}
    metadata = {
        "format": FORMAT,
        "shapes": json.dumps({info.name: list(info.shape) for info in tensors}),
        "kind": options.kind,
        "alpha": str(options.alpha),
        **({"k": str(options.k)} if options.needs_factors else {}),
        **({"seed": str(options.seed)} if options.kind == "random" else {}),
    }
    writer = SafetensorsWriter(out, layout, metadata)
    inside, missed = 0, []
    try:
        for index, info in enumerate(tensors):
            rows = info.shape[-2]
            for start in range(0, info.rows, max(1, rows)):
                weight = checkpoint.read(info.name, start, start + rows).to(device)
                try:
                    mask, error = masks.mask_and_error(
                        weight,
                        options.kind,
                        options.alpha,
                        k=options.k,
                        seed=options.seed + index + start,
                        tol_degrees=options.tol_degrees,
                    )
                except ValueError as problem:
                    raise ValueError(f"{checkpoint.path_of(info.name)}: tensor {info.name}: {problem}") from None
                if error > options.tol_degrees:
                    missed.append((info.name, error))
                inside += mask.count()
                writer.write(info.name, start * packing.row_bytes(info.columns), mask.words)
                if progress:
                    progress(weight.nbytes)
        writer.finish()
    except BaseException:
        writer.discard()
        raise
    return MaskReport(len(tensors), sum(info.rows * info.columns for info in tensors), inside, tuple(missed))
