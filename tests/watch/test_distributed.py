"""UpdateWatch on shards of every kind, in real processes over gloo: the numbers of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ..optim.workers import launch
from . import workers

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch without gloo")

WORLDS = (2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What four, two and one process found."""
    where = tmp_path_factory.mktemp("processes")
    work = (workers.fsdp, workers.hsdp, workers.other_placements, workers.given_bases, workers.callback)
    launch(4, (*work, workers.strided), where)
    launch(2, work, where)
    workers.fsdp(0, 1, where)
    workers.callback(0, 1, where)
    return where


def load(folder, name: str, world: int) -> dict:
    """What a process found, which must be what every process found, bit for bit."""
    first, *others = (torch.load(folder / f"{name}-{world}-{rank}", weights_only=False) for rank in range(world))
    assert all(other == first for other in others), name
    return first


def same(found: dict, expected: dict) -> None:
    """Counts are equal and floats up to the order of sums."""
    assert found["shapes"] == {name: expected["shapes"][name] for name in found["shapes"]}
    assert found["detail"] == {name: expected["detail"][name] for name in found["detail"]}
    for key, value in found["sums"].items():
        assert value == pytest.approx(expected["sums"][key], rel=1e-5), key
        assert not isinstance(value, int) or value == expected["sums"][key], key


@pytest.mark.parametrize("world", WORLDS)
def test_shards_of_fsdp(folder, world) -> None:
    for dtype, exact in ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True)):
        name = f"fsdp-{dtype}-{exact}"
        one, found = load(folder, name, 1), load(folder, name, world)
        assert found["still"] == one["still"] and found["still"]["changed"] == 0
        same(found, one)
        assert 0 < found["sums"]["energy/0.weight/both"] < 1 and found["sums"]["sign_flips"] > 0


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["hsdp", "columns", "copies", "rows twice", "columns, replicated", "blocks"])
def test_other_placements(folder, world, name) -> None:
    found = load(folder, name, world)
    one = load(folder, f"fsdp-{torch.bfloat16}-False", 1)
    same(found, one)
    if name != "blocks":
        assert found["sums"].keys() == one["sums"].keys()
    else:
        assert "0.weight is sharded by two mesh dimensions at once" in found["said"]


def test_tensor_parallelism_and_fsdp_in_one_dimension(folder) -> None:
    found = load(folder, "strided", 4)
    one = load(folder, f"fsdp-{torch.bfloat16}-False", 1)
    assert found["detail"] == {name: one["detail"][name] for name in ("0.weight", "0.bias")}
    energies, base = found["said"]
    assert "two mesh dimensions" in energies and "take a snapshot" in base


@pytest.mark.parametrize("world", WORLDS)
def test_bases_that_are_given(folder, world) -> None:
    snapshot = load(folder, f"fsdp-{torch.bfloat16}-False", world)
    for name in ("checkpoint", "state", "sharded"):
        assert load(folder, f"base-{name}", world)["sums"] == snapshot["sums"]
    columns = load(folder, "base-columns", world)
    assert set(columns["detail"]) == {"0.weight", "2.weight", "3.weight"}
    assert columns["detail"] == {name: snapshot["detail"][name] for name in columns["detail"]}
    for key, value in columns["sums"].items():
        if key.startswith(("linear/", "energy/")):
            assert value == pytest.approx(snapshot["sums"][key], rel=1e-5), key


@pytest.mark.parametrize("world", WORLDS)
def test_refusals_reach_every_process(folder, world) -> None:
    basis, otherwise, gathered = load(folder, "refusals", world)
    assert "another base" in basis and "sharded otherwise" in otherwise and "reshard" in gathered


def test_a_basis_of_shards_serves_one_process(folder) -> None:
    from offprin_kernels import UpdateWatch

    net = workers.model()
    watch = UpdateWatch(net, energies=workers.ENERGIES, k=workers.K, basis=folder / "basis-4.safetensors")
    workers.move(net)
    same(workers.measured(watch), load(folder, f"fsdp-{torch.bfloat16}-False", 1))


@pytest.mark.parametrize("world", WORLDS)
def test_callback(folder, world) -> None:
    one, found = load(folder, "callback", 1), load(folder, "callback", world)
    assert [set(log) for log in found] == [set(log) for log in one]
    assert "update/changed" not in found[0] and found[1]["update/changed"] == one[1]["update/changed"] > 0
