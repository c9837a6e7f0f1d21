"""Names, rules and parts of a plan."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from offprin_kernels import Rule
from offprin_kernels.analysis import Options, make_plan, plan
from offprin_kernels.analysis.store import digest
from offprin_kernels.checkpoint import Checkpoint
from offprin_kernels.ops import subspace

from ..ops.weights import tuned as after
from ..ops.weights import weights
from .checkpoints import base_weights, offprin, save


@pytest.fixture
def opened(pair):
    *_, paths = pair
    return [Checkpoint.open(path) for path in paths]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\0b", "\ud800", "x" * 201, "\u00e4" * 101])
def test_run_names_are_file_names(opened, name) -> None:
    base, *tuned = opened
    options = Options((Rule.parse("bitwise"),))
    with pytest.raises(ValueError, match=r"run name .* --names"):
        make_plan(base, tuned, options, ["fine", name])
    assert make_plan(base, tuned, options, ["fine", "x" * 200]).names[1] == "x" * 200


def test_default_name_of_the_parent_directory(pair, monkeypatch) -> None:
    *_, paths = pair
    (inside := plan.Path(paths[1]) / "inside").mkdir()
    monkeypatch.chdir(inside)
    assert plan.run_names([Checkpoint.open("..")]) == ("tuned",)


def test_rules_are_distinct_and_few() -> None:
    with pytest.raises(ValueError, match=r"eta\(0.001\) is asked for twice"):
        Options((Rule.parse("eta"), Rule.parse("eta", 1e-3)))
    with pytest.raises(ValueError, match="1 to 8 rules, got 9"):
        Options(tuple(Rule.parse("ulp", n) for n in range(9)))


def test_thresholds_are_part_of_the_identity(opened) -> None:
    base, *tuned = opened
    plans = [make_plan(base, tuned, Options((Rule.parse("atol", t),))) for t in (1e-5, 1.0000001e-5)]
    digests = {digest(made.identity()) for made in plans}
    assert len(digests) == 2


def test_nothing_to_compare_says_why(opened, tmp_path) -> None:
    base = opened[0]
    other = save(tmp_path / "other", {name: torch.zeros(3, 3) for name in base_weights()})
    with pytest.raises(
        ValueError, match=r"no tensor of .*\? base \S+\.weight: shape \[\d+.* in base, \[3, 3\] in tuned"
    ):
        make_plan(base, [Checkpoint.open(other)], Options((Rule.parse("bitwise"),)))


@pytest.mark.parametrize(("unit", "parts"), [(1 << 20, 2), (10 << 20, 4), (40 << 20, 4), (1 << 30, 10)])
def test_small_models_are_saved_on_the_way_too(unit, parts) -> None:
    """Parts of a quarter of everything, from 64 MiB to 2 GiB."""
    count = {1 << 20: 128, 10 << 20: 40, 40 << 20: 40, 1 << 30: 20}[unit]
    units = [SimpleNamespace(nbytes=unit, linear=False)] * count
    assert len(plan.split(units, Options((Rule.parse("bitwise"),)))) == parts


@pytest.mark.parametrize("k", [1, 128, 5000])
def test_a_tolerance_that_factors_cannot_meet_is_refused_at_once(k) -> None:
    """The base is converged to a quarter of it; the number that is named is the user's, and one that works."""
    rules, least = (Rule.parse("bitwise"),), 4 * subspace.least_tolerance(k)
    Options(rules, metrics=("energy",), k=k, tol_degrees=max(1e-4, 1.001 * least))
    if least <= 1e-4:
        return
    Options(rules, k=k, tol_degrees=1e-4)  # no factors, no tolerance
    with pytest.raises(ValueError, match=rf"tol_degrees = 0.0001 is finer .* k = {k}; give at least \S+") as caught:
        Options(rules, metrics=("energy",), k=k, tol_degrees=1e-4)
    named = float(str(caught.value).split("at least ")[1].split(",")[0])
    assert least <= named < 1.15 * least
    Options(rules, metrics=("energy",), k=k, tol_degrees=named)


def test_a_tolerance_that_is_refused_leaves_nothing_behind(pair, tmp_path, capsys) -> None:
    options = ("--metrics", "spectrum", "--tol-degrees", "1e-4")
    assert offprin(*pair[2], "--out", tmp_path / "out", *options) == 2
    assert "tol_degrees = 0.0001 is finer" in capsys.readouterr().err and not (tmp_path / "out").exists()


PEAK = """
import re, sys, torch
torch.set_num_threads(2)
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
from offprin_kernels.cli import main
code = main(sys.argv[1:])
print(peak() - before)
sys.exit(code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("shape", "dtype", "metrics"),
    [
        ((6000, 1500), torch.float32, "spectrum"),
        ((1500, 1500), torch.bfloat16, "spectrum,masks,energy"),
        ((1000, 4000), torch.bfloat16, "masks"),
    ],
)
def test_peak_memory_is_told_beforehand(tmp_path, shape, dtype, metrics) -> None:
    """The plan's estimate is above what a process grows by, and not far above."""
    name, base = "model.layers.0.mlp.up_proj.weight", weights(shape, dtype)
    paths = [tmp_path / f"{run}.safetensors" for run in ("base", "one", "two")]
    for seed, path in enumerate(paths):
        save_file({name: after(base, dtype, seed=seed) if seed else base}, path)
    runs = [Checkpoint.open(path) for path in paths]
    told = make_plan(runs[0], runs[1:], Options((Rule.parse("bitwise"),), metrics=tuple(metrics.split(",")))).peak_bytes
    command = [sys.executable, "-c", PEAK, "analyze", *map(str, paths), "--out", str(tmp_path / "out"), "--no-report"]
    command += ["--device", "cpu"]  # whose memory is what is told
    done = subprocess.run([*command, "--quiet", "--metrics", metrics], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.splitlines()[-1])
    assert grown < told < 1.6 * grown, f"{told / 2**20:.0f} MiB told, {grown / 2**20:.0f} grown"
