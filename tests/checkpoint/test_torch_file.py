"""PyTorch files: lazily by byte range, nothing but plain tensors, wrappers set aside, damage named."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offprin_kernels.checkpoint import Checkpoint, CheckpointError

from .files import bf16, checked, reason, refused, save, status


@pytest.mark.parametrize("io", ["mmap", "read"])
@pytest.mark.parametrize("new_format", [True, False])
def test_tensors_of_every_form(tmp_path: Path, io: str, new_format: bool) -> None:
    whole = torch.randn(40, 30)
    state = {
        "plain": bf16(33, 17),
        "part": whole[10:20],
        "transposed": whole.t(),
        "strided": whole[::2, ::3],
        "half": torch.randn(3, 4, 5).half(),
        "scalar": torch.tensor(4.0),
        "none": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(4, 4)),
    }
    if new_format:  # the old one has no fp8
        state["fp8"] = torch.randn(8, 8).to(torch.float8_e4m3fn)
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=new_format)
    checkpoint = Checkpoint.open(tmp_path, io=io)
    assert checkpoint.tensors.keys() == state.keys()
    for name, tensor in state.items():
        shape = (tensor.shape[:-1].numel(), tensor.shape[-1]) if tensor.dim() else (1, 1)
        got, expected = checkpoint.read(name), tensor.detach().reshape(shape).contiguous()
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8)) or not got.numel(), name
    assert torch.equal(checkpoint.read("transposed", 3, 9), whole.t()[3:9])
    assert checkpoint.files[0].format == "torch"
    held = 2 if new_format else 7
    assert checkpoint.notes[0].startswith(f"{held} tensors of pytorch_model.bin are held in memory")


def test_zip_format_is_read_by_ranges_and_not_kept(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(256 << 18)}, tmp_path / "model.pt")
    script = """
        import resource, sys, torch
        from offprin_kernels.checkpoint import Checkpoint
        Checkpoint.open(sys.argv[2])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        checkpoint = Checkpoint.open(sys.argv[1])
        info = checkpoint.tensors["w"]
        assert info.offset > 0 and str(sys.argv[1]) not in open("/proc/self/maps").read()
        checkpoint.read("w").view(torch.int32)[:, :1000].sum()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    torch.save({"w": torch.zeros(4)}, tmp_path / "small.pt")
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "model.pt"), str(tmp_path / "small.pt")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 32 << 10, "KiB for a file of 256 MiB"


def test_index_and_several_files(tmp_path: Path) -> None:
    torch.save({"a": bf16(2, 2)}, tmp_path / "x-00001.bin")
    torch.save({"b": bf16(3, 2)}, tmp_path / "x-00002.bin")
    torch.save({"step": 3}, tmp_path / "optimizer.pt")
    assert list(Checkpoint.open(tmp_path).tensors) == ["a", "b"]
    index = '{"weight_map": {"a": "x-00001.bin", "b": "x-00002.bin"}}'
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    assert list(Checkpoint.open(tmp_path).tensors) == ["a", "b"]


@pytest.mark.parametrize("key", ["state_dict", "model", "module", "model_state_dict"])
def test_wrapped_state_dict(tmp_path: Path, key: str) -> None:
    torch.save({"epoch": 3, key: {"w": bf16(2, 2), "extra": "text"}, "optimizer": {"lr": 1.0}}, tmp_path / "a.pth")
    checkpoint = Checkpoint.open(tmp_path / "a.pth")
    assert list(checkpoint.tensors) == ["w"]
    assert checkpoint.ignored == ["epoch", "optimizer", "extra"]


def test_ambiguous_and_empty_state_dicts(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": bf16(2, 2)}, "model": {"w": bf16(2, 2)}}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match=r"two\.pt holds several state dicts \(state_dict, model\)"):
        Checkpoint.open(tmp_path / "two.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="holds no tensors under names"):
        Checkpoint.open(tmp_path / "none.pt")
    torch.save([bf16(2, 2)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list, not a state dict"):
        Checkpoint.open(tmp_path / "list.pt")


class Part(torch.Tensor):
    """A tensor that is more than its numbers, as a DTensor is."""


def test_only_plain_tensors_are_taken(tmp_path: Path) -> None:
    torch.save({"w": bf16(2, 2), "part": torch.ones(3).as_subclass(Part)}, tmp_path / "model.pt")
    with (
        torch.serialization.safe_globals([Part]),
        pytest.raises(CheckpointError, match="holds tensor 'part' as a Part and no plain tensor"),
    ):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("imported", [False, True])
def test_one_ranks_dtensors_under_another_name(saved: Path, tmp_path: Path, imported: bool) -> None:
    """Whether torch can build them depends on what the program has imported; what is said does not."""
    shutil.copy(saved / "ranks" / "model_world_size_3_rank_1.pt", tmp_path / "model.pt")
    script = """
        import sys
        if sys.argv[2] == "True":
            import torch.distributed.tensor
        from offprin_kernels.checkpoint import Checkpoint, CheckpointError
        try:
            Checkpoint.open(sys.argv[1])
        except CheckpointError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), str(imported)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "as a DTensor, which is one rank's part of a tensor; give the directory" in said


def test_bits_that_change_numbers_when_read_are_honoured(tmp_path: Path) -> None:
    state = {
        "neg": torch.randn(4, dtype=torch.complex64).conj().imag,
        "conj": torch.randn(4, dtype=torch.cfloat).conj(),
    }
    torch.save(state, tmp_path / "model.pt")
    checkpoint = Checkpoint.open(tmp_path)
    for name, tensor in state.items():
        assert torch.equal(checkpoint.read(name)[0], tensor.resolve_conj().resolve_neg())
        assert not checkpoint.read(name).is_neg() and not checkpoint.read(name).is_conj()


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_file_that_would_run_code(tmp_path: Path, form: str) -> None:
    target, path = tmp_path / "executed", tmp_path / "pytorch_model.bin"
    state = {"w": bf16(2, 2), "x": Malicious(target)}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"x": Malicious(target)}))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin .* could run code .* safetensors") as caught:
        Checkpoint.open(tmp_path)
    assert not target.exists() and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_bytes_raise_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = folder / "damaged.pt"
    torch.save({"w": bf16(4, 4), "v": torch.ones(3)}, path, _use_new_zipfile_serialization=data.draw(st.booleans()))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.unlink()
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    message = refused(
        lambda: [checkpoint.read(name) for checkpoint in [Checkpoint.open(path)] for name in checkpoint.tensors]
    )
    assert message is None or str(path) in message


def test_tied_weights_share_their_bytes(tmp_path: Path) -> None:
    embedding = bf16(20, 8)
    state = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    torch.save(state, tmp_path / "pytorch_model.bin")
    base = Checkpoint.open(tmp_path)
    assert base.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert base.notes == ["tensor lm_head.weight shares its bytes with model.embed_tokens.weight"]
    tuned = Checkpoint.open(save(tmp_path / "tuned", {"model.embed_tokens.weight": bf16(20, 8, seed=1)}))
    pairing = checked(base, tuned)
    assert status(pairing, "base", "lm_head.weight") == "tied"
    assert "tuned stores no head" in reason(pairing, "base", "lm_head.weight")
    assert len(pairing.pairs) == 1 and pairing.complete
