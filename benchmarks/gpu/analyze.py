"""offprin analyze on cached files: update and masks against host-to-device copies, all metrics on a layer of 70B."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from offprin_kernels import _backend
from offprin_kernels.analysis import Options, analyze, make_plan
from offprin_kernels.checkpoint import Checkpoint
from offprin_kernels.ops.update_scan import BACKENDS, Rule

from ..weights import few_ulp
from . import timing

BAR = 0.8
TENSORS, SHAPE = 8, (16384, 8192)  # 256 MiB a tensor, 2 GiB a side: pieces as large as those of large models
PIECE = 256 << 20  # bytes of a copy to the device: as large as a tensor
MEMORY = Path("/dev/shm")  # where results of timed calls go: a disk's speed is not what is measured
ROUNDS = 7  # of seconds each
METRICS = ("spectrum", "masks", "energy")
# Llama-3-70B: rows and columns of the matrices of a layer
LAYERS = 80
LAYER = {
    "self_attn.q_proj": (8192, 8192),
    "self_attn.k_proj": (1024, 8192),
    "self_attn.v_proj": (1024, 8192),
    "self_attn.o_proj": (8192, 8192),
    "mlp.gate_proj": (28672, 8192),
    "mlp.up_proj": (28672, 8192),
    "mlp.down_proj": (8192, 28672),
}
BYTES_70B = 2 * 70_553_706_496  # of one side in bf16
RULES = (Rule.parse("bitwise"), Rule.parse("eta"), Rule.parse("atol", 1e-5), Rule.parse("atol", 1e-8))
# Singular values of i^-0.5 in random directions over a Gaussian bulk up to 0.15 of the largest, as in
# benchmarks/weights.py, but for the first 512 alone: QR of all 8192 would take longer than what is measured.
DIRECTIONS = 512


def weight(shape: tuple[int, int], seed: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    count = min(DIRECTIONS, *shape)

    def directions(size: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(size, count, device=device, generator=generator))[0]

    values = torch.arange(1, count + 1, device=device) ** -0.5
    bulk = torch.randn(shape, device=device, generator=generator) * (0.15 / (shape[0] ** 0.5 + shape[1] ** 0.5))
    return torch.addmm(bulk, directions(shape[0]) * values, directions(shape[1]).T).bfloat16().cpu()


def write_pair(folder: Path, shapes: Mapping[str, tuple[int, int]], device: torch.device) -> tuple[Path, Path]:
    """A base, and what one-ULP steps on a tenth of its weights make of it, just written and so in the page cache."""
    base = {f"model.layers.{name}.weight": weight(shape, i, device) for i, (name, shape) in enumerate(shapes.items())}
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    save_file(base, paths[0])
    save_file({name: few_ulp(tensor) for name, tensor in base.items()}, paths[1])
    return paths


def analysis(pair: tuple[Path, Path], out: Path, options: Options, device: torch.device) -> dict:
    with Checkpoint.open(pair[0]) as base, Checkpoint.open(pair[1]) as tuned:
        found = analyze(make_plan(base, [tuned], options), out, device=device, overwrite=True).summary
    if found is None:
        raise RuntimeError("the analysis wrote no summary")
    return found


def same(found: Any, expected: Any) -> bool:
    """Counts and names exactly; sums in fp64, whose order may differ, and what is derived of them, to 1e-9."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, float):
        return isinstance(found, float) and math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-12)
    return found == expected


def check(pair: tuple[Path, Path], out: Path, options: Options, device: torch.device) -> None:
    """The whole summary of the update and every bit of the masks, as the CPU has them. Raises RuntimeError."""
    found = []
    for place in (device, torch.device("cpu")):
        summary = analysis(pair, out, options, place)["runs"]
        found.append((summary, (out / "masks" / "tuned.safetensors").read_bytes()))
    (runs, masks), (expected_runs, expected_masks) = found
    if not same(runs[0], expected_runs[0]) or masks != expected_masks:
        raise RuntimeError(f"the analysis finds {runs[0]['all']} on the device, {expected_runs[0]['all']} on the CPU")


