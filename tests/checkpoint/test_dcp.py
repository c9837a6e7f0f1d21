"""Distributed checkpoints: read chunk by chunk, against the tensors that were saved; damage and hostile metadata."""

from __future__ import annotations

import enum
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from offprin_kernels.checkpoint import Checkpoint, CheckpointError
from offprin_kernels.checkpoint import dcp as reading

from .distributed import check_analysis, check_rows
from .files import bf16, refused, save
from .workers import tuned, weights


def save_alone(folder: Path, state: dict) -> Path:
    """Saved by one process, without a process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=str(folder), no_dist=True)
    return folder


@pytest.mark.parametrize("io", ["mmap", "read"])
@pytest.mark.parametrize("name", ["dcp", "hybrid-dcp", "boxes-dcp", "strided-dcp"])
def test_saved_by_several_processes(saved: Path, name: str, io: str) -> None:
    check_rows(Checkpoint.open(saved / name, io=io), tuned(0))


def test_saved_by_one_process(tmp_path: Path) -> None:
    whole = torch.randn(20, 30)
    state = {
        "plain": bf16(33, 17),
        "part": whole[5:9],
        "transposed": whole.t(),
        "half": torch.randn(3, 4, 5).half(),
        "vector": bf16(13),
        "scalar": torch.tensor(4.0),
        "none": torch.empty(0, 3),
        "swapped": torch.randn(3, 4, 5).permute(2, 0, 1),
        "fp8": torch.randn(8, 8).to(torch.float8_e4m3fn),
        "integers": torch.arange(6),
        "parameter": torch.nn.Parameter(torch.randn(4, 4)),
        "step": 3,
    }
    checkpoint = Checkpoint.open(save_alone(tmp_path / "c", state))
    assert checkpoint.ignored == ["step"]
    del state["step"]
    fp8 = state.pop("fp8")
    assert torch.equal(checkpoint.read("fp8").view(torch.uint8), fp8.view(torch.uint8))
    expected = {name: tensor.detach() for name, tensor in state.items()}
    assert checkpoint.tensors.keys() == {*expected, "fp8"}
    for name, tensor in expected.items():
        info = checkpoint.tensors[name]
        assert torch.equal(checkpoint.read(name), tensor.reshape(info.rows, info.columns)), name
    assert torch.equal(checkpoint.read("transposed", 3, 9), whole.t()[3:9])
    assert [file.format for file in checkpoint.files] == ["dcp", "dcp"]
    assert checkpoint.files[-1].path.name == ".metadata"
    assert list(Checkpoint.open(tmp_path / "c" / ".metadata").tensors) == list(checkpoint.tensors)


@pytest.mark.parametrize(
    ("names", "prefix", "inner"),
    [
        (["model.layers.0.w", "model.norm.w"], "", ["model.layers.0.w", "model.norm.w"]),
        (["model.model.layers.0.w", "model.lm_head.w"], "model.", ["model.layers.0.w", "lm_head.w"]),
        (["app.model.tok_embeddings.w", "app.optim.a"], "app.", ["model.tok_embeddings.w"]),
        (["app.model.model.norm.w", "app.optim.a", "lr_scheduler.x"], "app.model.", ["model.norm.w"]),
        (["state_dict.model.norm.w", "optimizer.state.0.exp_avg"], "state_dict.", ["model.norm.w"]),
        (["model.norm.w", "ema.norm.w"], "", ["model.norm.w", "ema.norm.w"]),
        (["module", "optim.x"], "", ["module"]),
        (["tok_embeddings.w", "layers.0.w", "train_state.step"], "", ["tok_embeddings.w", "layers.0.w"]),
    ],
)
def test_wrappers_and_training_state(tmp_path: Path, names: list[str], prefix: str, inner: list[str]) -> None:
    save_alone(tmp_path / "c", {name: bf16(2, 2, seed=i) for i, name in enumerate(names)})
    checkpoint = Checkpoint.open(tmp_path / "c")
    assert sorted(checkpoint.tensors) == sorted(inner)
    assert checkpoint.notes == ([f"names are those below {prefix}"] if prefix else [])
    assert sorted(checkpoint.ignored) == sorted(name for name in names if name[len(prefix) :] not in inner)


def test_only_an_optimizer(tmp_path: Path) -> None:
    save_alone(tmp_path / "c", {"optim.a": bf16(2, 2), "lr_scheduler.b": 3})
    with pytest.raises(CheckpointError, match=r"no tensors of a model \(only lr_scheduler, optim\)"):
        Checkpoint.open(tmp_path / "c")


def test_analysis_equals_that_of_the_merged_model(saved: Path, tmp_path: Path) -> None:
    base, merged = save(tmp_path / "base", weights(0)), save(tmp_path / "merged", tuned(0))
    check_analysis(tmp_path, base, saved / "dcp", merged)


def test_opening_reads_no_chunk_and_a_slab_only_its_own(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    zipped = reading.Zip
    monkeypatch.setattr(reading, "Zip", lambda *place: looked.append(place) or zipped(*place))
    checkpoint = Checkpoint.open(saved / "dcp")
    assert not looked
    checkpoint.read("model.embed_tokens.weight", 20, 30)  # of 17, 17 and 16 rows
    assert [path.name for path, *_ in looked] == ["__1_0.distcp"]
    checkpoint.read("model.embed_tokens.weight", 20, 40)
    assert [path.name for path, *_ in looked] == ["__1_0.distcp", "__2_0.distcp"]


def test_resident_memory_stays_at_the_slab(tmp_path: Path) -> None:
    save_alone(tmp_path / "c", {"w": torch.zeros(1 << 13, 1 << 12)})  # 128 MiB
    script = """
        import resource, sys, torch
        from offprin_kernels.checkpoint import Checkpoint, Slab
        checkpoint, slab = Checkpoint.open(sys.argv[1], io=sys.argv[2]), Slab()
        checkpoint.read("w", 0, 1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for start in range(0, 1 << 13, 256):
            checkpoint.read("w", start, start + 256, slab=slab).sum()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    for io in ("mmap", "read"):
        command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "c"), io]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert int(result.stdout) < 48 << 10, f"{io}: KiB for slabs of 4 MiB"


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_metadata_is_refused_by_name(tmp_path: Path, protocol: int) -> None:
    folder = save_alone(tmp_path / "c", {"w": bf16(2, 2)})
    (folder / ".metadata").write_bytes(pickle.dumps(Malicious(tmp_path / "executed"), protocol))
    with pytest.raises(
        CheckpointError, match=r"names \w+\.mkdir, which the metadata .* nothing of it was run"
    ) as caught:
        Checkpoint.open(folder)
    assert not (tmp_path / "executed").exists() and "\n" not in str(caught.value)


