"""``python -m tests.gpu.apart NAME BACKEND``: what may take a process, or a device's context, down with it."""

from __future__ import annotations

import sys

import pytest
import torch

from offprin_kernels.optim import MaskedAdamW

from ..optim.models import gradients, masks_of, model


def trained(net: torch.nn.Module, step, device: torch.device) -> None:
    """Two steps from gradients that are made on the CPU."""
    for turn in range(2):
        gradients(net.cpu(), turn)
        net.to(device)
        step()


def optimizer(net: torch.nn.Module, device: torch.device, backend: str) -> MaskedAdamW:
    masks = {name: mask.to(device) for name, mask in masks_of(net).items()}
    return MaskedAdamW(net.named_parameters(), lr=1e-2, masks=masks, backend=backend)


def compiled_step(device: torch.device, backend: str) -> None:
    """torch.compile around step takes the same step."""
    results = []
    for compiled in (False, True):
        net = model().to(device)
        step = optimizer(net, device, backend).step
        trained(net, torch.compile(step, backend="eager") if compiled else step, device)
        results.append([p.detach().cpu() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def captured_step(device: torch.device, backend: str) -> None:
    """Counts of steps live on the CPU: a replay would take the captured step again and again. So it is refused."""
    net = model().to(device)
    step = optimizer(net, device, backend).step
    trained(net, step, device)
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="MaskedAdamW"):
        step()


if __name__ == "__main__":
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    {"compiled_step": compiled_step, "captured_step": captured_step}[sys.argv[1]](place, sys.argv[2])
