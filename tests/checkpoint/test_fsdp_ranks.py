"""One file per rank: assembled by rows, against the whole tensors; missing, foreign and damaged ranks."""

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

from offprin_kernels.checkpoint import Checkpoint, CheckpointError, inert, torch_zip

from .distributed import check_analysis, check_rows
from .files import bf16, refused, save
from .workers import save_ranks, tuned, weights


@pytest.mark.parametrize("io", ["mmap", "read"])
@pytest.mark.parametrize("name", ["ranks", "hybrid", "boxes", "strided"])
def test_every_way_to_shard(saved: Path, name: str, io: str) -> None:
    checkpoint = Checkpoint.open(saved / name, io=io)
    check_rows(checkpoint, tuned(0))
    world = 3 if name == "ranks" else 4
    assert [file.path.name for file in checkpoint.files] == [
        f"model_world_size_{world}_rank_{r}.pt" for r in range(world)
    ]
    assert not checkpoint.ignored and not checkpoint.notes
    assert [file.format for file in checkpoint.files] == ["fsdp"] * world


def test_config_of_the_folder_beside(saved: Path) -> None:
    assert Checkpoint.open(saved / "hybrid").config == {"model_type": "qwen3"}
    assert Checkpoint.open(saved / "ranks").config == {}


def test_sharded_tensors_of_old(saved: Path) -> None:
    check_rows(Checkpoint.open(saved / "sharded"), {"w": torch.arange(35.0).view(7, 5)})


def test_plain_tensors_are_replicas_or_refused(saved: Path) -> None:
    checkpoint = Checkpoint.open(saved / "replicas")
    assert checkpoint.read("same").tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]
    assert checkpoint.read("view").tolist() == [[3.0] * 4]
    assert checkpoint.notes == ["2 tensors are whole and equal in all 3 ranks; read from rank 0"]
    with pytest.raises(CheckpointError, match="rank 1 holds other numbers than rank 0 under this name"):
        Checkpoint.open(saved / "unlike")
    with pytest.raises(CheckpointError, match="placement Partial does not say which part"):
        Checkpoint.open(saved / "partial")


def test_one_rank_needs_no_processes(tmp_path: Path) -> None:
    whole = torch.randn(20, 30)
    state = {"w": bf16(5, 3), "t": whole.t(), "part": whole[3:9], "parameter": torch.nn.Parameter(whole), "extra": 3}
    save_ranks(state, 0, 1, tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.ignored == ["extra"]
    del state["extra"]
    check_rows(checkpoint, {name: tensor.detach() for name, tensor in state.items()})


def test_analysis_equals_that_of_the_merged_model(saved: Path, tmp_path: Path) -> None:
    base, merged = save(tmp_path / "base", weights(0)), save(tmp_path / "merged", tuned(0))
    check_analysis(tmp_path, base, saved / "ranks", merged)


def test_the_folder_above_names_the_one_below(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "ranks", tmp_path / "step" / "actor")
    with pytest.raises(CheckpointError, match=r"step holds no weights itself, but actor below it does; give .*/actor"):
        Checkpoint.open(tmp_path / "step")
    shutil.copytree(saved / "ranks", tmp_path / "step" / "critic")
    with pytest.raises(CheckpointError, match="but actor and critic below it do"):
        Checkpoint.open(tmp_path / "step")


def test_opening_reads_no_weights_and_imports_no_process_groups(tmp_path: Path) -> None:
    save_ranks({"w": torch.zeros(1 << 11, 1 << 14)}, 0, 1, tmp_path)  # 128 MiB
    save_ranks({"w": torch.zeros(1 << 2, 1 << 4)}, 0, 1, tmp_path / "small")
    script = """
        import resource, sys, torch
        before = "torch.distributed.tensor" in sys.modules
        from offprin_kernels.checkpoint import Checkpoint, Slab
        Checkpoint.open(sys.argv[1] + "/small").read("w")
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        checkpoint, slab = Checkpoint.open(sys.argv[1], io=sys.argv[2]), Slab()
        for row in range(0, 1 << 11, 64):
            checkpoint.read("w", row, row + 64, slab=slab).sum()
        assert ("torch.distributed.tensor" in sys.modules) == before
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
    """
    for io in ("mmap", "read"):
        command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), io]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert int(result.stdout) < 48 << 10, f"{io}: KiB for slabs of 4 MiB"


def rank(folder: Path, number: int, world: int = 3) -> Path:
    return folder / f"model_world_size_{world}_rank_{number}.pt"


