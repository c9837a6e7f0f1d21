"""What the processes of ``workers`` saved, made once for all tests; and comparison with a merged directory."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as parquet
import torch

from offprin_kernels.checkpoint import Checkpoint, Slab
from offprin_kernels.cli import main

# What a table says about the files rather than about the numbers.
FILE_COLUMNS = ("tuned_name", "base_name", "note", "file", "format", "nbytes")


def check_rows(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    """Every row range of every tensor, with a slab and without one."""
    assert checkpoint.tensors.keys() == expected.keys()
    slab = Slab()
    for name, tensor in expected.items():
        info = checkpoint.tensors[name]
        whole = tensor.reshape(info.rows, info.columns)
        assert info.shape == tuple(tensor.shape) and info.nbytes == tensor.nbytes
        for start in range(info.rows + 1):
            for stop in {start, min(start + 1, info.rows), min(start + 5, info.rows), info.rows}:
                if stop < start:
                    continue
                for memory in (None, slab):
                    got = checkpoint.read(name, start, stop, slab=memory)
                    assert got.dtype == tensor.dtype and got.is_contiguous()
                    assert got.shape == (stop - start, info.columns)
                    assert torch.equal(got, whole[start:stop]), (name, start, stop)


def check_analysis(folder: Path, base: Path, source: Path, merged: Path) -> None:
    """``offprin analyze`` of a source gives the rows that the merged directory gives."""
    tables = []
    for label, tuned in (("source", source), ("merged", merged)):
        out = folder / f"analysis-{label}"
        arguments = ["analyze", str(base), str(tuned), "--out", str(out), "--names", "run", "--quiet", "--json"]
        assert main(arguments) == 0
        tables.append({path.name: rows(path) for path in sorted(out.glob("*.parquet"))})
    assert tables[0].keys() == tables[1].keys() and "tensors.parquet" in tables[0]
    assert tables[0]["tensors.parquet"]
    assert tables[0] == tables[1]


def rows(path: Path) -> list[dict]:
    table = parquet.read_table(path)
    kept = [name for name in table.column_names if name not in FILE_COLUMNS]
    # As text, because a NaN equals a NaN there.
    return [{name: repr(value) for name, value in row.items()} for row in table.select(kept).to_pylist()]
