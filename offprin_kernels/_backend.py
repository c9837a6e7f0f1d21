"""Which implementation of an op runs: by device, or forced with ``backend=`` or ``OFFPRIN_BACKEND``.

A forced backend never falls back to another: where it cannot run, one sentence says why and what to install.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import threading

import torch

from . import _native
from ._native import BackendUnavailable

__all__ = ["BACKENDS", "BackendUnavailable", "choose", "instruction_set", "interpreting", "threads", "why_not"]

BACKENDS = ("reference", "cpu", "triton", "cuda")
MAX_THREADS = 4096


@functools.cache
def triton_missing() -> str | None:
    """Why Triton cannot be imported, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    return None


def interpreting() -> bool:
    """Whether Triton runs its kernels in its CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def why_not(backend: str, device: torch.device) -> str | None:
    """The reason why ``backend`` cannot run on ``device``, or None where it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        if device.type != "cpu":
            return f"it runs on CPU tensors and these are on {device}; move them with .cpu()"
        found = _native.load("cpu")
        return found if isinstance(found, str) else None
    if backend == "triton":
        if triton_missing():
            return triton_missing()
        if device.type == "cpu" and not interpreting():
            return "it needs a GPU; on the CPU set TRITON_INTERPRET=1 before Python starts (slow, for tests)"
        return None
    if device.type != "cuda":
        return f"it runs on CUDA tensors and these are on {device}; move them with .cuda()"
    found = _native.load("cuda")
    return found if isinstance(found, str) else None


def choose(device: torch.device, implemented: tuple[str, ...], backend: str | None = None) -> str:
    """The backend for an op with these implementations. Raises BackendUnavailable or ValueError.

    ``implemented`` lists the op's backends in order of preference; ``reference`` comes last.
    """
    forced = backend or os.environ.get("OFFPRIN_BACKEND") or None
    if forced is None:
        for name in implemented:
            if name == "triton" and device.type == "cpu":
                continue
            if why_not(name, device) is None:
                return name
        return "reference"
    if forced not in BACKENDS:
        raise ValueError(f"unknown backend {forced!r}; choose one of {', '.join(BACKENDS)}")
    if forced not in implemented:
        raise BackendUnavailable(f"backend {forced!r} has no implementation of this op; use {' or '.join(implemented)}")
    reason = why_not(forced, device)
    if reason:
        raise BackendUnavailable(f"backend {forced!r} is not available: {reason}")
    return forced


def instruction_set() -> str | None:
    """What the compiled CPU library uses: ``OFFPRIN_CPU_ISA``, else the best; None without the library.

    Raises BackendUnavailable where the processor lacks the forced one.
    """
    library = _native.load("cpu")
    if isinstance(library, str):
        return None
    try:
        return library.isa()
    except RuntimeError as error:
        raise BackendUnavailable(str(error)) from None


# What limit_threads has set, by thread.
_limits = threading.local()


def limit_threads(most: int) -> None:
    """Let the compiled CPU library use no more threads when it is called from the calling thread."""
    _limits.most = most


def threads() -> int:
    """Threads that the compiled CPU library may use: ``OFFPRIN_NUM_THREADS``, else PyTorch's own setting."""
    return min(wanted_threads(), getattr(_limits, "most", MAX_THREADS))


def wanted_threads() -> int:
    wanted = os.environ.get("OFFPRIN_NUM_THREADS", "")
    if not wanted:
        return torch.get_num_threads()
    if not wanted.isdecimal() or len(wanted) > 9 or not 1 <= int(wanted) <= MAX_THREADS:
        raise ValueError(f"OFFPRIN_NUM_THREADS must be a whole number from 1 to {MAX_THREADS}, got {wanted[:40]!r}")
    return int(wanted)
