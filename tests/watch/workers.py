"""What the processes of distributed tests do: functions of (rank, world, folder) that write down what they found."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from offprin_kernels import UpdateWatch
from offprin_kernels.checkpoint import Checkpoint, save_safetensors_atomic
from offprin_kernels.optim.local import local_tensor

K = 3
ENERGIES = ("0.weight", "2.weight")


def model(dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """50, 7 and 3 rows: over 4 processes, uneven shards and empty ones."""
    torch.manual_seed(3)
    layers = [torch.nn.Linear(30, 50), torch.nn.Tanh(), torch.nn.Linear(50, 7), torch.nn.Linear(7, 3)]
    net = torch.nn.Sequential(*layers)
    net.experts = torch.nn.Parameter(torch.randn(5, 4, 6))
    return net.to(dtype)


def move(net: torch.nn.Module) -> None:
    """An update that each process makes of its own values, by single IEEE operations: the same however they lie."""
    with torch.no_grad():
        for param in net.parameters():
            local = local_tensor(param)
            x = local.float() * 997
            local.copy_(local.float() + (x - x.round()) * 4e-3)


def measured(watch: UpdateWatch) -> dict:
    """All that a measurement says, as plain numbers."""
    changes = watch.tensors()
    detail = {c.name: (c.changed, c.sign_flips, c.nonzero_to_zero, c.update_max, c.exponents.tolist()) for c in changes}
    return {"sums": watch.measure(), "detail": detail, "shapes": {c.name: c.shape for c in changes}}


def write(rank: int, world: int, folder: Path, name: str, found) -> None:
    torch.save(found, folder / f"{name}-{world}-{rank}")


def shard(net: torch.nn.Module, world: int) -> None:
    """Over all processes. Without a mesh, a GPU that is visible would be taken, and the group is gloo's."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    fully_shard(net, mesh=init_device_mesh("cpu", (world,)))


def fsdp(rank: int, world: int, folder: Path) -> None:
    """Shards in one mesh dimension, or one process without them; bf16, fp32 and un-rounded fp32."""
    for dtype, exact in ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True)):
        net = model(dtype)
        if world > 1:
            shard(net[0], world)
            shard(net, world)
        keep = "cpu" if exact else "device"
        watch = UpdateWatch(net, energies=ENERGIES, k=K, exact=exact, keep=keep)
        assert watch.sharded == (world > 1)
        still = watch.measure()
        move(net)
        write(rank, world, folder, f"fsdp-{dtype}-{exact}", {"still": still, **measured(watch)})


def hsdp(rank: int, world: int, folder: Path) -> None:
    """Replicas of shards."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
    net = model()
    fully_shard(net, mesh=mesh)
    watch = UpdateWatch(net, energies=ENERGIES, k=K)
    move(net)
    write(rank, world, folder, "hsdp", measured(watch))


def placed(net: torch.nn.Module, mesh, placements) -> torch.nn.Module:
    """Every matrix as a DTensor; vectors stay whole on every process."""
    from torch.distributed.tensor import distribute_tensor

    for module in net.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if param.ndim > 1:
                setattr(module, name, torch.nn.Parameter(distribute_tensor(param.detach(), mesh, placements)))
    return net


def other_placements(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.tensor import Replicate, Shard, init_device_mesh

    line = init_device_mesh("cpu", (world,))
    square = init_device_mesh("cpu", (2, world // 2))
    cases = {
        "columns": (line, [Shard(1)]),
        "copies": (line, [Replicate()]),
        "rows twice": (square, [Shard(0), Shard(0)]),
        "columns, replicated": (square, [Shard(1), Replicate()]),
    }
    for name, (mesh, placements) in cases.items():
        net = placed(model(), mesh, placements)
        watch = UpdateWatch(net, energies=ENERGIES, k=K)
        assert watch.sharded == (name != "copies")
        move(net)
        write(rank, world, folder, name, measured(watch))
    net = placed(model(), square, [Shard(0), Shard(1)])
    said = refusal(lambda: UpdateWatch(net, energies=ENERGIES, k=K))
    watch = UpdateWatch(net)
    move(net)
    write(rank, world, folder, "blocks", {"said": said, **measured(watch)})


def strided(rank: int, world: int, folder: Path) -> None:
    """Tensor parallelism and FSDP in the same dimension."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
    net = torch.nn.Sequential(model()[0])
    parallelize_module(net, mesh["tensor"], {"0": ColwiseParallel()})
    fully_shard(net, mesh=mesh["data"])
    state = model().state_dict()
    said = [
        refusal(lambda options=o: UpdateWatch(net, **options)) for o in ({"energies": ["0.weight"]}, {"base": state})
    ]
    watch = UpdateWatch(net)
    move(net)
    write(rank, world, folder, "strided", {"said": said, **measured(watch)})


def refusal(make) -> str:
    try:
        make()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def given_bases(rank: int, world: int, folder: Path) -> None:
    """A checkpoint, a state dict, a basis on disk, for a model that has moved already."""
    from torch.distributed.tensor import Shard, init_device_mesh

    state = copy.deepcopy(model().state_dict())
    path = folder / f"base-{world}.safetensors"
    if rank == 0:
        save_safetensors_atomic(path, state)
    dist.barrier()
    file = folder / f"basis-{world}.safetensors"
    net = model()
    shard(net, world)
    options = {"energies": ENERGIES, "k": K, "basis": file}
    UpdateWatch(net, **options)
    sharded = {name: tensor.detach() + 0 for name, tensor in net.state_dict().items()}
    move(net)
    dist.barrier()
    for name, base in {"checkpoint": Checkpoint.open(path), "state": state, "sharded": sharded}.items():
        write(rank, world, folder, f"base-{name}", measured(UpdateWatch(net, base=base, **options)))
    columns = placed(model(), init_device_mesh("cpu", (world,)), [Shard(1)])
    matrices = [name for name, param in columns.named_parameters() if param.ndim == 2]
    move(columns)
    with Checkpoint.open(path) as base:
        watch = UpdateWatch(columns, base=base, include=matrices, energies=ENERGIES, k=K)
    write(rank, world, folder, "base-columns", measured(watch))
    said = [refusal(lambda: UpdateWatch(net, **options)), refusal(lambda: UpdateWatch(columns, base=sharded))]
    watch = UpdateWatch(net)
    net(torch.randn(2, 30).bfloat16())  # the root's parameters stay gathered after a forward pass alone
    said.append(refusal(watch.measure))
    write(rank, world, folder, "refusals", said)


def callback(rank: int, world: int, folder: Path) -> None:
    """The callback on a sharded model, called as a trainer calls it."""
    from offprin_kernels.integrations.transformers import UpdateWatchCallback

    net = model()
    if world > 1:
        shard(net, world)
    hook = UpdateWatchCallback(every=2, energies=ENERGIES, k=K)
    state = SimpleNamespace(global_step=0, is_world_process_zero=rank == 0, log_history=[])
    hook.on_train_begin(None, state, None, model=net)
    for step in range(1, 4):
        move(net)
        state.global_step = step
        hook.on_step_end(None, state, None, model=net)
        logs = {"step": step}
        state.log_history.append(dict(logs))
        hook.on_log(None, state, None, logs=logs, model=net)
        assert logs == state.log_history[-1]
    write(rank, world, folder, "callback", state.log_history)
