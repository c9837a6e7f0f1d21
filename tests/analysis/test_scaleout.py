"""Many processes on one analysis: shares, claims, kills, merging. The outcome is that of one process, byte for byte."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

from offprin_kernels.analysis import run, store
from offprin_kernels.analysis.scaleout import Shard, by_cost
from offprin_kernels.cli import main
from offprin_kernels.commands import analyze

from .checkpoints import files, offprin, save
from .ranks import ROOT, free_port, make_parts_small, ranks, same

ALL = ("--metrics", "update,spectrum,masks,energy", "--k", "5", "--alpha", "0.3")


@pytest.fixture
def small_parts(monkeypatch) -> None:
    make_parts_small(monkeypatch.setattr)


@pytest.fixture
def whole(pair, tmp_path, small_parts) -> Path:
    """What one process makes of it; in a process of its own, with one thread as the ranks have."""
    done = ranks(1, 0, (*pair[2], "--out", tmp_path / "whole", "--save-masks", *ALL))
    assert done.returncode == 0, done.stderr
    return tmp_path / "whole"


def test_ranks_make_what_one_process_makes(pair, tmp_path, whole) -> None:
    done = ranks(3, 0, (*pair[2], "--out", tmp_path / "out", "--save-masks", *ALL))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("complete; results in") == 1, "only rank 0 reports"
    same(tmp_path / "out", whole)
    lines = [json.loads(line) for line in (tmp_path / "out" / store.LOG).read_text().splitlines()]
    assert len(lines) == 3
    assert sum(line["made_parts"] for line in lines) == 6 and not any(line["resumed_parts"] for line in lines)


def test_a_rank_killed_twenty_times_loses_and_doubles_nothing(pair, tmp_path, whole) -> None:
    done = ranks(2, 20, (*pair[2], "--out", tmp_path / "out", "--save-masks", *ALL), seed=1)
    assert done.returncode == 0, done.stderr
    same(tmp_path / "out", whole)
    rows = pq.read_table(tmp_path / "out" / "geometry.parquet").to_pylist()
    keys = [(row["run"], row["name"]) for row in rows]
    assert len(keys) == len(set(keys)) == 8
    # half-written parts are gone too
    assert not (tmp_path / "out" / "parts").exists()


def test_a_finished_analysis_is_returned_to_all_ranks(pair, tmp_path, whole) -> None:
    before = files(whole)
    done = ranks(2, 0, (*pair[2], "--out", whole, "--save-masks", *ALL))
    assert done.returncode == 0 and done.stdout.count("complete; results in") == 1, done.stderr
    assert files(whole) == before


def test_rank_0_failing_is_every_ranks_failure(pair, tmp_path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("dear to me")
    done = ranks(2, 0, (*pair[2], "--out", tmp_path / "thesis"))
    assert done.returncode == 2
    assert done.stderr.count("holds no analysis") == 2 and "rank 0 failed" in done.stderr


@pytest.mark.parametrize("what", ["kill", "stop"])
def test_rank_0_makes_the_parts_of_one_that_falls_silent(pair, tmp_path, whole, what) -> None:
    out = tmp_path / "out"
    arguments = (*pair[2], "--out", out, "--save-masks", *ALL)
    done = ranks(2, 0, arguments, trouble=f"1 {what}")
    codes = done.stdout.splitlines()[-1].split()[2:]
    assert codes[0] == "0" and done.stdout.count("complete; results in") == 1, done.stderr
    assert codes[1] == ("-9" if what == "kill" else "0")
    assert "rank 1 fell silent; rank 0 made its parts" in done.stderr
    assert ranks(1, 0, arguments).returncode == 0, "drops what the other left on waking up"
    same(out, whole)


def test_a_rank_that_fails_is_every_ranks_failure_at_once(pair, tmp_path, small_parts) -> None:
    out = tmp_path / "out"
    done = ranks(3, 0, (*pair[2], "--out", out), trouble="1 fail")
    assert done.stdout.splitlines()[-1] == "exit codes 2 3 2", done.stderr
    assert done.stderr.count("rank 1 failed: [Errno 28] No space left on device") == 2
    assert not (out / store.SUMMARY).exists()


def test_torchrun_lets_rank_0_end_an_incomplete_analysis(pair, tmp_path) -> None:
    """Its exit code 3 is rank 0's alone, which has the time to make the page and to print."""
    _, (tuned, _), _ = pair
    odd = save(tmp_path / "odd", {**tuned, "model.extra.weight": torch.zeros(8, 8).bfloat16()})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    command += ["-m", "offprin_kernels", "analyze", tmp_path / "base", odd, "--out", tmp_path / "out", "--quiet"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert "exitcode  : 3 " in done.stderr and "rank      : 0 " in done.stderr, done.stderr
    assert "rank      : 1 " not in done.stderr and "SIGTERM" not in done.stderr
    assert "results in" in done.stdout and (tmp_path / "out" / "report.html").exists()


# ---- shards


def test_shards_finish_by_themselves_or_by_merge(pair, tmp_path, small_parts, capsys) -> None:
    *_, paths = pair
    options = ("--save-masks", *ALL)
    assert offprin(*paths, "--out", tmp_path / "whole", *options) == 0
    out = tmp_path / "out"
    capsys.readouterr()
    assert offprin(*paths, "--out", out, *options, "--shard", "2/3") == 0
    assert "parts are missing" in capsys.readouterr().out and not (out / "summary.json").exists()
    assert main(["merge", str(out)]) == 2
    assert "lacks" in capsys.readouterr().err
    assert offprin(*paths, "--out", out, *options, "--shard", "1/3") == 0
    assert offprin(*paths, "--out", out, *options, "--shard", "3/3") == 0
    assert "complete; results in" in capsys.readouterr().out
    same(out, tmp_path / "whole")
    assert main(["merge", str(out), "--no-report"]) == 0, "merging what is merged prints it again"


def test_a_shard_shows_and_tells_its_own_share(pair, tmp_path, small_parts, capsys, monkeypatch) -> None:
    *_, paths = pair
    totals, shown = [], []
    real = analyze.progress_bar

    def counted(total, quiet, label):
        totals.append(total)
        shown.append(0)
        return real(total, quiet, label)

    class Bar:
        def __init__(self, **options) -> None: ...

        def __enter__(self):
            return self

        def __exit__(self, *story) -> None: ...

        def update(self, nbytes: int) -> None:
            shown[-1] += nbytes

    monkeypatch.setattr(analyze, "progress_bar", counted)
    monkeypatch.setattr("tqdm.tqdm", Bar)
    for shard in ("1/3", "2/3", "1/3"):
        capsys.readouterr()
        command = ["analyze", *paths, "--out", str(tmp_path / "out"), "--shard", shard, "--json", "--no-report"]
        assert main(command) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["shard"] == shard and not told["finished"] and 0 < told["missing_parts"] < told["parts"]
    assert main([*command[:-4], "--sh=3/3", "--json", "--no-report"]) == 0
    summary = json.loads(capsys.readouterr().out)
    whole = sum(sum(Path(path).stat().st_size for path in Path(folder).glob("*.safetensors")) for folder in paths)
    assert shown == totals and totals[0] == totals[2]
    assert 0.9 * whole < totals[0] + totals[1] + totals[3] < whole
    # the command of the whole analysis
    assert summary["provenance"]["command"] == ["offprin", *command[:-4], "--json", "--no-report"]


def test_shards_share_the_cost() -> None:
    costs = [5.0, 1.0, 9.0, 3.0, 3.0, 2.0, 8.0]
    fake = SimpleNamespace(parts=costs, part_cost=lambda index: costs[index])
    assert [costs[i] for i in by_cost(fake)] == sorted(costs, reverse=True)
    shares = [list(Shard(i, 3)(fake)) for i in (1, 2, 3)]
    assert sorted(index for share in shares for index in share) == list(range(7))
    assert max(sum(costs[i] for i in share) for share in shares) <= 11
    assert list(Shard(8, 8)(fake)) == [], "more shards than parts"


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2", "1/2/3", ""])
def test_bad_shards(pair, tmp_path, capsys, text) -> None:
    if text:
        assert offprin(*pair[2], "--out", tmp_path / "out", f"--shard={text}") == 2
        assert "give i/n" in capsys.readouterr().err
    else:
        assert offprin(*pair[2], "--out", tmp_path / "out", "--shard", "1/2", "--overwrite") == 2
        assert "--shard does not go with --overwrite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- parts


def cut_short(paths, out: Path, monkeypatch, parts: int) -> None:
    """An analysis of which this many parts were made."""
    real, made = run.make_part, []

    def some(*arguments):
        if len(made) == parts:
            raise KeyboardInterrupt
        made.append(1)
        real(*arguments)

    monkeypatch.setattr(run, "make_part", some)
    assert offprin(*paths, "--out", out, "--save-masks") == 3
    monkeypatch.setattr(run, "make_part", real)


@pytest.mark.parametrize(
    "damage",
    [
        lambda part: (part / "tensors.parquet").write_bytes(b"PAR1 and nothing else"),
        lambda part: (part / "tensors.parquet").unlink(),
        lambda part: (part / "part.json").write_text("{"),
        lambda part: (part / "part.json").unlink(),
        lambda part: (part / "masks-1.safetensors").write_bytes(b""),
        lambda part: shutil.rmtree(part),
    ],
)
def test_a_damaged_part_is_made_again(pair, tmp_path, small_parts, monkeypatch, damage) -> None:
    *_, paths = pair
    assert offprin(*paths, "--out", tmp_path / "whole", "--save-masks") == 0
    out = tmp_path / "out"
    cut_short(paths, out, monkeypatch, 3)
    damage(out / "parts" / "00001")
    assert offprin(*paths, "--out", out, "--save-masks") == 0
    log = json.loads((out / store.LOG).read_text().splitlines()[-1])
    assert log["resumed_parts"] == 2
    same(out, tmp_path / "whole")


def test_a_part_of_another_plan_is_not_used(pair, tmp_path, small_parts, monkeypatch) -> None:
    *_, paths = pair
    cut_short(paths, tmp_path / "mine", monkeypatch, 2)
    cut_short((paths[0], paths[2], paths[1]), tmp_path / "other", monkeypatch, 2)
    shutil.rmtree(tmp_path / "mine" / "parts" / "00000")
    shutil.copytree(tmp_path / "other" / "parts" / "00000", tmp_path / "mine" / "parts" / "00000")
    assert offprin(*paths, "--out", tmp_path / "whole", "--save-masks") == 0
    assert offprin(*paths, "--out", tmp_path / "mine", "--save-masks") == 0
    same(tmp_path / "mine", tmp_path / "whole")
