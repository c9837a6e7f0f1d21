"""MaskedAdamW in real processes over gloo: replicas, shards of every kind, checkpoints in another number of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from . import workers

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch without gloo")


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What four, two and one process found."""
    where = tmp_path_factory.mktemp("processes")
    workers.launch(4, (workers.shards, workers.save), where)
    workers.launch(2, (workers.replicas, workers.shards, workers.resume, workers.refusals), where)
    workers.shards(0, 1, where)
    threads = torch.get_num_threads()
    workers.enter(0, 1, (workers.resume,), where)
    torch.set_num_threads(threads)
    return where


def test_replicas_stay_the_same_bit_for_bit(folder) -> None:
    for rounding in workers.ROUNDINGS:
        a, b = (load(folder / f"replica-{rounding}-{rank}") for rank in range(2))
        assert a["visible"] == b["visible"] > 0
        assert all(torch.equal(value, b["net"][name]) for name, value in a["net"].items())
        for index, state in a["state"].items():
            assert all(torch.equal(value, b["state"][index][name]) for name, value in state.items())


def test_shards_give_the_bits_of_one_process(folder) -> None:
    for rounding in workers.ROUNDINGS:
        one, *others = (load(folder / f"shards-{rounding}-{world}") for world in (1, 2, 4))
        for other in others:
            assert all(torch.equal(value, other[name]) for name, value in one.items()), rounding


def test_checkpoints_resume_in_another_number_of_processes(folder) -> None:
    expected = load(folder / "went-on")
    for world in (1, 2):
        found = load(folder / f"resumed-{world}")
        assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_refusals(folder) -> None:
    found = load(folder / "refusals")
    first, second = found["said"]
    assert "stochastic" in first and "first" in first and "nearest" in first
    assert "another world size" in second and "torch.distributed.checkpoint" in second
    assert torch.equal(found["moved"], found["mask"]) and found["same"]
