"""`offprin analyze` with all metrics against the factorisations it rests on, and two processes against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from offprin_kernels.analysis import Options, analyze, cost, make_plan
from offprin_kernels.checkpoint import Checkpoint
from offprin_kernels.ops.subspace import topk_svd
from offprin_kernels.ops.update_scan import Rule

from .memory import growth
from .timing import interleaved, median_ratio, spread
from .weights import few_ulp, slow_weight

# the layer shapes of Qwen3-0.6B
SHAPES = {
    "self_attn.q_proj": (2048, 1024),
    "self_attn.k_proj": (1024, 1024),
    "self_attn.v_proj": (1024, 1024),
    "self_attn.o_proj": (1024, 2048),
    "mlp.gate_proj": (3072, 1024),
    "mlp.up_proj": (3072, 1024),
    "mlp.down_proj": (1024, 3072),
}
LAYERS, K = 4, 128
METRICS = ("masks", "spectrum", "energy")


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """Four layers of a base and of what one-ULP steps on a tenth of the weights make of it."""
    root = tmp_path_factory.mktemp("qwen")
    base = {
        f"model.layers.{layer}.{kind}.weight": slow_weight(*shape, seed=10 * layer + i)
        for layer in range(LAYERS)
        for i, (kind, shape) in enumerate(SHAPES.items())
    }
    save_file(base, root / "base.safetensors")
    save_file({name: few_ulp(weight) for name, weight in base.items()}, root / "tuned.safetensors")
    return root / "base.safetensors", root / "tuned.safetensors"


RULES = (Rule.parse("bitwise"), Rule.parse("eta"), Rule.parse("atol", 1e-5), Rule.parse("atol", 1e-8))


def full_set(pair, out: Path, nss: str = "full") -> dict:
    with Checkpoint.open(pair[0]) as base, Checkpoint.open(pair[1]) as tuned:
        plan = make_plan(base, [tuned], Options(RULES, metrics=METRICS, k=K, nss=nss))
        summary = analyze(plan, out, overwrite=True).summary
    assert summary is not None
    return summary


def factorisations(pair, warm: bool = True) -> float:
    """The same top-k factors and nothing else, tuned ones from the base's or from nothing; the largest error."""
    worst = 0.0
    with Checkpoint.open(pair[0]) as base, Checkpoint.open(pair[1]) as tuned:
        for name in base.tensors:
            first = topk_svd(base.read(name), K, tol_degrees=0.05 / 4)
            second = topk_svd(tuned.read(name), K, tol_degrees=0.05, warm_start=first if warm else None)
            worst = max(worst, float(first.error_degrees), float(second.error_degrees))
    return worst


def test_full_set(benchmark, record, pair, tmp_path) -> None:
    found = full_set(pair, tmp_path / "out")["geometry"][0]["all"]
    assert found["matrices"] == LAYERS * len(SHAPES) and found["not_converged"] == 0 and found["left_degrees"] > 0
    assert factorisations(pair) <= 0.05
    square = torch.randn(2048, 2048)
    seconds = interleaved(
        {
            "full": lambda _: full_set(pair, tmp_path / "out"),
            "top": lambda _: full_set(pair, tmp_path / "top", "top"),
            "factors": lambda _: factorisations(pair),
            "cold": lambda _: factorisations(pair, warm=False),
            "gemm": lambda _: square @ square,
        },
        rounds=5,
    )
    for nss in ("full", "top"):
        for alone, what in (("factors", "the base's and, from these, the tuned ones"), ("cold", "both from nothing")):
            ratio = median_ratio(seconds[nss], seconds[alone])
            record(
                f"offprin analyze, all metrics, NSS {nss}, k = 128, layers of Qwen3-0.6B: factors {alone}",
                1 / ratio,
                1 / 1.3,
                f"time of the certified top-k factorisations, {what}, over that of the analysis (0.77: 1.3 times)",
                times_the_factorisations=ratio,
                seconds=spread(seconds[nss]),
            )
    rates = cost.Rates(flops=2 * 2048.0**3 / spread(seconds["gemm"])["median"])
    with Checkpoint.open(pair[0]) as base, Checkpoint.open(pair[1]) as tuned:
        for nss in ("full", "top"):
            plan = make_plan(base, [tuned], Options(RULES, metrics=METRICS, k=K, nss=nss))
            forecast = sum(cost.seconds(unit, plan.options, rates) for unit in plan.units)
            record(
                f"--dry-run, NSS {nss}: forecast over measured",
                forecast / spread(seconds[nss])["median"],
                None,
                "seconds at the rate of products measured in the same run over seconds taken",
                gemm_gflops=rates.flops / 1e9,
            )
    benchmark.pedantic(full_set, args=(pair, tmp_path / "out"), rounds=1)


def in_ranks(pair, out: Path, ranks: int) -> float:
    """Seconds of the work itself, without starting Python, by rank 0's clock; one thread a rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "offprin_kernels"]
    options = ["--metrics", "update,spectrum", "--k", str(K), "--out", str(out), "--overwrite", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OFFPRIN_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "analyze", *map(str, pair), *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return max(json.loads(line)["seconds"] for line in (out / "run_log.jsonl").read_text().splitlines())


def test_two_ranks(benchmark, record, pair, tmp_path) -> None:
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(5):
        for ranks, seconds in times.items():
            seconds.append(in_ranks(pair, tmp_path / str(ranks), ranks))
    for table in ("tensors", "geometry", "curves"):
        one, two = ((tmp_path / ranks / f"{table}.parquet").read_bytes() for ranks in ("1", "2"))
        assert one == two
    record(
        "offprin analyze, spectrum: two ranks of one thread over one",
        median_ratio(times[1], times[2]),
        1.7,
        "times as fast, start of the processes not counted",
        seconds=spread(times[2]),
    )
    benchmark.pedantic(in_ranks, args=(pair, tmp_path / "2", 2), rounds=1)


def test_peak_memory_with_factors(benchmark, record, tmp_path) -> None:
    """One 4096 x 14336 layer, masks and energy: growth of the peak over an interpreter that has loaded torch."""
    weight = (torch.randn(4096, 14336, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, tensor in zip(paths, (weight, few_ulp(weight)), strict=True):
        save_file({"model.layers.0.mlp.up_proj.weight": tensor}, path)
    options = ["--metrics", "update,masks,energy", "--k", K, "--out", tmp_path / "out", "--quiet", "--overwrite"]
    grown = benchmark.pedantic(growth, args=(["analyze", *paths, *options],), rounds=1)
    # the bar of the scan, and the factors of one tensor: base and update in fp32, blocks of 2 k vectors
    factors = 2 * 4 * weight.numel() + 4 * 2 * 4 * K * sum(weight.shape)
    budget = 1.25 * 2 * weight.nbytes + 300e6 + factors
    assert grown > 0
    record(
        "offprin analyze, masks and energy of a 4096 x 14336 layer, peak memory",
        budget / grown,
        1.0,
        "times under the budget of 1.25 x the pair + 300 MB + one tensor's factors (weight and update in fp32, blocks)",
        megabytes=grown / 1e6,
    )
