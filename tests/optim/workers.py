"""What the processes of distributed tests do: functions of (rank, world, folder) that write down what they found."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from offprin_kernels.optim import MaskedAdamW

from .models import mask, masks_of, model

ROUNDINGS = ("nearest", "stochastic", "kahan", "master")


def launch(world: int, work: tuple, folder: Path) -> None:
    """Runs each function of ``work`` in ``world`` processes over gloo."""
    torch.multiprocessing.spawn(process, args=(world, work, folder), nprocs=world)


def process(rank: int, world: int, work: tuple, folder: Path) -> None:
    enter(rank, world, work, folder)
    # The interpreter's finalisation is not under test, and threads of torch's gloo can abort it ("terminate called
    # without an active exception"). What failed has been raised by now.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def enter(rank: int, world: int, work: tuple, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{world}", rank=rank, world_size=world)
    try:
        for each in work:
            each(rank, world, folder)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 30, generator=torch.Generator().manual_seed(step))


def replicas(rank: int, world: int, folder: Path) -> None:
    """DDP: every process has its own data and all have the same weights."""
    for rounding in ROUNDINGS:
        net = model(torch.bfloat16)
        wrapped = torch.nn.parallel.DistributedDataParallel(net)
        optimizer = MaskedAdamW(
            net.named_parameters(), lr=1e-2, masks=masks_of(net), rounding=rounding, track_visible=True
        )
        for step in range(3):
            optimizer.zero_grad()
            wrapped(batch(10 * step + rank).bfloat16()).float().square().mean().backward()
            optimizer.step()
        torch.save(
            {"net": net.state_dict(), "state": optimizer.state_dict()["state"], "visible": optimizer.visible_count()},
            folder / f"replica-{rounding}-{rank}",
        )


def three_layers() -> torch.nn.Module:
    """50, 7 and 3 rows: over 4 processes, uneven shards and an empty one."""
    net = model(torch.bfloat16)
    return net.append(torch.nn.Linear(7, 3).bfloat16())


def sharded_model() -> torch.nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = three_layers()
    # without a mesh, a GPU that is visible would be taken, and the group is gloo's
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return net


def masks_for(net: torch.nn.Module, seed: int) -> dict:
    return {
        name: mask(p.shape, 0.4, seed + i) for i, (name, p) in enumerate(net.named_parameters()) if name != "0.bias"
    }


def stepped(net: torch.nn.Module, optimizer: MaskedAdamW, steps: range) -> None:
    """All processes have the same data, so that the averaged gradient is exactly everyone's."""
    for step in steps:
        optimizer.zero_grad()
        net(batch(step).to(next(net.parameters()).dtype)).float().square().mean().backward()
        optimizer.step()


def whole(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for n, p in net.named_parameters()}


def shards(rank: int, world: int, folder: Path) -> None:
    """FSDP2, or one process without it: five steps with a replacement of masks between them, for every rounding."""
    for rounding in ROUNDINGS:
        net = sharded_model() if world > 1 else three_layers()
        optimizer = MaskedAdamW(
            net.named_parameters(), lr=1e-2, masks=masks_for(net, 0), rounding=rounding, seed=5, track_visible=True
        )
        stepped(net, optimizer, range(3))
        optimizer.set_masks(masks_for(net, 30))
        stepped(net, optimizer, range(3, 5))
        visible = torch.tensor(optimizer.visible_count())
        if world > 1:
            dist.all_reduce(visible)
        result = {**whole(net), "visible": visible}
        if rank == 0:
            torch.save(result, folder / f"shards-{rounding}-{world}")


def save(rank: int, world: int, folder: Path) -> None:
    """Three steps, a replacement of masks, one step more; a distributed checkpoint, and how it goes on from there."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    net = sharded_model()
    optimizer = MaskedAdamW(net.named_parameters(), lr=1e-2, masks=masks_for(net, 0), rounding="master")
    stepped(net, optimizer, range(3))
    optimizer.set_masks(masks_for(net, 30))
    stepped(net, optimizer, range(3, 4))
    weights, state = get_state_dict(net, optimizer)
    dcp.save({"net": weights, "optimizer": state}, checkpoint_id=folder / "checkpoint")
    stepped(net, optimizer, range(4, 6))
    result = whole(net)
    if rank == 0:
        torch.save(result, folder / "went-on")
    dist.barrier()


def resume(rank: int, world: int, folder: Path) -> None:
    """In another number of processes."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    net = sharded_model()
    optimizer = MaskedAdamW(net.named_parameters(), lr=1e-2, masks=masks_for(net, 30), rounding="master")
    weights, state = get_state_dict(net, optimizer)
    dcp.load({"net": weights, "optimizer": state}, checkpoint_id=folder / "checkpoint")
    set_state_dict(net, optimizer, model_state_dict=weights, optim_state_dict=state)
    stepped(net, optimizer, range(4, 6))
    result = whole(net)
    if rank == 0:
        torch.save(result, folder / f"resumed-{world}")


def refusals(rank: int, world: int, folder: Path) -> None:
    """What a sharded optimizer says no to."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    columns = torch.nn.Parameter(distribute_tensor(torch.randn(6, 10).bfloat16(), mesh, [Shard(1)]))
    said = []
    try:
        MaskedAdamW([("w", columns)], rounding="stochastic")
    except ValueError as error:
        said.append(str(error))
    # other roundings work, masks and all
    full = columns.full_tensor().detach().clone()
    chosen = mask((6, 10), 0.5)
    optimizer = MaskedAdamW([("w", columns)], rounding="kahan", masks={"w": chosen}, lr=0.5)
    columns.grad = distribute_tensor(torch.ones(6, 10).bfloat16(), mesh, [Shard(1)])
    optimizer.step()
    moved = columns.full_tensor().detach() != full
    # compact state of one process cannot be another number's
    alone = torch.nn.Parameter(full.clone())
    single = MaskedAdamW([("w", alone)], rounding="kahan", masks={"w": chosen}, lr=0.5)
    alone.grad = torch.ones(6, 10).bfloat16()
    single.step()
    try:
        optimizer.load_state_dict(single.state_dict())
    except ValueError as error:
        said.append(str(error))
    same = torch.equal(columns.full_tensor().detach(), alone.detach())
    if rank == 0:
        torch.save({"said": said, "moved": moved, "mask": chosen.to_dense(), "same": same}, folder / "refusals")
