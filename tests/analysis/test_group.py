"""Processes that meet in a store: who waits for whom, and how each hears that another has failed or is gone."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from offprin_kernels.analysis import scaleout
from offprin_kernels.analysis.scaleout import Group
from offprin_kernels.output import OutputError

NOTHING = SimpleNamespace(parts=[])  # a plan


@pytest.fixture
def quick(monkeypatch) -> None:
    for name, value in (("BEAT", 0.02), ("SILENCE", 0.5), ("FAREWELL", 5.0), ("PATIENCE", 0.01)):
        monkeypatch.setattr(scaleout, name, value)


def aside(call) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_others_leave_with_rank_0(quick) -> None:
    store = dist.HashStore()
    first, second = (Group(rank, 2, store) for rank in (0, 1))
    left = []

    def other() -> None:
        with second:
            second.wait_for("finished")
        left.append("other")

    with first:
        first.tell("finished")
        thread = aside(other)
        time.sleep(1.0)  # longer than SILENCE: rank 0 still makes its page
        assert not left
    thread.join(5)
    assert left == ["other"]


def test_a_failure_is_told_to_all(quick) -> None:
    store = dist.HashStore()
    groups = [Group(rank, 3, store) for rank in range(3)]
    with pytest.raises(ValueError, match="bad"), groups[2]:
        raise ValueError("a bad file\nand its story")
    for group in groups[:2]:
        for call in (lambda group: next(group(NOTHING)), lambda group: group.wait_for("open")):
            with pytest.raises(OutputError, match=r"^rank 2 failed: a bad file$"):
                call(group)
    with pytest.raises(OutputError, match=r"^rank 2 failed: a bad file$"):
        groups[0].done()


def test_a_store_that_is_gone_is_one_sentence(quick) -> None:
    class Gone:
        def __getattr__(self, name):
            def call(*arguments):
                raise dist.DistNetworkError("Broken pipe\nException raised from ...")

            return call

    with Group(1, 2, Gone()) as group:
        for call in (
            lambda: next(group(NOTHING)),
            group.done,
            lambda: group.wait_for("open"),
            lambda: group.tell("open"),
        ):
            with pytest.raises(OutputError, match=r"^rank 0 or torchrun's store is gone \(Broken pipe\)$"):
                call()


def test_silence_of_rank_0_ends_the_others(quick) -> None:
    group = Group(1, 2, dist.HashStore())
    with pytest.raises(OutputError, match="rank 0 has shown no sign of life"), group:
        group.wait_for("open")


def test_rank_0_shows_what_all_have_dealt_with(quick) -> None:
    store = dist.HashStore()
    first, second = (Group(rank, 2, store) for rank in (0, 1))
    shown: list[int] = []
    first.watch(100, shown.append)
    first.count(10)
    second.count(60)
    second.done()
    assert first.done() == [] and sum(shown) == 70
    second.count(500)  # a part that two have made
    second.beat()
    first.beat()
    first.show()
    assert sum(shown) == 100


def test_a_process_ends_in_peace_with_signs_of_life_under_way() -> None:
    """Python ending while a thread is inside the store would abort."""
    script = (
        "import time, torch.distributed as dist\n"
        "from offprin_kernels.analysis import scaleout\n"
        "scaleout.BEAT = 0.0002\n"
        "store = dist.HashStore()\n"
        "groups = [scaleout.Group(rank, 32, store) for rank in range(32)]\n"
        "time.sleep(0.2)\n"
    )
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
