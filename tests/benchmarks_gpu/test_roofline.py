"""The roofline figure, from a sample that says what it is; and committed results, which must not be one."""

from __future__ import annotations

import json

import pytest

from benchmarks import roofline
from benchmarks.gpu.results import FOLDER, read
from offprin_kernels.output import OutputError

from . import samples


def written(tmp_path, file: dict):
    path = tmp_path / "gpu-sample.json"
    path.write_text(json.dumps(file))
    return path


def test_the_figure_says_what_the_file_says(tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="figures are drawn by matplotlib")
    from matplotlib import rc_context

    target = tmp_path / "roof.svg"
    source = written(tmp_path, samples.file())
    with rc_context({"svg.fonttype": "none"}):  # text as text
        roofline.write(source, target)
        svg = target.read_text()
        roofline.write(source, target)
    assert target.read_text() == svg
    for words in ("SAMPLE, not measured: Sample GPU, 2026-01-02, torch 2.11.0", "copy, 3000 GB/s",
                  "bf16 product, 800 TFLOP/s", "update_scan, mask + counts, bf16 [cuda]",
                  "0.97 of copy", "0.48 of bf16 product"):  # fmt: skip
        assert words in svg, words
    # failed slices are not drawn, nor rows without a ceiling among the shares
    assert "must not be drawn" not in svg and "offprin analyze" not in svg


def test_a_measured_result_is_not_called_a_sample() -> None:
    file = samples.file()
    del file["runs"][0]["sample"]
    assert roofline.title_of(file, file["runs"][0]).startswith("Sample GPU, 2026-01-02")


def test_points_lie_where_the_numbers_put_them() -> None:
    (_, x, y), *_, (_, last_x, last_y) = roofline.points(samples.rows())
    assert (x, y) == pytest.approx((2e9 / 9e9, 2e9 / 3.1e-3))
    assert (last_x, last_y) == pytest.approx((8e4, 8e12 / 21e-3))
    assert [roofline.bar_of(row) for row in samples.rows()] == [0.92, 0.92, 0.4, None]


def test_the_newest_run_with_something_to_draw() -> None:
    file = samples.file()
    file["runs"].append({**file["runs"][0], "date": "2026-01-03"})
    file["runs"].append({**file["runs"][0], "date": "2026-01-04", "slices": {}})
    assert roofline.newest(file)["date"] == "2026-01-03"


def test_rows_of_older_sources_are_left_out_and_named() -> None:
    file = samples.file()
    run = file["runs"][0]
    found = run["slices"]
    found["update_scan"] |= {"sources": "new", "at": "2026-01-02T10:00:00Z"}
    found["topk_svd"] = {"status": "ok", "sources": "old", "at": "2026-01-02T09:00:00Z", "rows": samples.rows()[2:3]}
    assert roofline.outdated(run) == ["topk_svd"] and {row["op"] for row in roofline.rows_of(run)} == {
        "update_scan", "topk_svd", "offprin analyze",
    }  # fmt: skip
    assert len(roofline.rows_of(run)) == 4
    assert roofline.title_of(file, run).endswith("left out, of older sources: topk_svd")
    found["topk_svd"]["sources"] = "new"
    assert roofline.outdated(run) == [] and len(roofline.rows_of(run)) == 5


@pytest.mark.parametrize("without", ["ceilings", "update_scan"])
def test_nothing_to_draw(tmp_path, without) -> None:
    file = samples.file()
    del file["runs"][0]["slices"][without]
    with pytest.raises(OutputError, match="both ceilings and rows"):
        roofline.newest(file)


def test_committed_results_are_measured() -> None:
    for path in FOLDER.glob("gpu-*.json"):
        found = read(path)
        assert found["device"] != samples.DEVICE and not any(run.get("sample") for run in found["runs"]), path
