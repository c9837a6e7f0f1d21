"""Reads a finished analysis: its summary, and columns of its tables as numpy arrays; what was not measured is NaN."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..output import OutputError, read_json
from .schema import SHIFTS, Shift
from .store import SUMMARY, SUMMARY_KEYS

if TYPE_CHECKING:
    import pyarrow as pa


class Frame:
    """Rows of one table, by column; a column that an older analysis has not, or that was not asked for, is all NaN."""

    def __init__(self, arrow: pa.Table) -> None:
        self.arrow = arrow
        self._known: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self.arrow.num_rows

    def numbers(self, name: str) -> np.ndarray:
        """float64, NaN where there is no value."""
        if name not in self._known:
            self._known[name] = np.full(len(self), np.nan)
            if name in self.arrow.column_names:
                values = [np.nan if value is None else value for value in self.arrow[name].to_pylist()]
                self._known[name] = np.array(values, dtype=np.float64)
        return self._known[name]

    def values(self, name: str) -> list:
        """As Python has them, exact integers and lists included; None where there is no value."""
        return self.arrow[name].to_pylist() if name in self.arrow.column_names else [None] * len(self)

    def texts(self, name: str) -> np.ndarray:
        return np.array(self.values(name), dtype=object)

    def has(self, *names: str) -> bool:
        """Whether every column has a value somewhere."""
        return all(bool(np.isfinite(self.numbers(name)).any()) for name in names)

    def where(self, keep: np.ndarray) -> Frame:
        import pyarrow as pa

        chosen = Frame(self.arrow.filter(pa.array(np.asarray(keep, dtype=bool))))
        chosen._known = {name: values[keep] for name, values in self._known.items()}
        return chosen

    def rows(self) -> list[dict]:
        return self.arrow.to_pylist()


class Tables:
    """One finished analysis on the disk. Tables are read when asked for; None where the analysis has none."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        check_finished(self.root)

    @cached_property
    def summary(self) -> dict:
        return read_summary(self.root)

    @property
    def runs(self) -> list[str]:
        return [run["run"] for run in self.summary["runs"]]

    @property
    def shift(self) -> Shift:
        """Columns of the spectral shift that this analysis measured."""
        return SHIFTS[self.summary["options"].get("nss", "full")]

    @property
    def rule(self) -> str:
        """By which a weight counts as changed."""
        return self.summary["options"]["rules"][0]

    @property
    def under(self) -> str:
        """What titles add where the rule is not that of bf16 values: ``, rule atol(1e-05)``."""
        return "" if self.rule == "bitwise" else f", rule {self.rule}"

    @property
    def config(self) -> dict:
        """The base's ``config.json``, or an empty dict."""
        found = self.summary["provenance"].get("base", {}).get("config")
        return found if isinstance(found, dict) else {}

    @cached_property
    def tensors(self) -> Frame:
        found = self.scalars("tensors")
        assert found is not None
        return found

    @cached_property
    def pairs(self) -> Frame | None:
        return self.scalars("pairs")

    @cached_property
    def geometry(self) -> Frame | None:
        """Without the rows that a note leaves out."""
        found = self.scalars("geometry")
        return None if found is None else found.where(np.array([note is None for note in found.values("note")]))

    def scalars(self, table: str) -> Frame | None:
        """A table without its lists, which in ``tensors`` are long; None where there is none, or it is empty."""
        path = self.root / f"{table}.parquet"
        if not path.exists():
            return None
        import pyarrow.types as types

        names = [field.name for field in schema(path) if not types.is_list(field.type)]
        found = Frame(read(path, names))
        return found if len(found) else None

    def chosen(self, table: str, names: Sequence[str]) -> Frame | None:
        """All columns of the rows of these tensors: a table of long lists is not read whole."""
        path = self.root / f"{table}.parquet"
        if not path.exists():
            return None
        found = Frame(read(path, None, [("name", "in", list(names))] if names else None))
        return found if len(found) else None


def check_finished(root: Path) -> None:
    """Raise OutputError where the directory is not a finished analysis."""
    if not root.is_dir():
        raise OutputError(f"{root} is no directory; name one that offprin analyze has written")
    if not (root / SUMMARY).exists():
        if (root / "plan.json").exists():
            raise OutputError(f"the analysis in {root} is not finished; the same offprin analyze continues it")
        raise OutputError(f"{root} holds no analysis ({SUMMARY} is missing); name the --out of offprin analyze")
    if not (root / "tensors.parquet").exists():
        raise OutputError(f"{root} is finished but lacks tensors.parquet; offprin analyze --overwrite makes all anew")


def read_summary(root: Path) -> dict:
    """``summary.json``. Raises OutputError where it is not one of ours."""
    found = read_json(root / SUMMARY, "offprin analyze --overwrite makes it anew")
    if not isinstance(found, dict) or not found.keys() >= SUMMARY_KEYS:
        raise OutputError(f"{root / SUMMARY} is not the summary of an analysis; offprin analyze --overwrite makes one")
    return found


def schema(path: Path) -> pa.Schema:
    parquet = arrow_parquet()
    return guarded(path, lambda: parquet.read_schema(path))


def read(path: Path, names: Sequence[str] | None, filters: list | None = None) -> pa.Table:
    parquet = arrow_parquet()
    return guarded(path, lambda: parquet.read_table(path, columns=names, filters=filters))


def guarded(path: Path, reading):
    """The result of reading a file, or one sentence why it cannot be had."""
    import pyarrow as pa

    try:
        return reading()
    except (OSError, pa.ArrowException) as error:
        why = str(error).splitlines()[0]
        raise OutputError(f"{path} cannot be read ({why}); offprin analyze --overwrite makes it anew") from None


def arrow_parquet():
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise OutputError("results are parquet files; pip install 'offprin-kernels[analysis]'") from None
    return pyarrow.parquet
