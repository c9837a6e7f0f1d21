"""A small model, and processes that save it in the ways of distributed training."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

# One process that waits for another in vain fails after this, rather than never.
PATIENCE = timedelta(seconds=120)

SHAPES = {
    "model.embed_tokens.weight": (50, 12),
    "model.layers.0.self_attn.q_proj.weight": (7, 12),  # rows that no number of processes divides
    "model.layers.0.mlp.gate.weight": (1, 12),  # fewer rows than processes
    "model.layers.0.mlp.experts.gate_up_proj": (4, 6, 5),
    "model.layers.0.input_layernorm.weight": (11,),
    "lm_head.weight": (50, 12),
}


def weights(seed: int) -> dict[str, torch.Tensor]:
    """The whole tensors, the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}


def tuned(seed: int) -> dict[str, torch.Tensor]:
    """The weights after training: a few of them moved."""
    generator = torch.Generator().manual_seed(seed + 1)
    found = {}
    for name, weight in weights(seed).items():
        moved = torch.rand(weight.shape, generator=generator) < 0.3
        found[name] = torch.where(moved, weight * 1.02, weight)
    return found


def module(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A module tree with these parameters."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        here = root
        for part in path:
            if not hasattr(here, part):
                here.add_module(part, torch.nn.Module())
            here = getattr(here, part)
        here.register_parameter(leaf, torch.nn.Parameter(tensor.clone()))
    return root


def launch(folder: Path) -> None:
    torch.multiprocessing.spawn(enter, args=(folder,), nprocs=4)


def enter(rank: int, folder: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=4, timeout=PATIENCE)
    try:
        # Starting processes takes longer than all that they do, so that three of the four play a world of three.
        three = DeviceMesh("cpu", [0, 1, 2])
        if rank < 3:
            one_mesh(rank, three, folder)
        dist.barrier()
        two_meshes(rank, 4, folder)
    finally:
        dist.destroy_process_group()


def save_ranks(state: dict, rank: int, world: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / f"model_world_size_{world}_rank_{rank}.pt")
    torch.save({"step": rank}, folder / f"optim_world_size_{world}_rank_{rank}.pt")
    torch.save({"seed": rank}, folder / f"extra_state_world_size_{world}_rank_{rank}.pt")


def one_mesh(rank: int, mesh: DeviceMesh, folder: Path) -> None:
    """FSDP2 as most runs have it: every parameter in rows, some processes with none."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import fully_shard

    world, group = mesh.size(), mesh.get_group()
    net = module(tuned(0))
    fully_shard(net, mesh=mesh)
    state = net.state_dict()
    save_ranks(state, rank, world, folder / "ranks")
    save_ranks({"model": net.state_dict(keep_vars=True), "step": 7}, rank, world, folder / "parameters")
    moments = {f"state.{name}.exp_avg": torch.zeros_like(value) for name, value in state.items()}
    whole = {"app": {"model": state, "optim": moments, "train_state": {"step": 7}}}
    dcp.save(whole, checkpoint_id=str(folder / "dcp"), process_group=group)
    plain = {"same": torch.arange(6.0), "view": torch.arange(8.0)[rank:][: 8 - world][:4] * 0 + 3}
    save_ranks(state | plain, rank, world, folder / "replicas")
    save_ranks({"w": torch.full((2, 2), float(rank))}, rank, world, folder / "unlike")
    save_ranks({"w": sharded_tensor(rank, group)}, rank, world, folder / "sharded")


def sharded_tensor(rank: int, group: ProcessGroup) -> object:
    from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardMetadata

    rows = [3, 3, 1][rank]
    whole = torch.arange(35.0).view(7, 5)
    where = ShardMetadata([3 * rank, 0], [rows, 5], f"rank:{rank}/cpu")
    return ShardedTensor._init_from_local_shards(
        [Shard(whole[3 * rank : 3 * rank + rows].clone(), where)], 7, 5, process_group=group
    )


def two_meshes(rank: int, world: int, folder: Path) -> None:
    """Replicas of shards, shards in two dimensions, and tensor parallelism under FSDP2."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    net = module(tuned(0))
    fully_shard(net, mesh=mesh)  # (replicate, shard)
    hybrid = net.state_dict()
    save_ranks(hybrid, rank, world, folder / "hybrid")
    dcp.save({"state_dict": hybrid}, checkpoint_id=str(folder / "hybrid-dcp"))

    placements = {
        "model.embed_tokens.weight": [Shard(0), Shard(1)],
        "model.layers.0.self_attn.q_proj.weight": [Shard(1), Shard(0)],
        "model.layers.0.mlp.gate.weight": [Replicate(), Shard(1)],
        "model.layers.0.mlp.experts.gate_up_proj": [Shard(0), Shard(1)],
        "model.layers.0.input_layernorm.weight": [Shard(0), Replicate()],
        "lm_head.weight": [Shard(0), Shard(0)],
    }
    boxes = {name: distribute_tensor(value, mesh, placements[name]) for name, value in tuned(0).items()}
    save_ranks(boxes, rank, world, folder / "boxes")
    dcp.save(dict(boxes), checkpoint_id=str(folder / "boxes-dcp"))

    # Tensor parallelism first, FSDP over it: a strided shard.
    parallel = module(tuned(0))
    for name, parameter in list(parallel.named_parameters()):
        owner = parallel.get_submodule(name.rpartition(".")[0])
        cut = distribute_tensor(parameter.data, mesh["inner"], [Shard(0)])
        owner.register_parameter(name.rpartition(".")[2], torch.nn.Parameter(cut))
    fully_shard(parallel, mesh=mesh["outer"])
    save_ranks(parallel.state_dict(), rank, world, folder / "strided")
    dcp.save(parallel.state_dict(), checkpoint_id=str(folder / "strided-dcp"))

    from torch.distributed.tensor import DTensor

    own = torch.full((2, 2), float(rank))
    for name, placements in (
        ("unlike-replicas", [Replicate(), Replicate()]),
        ("unlike-shards", [Replicate(), Shard(0)]),
    ):
        unlike = DTensor.from_local(own, mesh, placements, run_check=False)
        save_ranks({"w": unlike}, rank, world, folder / name)
    partial = DTensor.from_local(torch.ones(4, 4), mesh, [Partial(), Replicate()], run_check=False)
    save_ranks({"w": partial}, rank, world, folder / "partial")
    if rank == 0:
        (folder / "hybrid" / "huggingface").mkdir()
        (folder / "hybrid" / "huggingface" / "config.json").write_text('{"model_type": "qwen3"}')
