"""The runner: every slice's outcome is kept as it ends, whatever becomes of it or of the runner; reruns do the rest."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from benchmarks.gpu import process
from benchmarks.gpu.process import ROOT
from benchmarks.gpu.results import Results, read
from benchmarks.gpu.runner import ERROR, MOST_SECONDS, Slice, in_a_process, run_slices
from offprin_kernels.output import OutputError

from .samples import identity

FAKES = "tests.benchmarks_gpu.fakes"
PATIENCE = 60  # seconds for a process to begin or to be gone, on a busy machine


def items(*names: str) -> list[Slice]:
    return [Slice(name, FAKES, f"fake {name}", "rows=1") for name in names]


class Recorder:
    """Executes nothing and remembers what it was asked for."""

    def __init__(self, **outcomes: dict) -> None:
        self.outcomes, self.ran = outcomes, []

    def __call__(self, item: Slice, folder: Path) -> dict:
        self.ran.append(item.name)
        return dict(self.outcomes.get(item.name, {"status": "ok", "facts": {"turn": len(self.ran)}}))


def go(results: Results, recorder: Recorder, names=(), wanted=("a", "b", "c"), **options) -> int:
    return run_slices(items(*wanted), results, names, execute=recorder, say=lambda line: None, **options)


def test_a_rerun_does_only_what_is_missing(tmp_path) -> None:
    results, first, second = Results(identity(), folder=tmp_path), Recorder(), Recorder()
    assert go(results, first, wanted=("a", "b")) == 0 and first.ran == ["a", "b"]
    assert go(results, second, wanted=("a", "b", "c")) == 0 and second.ran == ["c"]
    assert go(results, second) == 0 and second.ran == ["c"]


def test_what_was_asked_for_by_name(tmp_path) -> None:
    results = Results(identity(), folder=tmp_path)
    failing = Recorder(b={"status": "failed", "error": "wrong"})
    assert go(results, failing) == 1 and failing.ran == ["a", "b", "c"]
    # a failure is a result: it is tried again only when asked for
    rerun = Recorder()
    assert go(results, rerun) == 1 and rerun.ran == []
    assert go(results, rerun, ["a"]) == 0 and rerun.ran == []
    assert go(results, rerun, ["b"]) == 0 and rerun.ran == ["b"]
    assert go(results, rerun, ["a"], again=True) == 0 and rerun.ran == ["b", "a"]
    with pytest.raises(ValueError, match="there is no slice 'd'; choose some of a, b, c"):
        go(results, rerun, ["d"])


def test_later_slices_run_after_a_failure(tmp_path) -> None:
    results = Results(identity(), folder=tmp_path)
    assert go(results, Recorder(a={"status": "failed", "error": "wrong"})) == 1
    done = results.slices()
    assert [done[name]["status"] for name in "abc"] == ["failed", "ok", "ok"] and done["a"]["error"] == "wrong"
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found["at"]) for found in done.values())


def test_skipped_is_no_failure(tmp_path) -> None:
    results = Results(identity(), folder=tmp_path)
    assert go(results, Recorder(b={"status": "skipped", "error": "no tool"})) == 0


@pytest.mark.parametrize(
    "change", [{"driver": "2.0"}, {"versions": {"torch": "2.13.0"}}, {"date": "2026-01-03"}, {"device": "Other GPU"}]
)
def test_other_devices_versions_and_days_start_anew(tmp_path, change) -> None:
    first, second = Recorder(), Recorder()
    assert go(Results(identity(), folder=tmp_path), first) == 0
    before = read(Results(identity(), folder=tmp_path).path)["runs"][0]
    other = Results(identity(**change), folder=tmp_path)
    assert other.slices() == {}
    assert go(other, second) == 0 and second.ran == ["a", "b", "c"]
    assert read(Results(identity(), folder=tmp_path).path)["runs"][0] == before
    files = sorted(path.name for path in tmp_path.iterdir())
    if "device" in change:
        assert files == ["gpu-other-gpu.json", "gpu-sample-gpu.json"]
    else:
        assert files == ["gpu-sample-gpu.json"] and len(read(other.path)["runs"]) == 2
    # and what was there first can be gone on with
    third = Recorder()
    assert go(Results(identity(), folder=tmp_path), third) == 0 and third.ran == []


def test_no_slice_may_take_longer_than_eight_minutes() -> None:
    with pytest.raises(ValueError, match=f"1 to {MOST_SECONDS} seconds"):
        Slice("a", FAKES, "", limit=MOST_SECONDS + 1)


# ---- in processes of their own --------------------------------------------------------------------------------------


def outcome(tmp_path: Path, argument: str, limit: int = PATIENCE) -> dict:
    return in_a_process(Slice("x", FAKES, "", argument, limit), tmp_path)


def test_outcomes_of_processes(tmp_path) -> None:
    assert outcome(tmp_path, "rows=7") == {"status": "ok", "facts": {"said": "7"}}
    assert outcome(tmp_path, "skip")["status"] == "skipped"
    judged = outcome(tmp_path, "judge")
    assert judged["status"] == "failed" and judged["tests"]["failed"] == 2
    raised = outcome(tmp_path, "raise")
    assert raised["status"] == "failed" and raised["error"].startswith("RuntimeError: the answer is wrong")
    assert "Traceback" in raised["log"]
    crashed = outcome(tmp_path, "crash")
    assert crashed["status"] == "failed" and f"code {-signal.SIGSEGV}" in crashed["error"]
    assert "last words" in crashed["log"]
    # of a slice before, nothing is left that could pass for this one's
    assert outcome(tmp_path, "crash") == crashed


def test_long_errors_are_cut(tmp_path) -> None:
    results = Results(identity(), folder=tmp_path)
    run_slices([Slice("x", FAKES, "", "raise", PATIENCE)], results, say=lambda line: None)
    assert len(results.slices()["x"]["error"]) == ERROR


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_a_command_past_its_limit_is_ended_with_all_it_started(tmp_path) -> None:
    pids = tmp_path / "pids"
    script = f"""