def without(folder: Path, name: str, number: int) -> None:
    """Rewrites a rank's file without a tensor; the class objects of torch need no processes to be unpickled here."""
    state = torch.load(rank(folder, number), weights_only=False)
    del state[name]
    torch.save(state, rank(folder, number))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda d: rank(d, 1).unlink(), r"lacks rank 1 of 3"),
        (lambda d: rank(d, 2).rename(rank(d, 5)), r"lacks rank 2 of 3"),
        (lambda d: shutil.copy(rank(d, 2), rank(d, 5)), r"file of rank 5 of 3, which cannot be"),
        (lambda d: shutil.copy(rank(d, 0), rank(d, 0, 2)), r"files of 2 and 3 ranks"),
        (lambda d: os.truncate(rank(d, 1), 3000), r"rank_1\.pt is damaged or not a PyTorch checkpoint"),
        (lambda d: rank(d, 1).write_bytes(b""), r"rank_1\.pt is damaged or not a PyTorch checkpoint"),
        (lambda d: torch.save([3], rank(d, 1)), "it holds no state dict"),
        (lambda d: torch.save({"a": 3}, rank(d, 1)), r"rank_1\.pt lacks tensor model\.embed_tokens\.weight"),
        (lambda d: without(d, "lm_head.weight", 0), r"rank_0\.pt lacks tensor lm_head\.weight"),
        (lambda d: without(d, "lm_head.weight", 2), r"rank_2\.pt lacks tensor lm_head\.weight"),
        # A rank of another run: its place in the mesh is taken, and its own is empty.
        (lambda d: shutil.copy(rank(d, 0), rank(d, 1)), r"do not hold tensor .* whole: row \d+ is missing"),
    ],
)
def test_damaged_directories(saved: Path, tmp_path: Path, damage, expected: str) -> None:
    folder = shutil.copytree(saved / "ranks", tmp_path / "c")
    damage(folder)
    with pytest.raises(CheckpointError, match=expected):
        Checkpoint.open(folder)


def test_mixed_dtypes_and_kinds(saved: Path, tmp_path: Path) -> None:
    for number, tensor in enumerate((torch.zeros(2, 2), torch.zeros(2, 2).bfloat16())):
        save_ranks({"w": tensor}, number, 2, tmp_path / "dtypes")
    with pytest.raises(CheckpointError, match=r"rank_1\.pt: tensor w is a plain tensor, BF16 .* in rank 0 .* F32"):
        Checkpoint.open(tmp_path / "dtypes")
    for number, rows in enumerate((2, 3)):
        save_ranks({"w": torch.zeros(rows, 2)}, number, 2, tmp_path / "shapes")
    with pytest.raises(CheckpointError, match=r"of shape \[3, 2\] and in rank 0 a plain tensor, F32 of shape \[2, 2\]"):
        Checkpoint.open(tmp_path / "shapes")
    save_ranks({"model._fsdp_wrapped_module._flat_param": torch.zeros(8)}, 0, 1, tmp_path / "flat")
    with pytest.raises(CheckpointError, match="holds flattened parameters"):
        Checkpoint.open(tmp_path / "flat")


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_file_that_would_run_code(tmp_path: Path) -> None:
    save_ranks({"w": bf16(2, 2), "x": Malicious(tmp_path / "executed")}, 0, 1, tmp_path)
    with pytest.raises(CheckpointError, match=r"names \w+\.mkdir, holds more than tensors .* nothing of it was run"):
        Checkpoint.open(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_inert_pickles_call_nothing() -> None:
    from io import BytesIO

    def load(content: bytes) -> object:
        return inert.Unpickler(BytesIO(content), {"builtins.getattr", "torch.distributed.tensor.DTensor"}).load()

    for hostile in (
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"c__builtin__\ngetattr\n(cos\nsystem\nS'x'\ntR.",
    ):
        with pytest.raises(inert.Forbidden):
            load(hostile)
    # getattr gives a class of no use, and only inside an inert class.
    with pytest.raises(inert.Forbidden):
        load(b"c__builtin__\ngetattr\n(I3\nS'__class__'\ntR.")
    inner = load(b"c__builtin__\ngetattr\n(ctorch.distributed.tensor\nDTensor\nS'__subclasses__'\ntR.")
    assert isinstance(inner, type) and issubclass(inner, inert.Record)
    # What a pickle hangs on a permitted class is gone with the file.
    with pytest.raises((TypeError, pickle.UnpicklingError)):
        load(b"ctorch.distributed.tensor\nDTensor\n}S'name'\nS'x'\nsb.")
    assert load(b"ctorch.distributed.tensor\nDTensor\n.").name == "torch.distributed.tensor.DTensor"


def test_older_forms_of_a_mesh(saved: Path, tmp_path: Path) -> None:
    """torch 2.8 pickles a mesh with its tensor of ranks and without a layout; only the coordinate is looked at."""
    folder = shutil.copytree(saved / "ranks", tmp_path / "c")
    for number in range(3):
        state = torch.load(rank(folder, number), weights_only=False)
        for value in state.values():
            mesh = value._spec.mesh
            for field in [field for field in vars(mesh) if field not in ("_coordinate_on_dim", "_device_type")]:
                delattr(mesh, field)
            mesh.__dict__["_coordinate_on_dim"] = [number]
        torch.save(state, rank(folder, number))
    check_rows(Checkpoint.open(folder), tuned(0))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_damaged_bytes_raise_nothing_else(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged-ranks"
    shutil.copytree(saved / "ranks", folder, dirs_exist_ok=True)
    path = rank(folder, data.draw(st.integers(0, 2)))
    content = bytearray(path.read_bytes())
    pickled = content.index(torch_zip.Zip(path).pickle[:50])
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.one_of(st.integers(0, len(content) - 1), st.integers(pickled, pickled + 3000)))] = (
            data.draw(st.integers(0, 255))
        )
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) - 1, len(content) // 2]))])
    message = refused(
        lambda: [checkpoint.read(name) for checkpoint in [Checkpoint.open(folder)] for name in checkpoint.tensors]
    )
    assert message is None or str(folder) in message
