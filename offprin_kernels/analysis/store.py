"""The output directory: parts while running, tables at the end; nothing is ever half written under its final name.

One process has it for itself, or several share it: the processes of a group, whose first one holds the lock, or shards,
which know nothing of each other and hold a shared lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint.write import atomic_write_bytes
from ..output import LOCK, OutputError, dump, lock, read_json
from .parts import PARTS, Parts
from .plan import unfit

PLAN, CONTEXT, MASKS, SUMMARY, LOG = "plan.json", "context.json", "masks", "summary.json", "run_log.jsonl"
REPORT, FIGURES, CAPTIONS = "report.html", "figures", "captions.json"
TABLES = ("tensors", "pairs", "consensus", "stripes", "geometry", "curves")
# what a process that is just claiming the directory leaves there for a moment
CLAIMING = re.compile(rf"\.({PLAN}|{CONTEXT})\..*\.tmp")

# By these keys a file is known as ours; --overwrite deletes nothing without such proof.
PLAN_KEYS = {"version", "slab_elements", "part_bytes", "options", "names"}
SUMMARY_KEYS = {"complete", "options", "runs", "ledger", "provenance"}


def tables(runs: int, metrics: Sequence[str]) -> list[str]:
    """Tables of an analysis of that many runs, with these metrics."""
    left_out = {"consensus": runs == 1, "geometry": not metrics, "curves": "spectrum" not in metrics}
    return [table for table in TABLES if not left_out.get(table)]


def mask_names(identity: dict) -> list[str]:
    """Runs whose masks an analysis saves; a stored plan may be damaged, and no name leads out of the directory."""
    names = identity["names"] if identity["options"]["save_masks"] else []
    return [name for name in names if isinstance(name, str) and not unfit(name)]


def digest(identity: dict) -> str:
    """What a part says of the plan that it belongs to."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def ours_in_passing(name: str) -> bool:
    """Whether a file of a directory without a plan is no one else's."""
    return name in (LOCK, CONTEXT) or CLAIMING.fullmatch(name) is not None


