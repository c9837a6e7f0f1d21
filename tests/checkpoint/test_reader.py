"""Reading by row slabs, against the safetensors library's own slices; sources, order of preference, and damage."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from offprin_kernels.checkpoint import Checkpoint, CheckpointError, Slab, storage

from .files import bf16, raw, save, save_sharded


@pytest.fixture(params=["mmap", "read"])
def io(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {
        "wide": bf16(37, 5000),
        "tall": torch.randn(3000, 7),
        "three": torch.randn(5, 6, 7, dtype=torch.float16),
        "vector": bf16(1001),
        "scalar": torch.tensor(2.5),
        "no_rows": torch.empty(0, 9),
        "no_columns": torch.empty(4, 0),
        "fp8": torch.randn(9, 33).to(torch.float8_e4m3fn),
        "odd": torch.arange(7, dtype=torch.uint8),
    }
    return save(tmp_path_factory.mktemp("mixed"), tensors)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_row_slabs_equal_the_librarys_slices(mixed: Path, data: st.DataObject) -> None:
    io = data.draw(st.sampled_from(["mmap", "read"]))
    slab = data.draw(st.sampled_from([None, Slab()]))
    with Checkpoint.open(mixed, io=io) as checkpoint, safe_open(mixed / "model.safetensors", "pt") as library:
        name = data.draw(st.sampled_from(sorted(checkpoint.tensors)))
        rows = checkpoint.tensors[name].rows
        start = data.draw(st.integers(0, rows))
        stop = data.draw(st.integers(start, rows))
        got = checkpoint.read(name, start, stop, slab=slab)
        whole = library.get_tensor(name)
        expected = whole.flatten(0, -2) if whole.dim() > 1 else whole.reshape(1, -1)
        assert got.dtype == whole.dtype and got.dim() == 2
        if expected.numel():
            assert torch.equal(got.view(torch.uint8), expected[start:stop].contiguous().view(torch.uint8))
        else:
            assert got.numel() == 0
        if name in ("wide", "tall"):
            assert torch.equal(got, library.get_slice(name)[start:stop])


def test_offsets_that_are_not_aligned_to_the_dtype(tmp_path: Path, io: str) -> None:
    # A header of odd length and an odd first tensor: the library itself never writes such a file, others do.
    weights = torch.arange(12, dtype=torch.float32).view(3, 4)
    header = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "w": {"dtype": "F32", "shape": [3, 4], "data_offsets": [3, 51]},
    }
    text = json.dumps(header)
    text += " " * ((2 - len(text)) % 4)
    (tmp_path / "model.safetensors").write_bytes(raw(text.encode(), bytes(3) + weights.numpy().tobytes()))
    checkpoint = Checkpoint.open(tmp_path, io=io)
    assert checkpoint.tensors["w"].offset % 4
    got = checkpoint.read("w", 1, 3)
    assert got.data_ptr() % 4 == 0 and torch.equal(got, weights[1:3])


def test_rows_outside_and_unknown_names(mixed: Path) -> None:
    checkpoint = Checkpoint.open(mixed)
    for start, stop in ((-1, 2), (0, 38), (5, 4)):
        with pytest.raises(IndexError, match="of wide, which has 37"):
            checkpoint.read("wide", start, stop)
    with pytest.raises(CheckpointError, match="no tensor lost"):
        checkpoint.read("lost")
    with pytest.raises(ValueError, match="unknown io 'fast'"):
        Checkpoint.open(mixed, io="fast")


def test_slab_is_reused_and_a_mapped_slab_is_private(mixed: Path) -> None:
    slab = Slab()
    checkpoint = Checkpoint.open(mixed, io="read")
    first = checkpoint.read("wide", slab=slab)
    second = checkpoint.read("wide", 3, 9, slab=slab)
    assert first.data_ptr() == second.data_ptr()
    before = (mixed / "model.safetensors").read_bytes()
    Checkpoint.open(mixed, io="mmap").read("wide").zero_()
    assert (mixed / "model.safetensors").read_bytes() == before


def test_mapped_slabs_outlive_the_checkpoint_and_unmap_when_they_die(mixed: Path) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(mixed))

    before = mapped()
    with Checkpoint.open(mixed, io="mmap") as checkpoint:
        rows = checkpoint.read("tall", 10, 2000)
    kept = rows.clone()
    gc.collect()
    assert mapped() == before + 1 and torch.equal(rows, kept)
    del rows
    gc.collect()
    assert mapped() == before


def test_many_threads_and_more_files_than_stay_open(tmp_path: Path, io: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_OPEN_FILES", 2)
    shards = [{f"w{number}": torch.full((50, 8), float(number))} for number in range(9)]
    checkpoint = Checkpoint.open(save_sharded(tmp_path, shards), io=io)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for step in range(60):
            number = (seed + step * 7) % 9
            if not bool((checkpoint.read(f"w{number}", 3, 40) == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    opened = len(os.listdir("/proc/self/fd"))
    checkpoint.close()
    assert len(os.listdir("/proc/self/fd")) <= opened - 2


def test_short_reads_are_continued(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, offset: real(file, [views[0][:1000]], offset))
    checkpoint = Checkpoint.open(mixed, io="read")
    with safe_open(mixed / "model.safetensors", "pt") as library:
        assert torch.equal(checkpoint.read("wide"), library.get_tensor("wide"))


@pytest.mark.parametrize("change", ["shorter", "longer", "gone", "replaced"])
def test_file_that_changes_after_opening(tmp_path: Path, io: str, change: str) -> None:
    path = save(tmp_path, {"w": bf16(100, 100)}) / "model.safetensors"
    checkpoint = Checkpoint.open(tmp_path, io=io)
    content = path.read_bytes()
    if change == "gone":
        path.unlink()
    elif change == "replaced":
        path.unlink()
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))
    else:
        path.write_bytes(content[:-100] if change == "shorter" else content + b"x")
    with pytest.raises(CheckpointError, match=r"model\.safetensors (can no longer|changed since).*tensor w"):
        checkpoint.read("w")


def test_file_that_shrinks_during_a_read_and_failing_disk(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(mixed, io="read")
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(CheckpointError, match="became shorter while tensor wide was read"):
        checkpoint.read("wide")

    def failing(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Input/output error\) at tensor wide"):
        checkpoint.read("wide")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("ext4", "mmap"), ("nfs4", "read"), ("fuse.sshfs", "read"), ("lustre", "read"), ("overlay", "mmap")],
)
def test_auto_reads_on_network_file_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, expected: str
) -> None:
    (tmp_path / "a b").mkdir()
    mounts = tmp_path / "mounts"
    point = str(tmp_path.resolve() / "a b").replace(" ", "\\040")
    mounts.write_text(f"root / xfs rw 0 0\nserver:/x {point} {kind} rw 0 0\nbroken\n")
    assert storage.file_system(tmp_path / "a b" / "file", str(mounts)) == kind
    assert storage.file_system(tmp_path / "elsewhere", str(mounts)) == "xfs"
    assert storage.file_system(tmp_path, str(tmp_path / "no mounts")) is None
    monkeypatch.setattr(storage, "file_system", lambda path: kind)
    assert storage.choose_io(tmp_path, "auto") == expected
    assert storage.choose_io(tmp_path, "mmap") == "mmap"


# Sources and their order.


def test_index_comes_before_a_single_file(tmp_path: Path) -> None:
    save_sharded(tmp_path, [{"a": bf16(2, 2)}, {"b": bf16(3, 3)}])
    save_file({"other": bf16(1, 1)}, tmp_path / "model.safetensors")
    torch.save({"older": bf16(1, 1)}, tmp_path / "pytorch_model.bin")
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.tensors) == ["a", "b"]
    assert [file.format for file in checkpoint.files] == ["safetensors"] * 2
    assert list(Checkpoint.open(tmp_path / "model.safetensors").tensors) == ["other"]
    assert list(Checkpoint.open(tmp_path / "model.safetensors.index.json").tensors) == ["a", "b"]
    (tmp_path / "model.safetensors.index.json").unlink()
    assert list(Checkpoint.open(tmp_path).tensors) == ["other"]


def test_several_files_without_an_index(tmp_path: Path) -> None:
    save_file({"a": bf16(2, 2)}, tmp_path / "one.safetensors")
    save_file({"b": bf16(2, 2)}, tmp_path / "two.safetensors")
    assert list(Checkpoint.open(tmp_path).tensors) == ["a", "b"]
    save_file({"a": bf16(2, 2)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor a is both in .*one\.safetensors and in .*two\.safetensors"):
        Checkpoint.open(tmp_path)


def test_config_notes_and_sizes(tmp_path: Path) -> None:
    save_sharded(tmp_path, [{"a": bf16(2, 2)}, {"b": bf16(3, 3), "c": bf16(1, 1)}])
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["c"]
    index.write_text(json.dumps(content))
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config == {"model_type": "qwen3"} and checkpoint.nbytes == 28
    assert checkpoint.notes == ["tensor c of model-00002-of-00002.safetensors is not in the index; it is included"]
    assert "c" in checkpoint.tensors and checkpoint.revision is None and checkpoint.source == str(tmp_path)
    assert [file.size for file in checkpoint.files] == [file.path.stat().st_size for file in checkpoint.files]


def test_two_shards_with_one_name_follow_the_index(tmp_path: Path) -> None:
    save_sharded(tmp_path, [{"a": torch.zeros(2), "c": torch.zeros(2)}, {"a": torch.ones(2), "b": torch.ones(2)}])
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.read("a").tolist() == [[1.0, 1.0]]
    shards = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert checkpoint.notes == [f"tensor a of {shards[0]} is left out: the index places it in {shards[1]}"]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda d: (d / "model-00002-of-00002.safetensors").unlink(), r"names shard model-00002.*tensor b.*is missing"),
        (lambda d: edit(d, lambda m: m.update(z="model-00001-of-00002.safetensors")), r"places tensor z .* lacks it"),
        (lambda d: edit(d, lambda m: m.update(z="../x.safetensors")), r"tensor z in '\.\./x"),
        (lambda d: edit(d, lambda m: m.update(z=3)), "tensor z in 3"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{"), "cannot be read as JSON"),
        (lambda d: (d / "model.safetensors.index.json").write_text("[]"), "not a JSON object"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
        (lambda d: (d / "config.json").write_text("nonsense"), r"config\.json cannot be read as JSON"),
    ],
)
def test_damaged_directories(tmp_path: Path, damage, expected: str) -> None:
    save_sharded(tmp_path, [{"a": bf16(2, 2)}, {"b": bf16(3, 3)}])
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=expected):
        Checkpoint.open(tmp_path)


def edit(folder: Path, change) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "readme.md").write_text("hello")
    (tmp_path / "text" / "training_args.bin").write_text("not weights")
    for source, expected in (
        (tmp_path / "empty", "is empty"),
        (tmp_path / "text", "holds no weights"),
        (tmp_path / "text" / "readme.md", "neither a directory nor"),
        (tmp_path / "lost.safetensors", "there is no file"),
        (tmp_path / "lost", "no file or directory"),
        ("x" * 5000, "no file or directory"),
        ("a\0b", "no file or directory"),
        ("", "no file or directory"),
    ):
        with pytest.raises(CheckpointError, match=expected):
            Checkpoint.open(source)


def test_resident_memory_stays_at_the_slab(tmp_path: Path) -> None:
    # 1 GiB of holes: read in slabs of 16 MiB, both ways, on top of the interpreter with torch.
    size = 1 << 30
    header = {"w": {"dtype": "BF16", "shape": [1 << 14, 1 << 15], "data_offsets": [0, size]}}
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw(header))
    os.truncate(path, path.stat().st_size + size)
    script = """
        import resource, sys, torch
        from offprin_kernels.checkpoint import Checkpoint, Slab
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        checkpoint, slab = Checkpoint.open(sys.argv[1], io=sys.argv[2]), Slab()
        total = 0
        for start in range(0, 1 << 14, 256):
            total += int(checkpoint.read("w", start, start + 256, slab=slab).view(torch.int64).sum())
        print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    for io in ("mmap", "read"):
        command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), io]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        total, grown = map(int, result.stdout.split())
        assert total == 0 and grown < 64 << 10, f"{io}: {grown} KiB for slabs of 16 MiB"


def test_transformers_sharded_checkpoint(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    checkpoint = Checkpoint.open(tmp_path)
    state = model.state_dict()
    assert len(checkpoint.files) > 1 and checkpoint.tensors.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(checkpoint.read(name), value.reshape(-1, value.shape[-1])), name
    assert checkpoint.config["model_type"] == "qwen3" and not checkpoint.notes


@pytest.mark.parametrize("shard", ["a" * 5000 + ".safetensors", "a\0b", "\ud800"], ids=["long", "null", "surrogate"])
def test_shards_that_no_file_system_could_hold(tmp_path: Path, shard: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(CheckpointError, match=r"names shard .* which is missing") as caught:
        Checkpoint.open(tmp_path)
    assert len(str(caught.value).encode()) < 600, "and it can be printed"
