"""The output directory: parts while running, tables at the end; nothing is ever half written under its final name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np

from ..checkpoint.write import atomic_write_bytes
from .schema import COLUMNS, arrow_schema, is_list, numpy_dtype

PLAN, PARTS, SUMMARY, LOG = "plan.json", "parts", "summary.json", "run_log.jsonl"
TABLES = ("tensors", "pairs", "consensus", "stripes")


class OutputError(ValueError):
    """The output directory cannot be used; one sentence says why and what to do."""


class Store:
    """One analysis' directory. ``open`` either claims an empty one or continues one with the same plan."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def open(cls, root: str | Path, identity: dict, *, overwrite: bool = False) -> Store:
        """Claim or continue. Raises OutputError where the directory holds another analysis or foreign files."""
        store = cls(Path(root))
        plan = store.root / PLAN
        if store.root.exists() and not store.root.is_dir():
            raise OutputError(f"{store.root} is a file; name a directory for the results")
        if plan.exists() and overwrite:
            store.clear()
        elif plan.exists():
            if read_json(plan) != json.loads(json.dumps(identity)):
                raise OutputError(
                    f"{store.root} holds the results of another pair, other options or files changed since; "
                    "choose another --out, or --overwrite to replace them"
                )
            (store.root / PARTS).mkdir(exist_ok=True)
            return store
        elif store.root.exists() and any(store.root.iterdir()) and not overwrite:
            raise OutputError(f"{store.root} is not empty and holds no analysis; choose another --out, or --overwrite")
        (store.root / PARTS).mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(plan, dump(identity))
        return store

    def clear(self) -> None:
        """Remove what an analysis writes, and nothing else."""
        shutil.rmtree(self.root / PARTS, ignore_errors=True)
        shutil.rmtree(self.root / "masks", ignore_errors=True)
        for name in (PLAN, SUMMARY, LOG, *(f"{table}.parquet" for table in TABLES)):
            (self.root / name).unlink(missing_ok=True)

    # ---- parts: a folder of small parquet files, renamed into place when complete

    def part_path(self, index: int) -> Path:
        return self.root / PARTS / f"{index:05d}"

    def has_part(self, index: int) -> bool:
        return self.part_path(index).exists()

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

    def restart_parts(self) -> None:
        """Forget what was finished."""
        self.drop_parts()
        (self.root / PARTS).mkdir()

    def drop_parts(self) -> None:
        shutil.rmtree(self.root / PARTS, ignore_errors=True)

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
        return read_json(self.root / SUMMARY)

    def log(self, entry: dict) -> None:
        """Append one line about this process: times, speed. Kept apart so that results stay reproducible."""
        with (self.root / LOG).open("a") as file:
            file.write(json.dumps(entry) + "\n")


def dump(value: dict) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=False) + "\n").encode()


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read ({error}); delete it, or use --overwrite") from None
