"""Times: of the device alone, in turns; and what rows make of them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import machine, model_step, timing

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# ---- a device that is none ------------------------------------------------------------------------------------------


class Device:
    """A clock that only work moves: of a host that enqueues, and of a device that does it in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host, self.busy, self.delays = 0.0, 0.0, []
        clock = lambda: self.host / 1e3  # noqa: E731
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock, monotonic=clock))
        monkeypatch.setattr(timing, "cycles_per_ms", lambda: 1e6)
        outer = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = max(outer.busy, outer.host)

            def query(self) -> bool:
                return outer.host >= self.at

            def synchronize(self) -> None:
                outer.host = max(outer.host, self.at)

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.sleep(cycles / 1e6), raising=False)

    def wait(self, *_: object) -> None:
        self.host = max(self.host, self.busy)

    def sleep(self, ms: float) -> None:
        self.delays.append(ms)
        self.launch(ms, 0.0)

    def launch(self, ms: float, host: float) -> None:
        self.host += host
        self.busy = max(self.busy, self.host) + ms


@pytest.mark.parametrize("host", [0.02, 4.0, 20.0])
def test_the_hosts_time_is_not_the_devices(monkeypatch, host) -> None:
    """Three kernels of 0.1 ms, whose launches take the host far longer."""
    device = Device(monkeypatch)

    def run(_: int) -> None:
        for _ in range(3):
            device.launch(0.1, host / 3)

    found = timing.turns({"ours": run}, CUDA, rounds=3)["ours"]
    assert found == pytest.approx([0.3] * 3) and found.host == pytest.approx([host] * 3)
    assert all(timing.LEAST_DELAY <= delay <= timing.MOST_DELAY for delay in device.delays)
    assert min(device.delays) > host
    assert timing.row("op", "case", "triton", {}, found)["host_ms"] == pytest.approx(host)


def test_a_delay_has_an_end_and_says_when_it_did_not_do(monkeypatch) -> None:
    device = Device(monkeypatch)
    found = timing.turns({"ours": lambda _: device.launch(0.1, 150.0)}, CUDA, rounds=3)["ours"]
    assert set(device.delays) == {timing.MOST_DELAY} and found.host == []
    assert timing.row("op", "case", "triton", {}, found)["host_ms"] is None


def test_calls_that_wait_for_the_device_are_timed_as_they_come(monkeypatch) -> None:
    device = Device(monkeypatch)

    def run(_: int) -> None:
        device.launch(1.0, 0.5)
        device.wait()
        device.launch(1.0, 0.5)

    found = timing.turns({"ours": run}, CUDA, rounds=2, waiting=("ours",))["ours"]
    assert found == pytest.approx([3.0] * 2) and found.host == [] and device.delays == []


def test_wall_time_of_steps_that_follow_each_other_is_the_slowers(monkeypatch) -> None:
    device = Device(monkeypatch)
    slow_host, slow_device = lambda _: device.launch(1.0, 3.0), lambda _: device.launch(2.0, 0.5)
    found = timing.in_a_row({"many": slow_host, "flat": slow_device}, CUDA, 2, calls=100)
    assert found["many"] == pytest.approx([3.0] * 2, rel=0.02) and found["flat"] == pytest.approx([2.0] * 2, rel=0.02)
    assert model_step.slower("x", found)["value"] == pytest.approx(1.5, rel=0.02)


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_shares_follow_from_times() -> None:
    # 6 GB in 2 ms are 3000 GB/s, of 4000 that are there
    row = timing.row("op", "case", "triton", {}, [1.0, 2.0, 3.0], nbytes=6 * 10**9, ceiling=("copy", "GB/s", 4000.0),
                     bar=0.76)  # fmt: skip
    assert row["floor_ms"] == 1.5 and row["share"] == 0.75
    assert row["ratios"][0]["met"] is False and row["ratios"][0]["value"] == 0.75
    assert row["ms"] == {"median": 2.0, "min": 1.0, "q1": 1.5, "q3": 2.5, "max": 3.0, "rounds": 3}
    # 8 TFLOP in 20 ms are 400 TFLOP/s, of 800
    rate = timing.row("op", "case", "triton", {}, [20.0], operations=8e12, ceiling=("mm", "TFLOP/s", 800.0), bar=0.5)
    assert rate["share"] == 0.5 and rate["ratios"][0]["met"] is True
    with pytest.raises(ValueError, match="does not say how much"):
        timing.row("op", "case", "triton", {}, [1.0], nbytes=1, ceiling=("mm", "TFLOP/s", 800.0))
    json.dumps(row, allow_nan=False)


def test_ratios_to_peers() -> None:
    found = timing.faster("a peer", [1.0, 2.0, 4.0], [3.0, 8.0, 8.0], 3.5)
    assert found["value"] == 3.0 and found["met"] is False and found["ms"]["median"] == 8.0
    assert timing.ratio("x", 1.2, 1.15, at_most=True)["met"] is False
    assert timing.ratio("x", 1.1, 1.15, at_most=True)["met"] is True
    assert timing.ratio("x", 1.1)["met"] is None


def test_candidates_take_turns_and_a_slow_one_ends_early() -> None:
    seen: list[tuple[str, int]] = []
    found = timing.turns(
        {name: lambda turn, name=name: seen.append((name, turn)) for name in "ab"}, CPU, rounds=3, warm_up=1
    )
    assert seen == [("a", 0), ("b", 0), ("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert {name: len(ms) for name, ms in found.items()} == {"a": 3, "b": 3}
    assert len(timing.turns({"a": lambda _: None}, CPU, rounds=9, seconds=-1)["a"]) == 1


def test_inputs_are_larger_than_the_cache() -> None:
    assert timing.copies(machine.L2_BYTES * 100, CPU) == 2
    assert timing.copies(machine.L2_BYTES // 4, CPU) == 16
