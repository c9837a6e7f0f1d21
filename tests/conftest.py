"""Shared fixtures: which backends a run covers, and outputs that are poisoned and fenced before every call."""

from __future__ import annotations

import pytest
import torch

from offprin_kernels import _backend, packing

COMPARED = ("cpu", "triton", "cuda")  # with the reference
FENCE = 64  # guard bytes on either side of every output


def device_of(backend: str) -> torch.device:
    return torch.device("cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu")


def why_not(backend: str) -> str | None:
    """The one place that decides which backends a test process covers, and says why not the others."""
    if _backend.interpreting() and backend != "triton":
        return "this process interprets Triton kernels; the other backends run in the main test process"
    if backend == "triton" and not _backend.interpreting() and not torch.cuda.is_available():
        return "Triton needs a GPU here; the process with TRITON_INTERPRET=1 covers it"
    return _backend.why_not(backend, device_of(backend))


def pytest_report_header() -> list[str]:
    return [f"backend {name}: {why_not(name) or 'covered'}" for name in COMPARED]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take `backend` run once for each that works here; a module may narrow the list with BACKENDS."""
    if "backend" in metafunc.fixturenames:
        implemented = getattr(metafunc.module, "BACKENDS", COMPARED)
        metafunc.parametrize("backend", [b for b in COMPARED if b in implemented and why_not(b) is None])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The process that interprets Triton runs what takes a backend; the rest has run in the main process."""
    if _backend.interpreting():
        config.hook.pytest_deselected(items=[item for item in items if "backend" not in item.fixturenames])
        items[:] = [item for item in items if "backend" in item.fixturenames]


@pytest.fixture
def device(backend: str) -> torch.device:
    return device_of(backend)


def poison(tensor: torch.Tensor) -> None:
    if tensor.dtype.is_floating_point:
        tensor.fill_(float("nan"))
    else:
        tensor.view(torch.uint8).fill_(0xA5)


@pytest.fixture(autouse=True)
def fenced_outputs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Every output tensor starts poisoned (NaN, 0xA5) between guard zones, which must survive the test.

    Tests marked `traced` go without: a trace allocates nothing, and compares storage offsets with those of real calls.
    """
    if request.node.get_closest_marker("traced"):
        yield
        return
    buffers: list[tuple[torch.Tensor, int]] = []

    def empty(shape, dtype, device):
        count = int(torch.Size(shape).numel())
        size = count * dtype.itemsize
        padded = (size + 63) // 64 * 64
        buffer = torch.full((FENCE + padded + FENCE,), 0xA5, dtype=torch.uint8, device=device)
        tensor = buffer[FENCE : FENCE + size].view(dtype).view(tuple(shape))
        if count:
            poison(tensor)
        buffers.append((buffer, size))
        return tensor

    monkeypatch.setattr(packing, "empty", empty)
    yield
    for buffer, size in buffers:
        assert bool((buffer[:FENCE] == 0xA5).all()), "an op wrote before its output"
        assert bool((buffer[FENCE + size :] == 0xA5).all()), "an op wrote behind its output"
