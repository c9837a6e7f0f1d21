"""Results of an analysis as data frames: ``offprin_kernels.analysis.load(DIR)``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..output import OutputError
from .tables import Tables, arrow_parquet, guarded

Engine = Literal["pandas", "polars"]


@dataclass(frozen=True)
class Results:
    """A finished analysis. Tables are read when first asked for; None where this analysis has no such table.

    Attributes:
        root: the directory.
        engine: library of the data frames.
    """

    root: Path
    engine: Engine = "pandas"

    @cached_property
    def _tables(self) -> Tables:
        return Tables(self.root)

    @property
    def summary(self) -> dict:
        """The content of ``summary.json``."""
        return self._tables.summary

    @property
    def runs(self) -> list[str]:
        """Names of the tuned runs, in the order of the command."""
        return self._tables.runs

    @cached_property
    def tensors(self) -> Any:
        """A row per run and compared tensor: counts, norms, histograms."""
        return self._frame("tensors")

    @cached_property
    def pairs(self) -> Any:
        """A row per pair of runs and tensor: agreement beside its nulls."""
        return self._frame("pairs")

    @cached_property
    def consensus(self) -> Any:
        """A row per tensor: how many runs changed a weight."""
        return self._frame("consensus")

    @cached_property
    def stripes(self) -> Any:
        """Changed weights of each row and of each column of every matrix."""
        return self._frame("stripes")

    @cached_property
    def geometry(self) -> Any:
        """A row per run and linear layer: angles, spectra, energies, overlaps with weight masks."""
        return self._frame("geometry")

    @cached_property
    def curves(self) -> Any:
        """A row per run and linear layer: all k angles and singular values."""
        return self._frame("curves")

    @cached_property
    def reconciliation(self) -> Any:
        """A row per run, set of tensors and published definition of sparsity or rotation."""
        import pyarrow as pa

        from .reconciliation import as_records, reconcile

        return self._of_arrow(pa.Table.from_pylist(as_records(reconcile(self._tables))))

    def _frame(self, table: str) -> Any:
        path = self.root / f"{table}.parquet"
        if not path.exists():
            return None
        return guarded(path, lambda: self._of_arrow(arrow_parquet().read_table(path)))

    def _of_arrow(self, arrow: Any) -> Any:
        """A data frame of the chosen library; counts stay integers where some are missing."""
        if self.engine == "polars":
            import polars

            return polars.from_arrow(arrow)
        import pandas
        import pyarrow as pa

        return arrow.to_pandas(types_mapper={pa.int64(): pandas.Int64Dtype()}.get)


def load(directory: str | Path, *, engine: Engine = "pandas") -> Results:
    """Open a finished analysis.

    Args:
        directory: what ``offprin analyze --out`` has written.
        engine: ``"pandas"`` or ``"polars"``.

    Raises:
        OutputError: the directory is not a finished analysis, or the library is not installed.
        ValueError: another engine.
    """
    if engine not in ("pandas", "polars"):
        raise ValueError(f"unknown engine {engine!r}; choose pandas or polars")
    arrow_parquet()
    try:
        __import__(engine)
    except ModuleNotFoundError:
        extra = "offprin-kernels[report]" if engine == "pandas" else "polars"
        raise OutputError(f"data frames of {engine} need {engine}; pip install '{extra}'") from None
    results = Results(Path(directory), engine)
    results.summary  # noqa: B018  # read now, so that a damaged one is known at once
    return results
