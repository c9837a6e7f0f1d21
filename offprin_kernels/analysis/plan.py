"""What will be compared with what: one unit per base tensor, with every tuned run that has a partner for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import packing
from .._version import __version__
from ..checkpoint import Checkpoint, Pairing, Status, TensorPair, TensorRef, describe, is_linear, pair
from ..ops import subspace
from ..ops.update_scan import Rule, contract
from . import cost, memory
from .experts import matrices
from .schema import SHIFTS

# Elements of one slab: large enough for a scan to run at memory speed, small enough that four of bf16 take 256 MiB.
# Part of the result's definition, because float sums are added slab by slab.
SLAB_ELEMENTS = 1 << 25

# Work between two savings: what an interruption can lose, and what a process claims at once. Each saving costs some
# 10 ms. A small model is saved four times, but not more often than every SMALLEST_PART bytes; with factorisations it is
# cut into at least 64 parts, so that processes end together.
PART_BYTES, SMALLEST_PART = 1 << 31, 1 << 26
PART_FLOPS, FEWEST_PARTS, SMALLEST_FLOPS = 4e12, 64, 2e10

METRICS = ("spectrum", "masks", "energy")

MAX_NAME_BYTES = 200  # of a run: masks/NAME.safetensors.partial stays under the 255 bytes of a file name


@dataclass(frozen=True)
class Options:
    """What to measure. ``rules[0]`` decides masks and everything derived from them."""

    rules: tuple[Rule, ...]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    save_masks: bool = False
    metrics: tuple[str, ...] = ()  # of METRICS, for linear layers, beside the counts that are always taken
    k: int = 128  # dimension of principal subspaces; all of a smaller matrix
    alpha: float = 0.5  # share of coordinates in weight masks
    tol_degrees: float = 0.05  # certificate asked of every tuned subspace
    nss: str = "full"  # spectral shift over "full" spectra, exactly, or over the "top" k values alone, far cheaper

    def __post_init__(self) -> None:
        unknown = [metric for metric in self.metrics if metric not in METRICS]
        if unknown:
            raise ValueError(f"unknown metric {unknown[0]!r}; choose some of {', '.join(METRICS)}")
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must lie in (0, 1], got {self.alpha}")
        if not 1e-4 <= self.tol_degrees <= 45:
            raise ValueError(f"tol_degrees must lie between 1e-4 and 45, got {self.tol_degrees}")
        # the base is converged to a quarter of it
        least = 4 * subspace.least_tolerance(self.k)
        if self.metrics and self.tol_degrees < least:
            raise ValueError(
                f"tol_degrees = {self.tol_degrees:g} is finer than fp32 vectors can show for k = {self.k}; "
                f"give at least {1.06 * least:.1e}, or a smaller k"
            )
        if self.nss not in SHIFTS:
            raise ValueError(f"nss must be one of {', '.join(SHIFTS)}, got {self.nss!r}")
        contract.distinct(self.rules)
        if not 0 < len(self.rules) <= contract.MAX_RULES:
            raise ValueError(f"an analysis takes 1 to {contract.MAX_RULES} rules, got {len(self.rules)}")

    def describe(self) -> dict:
        return {
            "rules": [str(rule) for rule in self.rules],
            "include": list(self.include),
            "exclude": list(self.exclude),
            "save_masks": self.save_masks,
            "metrics": list(self.metrics),
            "k": self.k,
            "alpha": self.alpha,
            "tol_degrees": self.tol_degrees,
            "nss": self.nss,
        }


@dataclass(frozen=True)
class Unit:
    """One base tensor (or one matrix of stacked experts) and its partners: the base is read once, for every run."""

    name: str
    base: TensorRef
    rows: int
    columns: int
    partners: tuple[tuple[int, TensorPair], ...]  # (run, pair)
    layer: int | None
    kind: str
    linear: bool

    @property
    def total(self) -> int:
        return self.rows * self.columns

    @property
    def nbytes(self) -> int:
        """Bytes read from all files."""
        return self.rows * sum(ref.stored_row_bytes for ref in (self.base, *(p.tuned for _, p in self.partners)))

    @property
    def slab_rows(self) -> int:
        return max(1, min(self.rows, SLAB_ELEMENTS // max(1, self.columns)))


@dataclass(frozen=True)
class Plan:
    """Everything an analysis will do, known before the first weight is read."""

    base: Checkpoint
    tuned: tuple[Checkpoint, ...]
    names: tuple[str, ...]
    options: Options
    pairings: tuple[Pairing, ...]
    units: tuple[Unit, ...]
    parts: tuple[tuple[int, ...], ...] = field(default=())

    @property
    def nbytes(self) -> int:
        return sum(unit.nbytes for unit in self.units)

    @property
    def complete(self) -> bool:
        """Whether every tensor of every side could be compared or is accounted for."""
        return all(pairing.complete for pairing in self.pairings)

    @property
    def peak_bytes(self) -> int:
        """Memory that a process takes at most on a CPU, beyond what it has once torch is imported; an estimate."""
        return memory.LIBRARIES + memory.peak_bytes(self.units, self.options)

    def identity(self) -> dict:
        """What must be equal for stored results to belong to this plan."""
        return {
            "version": __version__,
            "slab_elements": SLAB_ELEMENTS,
            "part_bytes": PART_BYTES,
            "part_flops": PART_FLOPS,
            "parts": hashlib.sha256(repr(self.parts).encode()).hexdigest(),
            "options": self.options.describe(),
            "names": list(self.names),
            "base": fingerprint(self.base),
            "tuned": [fingerprint(checkpoint) for checkpoint in self.tuned],
        }

    def part_cost(self, index: int) -> float:
        """Relative cost of a part, by which processes share the work."""
        return sum(cost.seconds(self.units[unit], self.options) for unit in self.parts[index])


def fingerprint(checkpoint: Checkpoint) -> dict:
    """Which files a checkpoint is made of: names, sizes and modification times."""
    return {
        "root": str(checkpoint.root),
        "files": [[file.path.name, file.size, file.mtime_ns] for file in checkpoint.files],
    }


def make_plan(
    base: Checkpoint, tuned: Sequence[Checkpoint], options: Options, names: Sequence[str] | None = None
) -> Plan:
    """Pair every tuned checkpoint with the base. Raises ValueError: no run, unfit names, nothing in common."""
    if not tuned:
        raise ValueError("nothing to compare: name at least one tuned checkpoint after the base")
    names = run_names(tuned) if names is None else tuple(names)
    if len(names) != len(tuned) or len(set(names)) != len(names):
        raise ValueError(f"{len(tuned)} tuned checkpoints need as many different names, got {', '.join(names)}")
    for name in names:
        if reason := unfit(name):
            raise ValueError(f"run name {name[:40]!a} {reason}; choose others with --names")
    pairings = tuple(pair(base, run, include=options.include, exclude=options.exclude) for run in tuned)
    grouped: dict[tuple, list[tuple[int, TensorPair]]] = {}
    for run, found in matrices(base, pairings):
        grouped.setdefault((found.base.name, found.base.start_row, found.base.rows), []).append((run, found))
    units = tuple(sorted(map(make_unit, grouped.values()), key=lambda unit: stream_order(base, unit)))
    if not units:
        raise ValueError(
            f"no tensor of {base.source} can be compared with {' or '.join(run.source for run in tuned)}; "
            "are they checkpoints of the same model, and do --include and --exclude leave anything?"
            + why_none(pairings)
        )
    return Plan(base, tuple(tuned), tuple(names), options, pairings, units, split(units, options))


def unfit(name: str) -> str | None:
    """Why a run's name cannot be part of a file name, or None."""
    if name in ("", ".", ".."):
        return "is no file name"
    if any(character in name for character in "/\\\0"):
        return "holds a slash, a backslash or a NUL"
    try:
        return f"has more than {MAX_NAME_BYTES} bytes" if len(name.encode()) > MAX_NAME_BYTES else None
    except UnicodeEncodeError:
        return "is no text"


