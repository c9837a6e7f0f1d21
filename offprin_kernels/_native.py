"""Finds the compiled libraries. Nothing is loaded until first use; a failure is kept and told in one sentence."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run here."""


@functools.cache
def load(name: str) -> ModuleType | str:
    """The extension module ``offprin_kernels._<name>`` (``cpu`` or ``cuda``), or the reason why it cannot be had."""
    try:
        return importlib.import_module(f"offprin_kernels._{name}")
    except ModuleNotFoundError:
        tool = {"cpu": "a C++17 compiler", "cuda": "nvcc (CUDA 12.8 or newer)"}[name]
        return f"the {name} library was not built; install {tool} and reinstall offprin-kernels"
    except ImportError as error:
        return (
            f"the {name} library was built but does not load here ({error}); reinstall offprin-kernels on this machine"
        )


def library(name: str) -> ModuleType:
    """The extension module; raises BackendUnavailable with the reason where there is none."""
    found = load(name)
    if isinstance(found, str):
        raise BackendUnavailable(f"backend {name!r} is not available: {found}")
    return found
