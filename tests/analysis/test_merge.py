"""Parts that lie in several directories, made on one machine or on many; and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from offprin_kernels.cli import main

from .checkpoints import offprin, save, tuned_weights
from .ranks import make_parts_small, same


@pytest.fixture
def small_parts(monkeypatch) -> None:
    make_parts_small(monkeypatch.setattr)


def test_shards_apart_are_merged_later(pair, tmp_path, small_parts, capsys) -> None:
    *_, paths = pair
    assert offprin(*paths, "--out", tmp_path / "whole", "--save-masks") == 0
    for i in (1, 2):
        assert offprin(*paths, "--out", tmp_path / f"s{i}", "--save-masks", "--shard", f"{i}/2") == 0
    assert main(["merge", str(tmp_path / "s1"), str(tmp_path / "s2"), "--no-report"]) == 0
    same(tmp_path / "s1", tmp_path / "whole")


def test_shards_of_other_machines_are_merged(pair, tmp_path, small_parts) -> None:
    """Copies of the same checkpoints, elsewhere and later."""
    *_, paths = pair
    assert offprin(*paths, "--out", tmp_path / "whole", "--save-masks") == 0
    copies = [shutil.copytree(path, tmp_path / "there" / Path(path).name) for path in paths]
    for path in (tmp_path / "there").rglob("*.safetensors"):
        os.utime(path, (1, 1))
    assert offprin(*paths, "--out", tmp_path / "s1", "--save-masks", "--shard", "1/2") == 0
    assert offprin(*copies, "--out", tmp_path / "s2", "--save-masks", "--shard", "2/2") == 0
    assert main(["merge", str(tmp_path / "s1"), str(tmp_path / "s2"), "--no-report"]) == 0
    same(tmp_path / "s1", tmp_path / "whole")


def test_parts_of_other_weights_are_not_merged(pair, tmp_path, small_parts, capsys) -> None:
    """Of another step of the same training: names and sizes of files are equal."""
    base, _, paths = pair
    other = save(tmp_path / "later" / "one", tuned_weights(base, 7))
    assert offprin(*paths[:2], "--out", tmp_path / "s1", "--shard", "1/2") == 0
    assert offprin(paths[0], other, "--out", tmp_path / "s2", "--shard", "2/2") == 0
    assert main(["merge", str(tmp_path / "s1"), str(tmp_path / "s2")]) == 2
    assert "s2 holds parts of other weights in files of the same names and sizes (tuned one)" in capsys.readouterr().err


def test_other_names_of_tensors_are_not_merged(pair, tmp_path, small_parts, capsys) -> None:
    _, (tuned, *_), paths = pair
    renamed = {name.replace("q_proj", "k_proj"): weight for name, weight in tuned.items()}
    other = save(tmp_path / "later" / "one", renamed)
    assert offprin(*paths[:2], "--out", tmp_path / "s1", "--shard", "1/2") == 0
    assert offprin(paths[0], other, "--out", tmp_path / "s2", "--shard", "2/2") == 3
    assert main(["merge", str(tmp_path / "s1"), str(tmp_path / "s2")]) == 2
    assert "holds parts of another plan (different parts)" in capsys.readouterr().err


def test_what_cannot_be_merged(pair, tmp_path, small_parts, capsys) -> None:
    *_, paths = pair
    out, other, part = (str(tmp_path / name) for name in ("out", "other", "part"))
    assert offprin(*paths[:2], "--out", out) == 0
    assert offprin(paths[0], paths[2], "--out", other) == 0
    assert offprin(*paths[:2], "--out", part, "--shard", "1/2") == 0
    capsys.readouterr()
    for arguments, words in (
        ([out, other], "other holds parts of another plan"),
        ([out, part, str(tmp_path / "nowhere")], "holds no analysis"),
        ([part, part], "part is "),
        ([part, out], "out is finished: it has all tables"),
        ([out, "--figures", "--no-report"], "leave out --no-report"),
    ):
        assert main(["merge", *arguments]) == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1, message
    assert main(["merge", out, part, "--no-report"]) == 0, "nothing is missing"


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
