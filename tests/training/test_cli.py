"""``offprin train``: parse, call, print."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from offprin_kernels import cli
from offprin_kernels.training import runs
from offprin_kernels.training.settings import STAGES

from . import tiny

SMALL = (
    "--steps 2 --batch 4 --most 12 --threads 1 --eval-problems 4 --tasks sort:2,add:2-3 --hidden 32 --layers 1 "
    "--heads 2 --kv-heads 1 --head-dim 16 --intermediate 32 --lr 0.01"
).split()


def said(capsys) -> str:
    """The one sentence on stderr."""
    captured = capsys.readouterr()
    assert captured.err.startswith("offprin: error: ") and captured.err.count("\n") == 1 and not captured.out
    return captured.err


@pytest.mark.parametrize("stage", ["", *STAGES])
def test_help(stage, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["train", *filter(None, [stage]), "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    wanted = [f"--{f.name.replace('_', '-')}" for f in fields(STAGES[stage])] if stage else list(STAGES)
    assert all(word in text for word in wanted)


def test_pretrain_and_what_follows(tmp_path, capsys) -> None:
    out = tmp_path / "base"
    assert cli.main(["train", "pretrain", "--out", str(out), *SMALL]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"complete; the checkpoint is {out / 'final'}, the log {out / 'log.jsonl'}\n"
    assert captured.err.startswith("pretrain 2/2 loss ")
    held = json.loads((out / "settings.json").read_text())
    assert held["tasks"] == {"add": [2, 3], "sort": [2]} and held["lr"] == 0.01 and held["worked_share"] == 0.3
    assert cli.main(["train", "pretrain", "--out", str(out), "--quiet", *SMALL]) == 0
    assert capsys.readouterr().err == ""
    chosen = ["--base", str(out / "final"), "--steps", "1", "--threads", "1", "--k", "2", "--most", "8", "--quiet"]
    given = ["--prompts", "2", "--samples", "2", "--eval-problems", "4", "--objective", "grpo", "--linear-only"]
    assert cli.main(["train", "rlvr", "--out", str(tmp_path / "rlvr"), *chosen, *given]) == 0
    held = json.loads((tmp_path / "rlvr" / "settings.json").read_text())
    assert held["objective"] == "grpo" and held["linear_only"] is True and held["k"] == 2
    assert len(runs.read_log(tmp_path / "rlvr")) == 1


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("sft", "a base is needed"), ("rlvr --base nowhere", "nowhere/config.json cannot be read"),
        ("pretrain --tasks divide", "unknown task 'divide'"), ("pretrain --tasks add:12", "sizes are digits"),
        ("pretrain --steps 0", "steps must be at least 1"), ("pretrain --device tpu", "unknown device 'tpu'"),
        ("sft --base BASE --masks nowhere", "masks nowhere cannot be read"),
        ("sft --base BASE --adapter dora", "unknown adapter"), ("rlvr --base BASE --objective ppo", "objective 'ppo'"),
        ("sft --base BASE --masks m --adapter lora", "give one of the two"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(given, sentence, base, tmp_path, capsys) -> None:
    arguments = [str(base) if word == "BASE" else word for word in given.split()]
    assert cli.main(["train", *arguments, "--out", str(tmp_path / "run"), "--threads", "1"]) == 2
    assert sentence in said(capsys) and not (tmp_path / "run").exists()


def test_a_taken_directory(tmp_path, capsys) -> None:
    (tmp_path / "mine").write_text("mine")
    for out, sentence in ((tmp_path, "is no run of"), (tmp_path / "mine" / "run", "Not a directory")):
        assert cli.main(["train", "pretrain", "--out", str(out), *SMALL]) == 2
        assert sentence in said(capsys)


def test_interrupted(tmp_path, capsys, monkeypatch) -> None:
    arguments = ["train", "pretrain", "--out", str(tmp_path / "run"), "--quiet", *SMALL]
    real = runs.Run.show

    def interrupt(self) -> None:
        monkeypatch.setattr(runs.Run, "show", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "show", interrupt)
    assert cli.main(arguments) == 3
    assert "the same command continues" in capsys.readouterr().err
    assert cli.main(arguments) == 0
    assert [row["step"] for row in tiny.rows(tmp_path / "run")] == [1, 2]
