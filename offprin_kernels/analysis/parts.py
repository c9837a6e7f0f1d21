"""Finished work on the disk: a folder for each part of a plan, made by any process, merged into tables in plan order.

A part is written under a name of its own and renamed when whole. It says which plan it belongs to, what its tables
must hash to and how large its masks must be, so that one torn by a crash is known and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from ..checkpoint import Checkpoint, CheckpointError, SafetensorsWriter
from ..checkpoint.safetensors_file import read_header
from ..output import OutputError
from .schema import COLUMNS, arrow_schema

# Bytes of rows that are written at once: a row group of 90 columns costs as much as thousands of rows in it.
ROW_GROUP = 1 << 25

# Of the few rows of a part, soon merged: dictionaries and statistics of 90 columns would cost more than their values.
PLAIN = {"compression": "none", "use_dictionary": False, "write_statistics": False}

PARTS, PART = "parts", "part.json"
PART_NAME = re.compile(r"\d{5,}(\.[0-9a-f]+\.partial)?")


class Parts:
    """The parts of one plan under ``root/parts``; ``digest`` identifies the plan."""

    def __init__(self, root: Path, digest: str) -> None:
        self.root, self.digest = root / PARTS, digest

    def path(self, index: int) -> Path:
        return self.root / f"{index:05d}"

    def folders(self) -> list[Path]:
        """Parts on the disk, half-written ones too."""
        return [path for path in sorted(self.root.glob("*")) if PART_NAME.fullmatch(path.name) and path.is_dir()]

    def has(self, index: int) -> bool:
        """Whether a part is there, belongs to this plan and is whole."""
        return not self.fault(index)

    def fault(self, index: int) -> str | None:
        """Why a part cannot be used, or None."""
        path = self.path(index)
        try:
            told = json.loads((path / PART).read_text())
            if told["plan"] != self.digest:
                return f"part {index} belongs to another plan"
            for name, want in told["files"].items():
                if want != seal(path / name):
                    return f"{path / name} is damaged"
        except FileNotFoundError:
            return f"part {index} is missing"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"{path / PART} cannot be read"
        return None

    def missing(self, count: int) -> list[int]:
        return [index for index in range(count) if not self.has(index)]

    def begin(self, index: int) -> Path:
        """A folder to write a part into; no other process has one of this name."""
        partial = self.root / f"{index:05d}.{os.urandom(6).hex()}.partial"
        partial.mkdir(parents=True)
        return partial

    def write(self, partial: Path, index: int, tables: Mapping[str, list[dict]]) -> None:
        """Rows by table name (a table without rows may be left out) beside what ``partial`` holds, then its name."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        for table, rows in tables.items():
            if rows:
                arrow = pa.Table.from_pylist(rows, schema=arrow_schema(list(rows[0])))
                pq.write_table(arrow, partial / f"{table}.parquet", **PLAIN)
        files = {path.name: seal(path) for path in sorted(partial.iterdir())}
        (partial / PART).write_text(json.dumps({"plan": self.digest, "files": files}))
        self.install(partial, index)

    def install(self, partial: Path, index: int) -> None:
        """Give a whole part its name, unless another process was faster; a damaged one of that name makes way."""
        for _ in range(2):
            try:
                os.rename(partial, self.path(index))
                return
            except OSError:
                if not self.path(index).is_dir():
                    raise
                if self.has(index):
                    shutil.rmtree(partial)
                    return
                shutil.rmtree(self.path(index), ignore_errors=True)
        raise OutputError(f"{self.path(index)} is damaged and cannot be replaced; delete it by hand")

    def abandon(self, partial: Path) -> None:
        """Remove what was begun and not written."""
        shutil.rmtree(partial, ignore_errors=True)

    def take(self, other: Parts, count: int) -> None:
        """Copy the parts of another directory that are missing here; they are of this plan, as the caller knows."""
        for index in range(count):
            if self.has(index) or not other.has(index):
                continue
            partial = self.begin(index)
            try:
                shutil.copytree(other.path(index), partial, dirs_exist_ok=True)
                told = json.loads((partial / PART).read_text())
                (partial / PART).write_text(json.dumps({**told, "plan": self.digest}))
                self.install(partial, index)
            except BaseException:
                self.abandon(partial)
                raise

    def check(self, count: int) -> None:
        """Raise OutputError unless every part is there: tables made of fewer would be wrong."""
        lost = self.missing(count)
        if lost:
            raise OutputError(
                f"{self.root} lacks {len(lost)} of {count} finished parts ({self.fault(lost[0])}); "
                "the same command makes them again"
            )

    def merge(self, table: str, count: int, target: Path) -> None:
        """Write a table from all parts, in row groups of no more than ROW_GROUP bytes or one part; sync it."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        files = [self.path(index) / f"{table}.parquet" for index in range(count)]
        files = [file for file in files if file.exists()]
        wanted = arrow_schema(COLUMNS[table]) if not files else pq.read_schema(files[0])
        partial = target.with_name(f"{target.name}.partial")
        try:
            with pq.ParquetWriter(partial, wanted, compression="zstd") as writer:
                group: list[pa.Table] = []
                held = 0
                for file in files:
                    with pq.ParquetFile(file) as part:
                        rows = part.read(use_threads=False).cast(wanted)
                    size = rows.nbytes
                    if group and held + size > ROW_GROUP:
                        writer.write_table(pa.concat_tables(group).combine_chunks())
                        group, held = [], 0
                    group.append(rows)
                    held += size
                if group:
                    writer.write_table(pa.concat_tables(group).combine_chunks())
            sync(partial)
            os.replace(partial, target)
            sync(target.parent)
        finally:
            partial.unlink(missing_ok=True)

    def merge_masks(self, run: int, count: int, target: Path) -> None:
        """One file of one run's masks out of all parts, in plan order; as :func:`masks.part_writers` made them."""
        files = [path for index in range(count) if (path := self.path(index) / mask_file(run)).exists()]
        layout: dict[str, tuple[str, tuple[int, ...]]] = {}
        shapes: dict[str, list[int]] = {}
        metadata: dict[str, str] = {}
        try:
            for file in files:
                entries, metadata = read_header(file)
                layout |= {entry.name: (entry.dtype, entry.shape) for entry in entries}
                shapes |= json.loads(metadata["shapes"])
            target.parent.mkdir(exist_ok=True)
            with SafetensorsWriter(target, layout, {**metadata, "shapes": json.dumps(shapes)}) as writer:
                for file in files:
                    with Checkpoint.open(file) as masks:
                        for name in masks.tensors:
                            writer.write(name, 0, masks.read(name))
                writer.finish()
        except CheckpointError as error:
            raise OutputError(f"{error}; delete that part, and the same command makes it again") from None

    def drop(self, only_partial: bool = False) -> None:
        """Forget what was finished; or only what was left half-written."""
        for path in self.folders():
            if not only_partial or path.suffix == ".partial":
                shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # absent, or holds files of others
            self.root.rmdir()


def mask_file(run: int) -> str:
    """Where a part keeps one run's masks."""
    return f"masks-{run}.safetensors"


def seal(path: Path) -> str:
    """What tells a whole file from a torn one: a hash of a table; the size of masks, which are synced and large."""
    if path.suffix == ".safetensors":
        return str(path.stat().st_size)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sync(path: Path) -> None:
    """Force a file, or the names in a directory, to the disk; some network file systems cannot sync a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