def test_hostile_chunk_is_not_run(tmp_path: Path) -> None:
    folder = save_alone(tmp_path / "c", {"w": bf16(64, 64)})
    data = folder / "__0_0.distcp"
    size = data.stat().st_size
    torch.save([Malicious(tmp_path / "executed"), torch.zeros(60, 60)], data)
    # The metadata gives the place and the length of the chunk that was there.
    data.write_bytes(data.read_bytes().ljust(size, b"\0"))
    checkpoint = Checkpoint.open(folder)
    message = refused(lambda: checkpoint.read("w"))
    assert message is not None and str(data) in message
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda d: (d / "__1_0.distcp").unlink(), r"names file __1_0\.distcp .*which is missing"),
        (lambda d: os.truncate(d / "__0_0.distcp", 900), r"__0_0\.distcp is truncated: tensor .* reaches to byte"),
        (lambda d: os.truncate(d / ".metadata", 100), r"\.metadata is damaged"),
        (lambda d: (d / ".metadata").write_bytes(b""), r"\.metadata is damaged"),
        (lambda d: (d / ".metadata").write_bytes(pickle.dumps({})), "is not the metadata"),
        (lambda d: (d / ".metadata").unlink(), r"without their \.metadata, which is written last"),
        (lambda d: edit(d, lambda m: m.storage_data.clear()), "does not say where the chunk of .* lies"),
        (lambda d: edit(d, lambda m: first(m).chunks.pop()), r"does not hold tensor .* whole: row \d+ is missing"),
        (lambda d: edit(d, lambda m: first(m).chunks.append(first(m).chunks[0])), "row 0 is stored twice"),
        (lambda d: edit(d, lambda m: setattr(first(m), "size", torch.Size([3, 3]))), "reaches beyond it"),
        (lambda d: edit(d, lambda m: place(m, "relative_path", "../x")), r"in '\.\./x', which is no file beside it"),
        (lambda d: edit(d, lambda m: place(m, "relative_path", "/etc/passwd")), "which is no file beside it"),
        (lambda d: edit(d, lambda m: place(m, "length", 3)), "holds 3 bytes for a chunk"),
        (lambda d: edit(d, lambda m: place(m, "offset", -3)), "which is no file beside it"),
        (lambda d: edit(d, lambda m: place(m, "transform_descriptors", ["zstd"])), r"transformed \(\['zstd'\]\)"),
    ],
)
def test_damaged_directories(saved: Path, tmp_path: Path, damage, expected: str) -> None:
    folder = shutil.copytree(saved / "dcp", tmp_path / "c")
    damage(folder)
    with pytest.raises(CheckpointError, match=expected):
        Checkpoint.open(folder)


def edit(folder: Path, change) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def first(metadata):
    return metadata.state_dict_metadata["app.model.model.embed_tokens.weight"]


def place(metadata, field: str, value: object) -> None:
    for index, info in metadata.storage_data.items():
        if index.fqn == "app.model.model.embed_tokens.weight":
            setattr(info, field, value)


def test_chunk_of_another_dtype_or_shape(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "dcp", tmp_path / "c")

    def change(metadata) -> None:
        first(metadata).properties.dtype = torch.float16

    edit(folder, change)
    with pytest.raises(CheckpointError, match=r"should be F16 of shape \[17, 12\] and is BF16 of shape \[17, 12\]"):
        Checkpoint.open(folder).read("model.embed_tokens.weight")


