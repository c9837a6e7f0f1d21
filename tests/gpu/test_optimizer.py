"""MaskedAdamW as an optimizer on a device: the CPU's bits, FSDP2, compiled models, captured graphs, loss scaling."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from offprin_kernels.optim import MaskedAdamW

from ..optim.models import gradients, mask, masks_of, model
from ..optim.workers import batch, masks_for, three_layers

BACKENDS = ("triton",)
ROOT = Path(__file__).resolve().parents[2]
ROUNDINGS = ("nearest", "stochastic", "kahan", "master")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def on(device: torch.device, masks: dict) -> dict:
    return {name: chosen.to(device) for name, chosen in masks.items()}


def stepped(net: torch.nn.Module, optimizer: MaskedAdamW, steps: range) -> None:
    """Gradients that depend on the step alone, made on the CPU."""
    for turn in steps:
        twin = [torch.empty(p.shape, dtype=p.dtype) for p in net.parameters()]
        holder = torch.nn.ParameterList(twin)
        gradients(holder, turn)
        for p, own in zip(net.parameters(), holder, strict=True):
            p.grad = own.grad.to(p.device)
        optimizer.step()


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("masked", [False, True])
def test_steps_have_the_cpus_bits(backend, device, rounding, masked) -> None:
    """Weights, state and visible changes, over a replacement of the masks."""
    nets, optimizers = [], []
    for place, chosen in ((torch.device("cpu"), "reference"), (device, backend)):
        net = model(torch.bfloat16).to(place)
        masks = on(place, masks_of(net)) if masked else None
        optimizer = MaskedAdamW(
            net.named_parameters(), lr=1e-2, masks=masks, rounding=rounding, seed=5, track_visible=True, backend=chosen
        )
        stepped(net, optimizer, range(3))
        if masked:
            optimizer.set_masks(on(place, {n: mask(p.shape, 0.5, 7) for n, p in net.named_parameters()}))
        stepped(net, optimizer, range(3, 5))
        nets.append(net)
        optimizers.append(optimizer)
    assert optimizers[0].visible_count() == optimizers[1].visible_count() > 0
    for (name, a), b in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b.cpu()), name
        assert optimizers[0].visible_mask(name) == optimizers[1].visible_mask(name).to("cpu"), name
        theirs = optimizers[1].state[b]
        for key, value in optimizers[0].state[a].items():
            assert torch.equal(value, theirs[key].cpu()), f"{key} of {name}"


@pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_fsdp2_on_one_device(backend, device, rounding, tmp_path) -> None:
    """A mesh of one: the bits of the same model unsharded, from gradients that a backward pass made."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    kind = "nccl" if device.type == "cuda" else "gloo"
    if not getattr(dist, f"is_{kind}_available")():
        pytest.skip(f"PyTorch without {kind}")
    if device.type == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(kind, init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        results = []
        for sharded in (False, True):
            net = three_layers().to(device)
            if sharded:
                fully_shard(net, mesh=init_device_mesh(device.type, (1,)))
            optimizer = MaskedAdamW(
                net.named_parameters(), lr=1e-2, masks=on(device, masks_for(net, 0)), rounding=rounding, seed=5,
                track_visible=True, backend=backend,
            )  # fmt: skip
            for turn in range(3):
                optimizer.zero_grad()
                net(batch(turn).to(device, torch.bfloat16)).float().square().mean().backward()
                optimizer.step()
            weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in net.parameters()]
            results.append(([w.detach().cpu() for w in weights], optimizer.visible_count()))
        assert results[0][1] == results[1][1] > 0
        assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    finally:
        dist.destroy_process_group()


def trajectory(device: torch.device, backend: str, gradient) -> list[torch.Tensor]:
    """Weights after four steps from the gradients that ``gradient(net)`` returns a function for."""
    net = model().to(device)
    optimizer = MaskedAdamW(net.named_parameters(), lr=1e-2, masks=on(device, masks_of(net)), backend=backend)
    backward = gradient(net)
    for turn in range(4):
        optimizer.zero_grad(set_to_none=False)
        backward(batch(turn).to(device))
        optimizer.step()
    return [p.detach().cpu() for p in net.parameters()]


def eager(net: torch.nn.Module):
    return lambda x: net(x).square().mean().backward()


def alike(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    """Compilers and captured libraries order sums otherwise: fp32 gradients of 8 x 30 products differ by some 1e-6 of
    their size, and a step of Adam moves by that share of lr, but for gradients near zero, where by up to lr = 1e-2."""
    close = torch.cat([((a - b).abs() < 1e-5).flatten() for a, b in zip(ours, theirs, strict=True)])
    return float(close.float().mean()) > 0.99


@needs_cuda
def test_compiled_models(backend, device) -> None:
    def compiled(net: torch.nn.Module):
        loss = torch.compile(lambda x: net(x).square().mean(), fullgraph=True)
        return lambda x: loss(x).backward()

    assert alike(trajectory(device, backend, compiled), trajectory(device, backend, eager))


def apart(what: str, backend: str) -> None:
    """See apart.py."""
    command = [sys.executable, "-m", "tests.gpu.apart", what, backend]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    # a process that a signal ended has said nothing
    assert done.returncode == 0, f"code {done.returncode}: {done.stderr[-2000:]}"


@needs_cuda
def test_a_compiled_step_is_the_step(backend) -> None:
    apart("compiled_step", backend)


@needs_cuda
def test_a_step_inside_a_captured_graph_is_refused(backend) -> None:
    apart("captured_step", backend)


def made(net: torch.nn.Module, turn: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(turn)
    return [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in net.parameters()]


@needs_cuda
def test_backward_passes_in_a_captured_graph(backend, device) -> None:
    """Gradients at fixed addresses, written by replays; steps between them."""

    def captured(net: torch.nn.Module):
        x = batch(0).to(device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                eager(net)(x)
        torch.cuda.current_stream().wait_stream(side)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for p in net.parameters():
                p.grad.zero_()
            eager(net)(x)

        def replay(given: torch.Tensor) -> None:
            x.copy_(given)
            graph.replay()

        return replay

    assert alike(trajectory(device, backend, captured), trajectory(device, backend, eager))


@needs_cuda
def test_loss_scaling(backend, device) -> None:
    """A scaler on the device hands over scale and overflow; a step that overflows is none."""
    nets = [model().to(device) for _ in range(2)]
    plain, scaled = (MaskedAdamW(net.named_parameters(), lr=1e-2, backend=backend) for net in nets)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=2)
    for turn in range(4):
        stepped_gradients = made(nets[0], turn)
        for p, q, own in zip(*(net.parameters() for net in nets), stepped_gradients, strict=True):
            p.grad, q.grad = own.clone(), own * scaler.get_scale()  # a power of two: exact
        if turn == 2:
            nets[1][0].weight.grad[0, 0] = float("inf")
        else:
            plain.step()
        scaler.scale(torch.ones((), device=device))
        scaler.step(scaled)
        scaler.update()
    assert scaler.get_scale() != 1024.0
    assert all(torch.equal(p, q) for p, q in zip(*(net.parameters() for net in nets), strict=True))
