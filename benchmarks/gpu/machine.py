"""The device at hand: what a run is known by, sizes that measurements depend on, and the sources that were measured."""

from __future__ import annotations

import datetime
import hashlib
import subprocess
from typing import Any

import torch

from offprin_kernels._env import environment, versions

from .process import ROOT
from .results import Identity

# where a device does not tell: more than any has today (B200: 126 MB)
L2_BYTES = 128 << 20


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.splitlines()[0].strip() if found.stdout.strip() else "unknown"


def identity() -> Identity:
    # of the rest, such as transformers, no measurement depends
    ours = {name: versions()[name] for name in ("offprin-kernels", "python", "torch", "triton", "numpy")}
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return Identity(torch.cuda.get_device_name(), driver(), {**ours, "cuda": torch.version.cuda}, today)


def properties() -> dict[str, Any]:
    found = torch.cuda.get_device_properties(0)
    return {
        "capability": f"{found.major}.{found.minor}",
        "memory_bytes": found.total_memory,
        "l2_bytes": l2_bytes(torch.device("cuda")),
        "multiprocessors": found.multi_processor_count,
    }


def l2_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return L2_BYTES
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", L2_BYTES))


def sources() -> str:
    """Twelve hex digits that change whenever a source of the package, of a kernel or of the benchmarks does."""
    digest = hashlib.sha256()
    for folder, pattern in (("offprin_kernels", "*.py"), ("csrc", "*.*"), ("benchmarks", "*.py")):
        for path in sorted((ROOT / folder).rglob(pattern)):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def checks() -> dict[str, Any]:
    """What must be there before anything is worth running; raises RuntimeError with all that is not."""
    found = environment()
    wrong = [f"{name}: {why}" for name, why in found["backends"].items() if why != "available"]
    if wrong:
        raise RuntimeError("; ".join(wrong))
    left = torch.randn(512, 512, device="cuda")
    exact = left.double() @ left.double()
    # sums of 512 products in fp32: relative error far below 1e-4, which no broken device meets by chance
    if not float((left @ left - exact).norm() / exact.norm()) < 1e-4:
        raise RuntimeError("a matrix product on the device is wrong")
    keep = ("versions", "platform", "backends", "instruction_set", "threads", "torch_cuda", "gpus")
    return {"facts": {**{key: found[key] for key in keep}, "driver": driver()}}


def run() -> dict[str, Any]:
    """The slice ``versions``."""
    return checks()
