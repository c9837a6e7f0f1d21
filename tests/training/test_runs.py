"""A run's directory: killed at any moment it goes on to the same bits, and it is no one else's."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import time

import pytest

from offprin_kernels.output import OutputError
from offprin_kernels.training import model, runs, stages
from offprin_kernels.training.stages import train

from . import tiny

SETTINGS = {
    "pretrain": lambda base: tiny.pretrain(),
    "sft": lambda base: tiny.sft(base, adapter="pissa"),
    "rlvr": lambda base: tiny.rlvr(base, objective="grpo"),
}
STAGES = list(SETTINGS)


@pytest.fixture(scope="module")
def wanted(base, tmp_path_factory):
    """What each stage leaves when nothing stops it."""
    found = {}
    for stage in STAGES:
        out = tmp_path_factory.mktemp("wanted") / stage
        train(stage, SETTINGS[stage](base), out)
        found[stage] = tiny.ended(out)
    return found


@pytest.fixture(scope="module")
def children():
    """Makes processes that have the libraries loaded and no threads, in a fraction of a second each."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("killing is tested where processes can be forked")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.tiny", "transformers.models.qwen3.modeling_qwen3", "peft"])
    return context


class Killed(BaseException):
    """As a kill: no handler of errors takes it."""


def no_litter(out) -> None:
    """Neither half-written checkpoints nor temporary files."""
    assert {p.name for p in out.iterdir()} == {
        ".lock", "settings.json", "log.jsonl", "state.pt", "step-00002", "step-00004", "final",
    }  # fmt: skip


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_dying_at_every_write(tmp_path, wanted, monkeypatch, after) -> None:
    """Two checkpoints and two states, the settings and the final checkpoint: dying at any of them costs nothing."""
    writes = 0

    def dying(real, at):
        def save(*args):
            nonlocal writes
            writes += 1
            if writes == at and not after:
                raise Killed
            real(*args)
            if writes == at:
                raise Killed

        return save

    for at in range(1, 8):
        out, writes = tmp_path / str(at), 0
        with monkeypatch.context() as patch:
            for place, name in (
                (runs, "atomic_write_bytes"),
                (runs, "save_checkpoint"),
                (stages, "save_checkpoint"),
            ):
                patch.setattr(place, name, dying(getattr(place, name), at))
            if at <= 6:
                with pytest.raises(Killed):
                    train("pretrain", tiny.pretrain(), out)
            else:
                train("pretrain", tiny.pretrain(), out)
        assert writes == min(at, 6)
        train("pretrain", tiny.pretrain(), out)
        assert tiny.ended(out) == wanted["pretrain"]
        no_litter(out)


# which of the things that take their names in a process it is killed at: settings, step-2, state, step-4, state, final
BEFORE = (1, 2, 3, 2, 0)  # settings, step-2, step-4 with state 2 recorded, state 4
AFTER = (1, 1, 2, 1, 0)  # settings, step-2 with no state recorded, step-4, state 4


@pytest.mark.parametrize(("stage", "before"), [("rlvr", True), ("rlvr", False), ("sft", True)])
def test_killed_where_files_take_their_names(base, tmp_path, wanted, children, stage, before) -> None:
    """SIGKILL right before files and directories take their names, or right after.

    Before: temporary files and half a checkpoint are left. After: what they were for is not recorded anywhere.
    """
    out, settings = tmp_path / "run", SETTINGS[stage](base)
    for at in BEFORE if before else AFTER:
        process = children.Process(target=tiny.train_and_die, args=(stage, settings, out, at, before))
        process.start()
        process.join(60)
        assert process.exitcode == (-signal.SIGKILL if at else 0)
    assert tiny.ended(out) == wanted[stage]
    no_litter(out)


def test_killed_between_steps(base, tmp_path, wanted, children) -> None:
    """SIGKILL as soon as the log has one line, then three, then all, whatever the process is doing then."""
    out, settings, killed = tmp_path / "run", SETTINGS["rlvr"](base), 0
    for lines in (1, 3, 4, 99):
        process = children.Process(target=tiny.train_and_die, args=("rlvr", settings, out, 0, True))
        process.start()
        log, deadline = out / "log.jsonl", time.monotonic() + 60
        while process.is_alive() and time.monotonic() < deadline:
            if log.exists() and log.read_bytes().count(b"\n") >= lines:
                process.kill()
            time.sleep(0.001)
        process.join(60)
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 2 and process.exitcode == 0
    assert tiny.ended(out) == wanted["rlvr"]