class Store:
    """One analysis' directory, locked while it is written to. Close it, or use it in a ``with`` statement."""

    def __init__(self, root: Path, identity: dict) -> None:
        self.root = root
        self.parts = Parts(root, digest(identity))
        self._lock: int | None = None

    @classmethod
    def open(
        cls, root: str | Path, identity: dict, context: dict, *, overwrite: bool = False, shared: bool = False
    ) -> Store:
        """Claim an empty directory, or continue one of the same plan.

        ``context`` is what the summary will say beside numbers, kept so that a later process can finish the work.
        Raises OutputError where the directory holds another analysis or foreign files, or cannot be written to.
        """
        store = cls(Path(root), identity)
        try:
            store.check(identity, overwrite)
            if overwrite or not store.finished:
                store.claim(identity, context, overwrite, shared)
            else:
                store.tidy()
        except OSError as error:
            store.close()
            sentence = f"{error.strerror or error} ({error.filename or root})"
            raise OutputError(
                f"{root} cannot take results: {sentence}; make it writable or choose another --out"
            ) from None
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def reopen(cls, root: str | Path, version: str) -> Store:
        """A directory with a plan, for itself, to finish what shards left there.

        Raises OutputError where there is no plan, another process is at work, or the plan is of another version.
        """
        root = Path(root)
        stored = cls(root, {}).stored_plan()
        if stored is None:
            raise OutputError(f"{root} holds no analysis; name the --out directory of one")
        if stored["version"] != version:
            raise OutputError(
                f"{root} holds parts of version {stored['version']} of offprin-kernels (this is {version}); "
                "merge them with that version, or analyze anew"
            )
        store = cls(root, stored)
        if store.finished:
            store.tidy()
        else:
            store._lock = lock(root)
        return store

    def claim(self, identity: dict, context: dict, overwrite: bool, shared: bool) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.root, shared=shared)
        # once more: until now another process may have been at work here
        self.check(identity, overwrite)
        if overwrite:
            self.clear()
        elif self.finished:
            if not shared:
                self.drop_parts()
            return
        if not all((self.root / name).exists() for name in (PLAN, CONTEXT)):
            # the plan comes last: where there is one, there is the other
            atomic_write_bytes(self.root / CONTEXT, dump(context))
            atomic_write_bytes(self.root / PLAN, dump(identity))
        if not shared:
            self.parts.drop(only_partial=True)

    def tidy(self) -> None:
        """Drop what a kill after the end of the analysis has left, unless another process is at work, or may not."""
        if self.parts.folders() or (self.root / CONTEXT).exists():
            with contextlib.suppress(OutputError, OSError):
                self._lock = lock(self.root)
                self.drop_parts()
            self.close()

    def own(self) -> bool:
        """Have the directory for itself from now on, if no other process is at work there."""
        self.close()
        try:
            self._lock = lock(self.root)
        except OutputError:
            return False
        return True

    def close(self) -> None:
        """Let other processes write here."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- what may be done with a directory

    def check(self, identity: dict, overwrite: bool) -> None:
        """Raise OutputError where this analysis may not write here, or what it would return is not whole."""
        if self.root.exists() and not self.root.is_dir():
            raise OutputError(f"{self.root} is a file; name a directory for the results")
        stored = self.stored_plan()
        if overwrite:
            ours = self.written(self.earlier_masks())
            for path in self.written(mask_names(identity)):
                if path not in ours and os.path.lexists(path):
                    raise OutputError(
                        f"{path} is in the way, and no analysis here is known to have written it; "
                        "move it away or choose another --out"
                    )
        elif stored is None:
            if self.root.exists() and not all(ours_in_passing(path.name) for path in self.root.iterdir()):
                raise OutputError(
                    f"{self.root} is not empty and holds no analysis; choose another --out, or --overwrite"
                )
        elif stored != json.loads(json.dumps(identity)):
            what = "another pair, other options or files changed since"
            if stored["version"] != identity["version"]:
                what = f"version {stored['version']} of offprin-kernels (this is {identity['version']})"
            raise OutputError(
                f"{self.root} holds the results of {what}; choose another --out, or --overwrite to replace them"
            )
        elif self.finished:
            self.check_whole(identity)

    def check_whole(self, identity: dict) -> None:
        """Raise OutputError where a finished analysis lacks a file or its summary cannot be read."""
        names = [f"{table}.parquet" for table in tables(len(identity["names"]), identity["options"]["metrics"])]
        names += [f"{MASKS}/{run}.safetensors" for run in mask_names(identity)]
        missing = [name for name in names if not (self.root / name).exists()]
        if missing:
            raise OutputError(f"{self.root} is finished but lacks {', '.join(missing)}; --overwrite makes all anew")
        self.read_summary()

    def stored_plan(self) -> dict | None:
        """The plan whose results lie here, or None. Raises OutputError for a file of that name that is not ours."""
        path = self.root / PLAN
        if not path.exists():
            return None
        stored = read_json(path, "move it away or choose another --out")
        with contextlib.suppress(AttributeError, KeyError, TypeError):  # not even of a plan's form
            if stored.keys() >= PLAN_KEYS and mask_names(stored) is not None:
                return stored
        raise OutputError(f"{path} is not the plan of an analysis; choose another --out")

    def earlier_masks(self) -> list[str] | None:
        """Runs whose masks were saved here; None where nothing proves that any file is ours."""
        if stored := self.stored_plan():
            return mask_names(stored)
        with contextlib.suppress(OutputError, KeyError, TypeError):
            summary = self.read_summary()
            return mask_names({**summary, "names": [run["run"] for run in summary["runs"]]})
        return [] if any((part / "tensors.parquet").exists() for part in self.parts.folders()) else None

    def written(self, masks: Sequence[str] | None) -> list[Path]:
        """What an analysis with these masks writes, but for its plan; the summary, which ends it, comes first."""
        if masks is None:
            return []
        names = [SUMMARY, *(f"{table}.parquet{end}" for table in TABLES for end in ("", ".partial")), LOG, REPORT]
        names += [f"{MASKS}/{run}.safetensors{end}" for run in masks for end in ("", ".partial")]
        return [*(self.root / name for name in names), self.root / CONTEXT, *self.figures(), *self.parts.folders()]

    def figures(self) -> list[Path]:
        """Figures of an earlier analysis, named by their captions, which go last."""
        captions = self.root / FIGURES / CAPTIONS
        drawn: object = None
        with contextlib.suppress(OutputError):
            drawn = read_json(captions, "")
        if not isinstance(drawn, dict):
            return []
        names = [f"{key}.{kind}" for key in drawn if not unfit(key) for kind in ("png", "pdf")]
        return [*(captions.parent / name for name in names), captions]

    def clear(self) -> None:
        """Remove what an analysis wrote, and nothing else; the plan, which proves the rest ours, goes last."""
        for path in self.written(self.earlier_masks()):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for folder in (MASKS, FIGURES, PARTS):
            with contextlib.suppress(OSError):  # absent, or holds files of others
                (self.root / folder).rmdir()
        (self.root / PLAN).unlink(missing_ok=True)

    # ---- results

    def drop_parts(self) -> None:
        """Forget what a finished analysis needs no more."""
        self.parts.drop()
        (self.root / CONTEXT).unlink(missing_ok=True)

    @property
    def finished(self) -> bool:
        return (self.root / SUMMARY).exists()

    def write_summary(self, summary: dict) -> None:
        atomic_write_bytes(self.root / SUMMARY, dump(summary))

    def read_context(self) -> dict:
        """Raises OutputError where it is lost."""
        found = read_json(self.root / CONTEXT, "the command that began the analysis makes all anew with --overwrite")
        if not isinstance(found, dict):
            raise OutputError(f"{self.root / CONTEXT} is damaged; begin the analysis anew with --overwrite")
        return found

    def read_summary(self) -> dict:
        """Raises OutputError where it is not one of ours."""
        found = read_json(self.root / SUMMARY, "--overwrite makes it anew")
        if not isinstance(found, dict) or not found.keys() >= SUMMARY_KEYS:
            raise OutputError(f"{self.root / SUMMARY} is not the summary of an analysis; --overwrite makes it anew")
        return found

    def log(self, entry: dict) -> None:
        """Append one line about this process: times, speed. Kept apart so that results stay reproducible."""
        with (self.root / LOG).open("a") as file:
            file.write(json.dumps(entry) + "\n")
