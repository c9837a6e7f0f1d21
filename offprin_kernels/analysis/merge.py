"""From parts to the tables and the summary; and parts that were made elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .._env import versions
from .._version import __version__
from ..checkpoint import Checkpoint
from ..output import OutputError, strict
from .compact import Rows, columns
from .plan import Plan
from .store import MASKS, PLAN, Store, tables
from .summary import summarize

# Bytes of a sample, and into how many stretches a file is cut, each of which gives one: its header is in the first.
SAMPLE, STRETCHES = 1 << 14, 4


@dataclass(frozen=True)
class Outcome:
    """What an analysis came to: the content of ``summary.json``, or None where other processes have that."""

    root: Path
    summary: dict | None
    missing_parts: int = 0
    complete: bool = True  # False where tensors were left unmatched or refused, or parts are missing
    silent_ranks: tuple[int, ...] = ()  # of a group: gone without a word, so that rank 0 made their parts


def finish(store: Store) -> dict:
    """Merge the parts into tables, write the summary last (it marks the analysis as finished), drop the parts."""
    told = store.read_context()
    parts, names, options = told["parts"], told["names"], told["options"]
    store.parts.check(parts)
    paths = {table: store.root / f"{table}.parquet" for table in tables(len(names), options["metrics"])}
    for table, path in paths.items():
        store.parts.merge(table, parts, path)
    if options["save_masks"]:
        for run, name in enumerate(names):
            store.parts.merge_masks(run, parts, store.root / MASKS / f"{name}.safetensors")
    found: dict = {
        "tensors": columns(paths["tensors"]),
        "pairs": columns(paths["pairs"]),
        "consensus": Rows(paths["consensus"]) if "consensus" in paths else [],
        "geometry": Rows(paths["geometry"]) if "geometry" in paths else [],
    }
    summary = strict(summarize(told, found, versions()))
    store.write_summary(summary)
    store.drop_parts()
    return summary


def merge(out: str | Path, others: Sequence[str | Path] = ()) -> Outcome:
    """Finish what shards left in ``out``; parts that lie in ``others``, made of the same plan, are copied first.

    Raises OutputError: no analysis there, parts of another version or plan, parts missing, another process at work.
    """
    with Store.reopen(out, __version__) as store:
        for other in others:
            take(store, Path(other))
        summary = store.read_summary() if store.finished else finish(store)
        return Outcome(store.root, summary, complete=summary["complete"])


def take(store: Store, other: Path) -> None:
    """Copy what parts ``other`` has. Raises OutputError where they are of another plan, version or weights."""
    if other.exists() and other.samefile(store.root):
        raise OutputError(f"{other} is the directory to merge into, whose parts are used anyway; name others, or none")
    with Store.reopen(other, __version__) as second:
        mine, theirs = (portable_plan(found) for found in (store, second))
        if mine == theirs and not (store.finished or second.finished):
            mine, theirs = (portable_context(found) for found in (store, second))
        if mine != theirs:
            raise OutputError(f"{other} holds parts of {difference(mine, theirs)}; not merged")
        if store.finished:
            return
        if second.finished:
            raise OutputError(f"{other} is finished: it has all tables, and no parts to take")
        store.parts.take(second.parts, store.read_context()["parts"])


# ---- the same plan on another machine


def portable_plan(store: Store) -> dict:
    """The stored plan, but for where files lay and when they were written. Raises OutputError where it is damaged."""

    def bare(checkpoint: dict) -> dict:
        files = [[*file[:2], *file[3:]] for file in checkpoint["files"]]
        return {**{key: value for key, value in checkpoint.items() if key != "root"}, "files": files}

    plan = store.stored_plan() or {}
    try:
        return {**plan, "base": bare(plan["base"]), "tuned": [bare(checkpoint) for checkpoint in plan["tuned"]]}
    except (KeyError, TypeError, AttributeError):
        raise OutputError(f"{store.root / PLAN} is damaged; begin the analysis anew with --overwrite") from None


def portable_context(store: Store) -> dict:
    """What else must be equal: names and dtypes of tensors, how they were paired, and samples of their bytes."""

    def bare(checkpoint: dict) -> dict:
        return {key: value for key, value in checkpoint.items() if key not in ("source", "revision", "root")}

    told = store.read_context()
    try:
        told = {**told, "base": bare(told["base"]), "tuned": [bare(checkpoint) for checkpoint in told["tuned"]]}
    except (KeyError, TypeError, AttributeError):
        raise OutputError(f"the context of {store.root} is damaged; begin the analysis anew with --overwrite") from None
    return {key: value for key, value in told.items() if key != "command"}


def samples(plan: Plan) -> dict[str, str]:
    """A hash of some bytes of every file: two checkpoints of one training run have files of the same names and sizes.

    Raises OSError where a file is gone.
    """
    labelled = {"base": plan.base, **{f"tuned {name}": run for name, run in zip(plan.names, plan.tuned, strict=True)}}
    return {label: sample(checkpoint) for label, checkpoint in labelled.items()}


def sample(checkpoint: Checkpoint) -> str:
    found = hashlib.sha256()
    for info in checkpoint.files:
        with info.path.open("rb") as file:
            for start in range(0, info.size, max(SAMPLE, info.size // STRETCHES)):
                file.seek(start)
                found.update(file.read(SAMPLE))
    return found.hexdigest()


def difference(mine: dict, other: dict) -> str:
    """In what two plans, or their contexts, differ, as the end of a sentence."""
    if mine.get("version") != other.get("version"):
        return f"version {other['version']} of offprin-kernels (this is {mine['version']})"
    names = [key for key in mine if mine[key] != other.get(key)]
    if names == ["samples"]:
        ours, theirs = mine["samples"], other.get("samples") or {}
        sides = [side for side in ours if ours[side] != theirs.get(side)]
        return f"other weights in files of the same names and sizes ({', '.join(sides)})"
    return f"another plan (different {', '.join(names)})"
