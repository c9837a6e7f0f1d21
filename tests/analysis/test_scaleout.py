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

from offprin_kernels.analysis import plan, run, store
from offprin_kernels.analysis.scaleout import Shard, by_cost
from offprin_kernels.cli import main

from .checkpoints import files, offprin

ALL = ("--metrics", "update,spectrum,masks,energy", "--k", "5", "--alpha", "0.3")


@pytest.fixture
def small_parts(monkeypatch) -> None:
    """A part for every tensor or two."""
    for name, value in (("PART_BYTES", 20_000), ("SMALLEST_PART", 1), ("FEWEST_PARTS", 1000), ("SMALLEST_FLOPS", 1)):
        monkeypatch.setattr(plan, name, value)


def same(a: Path, b: Path) -> None:
    """Equal files, but for the command line in the summary, which names the directory."""
    ours, theirs = files(a), files(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name == "summary.json":
            one, two = (json.loads(found[name]) for found in (ours, theirs))
            for summary in (one, two):
                del summary["provenance"]["command"]
            assert one == two
        elif name.endswith(".html"):
            continue
        else:
            assert ours[name] == theirs[name], name


def ranks(world: int, kills: int, arguments: tuple, seed: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.analysis.ranks", world, kills, seed, *arguments]
    root = Path(__file__).parents[2]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=root, timeout=300)


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


def test_shards_apart_are_merged_later(pair, tmp_path, small_parts, capsys) -> None:
    *_, paths = pair
    assert offprin(*paths, "--out", tmp_path / "whole", "--save-masks") == 0
    for i in (1, 2):
        assert offprin(*paths, "--out", tmp_path / f"s{i}", "--save-masks", "--shard", f"{i}/2") == 0
    assert main(["merge", str(tmp_path / "s1"), str(tmp_path / "s2"), "--no-report"]) == 0
    same(tmp_path / "s1", tmp_path / "whole")


def test_parts_of_another_version_or_plan_are_not_merged(pair, tmp_path, small_parts, capsys) -> None:
    *_, paths = pair
    for i in (1, 2):
        assert offprin(*paths, "--out", tmp_path / f"s{i}", "--shard", f"{i}/2", "--threshold", i, "--rule", "ulp") == 0
    assert main(["merge", str(tmp_path / "s1"), str(tmp_path / "s2")]) == 2
    assert "another plan (different options)" in capsys.readouterr().err
    for folder, words in (("s1", "s1 holds parts of version 0.0.9"), ("s2", "s2 holds parts of version 0.0.9")):
        path = tmp_path / folder / "plan.json"
        text = path.read_text()
        path.write_text(json.dumps({**json.loads(text), "version": "0.0.9"}))
        assert main(["merge", str(tmp_path / "s1"), str(tmp_path / "s2")]) == 2
        assert words in capsys.readouterr().err
        path.write_text(text)
    assert main(["merge", str(tmp_path / "nowhere")]) == 2
    assert "holds no analysis" in capsys.readouterr().err


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
