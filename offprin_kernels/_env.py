"""What a bug report needs: versions, backends and why each is or is not available, instruction set, threads, device."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Callable
from typing import Any

import torch

from . import _backend, _native
from ._version import __version__

PACKAGES = ("torch", "triton", "numpy", "safetensors", "pyarrow", "transformers", "trl", "peft", "accelerate")


def versions() -> dict[str, str | None]:
    """Versions of Python, this package and its peers; None where one is not installed."""
    found: dict[str, str | None] = {"offprin-kernels": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def gpus() -> list[dict]:
    return [
        {
            "name": torch.cuda.get_device_name(index),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
            "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
        }
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]


def told(value: Callable[[], Any]) -> Any:
    """The value, or the sentence of the error in its place: a bug report must not fail on the bug."""
    try:
        return value()
    except Exception as error:
        return str(error) or type(error).__name__


def environment() -> dict:
    """Everything ``offprin env`` prints, as plain values."""
    cpu = _native.load("cpu")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    places = {"reference": device, "cpu": torch.device("cpu"), "triton": device, "cuda": device}
    return {
        "versions": versions(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python_executable": sys.executable,
        "backends": {name: _backend.why_not(name, place) or "available" for name, place in places.items()},
        "default_backend": told(lambda: _backend.choose(device, ("triton", "cpu", "reference", "cuda"))),
        "instruction_set": told(_backend.instruction_set),
        "instruction_sets": None if isinstance(cpu, str) else cpu.isas(),
        "threads": told(_backend.threads),
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "gpus": told(gpus),
    }
