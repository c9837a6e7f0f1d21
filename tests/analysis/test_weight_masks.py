"""offprin mask: masks of a whole checkpoint against those of its matrices, and input that cannot be had."""

from __future__ import annotations

import math

import pytest
import torch

from offprin_kernels import BitMask, masks
from offprin_kernels.cli import main
from offprin_kernels.ops.subspace import topk_svd

from .checkpoints import base_weights, save

LINEAR = [name for name in base_weights() if "proj" in name]


def mask(*arguments) -> int:
    return main(["mask", *map(str, arguments), "--quiet"])


@pytest.fixture
def model(tmp_path):
    base = base_weights()
    return base, save(tmp_path / "model", base)


@pytest.mark.parametrize("kind", ["principal", "non-principal", "low", "safe"])
def test_masks_of_a_checkpoint(model, tmp_path, capsys, kind) -> None:
    base, path = model
    out = tmp_path / "masks.safetensors"
    assert mask(path, "--kind", kind, "--k", "4", "--alpha", "0.3", "--out", out) == 0
    found = BitMask.load(out)
    assert sorted(found) == sorted(LINEAR)
    for name in LINEAR:
        factors = topk_svd(base[name], 4)
        principal = masks.principal_mask(factors, base[name].shape, 0.3)
        low = masks.low_magnitude_mask(base[name], 0.3)
        expected = {"principal": principal, "non-principal": ~principal, "low": low, "safe": low | ~principal}[kind]
        assert found[name] == expected
    inside = sum(one.count() for one in found.values())
    assert f"{inside:,} of {sum(base[name].numel() for name in LINEAR):,} weights" in capsys.readouterr().out


def test_random_masks_differ_by_layer_and_seed(model, tmp_path) -> None:
    found = []
    for seed in (0, 0, 1):
        assert mask(model[1], "--kind", "random", "--alpha", "0.2", "--seed", seed, "--out", tmp_path / "m") == 0
        found.append(BitMask.load(tmp_path / "m"))
    q0, q1 = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))
    assert found[0][q0].count() == math.ceil(0.2 * 1600) and found[0][q0] == found[1][q0]
    assert found[0][q0] != found[0][q1] and found[0][q0] != found[2][q0]


def test_experts_are_masked_one_by_one(tmp_path) -> None:
    experts = torch.randn(3, 20, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    name = "model.layers.0.mlp.experts.down_proj"
    path = save(tmp_path / "moe", {name: experts}, shards=1)
    assert mask(path, "--kind", "low", "--alpha", "0.25", "--out", tmp_path / "m") == 0
    found = BitMask.load(tmp_path / "m")[name]
    assert found.shape == (3, 20, 30)
    assert found.to_dense().sum(dim=(1, 2)).tolist() == [150, 150, 150]


def test_include_and_exclude(model, tmp_path) -> None:
    assert mask(model[1], "--kind", "low", "--out", tmp_path / "m", "--include", "*.0.*", "--exclude", "*q_proj*") == 0
    assert list(BitMask.load(tmp_path / "m")) == ["model.layers.0.mlp.down_proj.weight"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kind", "best"), "unknown kind 'best'"),
        (("--kind", "safe", "--k", "0"), "k must be at least 1"),
        (("--kind", "safe", "--alpha", "1.5"), "alpha must lie in (0, 1]"),
        (("--kind", "safe", "--tol-degrees", "-1"), "tol_degrees must be a positive"),
        (("--kind", "random", "--seed", "-1"), "seed"),
        (("--kind", "low", "--include", "*.7.*"), "no linear layer that --include *.7.* leaves"),
        (("--kind", "low", "--exclude", "*"), "no linear layer that --exclude leaves"),
    ],
)
def test_bad_options(model, tmp_path, capsys, options, words) -> None:
    out = tmp_path / "masks.safetensors"
    out.write_text("what was here before")
    assert mask(model[1], *options, "--out", out) == 2
    assert words in capsys.readouterr().err
    assert out.read_text() == "what was here before" and len(list(tmp_path.iterdir())) == 2


def test_broken_weights_are_refused_by_name(tmp_path, capsys) -> None:
    base = base_weights()
    base[LINEAR[1]][3, 3] = math.nan
    path = save(tmp_path / "model", base)
    for kind in ("safe", "low"):
        assert mask(path, "--kind", kind, "--k", "4", "--out", tmp_path / "m") == 2
        message = capsys.readouterr().err
        assert LINEAR[1] in message and "NaN" in message and not (tmp_path / "m").exists()
    base[LINEAR[1]] = torch.ones(4, 4, dtype=torch.int8)
    path = save(tmp_path / "packed", base)
    assert mask(path, "--kind", "low", "--out", tmp_path / "m") == 2
    assert "has dtype I8" in capsys.readouterr().err
    assert mask(tmp_path / "nowhere", "--kind", "low", "--out", tmp_path / "m") == 2
    assert mask(path, "--kind", "low", "--exclude", LINEAR[1], "--out", tmp_path / "no" / "m") == 2
    assert "nothing was written" in capsys.readouterr().err


def test_missed_tolerances_are_told(tmp_path, capsys) -> None:
    """Two equal singular values at the edge of the top k: no such subspace."""
    path = save(tmp_path / "model", {LINEAR[0]: torch.eye(40).bfloat16()}, shards=1)
    assert mask(path, "--kind", "principal", "--k", "3", "--out", tmp_path / "m") == 3
    assert "certified to 90.000 degrees only" in capsys.readouterr().err
    assert BitMask.load(tmp_path / "m")[LINEAR[0]].count() == 800