def outputs(nbytes: int, memory: Path = MEMORY) -> Path | None:
    """Where so many bytes of results have ample room in memory; None: nowhere, the temporary folder has to do."""
    try:
        free = shutil.disk_usage(memory).free
    except OSError:
        return None
    return memory if free > 4 * nbytes else None


def host_to_device(device: torch.device, nbytes: int) -> tuple[int, timing.Run]:
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    source = source.pin_memory() if device.type == "cuda" else source
    target = torch.empty_like(source, device=device)
    target.copy_(source)
    if not torch.equal(target.cpu(), source):
        raise RuntimeError("a copy to the device differs from its source")
    return nbytes, lambda _: target.copy_(source, non_blocking=True)


def projection(update: float, geometry: float, layers: int) -> str:
    """``update``: bytes per second of both sides; ``geometry``: seconds that a layer's metrics take beyond that."""
    scan, rest = 2 * BYTES_70B / update, layers * geometry
    return (
        f"a Llama-3-70B pair in the page cache, one device: {scan:.0f} s for update and masks, "
        f"{(scan + rest) / 60:.0f} min with all metrics (k = 128, NSS over the top k)"
    )


def run(
    device: str = "cuda",
    tensors: int = TENSORS,
    shape: tuple[int, int] = SHAPE,
    layer: Mapping[str, tuple[int, int]] = LAYER,
    k: int = 128,
    piece: int = PIECE,
    rounds: int = ROUNDS,
) -> dict:
    """The slice ``analyze``."""
    place = torch.device(device)
    update = Options(RULES, save_masks=True)
    moved, copying = host_to_device(place, piece)
    total = 2 * 2 * tensors * math.prod(shape)
    # a bit per weight of either pair, parts and tables far below that again
    where = outputs(max(total, 4 * sum(math.prod(size) for size in layer.values())) // 16)
    backend = _backend.choose(place, BACKENDS)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir=where) as fast:
        root, out = Path(folder), Path(fast) / "out"
        (root / "flat").mkdir()
        pair = write_pair(root / "flat", {f"{i}.mlp.up_proj": shape for i in range(tensors)}, place)
        check(pair, out, update, place)
        ms = timing.turns(
            {"ours": lambda _: analysis(pair, out, update, place), "copy": copying}, place, rounds, warm_up=1,
            waiting=("ours",),
        )  # fmt: skip
        sizes = {"tensors": tensors, "rows": shape[0], "columns": shape[1], "dtype": "bfloat16"}
        ceiling = ("host-to-device copy", "GB/s", moved / timing.spread(ms["copy"])["median"] / 1e6)
        first = timing.row(
            "offprin analyze", "update and masks", backend, sizes, ms["ours"],
            nbytes=total, ceiling=ceiling, bar=BAR, results_in=str(where or tempfile.gettempdir()),
        )  # fmt: skip
        (root / "layer").mkdir()
        pair = write_pair(root / "layer", {f"0.{name}": size for name, size in layer.items()}, place)
        whole = Options(RULES, save_masks=True, metrics=METRICS, k=k, nss="top")
        once: dict[str, Any] = {"warm_up": 1, "waiting": ("ours",)}
        bare = timing.turns({"ours": lambda _: analysis(pair, out, update, place)}, place, 3, **once)
        full = timing.turns({"ours": lambda _: analysis(pair, out, whole, place)}, place, 3, **once)
    beyond = (timing.spread(full["ours"])["median"] - timing.spread(bare["ours"])["median"]) / 1e3
    second = timing.row(
        "offprin analyze", "all metrics, one layer of Llama-3-70B", backend,
        {"matrices": len(layer), "k": k, "dtype": "bfloat16"}, full["ours"],
        nbytes=2 * 2 * sum(math.prod(size) for size in layer.values()), seconds_beyond_update=beyond,
        results_in=str(where or tempfile.gettempdir()),
    )  # fmt: skip
    rate = total / timing.spread(ms["ours"])["median"] * 1e3
    return {"rows": [first, second], "facts": {"projected": projection(rate, beyond, LAYERS)}}