def test_a_line_cut_in_half_is_written_anew(base, tmp_path, wanted, monkeypatch) -> None:
    out, settings = tmp_path / "run", SETTINGS["sft"](base)
    real = runs.Run.finish_step

    def cut(self, *args, **given):
        real(self, *args, **given)
        if self.done == 3:
            with open(out / "log.jsonl", "r+b") as file:
                file.truncate((out / "log.jsonl").stat().st_size - 20)
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "finish_step", cut)
        with pytest.raises(Killed):
            train("sft", settings, out)
    assert not (out / "log.jsonl").read_bytes().endswith(b"}\n")
    train("sft", settings, out)
    assert tiny.ended(out) == wanted["sft"]


def test_left_behind_by_a_kill(tmp_path, wanted) -> None:
    """Temporary files from before the settings, and from the middle of a checkpoint, do no harm and go."""
    out = tmp_path / "run"
    (out / "step-00002.partial").mkdir(parents=True)
    assert "is no run of" in refused(out)
    (out / "step-00002.partial").rmdir()
    (out / ".settings.json.7.ab.tmp").write_text("{")
    (out / ".lock").touch()
    train("pretrain", tiny.pretrain(), out)
    assert tiny.ended(out) == wanted["pretrain"]
    no_litter(out)


def test_a_complete_run_is_left_alone(tmp_path, monkeypatch) -> None:
    train("pretrain", tiny.pretrain(), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    monkeypatch.setattr(runs.Run, "steps", lambda self: 1 / 0)
    assert train("pretrain", tiny.pretrain(), tmp_path / "run") == tmp_path / "run" / "final"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


# ---- whose directory it is


def contents(root) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in root.rglob("*") if p.is_file()} if root.is_dir() else {}


def refused(out, settings=None, stage: str = "pretrain") -> str:
    before = contents(out)
    with pytest.raises(OutputError) as error:
        train(stage, settings or tiny.pretrain(), out)
    assert contents(out) == before and "\n" not in str(error.value)
    return str(error.value)


def test_a_directory_of_another_run(base, tmp_path) -> None:
    out = tmp_path / "run"
    train("pretrain", tiny.pretrain(), out)
    message = refused(out, tiny.pretrain(seed=3, lr=0.5))
    assert message == f"{out} holds another run, which differs in lr, seed; choose another --out"
    assert "differs in tasks;" in refused(out, tiny.pretrain(tasks={"sort": [2]}))
    assert "stage" in refused(out, tiny.sft(base), "sft")
    (out / "settings.json").write_text("[")
    assert "settings.json cannot be read" in refused(out)


def test_another_base_under_the_same_name(base, tmp_path) -> None:
    """A base that was trained anew, or masks that were drawn anew, make another run."""
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    train("sft", tiny.sft(copy), tmp_path / "run")
    shutil.rmtree(copy)
    model.save_checkpoint(tiny.lively(), copy)
    assert "differs in base_sha256;" in refused(tmp_path / "run", tiny.sft(copy), "sft")


def test_foreign_directories(tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    assert "full exists and is no run of `offprin train`" in refused(tmp_path / "full")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="file exists and is no run"):
        train("pretrain", tiny.pretrain(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    train("pretrain", tiny.pretrain(), tmp_path / "empty")


def test_two_processes_at_once(tmp_path) -> None:
    pytest.importorskip("fcntl", reason="where there are no locks, nothing is promised")
    out = tmp_path / "run"
    first = runs.Run(out, "pretrain", tiny.pretrain())
    assert "another process is writing into" in refused(out)
    first.close()
    train("pretrain", tiny.pretrain(), out)


def test_another_run_made_while_waiting_for_the_lock(tmp_path, monkeypatch) -> None:
    """Between the first look and the lock another process makes a run here, and ends."""
    out, real = tmp_path / "run", runs.lock

    def slow(root):
        monkeypatch.setattr(runs, "lock", real)
        train("pretrain", tiny.pretrain(seed=5), out)
        return real(root)

    monkeypatch.setattr(runs, "lock", slow)
    with pytest.raises(OutputError, match="holds another run, which differs in seed"):
        train("pretrain", tiny.pretrain(), out)
    assert json.loads((out / "settings.json").read_text())["seed"] == 5
    # and the lock has been given back
    train("pretrain", tiny.pretrain(seed=5), out)


# ---- progress


def test_progress(tmp_path, capsys) -> None:
    train("pretrain", tiny.pretrain(), tmp_path / "a", quiet=False)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("pretrain 4/4 loss ") and "accuracy" in lines[0]
    assert "tokens/s" in lines[0] and lines[0].endswith(", 0 s left")
    train("pretrain", tiny.pretrain(), tmp_path / "b")
    assert capsys.readouterr() == ("", "")
