"""``python -m benchmarks.gpu`` and ``make gpu``: what is run, what is run again, where results are read and written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from benchmarks.gpu import __main__ as cli
from benchmarks.gpu import machine
from benchmarks.gpu.process import ROOT
from benchmarks.gpu.results import Results, read
from benchmarks.gpu.runner import Slice

from .samples import identity

FAKES = "tests.benchmarks_gpu.fakes"
PATIENCE = 60  # seconds for a slice, on a busy machine


def command(monkeypatch, tmp_path, *arguments: str) -> int:
    """``python -m benchmarks.gpu`` as if there were a device, with two slices of ours."""
    slices = (Slice("good", FAKES, "fake", "rows=1", PATIENCE), Slice("bad", FAKES, "fake", "raise", PATIENCE))
    monkeypatch.setattr(cli, "SLICES", slices)
    monkeypatch.setattr(cli.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli.machine, "identity", identity)
    monkeypatch.setattr(cli.machine, "properties", lambda: {"capability": "9.0"})
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--results", str(tmp_path), *arguments])
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    return cli.main()


def test_the_command(monkeypatch, tmp_path, capsys) -> None:
    assert command(monkeypatch, tmp_path) == 1
    said = capsys.readouterr().out
    assert "good: ok after" in said and "bad: failed after" in said and "1 of 2 slices done" in said
    run = read(Results(identity(), folder=tmp_path).path)["runs"][0]
    assert run["properties"] == {"capability": "9.0"} and re.fullmatch(
        r"[0-9a-f]{12}", run["slices"]["good"]["sources"]
    )
    assert command(monkeypatch, tmp_path, "--slice", "good") == 0
    assert "good: fake" not in capsys.readouterr().out
    assert command(monkeypatch, tmp_path, "--list") == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [["good", "ok"], ["bad", "failed"]]
    monkeypatch.setattr(cli.machine, "sources", lambda: "other")
    assert command(monkeypatch, tmp_path, "--list") == 0
    assert capsys.readouterr().out.count("sources have changed since") == 2
    with pytest.raises(SystemExit, match="there is no slice"):
        command(monkeypatch, tmp_path, "--slice", "best")


def test_what_other_sources_gave_is_run_again_by_name(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(cli.machine, "sources", lambda: "before")
    assert command(monkeypatch, tmp_path, "--slice", "good") == 0
    monkeypatch.setattr(cli.machine, "sources", lambda: "after")
    capsys.readouterr()
    # not of itself: that would be a whole evening's work after every change
    assert command(monkeypatch, tmp_path) == 1 and "good: fake" not in capsys.readouterr().out
    assert command(monkeypatch, tmp_path, "--slice", "good") == 0 and "good: fake" in capsys.readouterr().out
    assert Results(identity(), folder=tmp_path).slices()["good"]["sources"] == "after"
    assert command(monkeypatch, tmp_path, "--slice", "good") == 0 and "good: fake" not in capsys.readouterr().out


def test_results_carried_to_another_folder_are_gone_on_with(monkeypatch, tmp_path, capsys) -> None:
    first, second = tmp_path / "first", tmp_path / "carried" / "deep"
    assert command(monkeypatch, first, "--slice", "good") == 0
    second.mkdir(parents=True)
    for path in first.iterdir():
        shutil.copy(path, second)
    before = Results(identity(), folder=first).slices()
    capsys.readouterr()
    # a path as one types it
    monkeypatch.chdir(second.parent)
    assert command(monkeypatch, "deep") == 1
    said = capsys.readouterr().out
    assert "good: fake" not in said and "bad: failed" in said
    found = Results(identity(), folder=second).slices()
    assert found["good"] == before["good"] and found["bad"]["status"] == "failed"
    assert Results(identity(), folder=first).slices() == before
    assert command(monkeypatch, tmp_path / "made", "--slice", "good") == 0 and (tmp_path / "made").is_dir()


def test_sources_are_those_of_the_benchmarks_too(monkeypatch, tmp_path) -> None:
    for folder in ("offprin_kernels", "csrc", "benchmarks/gpu", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    seen = [machine.sources()]
    for path in ("offprin_kernels/a.py", "csrc/a.cu", "benchmarks/registry.py", "benchmarks/gpu/timing.py"):
        (tmp_path / path).write_text("x")
        seen.append(machine.sources())
    assert len(set(seen)) == 5
    (tmp_path / "benchmarks/results/gpu-x.json").write_text(json.dumps({}))
    assert machine.sources() == seen[-1]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_hands_everything_on() -> None:
    # as from a shell: inside of another make it would say more
    shell = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    given = ["SLICE=a b", "AGAIN=1", "WITHIN=9", "RESULTS=some dir"]
    said = [
        subprocess.run(["make", "-n", "gpu", *more], cwd=ROOT, env=shell, capture_output=True, text=True).stdout
        for more in ([], given)
    ]
    said = [" ".join(text.split()) for text in said]
    assert said[0].replace("\\", "").endswith("-m benchmarks.gpu")
    assert '-m benchmarks.gpu --slice a b --again --within 9 --results "some dir"' in said[1].replace("\\ ", "")
