"""Formats that are known and not read: one sentence with their name and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from offprin_kernels.checkpoint import Checkpoint, CheckpointError
from offprin_kernels.cli import main

from .files import bf16


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["model.Q4_K_M.gguf"], "is in GGUF, a quantised format .*gguf_file=.* save_pretrained"),
        (
            ["zero_to_fp32.py", "latest", "global_step9/x_optim_states.pt"],
            "DeepSpeed ZeRO shards; run its zero_to_fp32.py",
        ),
        (["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"], "DeepSpeed ZeRO"),
        (["global_step9/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], "DeepSpeed ZeRO"),
        (["latest_checkpointed_iteration.txt", "iter_0000100/mp_rank_00/model_optim_rng.pt"], "a Megatron checkpoint"),
        (["mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"], "a Megatron checkpoint"),
        (["tf_model.h5"], "TensorFlow or Flax weights"),
        (["flax_model.msgpack"], "TensorFlow or Flax weights"),
        (["model.nemo"], "is a NeMo archive"),
        (["__0_0.distcp"], r"holds \.distcp files without their \.metadata"),
        (["optim_world_size_2_rank_0.pt", "extra_state_world_size_2_rank_0.pt"], "holds no weights"),
    ],
    ids=str,
)
def test_directories(tmp_path: Path, files: list[str], expected: str) -> None:
    for name in ["config.json", *files]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=expected) as caught:
        Checkpoint.open(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.gguf", b"", "is in GGUF"),
        ("blob", b"GGUF\3\0\0\0", "is in GGUF"),
        ("a.nemo", b"", "is a NeMo archive"),
        ("tf_model.h5", b"", "TensorFlow or Flax"),
        ("__0_0.distcp", b"", r"one file of a distributed checkpoint; give the directory with its \.metadata"),
        ("readme.md", b"hello", "neither a directory nor"),
    ],
)
def test_files(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=expected):
        Checkpoint.open(tmp_path / name)


def test_the_command_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert main(["analyze", str(tmp_path / "a.gguf"), str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "is in GGUF" in error and "Traceback" not in error


def test_readable_weights_win(tmp_path: Path) -> None:
    save_file({"w": bf16(2, 2)}, tmp_path / "model.safetensors")
    for name in ("a.gguf", "tf_model.h5", "zero_to_fp32.py", "latest_checkpointed_iteration.txt", ".metadata"):
        (tmp_path / name).write_text("{}")
    torch.save({"v": bf16(2, 2)}, tmp_path / "model_world_size_1_rank_0.pt")
    assert list(Checkpoint.open(tmp_path).tensors) == ["w"]


def test_a_whole_model_beside_a_distributed_one_wins(tmp_path: Path) -> None:
    torch.save({"w": bf16(2, 2)}, tmp_path / "pytorch_model.bin")
    for name in (".metadata", "__0_0.distcp"):
        (tmp_path / name).write_text("")
    assert list(Checkpoint.open(tmp_path).tensors) == ["w"]
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "other.pt")
    (tmp_path / "__0_0.distcp").unlink()
    assert list(Checkpoint.open(tmp_path).tensors) == ["w"]  # a .metadata of some other program


def test_unjoined_safetensors_shards_of_a_distributed_save(tmp_path: Path) -> None:
    for number in range(2):
        path = tmp_path / f"shard-0000{number}-model-00001-of-00001.safetensors"
        save_file({"w": bf16(2, 2)}, path, metadata={"DCP_SHARDING_INFO": '{"w": {"saved_offsets": [0, 0]}}'})
    with pytest.raises(CheckpointError, match=r"join them with .*consolidate_safetensors_files"):
        Checkpoint.open(tmp_path)


def test_gguf_under_the_name_of_a_torch_file(tmp_path: Path) -> None:
    (tmp_path / "ggml-model-q4_0.bin").write_bytes(b"GGUF" + bytes(100))
    for source in (tmp_path, tmp_path / "ggml-model-q4_0.bin"):
        with pytest.raises(CheckpointError, match=r"q4_0\.bin is in GGUF"):
            Checkpoint.open(source)
