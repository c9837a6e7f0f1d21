"""`offprin analyze` on a cached pair, against reading the same files into memory; and its peak memory."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from offprin_kernels import _backend, update_scan
from offprin_kernels.analysis import Options, analyze, make_plan
from offprin_kernels.checkpoint import Checkpoint
from offprin_kernels.ops.update_scan import Rule

from .memory import growth
from .timing import interleaved, median_ratio, spread

LAYERS, SHAPE = 8, (16384, 8192)  # 256 MiB a tensor, 2 GiB a side


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A base and a tuned checkpoint of 2 GiB each."""
    root = tmp_path_factory.mktemp("pair")
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(SHAPE, generator=generator) * 0.02).bfloat16()
    after = (base.float() + torch.randn(SHAPE, generator=generator) * 3e-5).bfloat16()
    for name, tensor in (("base", base), ("tuned", after)):
        tensors = {f"model.layers.{i}.mlp.up_proj.weight": tensor.clone() for i in range(LAYERS)}
        save_file(tensors, root / f"{name}.safetensors")
    return root / "base.safetensors", root / "tuned.safetensors"


def read_files(paths) -> None:
    """All bytes into memory, by as many threads as the analysis has, into buffers that are used again."""
    piece, threads = 32 << 20, _backend.threads()
    jobs = [(path, offset) for path in paths for offset in range(0, path.stat().st_size, piece)]
    handles = {path: os.open(path, os.O_RDONLY) for path in paths}
    buffers = [bytearray(piece) for _ in range(threads)]

    def work(thread: int) -> None:
        for path, offset in jobs[thread::threads]:
            os.preadv(handles[path], [buffers[thread]], offset)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    for handle in handles.values():
        os.close(handle)


def run_analysis(paths, out: Path) -> dict:
    rules = (Rule.parse("bitwise"), Rule.parse("eta"), Rule.parse("atol", 1e-5))
    with Checkpoint.open(paths[0]) as base, Checkpoint.open(paths[1]) as tuned:
        return analyze(make_plan(base, [tuned], Options(rules)), out, overwrite=True).summary


def test_analyze_cached_pair(benchmark, record, pair, tmp_path) -> None:
    summary = run_analysis(pair, tmp_path / "out")
    with Checkpoint.open(pair[0]) as base, Checkpoint.open(pair[1]) as tuned:
        name = next(iter(base.tensors))
        one = update_scan(base.read(name), tuned.read(name), outputs="mask", backend="cpu").changed
    assert summary["runs"][0]["all"]["changed"] == LAYERS * one > 0
    seconds = interleaved(
        {
            "ours": lambda _: run_analysis(pair, tmp_path / "out"),
            "read": lambda _: read_files(pair),
        },
        rounds=7,
    )
    total = sum(path.stat().st_size for path in pair)
    record(
        "offprin analyze, all outputs, three rules",
        median_ratio(seconds["read"], seconds["ours"]),
        0.7,
        "share of the speed of reading the same cached files into memory (same threads, reused buffers)",
        seconds=spread(seconds["ours"]),
        gb_per_s=total / spread(seconds["ours"])["median"] / 1e9,
        read_gb_per_s=total / spread(seconds["read"])["median"] / 1e9,
    )
    benchmark.pedantic(run_analysis, args=(pair, tmp_path / "out"), rounds=3)


def test_peak_memory(benchmark, record, pair, tmp_path) -> None:
    """Growth of the peak over an interpreter that has loaded torch, as a share of the budget."""
    arguments = ["analyze", *pair, "--out", tmp_path / "out", "--quiet", "--overwrite"]
    grown = benchmark.pedantic(growth, args=(arguments,), rounds=1)
    budget = 1.25 * 2 * 2 * SHAPE[0] * SHAPE[1] + 300e6
    assert grown > 0
    record(
        "offprin analyze, peak memory",
        budget / grown,
        1.0,
        "times under the budget of 1.25 x the largest pair + 300 MB over the interpreter with torch",
        megabytes=grown / 1e6,
    )
