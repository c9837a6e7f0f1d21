"""Writing: whole or not at all, in any order, resumable; a full disk costs nothing that was there."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from offprin_kernels.checkpoint import (
    Checkpoint,
    SafetensorsWriter,
    atomic_write_bytes,
    save_safetensors_atomic,
)

from .files import bf16

TENSORS = {
    "bits": torch.arange(5, dtype=torch.uint8),
    "wide": torch.randn(3, 4),
    "weight": bf16(5, 7),
    "strided": torch.randn(6, 6).t(),
    "scalar": torch.tensor(2, dtype=torch.int64),
    "none": torch.empty(0, 3),
    "fp8": torch.randn(3, 3).to(torch.float8_e4m3fn),
}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors_atomic(path, TENSORS, {"rows": "5", "name": "\u00e9"})
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].float(), tensor.float())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"rows": "5", "name": "\u00e9"}
    checkpoint = Checkpoint.open(path)
    for info in checkpoint.tensors.values():
        assert info.offset % 8 == 0 or info.dtype in ("BF16", "U8", "F8_E4M3", "F32")
        assert info.offset % TENSORS[info.name].element_size() == 0
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_no_tensors_and_unknown_dtypes(tmp_path: Path) -> None:
    save_safetensors_atomic(tmp_path / "none.safetensors", {})
    assert load_file(tmp_path / "none.safetensors") == {}
    with pytest.raises(ValueError, match=r"tensor w has dtype torch\.complex128"):
        save_safetensors_atomic(tmp_path / "x.safetensors", {"w": torch.ones(1, dtype=torch.complex128)})
    with pytest.raises(ValueError, match="tensor w has dtype 'B1'"):
        SafetensorsWriter(tmp_path / "x.safetensors", {"w": ("B1", (1,))})
    assert os.listdir(tmp_path) == ["none.safetensors"]


def disk_full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
def test_full_disk_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors_atomic(path, {"w": torch.ones(4)})
    before = path.read_bytes()
    monkeypatch.setattr(os, call, disk_full)
    for write in (
        lambda: save_safetensors_atomic(path, TENSORS),
        lambda: atomic_write_bytes(path, b"new"),
        lambda: atomic_write_bytes(tmp_path / "other", b"new"),
    ):
        with pytest.raises(OSError, match="No space left"):
            write()
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.safetensors"]


def test_real_file_size_limit(tmp_path: Path) -> None:
    script = """
        import os, resource, signal, sys, torch
        from offprin_kernels.checkpoint import SafetensorsWriter, atomic_write_bytes, save_safetensors_atomic
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        path = sys.argv[1] + "/x.safetensors"
        save_safetensors_atomic(path, {"w": torch.ones(4)})
        before = open(path, "rb").read()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        for write in (
            lambda: save_safetensors_atomic(path, {"w": torch.ones(1 << 20)}),
            lambda: atomic_write_bytes(path, bytes(2 << 20)),
            lambda: SafetensorsWriter(path, {"w": ("U8", (2 << 20,))}),
        ):
            try:
                write()
                raise SystemExit("written beyond the limit")
            except OSError as error:
                print(error.strerror)
        assert open(path, "rb").read() == before
        print(sorted(os.listdir(sys.argv[1])))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("File too large") == 3
    assert "['x.safetensors', 'x.safetensors.partial']" in result.stdout


def test_interruption_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write_bytes(tmp_path / "x", b"data")
    assert os.listdir(tmp_path) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: real(file, data[:7], offset))
    save_safetensors_atomic(tmp_path / "x.safetensors", {"w": TENSORS["wide"]})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["w"], TENSORS["wide"])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_parts_in_any_order_with_interruptions(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "parts.safetensors"
    tensors = {"a": torch.randn(6, 5), "b": bf16(3, 7), "c": torch.arange(11, dtype=torch.uint8)}
    layout = {
        "a": ("F32", tensors["a"].shape),
        "b": ("BF16", tensors["b"].shape),
        "c": ("U8", tensors["c"].shape),
    }
    parts = []
    for name, tensor in tensors.items():
        content = tensor.view(torch.uint8).reshape(-1)
        cuts = sorted({0, len(content), *data.draw(st.lists(st.integers(0, len(content)), max_size=4))})
        parts += [(name, begin, content[begin:end]) for begin, end in itertools.pairwise(cuts)]
    parts = data.draw(st.permutations(parts))
    stop = data.draw(st.integers(0, len(parts)))
    with SafetensorsWriter(path, layout, {"k": "v"}) as writer:
        assert not writer.resumed
        for name, begin, part in parts[:stop]:
            writer.write(name, begin, part)
        writer.sync()
    with SafetensorsWriter(path, layout, {"k": "v"}, resume=True) as writer:
        assert writer.resumed
        for name, begin, part in parts[stop:]:
            writer.write(name, begin, part.numpy().tobytes())
        writer.finish()
    assert not writer.partial.exists()
    loaded = load_file(path)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)


def test_resume_needs_the_same_header(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, {"w": ("U8", (4,))}, {"pair": "one"}) as writer:
        writer.write("w", 0, b"abcd")
    for layout, metadata, resume in (
        ({"w": ("U8", (4,))}, {"pair": "two"}, True),
        ({"w": ("U8", (5,))}, {"pair": "one"}, True),
        ({"w": ("U8", (4,))}, {"pair": "one"}, False),
    ):
        with SafetensorsWriter(path, layout, metadata, resume=resume) as writer:
            assert not writer.resumed
    writer = SafetensorsWriter(path, {"w": ("U8", (4,))}, {"pair": "one"}, resume=True)
    assert writer.resumed
    writer.discard()
    assert os.listdir(tmp_path) == []


def test_writes_outside_a_tensor(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "x", {"w": ("U8", (4,)), "v": ("U8", (4,))}) as writer:
        for offset, data in ((2, b"abc"), (-1, b"a"), (5, b"")):
            with pytest.raises(ValueError, match="of tensor w, which has 4"):
                writer.write("w", offset, data)
        with pytest.raises(KeyError):
            writer.write("lost", 0, b"")


def test_partial_file_is_sparse_and_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors_atomic(path, {"old": torch.ones(2)})
    with SafetensorsWriter(path, {"w": ("U8", (1 << 30,))}) as writer:
        assert writer.partial.stat().st_size > 1 << 30
        assert writer.partial.stat().st_blocks * 512 < 1 << 20
        assert list(load_file(path)) == ["old"]
