"""The output directory: whose files are these, who may write, and what is returned from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from offprin_kernels.analysis import plan, run, store
from offprin_kernels.cli import main

from .checkpoints import files, offprin


def said(capsys) -> str:
    """The one sentence on stderr."""
    message = capsys.readouterr().err
    assert message.startswith("offprin: error: ") and message.count("\n") == 1, message
    return message


def test_overwrite_without_a_plan_returns_nothing_stale(pair, tmp_path) -> None:
    *_, paths = pair
    out = tmp_path / "out"
    assert offprin(*paths[:2], "--out", out, "--names", "a", "--save-masks") == 0
    (out / "plan.json").unlink()
    assert offprin(paths[0], paths[2], "--out", out, "--names", "b", "--overwrite") == 0
    assert [r["run"] for r in json.loads((out / "summary.json").read_text())["runs"]] == ["b"]
    assert not (out / "masks").exists()


def test_parts_without_a_plan_are_not_continued(pair, tmp_path, monkeypatch) -> None:
    *_, paths = pair
    out = tmp_path / "out"
    monkeypatch.setattr(run, "finish", lambda *rest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        offprin(*paths[:2], "--out", out)
    monkeypatch.undo()
    (out / "plan.json").unlink()
    assert offprin(paths[0], paths[2], "--out", out, "--overwrite") == 0
    assert json.loads((out / store.LOG).read_text())["resumed_parts"] == 0


def test_a_kill_while_clearing_leaves_no_finished_analysis(pair, tmp_path, monkeypatch) -> None:
    *_, paths = pair
    out = tmp_path / "out"
    assert offprin(*paths[:2], "--out", out) == 0
    gone = []
    real = store.Path.unlink

    def dying(path, missing_ok=False):
        gone.append(path.name)
        real(path, missing_ok=missing_ok)
        if len(gone) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(store.Path, "unlink", dying)
    assert offprin(*paths[:2], "--out", out, "--overwrite") == 3
    monkeypatch.undo()
    assert gone[0] == "summary.json" and (out / "plan.json").exists()
    assert offprin(*paths[:2], "--out", out) == 0
    assert (out / "tensors.parquet").exists()


@pytest.mark.parametrize("name", ["plan.json", "summary.json", "pairs.parquet", "masks/one.safetensors", "parts/00000"])
def test_overwrite_never_touches_files_of_others(pair, tmp_path, capsys, name) -> None:
    *_, paths = pair
    mine = tmp_path / "out" / name
    if name.startswith("parts"):
        mine = mine / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text('{"dear": "to me"}')
    before = files(tmp_path / "out")
    assert offprin(*paths, "--out", tmp_path / "out", "--overwrite", "--save-masks") == 2
    assert "choose another --out" in said(capsys)
    found = files(tmp_path / "out")
    found.pop(store.LOCK, None)
    assert found == before


def test_overwrite_and_finish_leave_files_of_others_in_our_folders(pair, tmp_path) -> None:
    *_, paths = pair
    out = tmp_path / "out"
    for _ in range(2):
        assert offprin(*paths, "--out", out, "--overwrite", "--save-masks", "--names", "a", "b") == 0
        for folder in ("masks", "parts"):
            (out / folder).mkdir(exist_ok=True)
            (out / folder / "thesis.safetensors").write_text("dear to me")
    assert offprin(*paths, "--out", out, "--overwrite") == 0
    assert (
        sorted(p.name for folder in ("masks", "parts") for p in (out / folder).iterdir()) == ["thesis.safetensors"] * 2
    )


def test_no_name_in_a_stored_plan_leads_out_of_the_directory(pair, tmp_path) -> None:
    *_, paths = pair
    out = tmp_path / "out"
    assert offprin(*paths[:2], "--out", out, "--save-masks") == 0
    stored = json.loads((out / "plan.json").read_text())
    (out / "plan.json").write_text(json.dumps({**stored, "names": ["../../thesis"]}))
    (tmp_path / "thesis.safetensors").write_text("dear to me")
    assert offprin(*paths[:2], "--out", out, "--overwrite") == 0
    assert (tmp_path / "thesis.safetensors").exists()


def test_finish_needs_every_part(pair, tmp_path, monkeypatch, capsys) -> None:
    *_, paths = pair
    monkeypatch.setattr(plan, "PART_BYTES", 20_000)
    real = store.Parts.write

    def losing(self, partial, index, tables):
        real(self, partial, index, tables)
        if index == 2:
            store.shutil.rmtree(self.path(1))

    monkeypatch.setattr(store.Parts, "write", losing)
    assert offprin(*paths, "--out", tmp_path / "out") == 2
    assert "lacks 1 of" in said(capsys)
    assert not (tmp_path / "out" / "summary.json").exists()


def test_one_writer_at_a_time(pair, tmp_path, capsys) -> None:
    *_, paths = pair
    out = tmp_path / "out"
    out.mkdir()
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from offprin_kernels.output import lock\n"
        "held = lock(Path(sys.argv[1]))\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        for options in ([], ["--overwrite"]):
            assert offprin(*paths, "--out", out, *options) == 2
            assert f"another process is writing into {out}; wait for it or choose another --out" in said(capsys)
        other.stdin.close()
    assert offprin(*paths, "--out", out) == 0


def test_out_that_cannot_be_made_is_bad_input(pair, tmp_path, capsys, monkeypatch) -> None:
    *_, paths = pair
    (tmp_path / "file").write_text("")
    assert offprin(*paths, "--out", tmp_path / "file" / "out") == 2
    message = said(capsys)
    assert str(tmp_path / "file" / "out") in message and "choose another --out" in message

    def denied(path, data):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(store, "atomic_write_bytes", denied)
    assert offprin(*paths, "--out", tmp_path / "out") == 2
    assert "Permission denied" in said(capsys)


def test_finished_directory_that_lacks_a_file(pair, tmp_path, capsys) -> None:
    *_, paths = pair
    out = tmp_path / "out"
    assert offprin(*paths, "--out", out, "--save-masks") == 0
    (out / "pairs.parquet").unlink()
    (out / "masks" / "two.safetensors").unlink()
    assert offprin(*paths, "--out", out, "--save-masks") == 2
    message = said(capsys)
    assert "lacks pairs.parquet, masks/two.safetensors" in message and "--overwrite" in message


@pytest.mark.parametrize("text", ["[1]", "{}", "", "\x00"])
def test_summary_that_is_none(pair, tmp_path, capsys, text) -> None:
    *_, paths = pair
    out = tmp_path / "out"
    assert offprin(*paths, "--out", out) == 0
    (out / "summary.json").write_text(text)
    assert offprin(*paths, "--out", out) == 2
    assert "summary.json" in (message := said(capsys)) and "--overwrite" in message
    assert offprin(*paths, "--out", out, "--overwrite") == 0


def test_rerun_of_a_finished_analysis_changes_nothing(pair, tmp_path) -> None:
    *_, paths = pair
    out = tmp_path / "out"
    assert offprin(*paths, "--out", out) == 0
    before = sorted(out.rglob("*"))
    out.chmod(0o555)
    assert offprin(*paths, "--out", out) == 0
    assert sorted(out.rglob("*")) == before
    out.chmod(0o755)


def test_results_of_another_version_say_so(pair, tmp_path, capsys) -> None:
    *_, paths = pair
    out = tmp_path / "out"
    assert offprin(*paths, "--out", out) == 0
    stored = json.loads((out / "plan.json").read_text())
    (out / "plan.json").write_text(json.dumps({**stored, "version": "0.0.9"}))
    assert offprin(*paths, "--out", out) == 2
    assert "the results of version 0.0.9 of offprin-kernels" in said(capsys)


# ---- the end of an analysis


def test_tables_are_on_the_disk_before_the_summary(pair, tmp_path, monkeypatch) -> None:
    *_, paths = pair
    out = tmp_path / "out"
    synced, renamed = [], []
    sync, replace, written = os.fsync, os.replace, store.Store.write_summary

    def syncing(descriptor) -> None:
        sync(descriptor)
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def replacing(old, new) -> None:
        if Path(new).suffix == ".parquet" and Path(new).parent == out:
            assert str(old) in synced, "renamed before it was whole on the disk"
            synced.clear()
            renamed.append(Path(new).stem)
        replace(old, new)

    def write_summary(self, summary) -> None:
        assert renamed == store.tables(2, ["spectrum"])
        assert str(out) in synced, "the names of the tables are on the disk too"
        written(self, summary)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    monkeypatch.setattr(store.Store, "write_summary", write_summary)
    assert offprin(*paths, "--out", out, "--metrics", "spectrum", "--k", "5") == 0


@pytest.mark.parametrize("again", ["analyze", "merge", "shard"])
def test_a_kill_after_the_summary_leaves_no_parts_for_good(pair, tmp_path, monkeypatch, again) -> None:
    *_, paths = pair
    out = tmp_path / "out"

    def killed(self) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "drop_parts", killed)
        assert offprin(*paths, "--out", out) == 3
    assert (out / store.SUMMARY).exists() and (out / store.CONTEXT).exists() and any((out / "parts").iterdir())
    if again == "merge":
        assert main(["merge", str(out), "--no-report"]) == 0
    else:
        assert offprin(*paths, "--out", out, *(["--shard", "1/2"] if again == "shard" else [])) == 0
    assert not (out / store.CONTEXT).exists() and not (out / "parts").exists()


@pytest.mark.parametrize("options", [[], ["--shard", "1/1"]])
def test_a_process_that_comes_just_after_the_end_adds_nothing(pair, tmp_path, monkeypatch, options) -> None:
    *_, paths = pair
    out = tmp_path / "out"
    real = store.lock

    def late(root, **shared):
        """Another process finishes between our first look and our lock."""
        monkeypatch.setattr(store, "lock", real)
        assert offprin(*paths, "--out", out) == 0
        before.update(files(out))
        return real(root, **shared)

    before: dict[str, bytes] = {}
    monkeypatch.setattr(store, "lock", late)
    assert offprin(*paths, "--out", out, *options) == 0
    assert before and files(out) == before
