"""Slices that are stopped: by their limit, by the time there is for all, from outside. Rows measured by then stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from benchmarks.gpu import process
from benchmarks.gpu.child import LAST_WORDS
from benchmarks.gpu.process import ROOT
from benchmarks.gpu.results import Results
from benchmarks.gpu.runner import LEAST_SECONDS, Slice, run_slices

from .samples import identity
from .test_runner import FAKES, PATIENCE, Recorder, go, outcome, wait_for

SOURCES = "0123456789ab"
ROW = {"op": "op", "backend": "triton", "share": None, "ms": {"median": 1.0}, "ratios": []}


def cases(results: Results, name: str = "x") -> list[str]:
    return [row["case"] for row in results.slices().get(name, {}).get("rows", [])]


def measure(results: Results, number: int, limit: int, within: float | None = None, **options) -> int:
    item = Slice("x", FAKES, "", f"measure={number}", limit)
    return run_slices([item], results, within=within, sources=SOURCES, say=lambda line: None, **options)


# ---- time for all ---------------------------------------------------------------------------------------------------


class Clock(Recorder):
    """Remembers limits, and takes so many seconds for each slice."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float, **outcomes: dict) -> None:
        super().__init__(**outcomes)
        self.now, self.seconds, self.limits = 0.0, seconds, []
        monkeypatch.setattr("benchmarks.gpu.runner.time.monotonic", lambda: self.now)

    def __call__(self, item: Slice, folder: Path) -> dict:
        self.limits.append(item.limit)
        self.now += self.seconds
        return super().__call__(item, folder)


def test_a_slice_has_what_is_left_of_the_time_for_all(tmp_path, monkeypatch) -> None:
    clock = Clock(monkeypatch, 200)
    assert go(Results(identity(), folder=tmp_path), clock, within=500) == 0
    assert clock.limits == [480, 300, 100] and clock.ran == ["a", "b", "c"]


def test_what_is_too_little_to_begin_with_is_not_begun(tmp_path, monkeypatch) -> None:
    clock = Clock(monkeypatch, 200)
    assert go(Results(identity(), folder=tmp_path), clock, within=200 + LEAST_SECONDS - 1) == 1
    assert clock.ran == ["a"]


def test_a_slice_cut_short_is_partial_and_one_that_had_its_time_has_failed(tmp_path, monkeypatch) -> None:
    cut = {"status": "partial", "error": "out of time", "rows": []}
    results, clock = Results(identity(), folder=tmp_path), Clock(monkeypatch, 100, a=cut, b=cut)
    assert go(results, clock, wanted=("a", "b"), within=580) == 1
    assert clock.limits == [480, 480] and [results.slices()[name]["status"] for name in "ab"] == ["failed", "failed"]
    assert go(results, clock, ["a"], wanted=("a", "b"), within=300) == 1
    assert results.slices()["a"]["status"] == "partial"
    # and is what the next run begins with
    again = Recorder()
    assert go(results, again, wanted=("a", "b")) == 1 and again.ran == ["a"]


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_a_slice_that_runs_late_keeps_what_it_measured(tmp_path) -> None:
    results = Results(identity(), folder=tmp_path)
    # two seconds for an interpreter to start in would be few on a busy machine
    assert measure(results, 2, LAST_WORDS + 20) == 1
    found = results.slices()["x"]
    assert found["status"] == "failed" and found["error"].startswith("out of time") and "Late" in found["log"]
    assert cases(results) == ["case 0", "case 1"] and found["rows"][1]["ratios"][0]["what"] == "a peer"


def test_a_slice_that_crashes_keeps_what_it_measured(tmp_path) -> None:
    results = Results(identity(), folder=tmp_path)
    run_slices([Slice("x", FAKES, "", "crash", PATIENCE)], results, sources=SOURCES, say=lambda line: None)
    found = results.slices()["x"]
    assert found["status"] == "failed" and "code -11" in found["error"] and cases(results) == ["before the crash"]


@pytest.mark.parametrize(("sources", "rows"), [(SOURCES, 5), ("other", 0)])
def test_rows_of_an_attempt_before_stay_if_they_are_of_the_same_sources(tmp_path, sources, rows) -> None:
    results = Results(identity(), folder=tmp_path)
    kept = [{"case": str(number), **ROW} for number in range(5)]
    results.add("x", {"status": "partial", "sources": sources, "rows": kept})
    stopped = Recorder(x={"status": "partial", "error": "out of time"})
    measure(results, 1, PATIENCE, execute=stopped, within=PATIENCE - 1)
    assert stopped.ran == ["x"] and len(cases(results)) == rows
    finished = Recorder(x={"status": "ok", "rows": [{"case": "new", **ROW}]})
    measure(results, 1, PATIENCE, execute=finished)
    assert cases(results) == ["new"]


def test_a_slice_past_its_limit_has_not_ended(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(process, "run", lambda *_: process.Ended(None, "and then nothing"))
    assert outcome(tmp_path, "rows=1") == {
        "status": "partial", "error": f"ran past its limit of {PATIENCE} s", "log": "and then nothing",
    }  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="processes end with their parents on Linux alone")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda how: how.name)
def test_rows_are_in_the_result_file_before_anything_is_killed(tmp_path, how) -> None:
    """The whole process group at once, as a job's time limit does it."""
    script = textwrap.dedent(f"""
        from pathlib import Path
        from benchmarks.gpu.results import Results
        from tests.benchmarks_gpu.samples import identity
        from tests.benchmarks_gpu.test_stopped import measure
        measure(Results(identity(), folder=Path({str(tmp_path)!r})), 3, {PATIENCE})
    """)
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    runner = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment, start_new_session=True)
    results = Results(identity(), folder=tmp_path)
    wait_for(lambda: len(cases(results)) == 3 and results.slices()["x"]["rows"][2]["ratios"])
    os.killpg(runner.pid, how)
    assert runner.wait(PATIENCE) != 0
    found = results.slices()["x"]
    assert found["status"] == "partial" and found["sources"] == SOURCES and found["seconds"] >= 0
    assert cases(results) == ["case 0", "case 1", "case 2"]