import os, subprocess, time
child = subprocess.Popen(["sleep", "600"])
print("and then nothing", flush=True)
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
time.sleep(600)
"""
    ended = process.run([sys.executable, "-c", script], 5, tmp_path / "log")  # an interpreter starts in far less
    assert ended.code is None and ended.tail == "and then nothing"
    for pid in map(int, pids.read_text().split()):
        wait_for(lambda pid=pid: gone(pid))


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
def test_a_killed_runner_leaves_earlier_slices_and_no_process(tmp_path, how) -> None:
    pids = tmp_path / "pids"
    script = textwrap.dedent(f"""
        import signal, sys
        from pathlib import Path
        from benchmarks.gpu.results import Results
        from benchmarks.gpu.runner import Slice, run_slices
        from tests.benchmarks_gpu.samples import identity
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
        slices = [Slice("a", {FAKES!r}, "", "rows=1"), Slice("b", {FAKES!r}, "", "hang={pids}"),
                  Slice("c", {FAKES!r}, "", "rows=3")]
        run_slices(slices, Results(identity(), folder=Path({str(tmp_path)!r})))
    """)
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    runner = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    runner.send_signal(how)
    assert runner.wait(PATIENCE) != 0
    for pid in map(int, pids.read_text().split()):
        wait_for(lambda pid=pid: gone(pid))
    results = Results(identity(), folder=tmp_path)
    assert list(results.slices()) == ["a"] and results.slices()["a"]["facts"] == {"said": "1"}
    recorder = Recorder()
    assert go(results, recorder) == 0 and recorder.ran == ["b", "c"]


# ---- the file -------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch) -> None:
    results = Results(identity(), folder=tmp_path)
    results.add("a", {"status": "ok", "value": float("nan")})
    before = results.path.read_bytes()
    assert results.slices()["a"]["value"] is None

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        results.add("b", {"status": "ok"})
    assert results.path.read_bytes() == before and list(tmp_path.iterdir()) == [results.path]


def test_files_that_are_no_results(tmp_path) -> None:
    results = Results(identity(), folder=tmp_path)
    with pytest.raises(ValueError, match="status of slice 'a' is 'fine'"):
        results.add("a", {"status": "fine"})
    for text in ("{", "[]", '{"format": 2, "runs": []}'):
        results.path.write_text(text)
        with pytest.raises(OutputError):
            results.slices()
    results.path.write_text('{"format": 1, "device": "Sample-GPU", "runs": []}')
    with pytest.raises(OutputError, match="is of Sample-GPU, not of Sample GPU"):
        results.slices()
