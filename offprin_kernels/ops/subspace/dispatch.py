"""Whether the Triton kernels of this op run for tensors of a device; PyTorch's products do elsewhere."""

from __future__ import annotations

import os
from types import ModuleType

import torch

from ... import _backend


def kernels(device: torch.device) -> ModuleType | None:
    """``triton_launch``, or None. Raises BackendUnavailable where Triton is forced and cannot run."""
    # the compiled backends have no part in this op, which is made of library products on every device
    if os.environ.get("OFFPRIN_BACKEND") in ("cpu", "cuda"):
        return None
    if _backend.choose(device, ("triton", "reference")) != "triton":
        return None
    from . import triton_launch

    return triton_launch
