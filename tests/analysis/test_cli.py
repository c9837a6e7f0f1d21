"""The command before any work: options, environment variables, interruptions; and `offprin env`, which never dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offprin_kernels import _env, cli
from offprin_kernels.commands.common import pick_device

from .checkpoints import offprin


def refused(paths, tmp_path, capsys, *options) -> str:
    """The sentence of a run that must end before the output directory is made."""
    assert offprin(*paths, "--out", tmp_path / "out", *options) == 2
    message = capsys.readouterr().err
    assert message.startswith("offprin: error: ") and message.count("\n") == 1, message
    assert not (tmp_path / "out").exists()
    return message


def test_too_many_rules(pair, tmp_path, capsys) -> None:
    also = [f"ulp:{n}" for n in range(8)]
    assert "--also: at most 7 rules" in refused(pair[2], tmp_path, capsys, "--also", *also)
    assert offprin(*pair[2], "--out", tmp_path / "out", "--also", *also[:7], "ulp:0") == 0


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("OFFPRIN_BACKEND", "cuda", "use OFFPRIN_BACKEND=triton"),
        ("OFFPRIN_BACKEND", "tpu", "unknown backend 'tpu'"),
        ("OFFPRIN_BACKEND", "triton", "it needs a GPU"),
        ("OFFPRIN_CPU_ISA", "mmx", "OFFPRIN_CPU_ISA=mmx cannot run"),
        ("OFFPRIN_NUM_THREADS", "many", "from 1 to 4096"),
        ("OFFPRIN_NUM_THREADS", "4097", "from 1 to 4096"),
    ],
)
def test_forced_settings_that_cannot_be_had(pair, tmp_path, capsys, monkeypatch, variable, value, words) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert words in refused(pair[2], tmp_path, capsys, "--device", "cpu")
    capsys.readouterr()
    assert cli.main(["env"]) == 0
    assert value in capsys.readouterr().out or value == "triton"


@pytest.mark.parametrize("device", ["meta", "mps", "cpu:1", "cuda:x", "cuda:-1", "gpu", "cuda:2", "cuda:99999999999"])
def test_devices_that_cannot_analyze(pair, tmp_path, capsys, monkeypatch, device) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert f"--device {device}: " in refused(pair[2], tmp_path, capsys, "--device", device)
    assert str(pick_device("cuda:1")) == "cuda:1"


def test_env_tells_what_fails(capsys, monkeypatch) -> None:
    def broken() -> int:
        raise RuntimeError("the driver is asleep")

    monkeypatch.setattr(_env, "gpus", broken)
    assert cli.main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpus"] == "the driver is asleep"


@pytest.mark.parametrize(
    "start", [["-m", "offprin_kernels"], ["-c", "from offprin_kernels.cli import main; exit(main())"]]
)
def test_interrupted_while_torch_loads(tmp_path, start) -> None:
    (tmp_path / "torch.py").write_text("exec('raise KeyboardInterrupt')")
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root])}
    done = subprocess.run([sys.executable, *start, "env"], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert done.stderr == "offprin: interrupted; the same command continues where it stopped\n"
