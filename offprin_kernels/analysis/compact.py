"""Finished tables as the summary reads them: columns in numpy, and rows that hold no object for every value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .schema import is_list, numpy_dtype

if TYPE_CHECKING:
    import pyarrow as pa


def columns(path: Path) -> dict[str, np.ndarray]:
    """The scalar columns of a table (object arrays where values may be missing)."""
    import pyarrow.parquet as pq

    names = [name for name in pq.read_schema(path).names if not is_list(name)]
    arrow = pq.read_table(path, columns=names)
    return {name: np.array(arrow[name].to_pylist(), dtype=numpy_dtype(name)) for name in names}


class Row:
    """One row: its values by column name."""

    __slots__ = ("_index", "_values")

    def __init__(self, values: Values, index: int) -> None:
        self._values, self._index = values, index

    def __getitem__(self, name: str) -> Any:
        return self._values[name](self._index)


class Values(dict[str, Callable[[int], Any]]):
    """For each column a function from row to value. A column is read when it is first asked for, and then kept packed:
    a table of a hundred thousand matrices takes tens of megabytes, as dictionaries half a gigabyte."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self.file = pq.ParquetFile(path)

    def __missing__(self, name: str) -> Callable[[int], Any]:
        if name not in self.file.schema_arrow.names:
            raise KeyError(name)
        self[name] = getter(self.file.read(columns=[name])[name].combine_chunks())
        return self[name]


def getter(column: pa.Array) -> Callable[[int], Any]:
    """Values as Python has them, None where there is none."""
    import pyarrow as pa

    if column.null_count == len(column):
        return lambda index: None
    if pa.types.is_list(column.type):
        return column.to_pylist().__getitem__
    if pa.types.is_string(column.type):
        coded = column.dictionary_encode()
        words = [*coded.dictionary.to_pylist(), None]
        codes = coded.indices.fill_null(len(words) - 1).to_numpy()
        return lambda index: words[codes[index]]
    if not column.null_count:
        return column.to_numpy(zero_copy_only=False).item
    known = column.is_valid().to_numpy(zero_copy_only=False)
    value = column.fill_null(False if pa.types.is_boolean(column.type) else 0).to_numpy(zero_copy_only=False).item
    return lambda index: value(index) if known[index] else None


class Rows:
    """The rows of a table, as often as they are asked for."""

    def __init__(self, path: Path) -> None:
        self._values = Values(path)

    def __len__(self) -> int:
        return self._values.file.metadata.num_rows

    def __iter__(self) -> Iterator[Row]:
        return (Row(self._values, index) for index in range(len(self)))
