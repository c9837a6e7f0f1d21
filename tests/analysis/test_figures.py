"""PNG and PDF figures: one of each for every chart, the same bytes for the same input."""

from __future__ import annotations

import builtins
import sys

import pytest

from offprin_kernels.analysis import figures
from offprin_kernels.analysis.charts import charts
from offprin_kernels.analysis.charts.scale import log_ticks, shorten, tick
from offprin_kernels.analysis.figures import write_figures
from offprin_kernels.analysis.tables import Tables
from offprin_kernels.output import OutputError

from . import synthetic
from .checkpoints import offprin


def test_figures_of_a_real_analysis(pair, tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert offprin(*pair[2], "--out", out, "--metrics", "spectrum,masks,energy", "--k", "5") == 0
    tables = Tables(out)
    written = write_figures(tables)
    assert len(written) == 2 * len(charts(tables)) > 10
    first = {path.name: path.read_bytes() for path in written}
    assert set(first) == {f"{chart.key}.{end}" for chart in charts(tables) for end in ("png", "pdf")}
    for name, data in first.items():
        assert data.startswith(b"%PDF" if name.endswith(".pdf") else b"\x89PNG") and len(data) > 5000
    few = charts(tables)[1:4]
    monkeypatch.setattr(figures, "charts", lambda _: few)
    again = {path.name: path.read_bytes() for path in write_figures(tables)}
    assert len(again) == 6 and all(first[name] == data for name, data in again.items())


def test_every_kind_of_chart_is_drawn(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    root = synthetic.write(tmp_path / "small", layers=1, runs=("dapo", "sft"))
    names = {path.stem for path in write_figures(Tables(root))}
    assert {"angle-curves-layer-0", "spectra-layer-0", "stripes-layer-0", "overlap", "jaccard-pairs"} <= names


def test_without_matplotlib(pair, tmp_path, monkeypatch) -> None:
    assert offprin(*pair[2], "--out", tmp_path / "out") == 0
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return real(name, *rest, **more)

    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OutputError, match=r"pip install 'offprin-kernels\[report\]'"):
        write_figures(Tables(tmp_path / "out"))
    assert not (tmp_path / "out" / "figures").exists()


def test_ticks_and_labels() -> None:
    assert log_ticks(-2, 1) == ([0.01, 0.1, 1.0, 10.0], ["0.01", "0.1", "1", "10"])
    assert tick(1e-5) == "10⁻⁵" and tick(2e-5) == "2\N{MULTIPLICATION SIGN}10⁻⁵" and tick(20000) == "20,000"
    for low, high in ((-0.1, 0.05), (-7.3, 1.2), (0.30, 0.33)):
        places, labels = log_ticks(low, high)
        assert len(places) == len(labels) <= 9 and all(10**low <= place <= 10**high for place in places)
    assert shorten("short") == "short"
    assert shorten("a" * 50 + "z" * 50) == "a" * 17 + "…" + "z" * 16
