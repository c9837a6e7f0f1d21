"""One file per rank: assembled by rows, against the whole tensors; missing, foreign and damaged ranks."""

from __future__ import annotations

import itertools
import math
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

from offprin_kernels.checkpoint import Checkpoint, CheckpointError, inert, rank_parts, torch_zip

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


@pytest.mark.parametrize("name", ["unlike-replicas", "unlike-shards"])
def test_replicas_of_a_part_are_compared(saved: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"rank \d holds other numbers than rank 0 for the part at \[0, 0\]"):
        Checkpoint.open(saved / name)


def test_parameters_inside_of_a_wrapper(saved: Path) -> None:
    """``state_dict(keep_vars=True)`` of FSDP2: parameters that are DTensors have attributes beside their slots."""
    checkpoint = Checkpoint.open(saved / "parameters")
    check_rows(checkpoint, tuned(0))
    assert checkpoint.ignored == ["step"]


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("layout", ["whole", "view", "transposed"])
def test_replicas_are_compared_with_and_without_checksums(tmp_path: Path, layout: str, checksums: bool) -> None:
    """Without checksums torch writes a 0 for each, which says nothing; a view has none of its own either."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    try:
        for last in (0.0, 1.0):
            for number in range(2):
                whole = torch.zeros(6, 5)
                whole[-1, -1] = last * number
                stored = {"whole": whole, "view": torch.cat([whole + number, whole])[6:], "transposed": whole.t()}
                save_ranks({"w": stored[layout]}, number, 2, tmp_path / str(last))
    finally:
        torch.serialization.set_crc32_options(before)
    assert Checkpoint.open(tmp_path / "0.0").notes == ["1 tensors are whole and equal in all 2 ranks; read from rank 0"]
    with pytest.raises(CheckpointError, match="rank 1 holds other numbers than rank 0 under this name"):
        Checkpoint.open(tmp_path / "1.0")


def cut(placements: list[tuple[str, int]], mesh: tuple[int, ...], rows: int, place: tuple[int, ...], held: int) -> int:
    """Where dtensor_offsets says that a rank's rows of one axis begin."""
    made = []
    for kind, factor in placements:
        placement = type(kind, (inert.Record,), {"name": f"x.{kind}"})()
        placement.state = {"dim": 0, "split_factor": factor}
        made.append(placement)
    stored = torch_zip.Stored("F32", (held,), (1,), "0", 0)
    return rank_parts.dtensor_offsets(rank_parts.Part("dtensor", stored, (rows,), (), tuple(made), place), mesh)[0]


@pytest.mark.parametrize("rows", [12, 13, 29])
@pytest.mark.parametrize("mesh", [(2, 2, 2), (2, 2, 3), (2, 3, 1), (4, 3, 2)])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_strided_shards_of_three_dimensions(mesh: tuple[int, ...], order: tuple[int, ...], rows: int) -> None:
    placements = []
    for dimension in range(3):
        # The split factor by its definition: sizes of the dimensions that cut before and stand to the right.
        before = [mesh[d] for d in order[: order.index(dimension)] if d > dimension]
        placements.append(("_StridedShard" if math.prod(before) > 1 else "Shard", math.prod(before)))
    for place in itertools.product(*map(range, mesh)):
        held = list(range(rows))
        for dimension in order:
            piece = -(-len(held) // mesh[dimension])
            held = held[piece * place[dimension] :][:piece]
        if held:
            assert cut(placements, mesh, rows, place, len(held)) == held[0]
    with pytest.raises(ValueError, match="a strided shard of split factor 7 behind"):
        cut([("_StridedShard", 7), *placements[1:]], mesh, rows, (0, 0, 0), 1)


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


def test_a_path_to_one_rank(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is the part of rank 1 of 3; give the directory with those of all"):
        Checkpoint.open(rank(saved / "ranks", 1))
    save_ranks({"w": torch.ones(2, 2)}, 0, 1, tmp_path)
    assert Checkpoint.open(rank(tmp_path, 0, 1)).files[0].format == "fsdp"


def test_tensors_of_other_dtypes_and_forms(tmp_path: Path) -> None:
    buffer, odd = torch.ones(3), torch.ones(4)
    odd.attribute = 3
    state = {
        "w": bf16(2, 2),
        "complex": torch.ones(2, 3, dtype=torch.complex64),
        "buffer": torch.nn.Buffer(buffer),
        "odd": odd,
    }
    unread = {"double": torch.ones(2, dtype=torch.complex128), "half": torch.ones(2, dtype=torch.complex32)}
    save_ranks(state | unread, 0, 1, tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    for name, tensor in state.items():
        assert torch.equal(checkpoint.read(name), tensor.reshape(-1, tensor.shape[-1])), name
    for name in unread:
        with pytest.raises(CheckpointError, match=rf"tensor {name} has dtype torch\.complex\d+, which cannot be read"):
            checkpoint.read(name)


def test_forms_that_have_no_ranges(tmp_path: Path) -> None:
    save_ranks({"w": torch.ones(4, dtype=torch.complex64).conj().imag}, 0, 1, tmp_path / "neg")
    with pytest.raises(
        CheckpointError, match=r"a tensor is stored with its neg bit set; save it after resolve_neg\(\)"
    ):
        Checkpoint.open(tmp_path / "neg")
    (tmp_path / "old").mkdir()
    torch.save({"w": torch.ones(2)}, rank(tmp_path / "old", 0, 1), _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="it is in torch's old format, which is no zip"):
        Checkpoint.open(tmp_path / "old")
    save_ranks({"w": torch.zeros(1).expand(1 << 30, 1 << 20, 2)}, 0, 1, tmp_path / "wide")
    with pytest.raises(CheckpointError, match=r"its storage '0' has 4 bytes, repeated to \[1073741824"):
        Checkpoint.open(tmp_path / "wide")
    save_ranks({"w": torch.zeros(1).expand(300, 2)}, 0, 1, tmp_path / "narrow")
    assert Checkpoint.open(tmp_path / "narrow").read("w").shape == (300, 2)


def test_a_storage_that_is_not_in_the_file(tmp_path: Path) -> None:
    save_ranks({"w": torch.ones(4), "v": torch.ones(3)}, 0, 1, tmp_path)
    path = rank(tmp_path, 0, 1)
    content = path.read_bytes()
    at = content.rindex(b"data/1")  # in the list of members
    path.write_bytes(content[:at] + b"data/9" + content[at + 6 :])
    with pytest.raises(CheckpointError, match="its storage '1' is not in the file"):
        Checkpoint.open(tmp_path)


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
