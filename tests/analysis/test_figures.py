"""PNG and PDF figures: one of each for every chart, the same bytes for the same input."""

from __future__ import annotations

import builtins
import itertools
import sys

import pytest

from offprin_kernels.analysis import figures
from offprin_kernels.analysis.charts import charts
from offprin_kernels.analysis.charts.names import shorten, told
from offprin_kernels.analysis.charts.scale import log_ticks, tick
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


def test_short_names_keep_what_differs() -> None:
    names = list(synthetic.MANY)
    assert shorten(["short", "brief"]) == ["short", "brief"]
    assert shorten(names, 24) == [f"seed{i}" for i in range(14)]
    # nothing in common at either end: the middle goes, and a number keeps apart what then reads alike
    alike = [f"{letter}{'m' * 40}{middle}{'n' * 40}{letter}" for letter, middle in zip("aabb", "1212", strict=True)]
    found = shorten(alike, 24)
    assert len(set(found)) == 4 and max(map(len, found)) <= 24 and found[0].startswith("1: ")
    assert shorten(["run", "run-two" + "x" * 40])[0] == "run"


def test_sentences_of_many_runs_name_the_extremes() -> None:
    names = {str(i): f"run{i}" for i in range(9)}
    said = {run: (float(run), f" {run} %") for run in names}
    assert told({"1": said["1"], "2": said["2"]}, names) == "run1 1 %; run2 2 %"
    assert told(said, names) == "of 9 runs, lowest run0 0 %; highest run8 8 %"


def test_labels_and_legends_fit(tmp_path) -> None:
    """No two labels of an axis and no two entries of a legend overlap, whatever the names."""
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    root = synthetic.write(tmp_path / "many", layers=1, runs=tuple(synthetic.MANY))
    for chart in charts(Tables(root)):
        drawn = figures.draw(chart)
        FigureCanvasAgg(drawn)
        drawn.draw_without_rendering()
        whole = drawn.bbox
        for legend in drawn.legends:
            box = legend.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= whole.x1 and box.y0 >= 0, chart.key
        for axis in drawn.axes:
            labels = [label for label in axis.get_xticklabels() if label.get_text()]
            if len(labels) > 1 and labels[0].get_rotation() == 0:
                boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
                assert all(a.x1 <= b.x0 for a, b in itertools.pairwise(boxes)), chart.key