def nested(depth: int, width: int) -> list:
    found = ["a"]
    for _ in range(depth):
        found = [found] * width
    return found


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        # As text this is of some gigabytes.
        (lambda m: place(m, "transform_descriptors", nested(30, 2)), r"transformed \(\[\[\[\[\.\.\.\], "),
        (lambda m: place(m, "transform_descriptors", nested(250, 1)), r"transformed \(\[\[\[\[\.\.\.\]\]\]\]\)"),
        (lambda m: place(m, "relative_path", nested(30, 2)), r"in \[\[\[\[\.\.\.\], .* is no file beside it"),
        (lambda m: place(m, "relative_path", "a" * 5000), r"names file 'a{80}'\.\.\. .* is missing"),
        (lambda m: place(m, "relative_path", "\ud800\n"), r"names file '\\ud800\\n' .* is missing"),
        (lambda m: place(m, "relative_path", "a\0b"), r"names file 'a\\x00b' .* is missing"),
        (lambda m: unhashable(m), "does not say where the chunk of .* lies"),
        (lambda m: m.state_dict_metadata.update({5: first(m)}), "tensor 5 has no dtype, shape or chunks"),
    ],
)
def test_hostile_metadata_ends_in_one_short_sentence(saved: Path, tmp_path: Path, change, expected: str) -> None:
    folder = shutil.copytree(saved / "dcp", tmp_path / "c")
    edit(folder, change)
    with pytest.raises(CheckpointError, match=expected) as caught:
        Checkpoint.open(folder)
    assert len(str(caught.value).encode()) < 600 and "\n" not in str(caught.value)


def unhashable(metadata) -> None:
    for index in metadata.storage_data:
        # Hashed when the file is written, and not when it is read.
        object.__setattr__(index, "fqn", [1])


def test_names_that_are_no_text(tmp_path: Path) -> None:
    folder = save_alone(tmp_path / "c", {"step": 3})
    edit(folder, lambda m: m.state_dict_metadata.update({5: m.state_dict_metadata.pop("step")}))
    with pytest.raises(CheckpointError, match=r"no tensors of a model \(only 5\)"):
        Checkpoint.open(folder)


def test_dtypes_without_numbers_leave_the_rest_readable(tmp_path: Path) -> None:
    state = {"w": bf16(3, 2), "c": torch.ones(2, dtype=torch.complex64), "d": torch.ones(2, dtype=torch.complex128)}
    checkpoint = Checkpoint.open(save_alone(tmp_path / "c", state | {"h": torch.ones(2, dtype=torch.complex32)}))
    assert torch.equal(checkpoint.read("w"), state["w"]) and torch.equal(checkpoint.read("c")[0], state["c"])
    for name in "dh":
        with pytest.raises(CheckpointError, match=rf"tensor {name} has dtype torch\.complex\d+, which cannot be read"):
            checkpoint.read(name)


def test_chunks_written_as_safetensors_are_named(tmp_path: Path) -> None:
    formats = pytest.importorskip("torch.distributed.checkpoint.filesystem")
    if not hasattr(formats, "SerializationFormat"):
        pytest.skip("this torch writes zips only")
    writer = formats.FileSystemWriter(tmp_path / "c", serialization_format=formats.SerializationFormat.SAFETENSORS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"w": bf16(2, 2)}, storage_writer=writer, no_dist=True)
    with pytest.raises(CheckpointError, match="it is written as safetensors; save the checkpoint in torch's own"):
        Checkpoint.open(tmp_path / "c").read("w")


def test_file_that_changed_since(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "dcp", tmp_path / "c")
    checkpoint = Checkpoint.open(folder)
    os.utime(folder / "__0_0.distcp", ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        checkpoint.read("model.embed_tokens.weight", 0, 3)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_damaged_bytes_raise_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged-dcp"
    if not folder.exists():
        save_alone(folder, {"w": bf16(4, 4), "v": torch.ones(3)})
        shutil.copytree(folder, f"{folder}-kept")
    path = folder / data.draw(st.sampled_from([".metadata", "__0_0.distcp"]))
    for item in Path(f"{folder}-kept").iterdir():
        shutil.copy(item, folder / item.name)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    message = refused(
        lambda: [checkpoint.read(name) for checkpoint in [Checkpoint.open(folder)] for name in checkpoint.tensors]
    )
    assert message is None or str(folder) in message


def test_members_of_enums_named_by_getattr(tmp_path, monkeypatch) -> None:
    """As Python 3.11.0 to 3.11.3 pickles them; nothing is looked up."""
    monkeypatch.setattr(enum.Enum, "__reduce_ex__", lambda member, _: (getattr, (type(member), member.name)))
    path = save_alone(tmp_path / "c", {"w": torch.arange(6.0).reshape(2, 3)})
    assert b"getattr" in (path / ".metadata").read_bytes()
    assert torch.equal(Checkpoint.open(path).read("w"), torch.arange(6.0).reshape(2, 3))