def why_none(pairings: Sequence[Pairing]) -> str:
    """The first tensor that was refused, or else left unmatched, as the end of a sentence."""
    entries = [entry for pairing in pairings for entry in pairing.ledger if entry.reason]
    for status in (Status.REFUSED, Status.UNMATCHED):
        for entry in entries:
            if entry.status is status:
                return f" {entry.side} {entry.name}: {entry.reason}"
    return ""


def stream_order(base: Checkpoint, unit: Unit) -> tuple[int, int, int]:
    """Base file order, so that disks read forward."""
    info = base.tensors[unit.base.name]
    return info.file, info.offset, unit.base.start_row


def make_unit(partners: list[tuple[int, TensorPair]]) -> Unit:
    first = partners[0][1]
    layer, kind = describe(first.name)
    whole = first.base.rows == packing.matrix_shape(first.base.shape)[0]
    shape = first.base.shape if whole else (first.base.rows, first.base.columns)
    return Unit(
        name=first.name,
        base=first.base,
        rows=first.base.rows,
        columns=first.base.columns,
        partners=tuple(partners),
        layer=layer,
        kind=kind,
        linear=is_linear(first.name, shape),
    )


def split(units: Sequence[Unit], options: Options) -> tuple[tuple[int, ...], ...]:
    """Consecutive units in parts of about PART_BYTES or PART_FLOPS, or a share of everything where that is less."""
    work = [cost.flops(unit, options) for unit in units]
    limit = min(PART_BYTES, max(SMALLEST_PART, sum(unit.nbytes for unit in units) // 4))
    flops_limit = min(PART_FLOPS, max(SMALLEST_FLOPS, sum(work) / FEWEST_PARTS))
    parts: list[list[int]] = []
    size = flops = 0.0
    for index, unit in enumerate(units):
        if not parts or size >= limit or flops >= flops_limit:
            parts.append([])
            size = flops = 0.0
        parts[-1].append(index)
        size += unit.nbytes
        flops += work[index]
    return tuple(tuple(part) for part in parts)


def run_names(tuned: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Short distinct names: the last path component that tells the runs apart, numbered where none does."""
    stems = []
    for checkpoint in tuned:
        source = checkpoint.source.rstrip("/")
        stems.append(Path(source).stem if Path(source).suffix in (".safetensors", ".bin", ".pt") else Path(source).name)
    names: list[str] = []
    for stem in stems:
        stem = "tuned" if stem in ("", "..") else stem
        name, number = stem, 2
        while name in names:
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
    return tuple(names)
