"""Rows of a table without an object for every value."""

from __future__ import annotations

import json
import math
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offprin_kernels.analysis import merge
from offprin_kernels.analysis.compact import Rows
from offprin_kernels.analysis.schema import BOOL, COLUMNS, FLOAT, FLOAT_LIST, LIST, TEXT, arrow_schema

from .checkpoints import offprin


def table(path, names: list[str], rows: int, gaps: bool) -> list[dict]:
    """A table of random values, some of them missing; its rows."""
    rng = np.random.default_rng(0)
    columns = []
    for name in names:
        if name in TEXT:
            values = [f"{name} {i % 7}" for i in range(rows)]
        elif name in BOOL:
            values = (rng.random(rows) < 0.5).tolist()
        elif name in LIST or name in FLOAT_LIST:
            values = rng.integers(0, 9, (rows, 3)).tolist()
        else:
            values = rng.random(rows).tolist() if name in FLOAT else rng.integers(0, 1 << 60, rows).tolist()
        if gaps:
            values = [None if missing else value for value, missing in zip(values, rng.random(rows) < 0.3, strict=True)]
        columns.append(values)
    if gaps:
        columns[0] = [None] * rows
    arrow = pa.table(columns, schema=arrow_schema(names))
    pq.write_table(arrow, path, row_group_size=max(1, rows // 3))
    return arrow.to_pylist()


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("name", ["geometry", "consensus"])
@pytest.mark.parametrize("rows", [0, 50])
def test_rows_are_those_of_the_table(tmp_path, name, gaps, rows) -> None:
    expected = table(tmp_path / "t.parquet", COLUMNS[name], rows, gaps)
    found = Rows(tmp_path / "t.parquet")
    assert len(found) == rows
    for _ in range(2):
        assert [{column: row[column] for column in COLUMNS[name]} for row in found] == expected
    types = [{type(row[column]) for row in found} for column in COLUMNS[name]]
    assert types == [{type(row[column]) for row in expected} for column in COLUMNS[name]], "Python's, which JSON knows"


def test_rows_take_little_memory(tmp_path) -> None:
    """A geometry table has some ninety columns: as dictionaries each row takes 5 kB."""
    rows = 3000
    table(tmp_path / "t.parquet", COLUMNS["geometry"], rows, gaps=True)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0], pa.total_allocated_bytes()
    kept = list(Rows(tmp_path / "t.parquet"))
    for column in COLUMNS["geometry"]:
        assert math.isfinite(sum(isinstance(row[column], float) for row in kept))
    grown = tracemalloc.get_traced_memory()[0] - before[0] + pa.total_allocated_bytes() - before[1]
    tracemalloc.stop()
    assert grown < rows * (300 + 10 * len(COLUMNS["geometry"])), grown / rows


def test_a_summary_of_rows_is_that_of_dictionaries(pair, tmp_path, monkeypatch) -> None:
    """Also: finishing an analysis never makes dictionaries of its geometry."""
    *_, paths = pair
    metrics = ("--metrics", "spectrum,masks,energy", "--k", "5")
    assert offprin(*paths, "--out", tmp_path / "rows", *metrics) == 0
    monkeypatch.setattr(merge, "Rows", lambda path: pq.read_table(path).to_pylist())
    assert offprin(*paths, "--out", tmp_path / "dictionaries", *metrics) == 0
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("rows", "dictionaries"))
    del one["provenance"], two["provenance"]
    assert one == two and one["geometry"][0]["all"]["matrices"] == 4
