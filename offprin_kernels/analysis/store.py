"""The output directory: parts while running, tables at the end; nothing is ever half written under its final name."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..checkpoint.write import atomic_write_bytes
from ..output import LOCK, OutputError, dump, lock, read_json
from .plan import unfit
from .schema import COLUMNS, arrow_schema, is_list, numpy_dtype

PLAN, PARTS, MASKS, SUMMARY, LOG = "plan.json", "parts", "masks", "summary.json", "run_log.jsonl"
TABLES = ("tensors", "pairs", "consensus", "stripes", "geometry")

# By these keys a file is known as ours; --overwrite deletes nothing without such proof.
PLAN_KEYS = {"version", "slab_elements", "part_bytes", "options", "names"}
SUMMARY_KEYS = {"complete", "options", "runs", "ledger", "provenance"}


def tables(runs: int, metrics: Sequence[str]) -> list[str]:
    """Tables of an analysis of that many runs, with these metrics."""
    left_out = {"consensus": runs == 1, "geometry": not metrics}
    return [table for table in TABLES if not left_out.get(table)]


def mask_names(identity: dict) -> list[str]:
    """Runs whose masks an analysis saves; a stored plan may be damaged, and no name leads out of the directory."""
    names = identity["names"] if identity["options"]["save_masks"] else []
    return [name for name in names if isinstance(name, str) and not unfit(name)]


class Store:
    """One analysis' directory, locked while it is written to. Close it, or use it in a ``with`` statement."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock: int | None = None

    @classmethod
    def open(cls, root: str | Path, identity: dict, *, overwrite: bool = False) -> Store:
        """Claim an empty directory, or continue one of the same plan.

        Raises OutputError where the directory holds another analysis or foreign files, or cannot be written to.
        """
        store = cls(Path(root))
        try:
            store.check(identity, overwrite)
            if overwrite or not store.finished:
                store.claim(identity, overwrite)
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

    def claim(self, identity: dict, overwrite: bool) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.root)
        # once more: until now another process may have been at work here
        self.check(identity, overwrite)
        if overwrite:
            self.clear()
        if not (self.root / PLAN).exists():
            atomic_write_bytes(self.root / PLAN, dump(identity))

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
            if self.root.exists() and any(path.name != LOCK for path in self.root.iterdir()):
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
        return [] if any((part / "tensors.parquet").exists() for part in self.part_folders()) else None

    def written(self, masks: Sequence[str] | None) -> list[Path]:
        """What an analysis with these masks writes, but for its plan; the summary, which ends it, comes first."""
        if masks is None:
            return []
        names = [SUMMARY, *(f"{table}.parquet{end}" for table in TABLES for end in ("", ".partial")), LOG]
        names += [f"{MASKS}/{run}.safetensors{end}" for run in masks for end in ("", ".partial")]
        return [*(self.root / name for name in names), *self.part_folders()]

    def clear(self) -> None:
        """Remove what an analysis wrote, and nothing else; the plan, which proves the rest ours, goes last."""
        for path in self.written(self.earlier_masks()):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for folder in (MASKS, PARTS):
            with contextlib.suppress(OSError):  # absent, or holds files of others
                (self.root / folder).rmdir()
        (self.root / PLAN).unlink(missing_ok=True)

    # ---- parts: a folder of small parquet files, renamed into place when complete

    def part_path(self, index: int) -> Path:
        return self.root / PARTS / f"{index:05d}"

    def part_folders(self) -> list[Path]:
        """Parts on the disk, half-written ones too."""
        found = sorted((self.root / PARTS).glob("*"))
        return [path for path in found if re.fullmatch(r"\d{5,}(\.partial)?", path.name) and path.is_dir()]

    def has_part(self, index: int) -> bool:
        return (self.part_path(index) / "tensors.parquet").exists()

    def check_parts(self, parts: int) -> None:
        """Raise OutputError unless every part is there: tables made of fewer would be wrong."""
        lost = sum(not self.has_part(index) for index in range(parts))
        if lost:
            raise OutputError(
                f"{self.root / PARTS} has lost {lost} of {parts} finished parts; the same command makes them again"
            )

    def write_part(self, index: int, tables: dict[str, list[dict]]) -> None:
        """Atomic. Rows by table name; a table without rows may be left out."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        partial = self.part_path(index).with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            for table, rows in tables.items():
                if rows:
                    arrow = pa.Table.from_pylist(rows, schema=arrow_schema(list(rows[0])))
                    sink = pa.BufferOutputStream()
                    pq.write_table(arrow, sink, compression="zstd")
                    atomic_write_bytes(partial / f"{table}.parquet", sink.getvalue().to_pybytes())
            os.replace(partial, self.part_path(index))
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def merge_parts(self, table: str, parts: int) -> None:
        """Write ``<table>.parquet`` from all parts, one row group each, without holding more than one in memory."""
        import pyarrow.parquet as pq

        files = [self.part_path(index) / f"{table}.parquet" for index in range(parts)]
        files = [file for file in files if file.exists()]
        wanted = arrow_schema(COLUMNS[table]) if not files else pq.read_schema(files[0])
        partial = self.root / f"{table}.parquet.partial"
        try:
            with pq.ParquetWriter(partial, wanted, compression="zstd") as writer:
                for file in files:
                    writer.write_table(pq.read_table(file, schema=wanted))
            os.replace(partial, self.root / f"{table}.parquet")
        finally:
            partial.unlink(missing_ok=True)

    def drop_parts(self) -> None:
        """Forget what was finished."""
        for path in self.part_folders():
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # absent, or holds files of others
            (self.root / PARTS).rmdir()

    # ---- results

    @property
    def finished(self) -> bool:
        return (self.root / SUMMARY).exists()

    def columns(self, table: str) -> dict[str, np.ndarray]:
        """The scalar columns of a finished table as numpy arrays (object arrays where values may be missing)."""
        import pyarrow.parquet as pq

        names = [name for name in pq.read_schema(self.root / f"{table}.parquet").names if not is_list(name)]
        arrow = pq.read_table(self.root / f"{table}.parquet", columns=names)
        return {name: np.array(arrow[name].to_pylist(), dtype=numpy_dtype(name)) for name in names}

    def rows(self, table: str) -> list[dict]:
        """A finished table as dictionaries; for small tables."""
        import pyarrow.parquet as pq

        return pq.read_table(self.root / f"{table}.parquet").to_pylist()

    def write_summary(self, summary: dict) -> None:
        atomic_write_bytes(self.root / SUMMARY, dump(summary))

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
