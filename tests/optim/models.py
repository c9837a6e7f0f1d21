"""What tests of optimizers share: a small model, masks, gradients that depend on the step alone."""

from __future__ import annotations

import torch

from offprin_kernels import BitMask


def model(dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.nn.Sequential:
    """Two linear layers whose sizes are no multiples of anything."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(30, 50), torch.nn.Tanh(), torch.nn.Linear(50, 7)).to(dtype)


def mask(shape, density: float = 0.3, seed: int = 0) -> BitMask:
    return BitMask.from_dense(torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed)) < density)


def masks_of(net: torch.nn.Module, density: float = 0.3) -> dict[str, BitMask]:
    return {name: mask(p.shape, density, i) for i, (name, p) in enumerate(net.named_parameters())}


def gradients(net: torch.nn.Module, step: int) -> None:
    """Gradients that depend on the step alone; the same in every dtype up to rounding."""
    for i, p in enumerate(net.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + i)).to(p.dtype)


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        gradients(net, step)
        optimizer.step()


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
