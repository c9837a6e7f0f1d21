"""A finished analysis read back as data frames, and what is said where there is none."""

from __future__ import annotations

import builtins
import sys

import pytest

from offprin_kernels import analysis
from offprin_kernels.output import OutputError

from .checkpoints import offprin

ALL = ("--metrics", "spectrum,masks,energy", "--k", "5")


@pytest.fixture
def finished(pair, tmp_path):
    assert offprin(*pair[2], "--out", tmp_path / "out", *ALL) == 0
    return tmp_path / "out"


def test_tables_and_summary(finished) -> None:
    pd = pytest.importorskip("pandas")
    results = analysis.load(finished)
    assert results.runs == ["one", "two"] and results.summary["complete"]
    assert isinstance(results.tensors, pd.DataFrame) and len(results.tensors) == 14
    assert len(results.pairs) == len(results.consensus) == 7
    assert len(results.geometry) == 8 and set(results.stripes["axis"]) == {"row", "column"}
    assert results.tensors is results.tensors
    changed = results.tensors.loc[results.tensors["run"] == "one", "changed"].sum()
    assert changed == results.summary["runs"][0]["all"]["changed"]
    assert isinstance(results.reconciliation, pd.DataFrame)
    assert results.reconciliation["definition"][0] == "bitwise, bf16"


def test_counts_stay_integers_where_some_are_missing(finished) -> None:
    pd = pytest.importorskip("pandas")
    results = analysis.load(finished)
    assert str(results.tensors["layer"].dtype) == str(results.tensors["changed"].dtype) == "Int64"
    head = results.tensors.loc[results.tensors["name"] == "lm_head.weight"]
    assert head["layer"].isna().all() and head["total"].iloc[0] == 96 * 40
    row = results.reconciliation.iloc[0]
    assert isinstance(results.reconciliation, pd.DataFrame) and row["numerator"] + 0 == int(row["numerator"])
    assert str(results.reconciliation["numerator"].dtype) == "Int64"


def test_polars(finished) -> None:
    pl = pytest.importorskip("polars")
    results = analysis.load(finished, engine="polars")
    assert isinstance(results.tensors, pl.DataFrame)
    assert isinstance(results.reconciliation, pl.DataFrame)
    assert results.tensors.height == 14 and results.geometry["k"].to_list() == [5] * 8


def test_tables_that_this_analysis_has_not(pair, tmp_path) -> None:
    pytest.importorskip("pandas")
    assert offprin(*pair[2][:2], "--out", tmp_path / "out") == 0
    results = analysis.load(tmp_path / "out")
    assert results.consensus is None and results.geometry is None and results.curves is None
    assert len(results.pairs) == 0


def test_not_a_finished_analysis(pair, tmp_path) -> None:
    pytest.importorskip("pandas")
    with pytest.raises(OutputError, match="is no directory"):
        analysis.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputError, match="holds no analysis"):
        analysis.load(tmp_path / "empty")
    (tmp_path / "empty" / "plan.json").write_text("{}")
    with pytest.raises(OutputError, match="not finished; the same offprin analyze continues it"):
        analysis.load(tmp_path / "empty")
    assert offprin(*pair[2], "--out", tmp_path / "out") == 0
    (tmp_path / "out" / "summary.json").write_text("[]")
    with pytest.raises(OutputError, match="not the summary of an analysis"):
        analysis.load(tmp_path / "out")


def test_a_damaged_table(finished) -> None:
    pytest.importorskip("pandas")
    (finished / "pairs.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(OutputError, match=r"pairs\.parquet cannot be read"):
        _ = analysis.load(finished).pairs


@pytest.mark.parametrize(("engine", "extra"), [("pandas", "report"), ("polars", "polars")])
def test_a_missing_library(finished, monkeypatch, engine, extra) -> None:
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.split(".")[0] == engine:
            raise ModuleNotFoundError(name)
        return real(name, *rest, **more)

    for module in [name for name in sys.modules if name.split(".")[0] == engine]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OutputError, match=f"need {engine}; pip install .*{extra}"):
        analysis.load(finished, engine=engine)


def test_an_unknown_engine(finished) -> None:
    with pytest.raises(ValueError, match="choose pandas or polars"):
        analysis.load(finished, engine="excel")
