"""fp8 weights with per-tensor, per-row and block scales, against a dense dequantization written out here."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offprin_kernels.checkpoint import Checkpoint

from .files import bf16, checked, pair_of, reason, save, status


def expanded(scale: torch.Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> torch.Tensor:
    """The scale of every element, by index arithmetic on each one's own position."""
    rows, columns = shape[-2:]
    lead = math.prod(shape[:-2])
    if scale.numel() == 1:
        return scale.float().reshape(1, 1, 1).expand(lead, rows, columns)
    if scale.numel() == lead:
        return scale.float().reshape(lead, 1, 1).expand(lead, rows, columns)
    if scale.numel() == lead * rows and (scale.shape[-1] == 1 or scale.dim() == len(shape) - 1):
        return scale.float().reshape(lead, rows, 1).expand(lead, rows, columns)
    grid = scale.float().reshape(lead, -(-rows // block[0]), -(-columns // block[1]))
    return grid[:, torch.arange(rows) // block[0]][:, :, torch.arange(columns) // block[1]]


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_row_slabs_are_scaled_right(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(7, 9), (130, 257), (128, 128), (1, 300), (5,), (3, 6, 10), (2, 129, 4)]))
    block = data.draw(st.sampled_from([(128, 128), (4, 3), (1, 5)]))
    rows, columns = (1, 1, *shape)[-2:]
    lead = shape[:-2]
    grid = (*lead, -(-rows // block[0]), -(-columns // block[1]))
    shapes = [(), (1,), (1, 1), (*lead, rows), (*lead, rows, 1), grid]
    if lead:
        shapes += [lead, (*lead, 1), (*lead, 1, 1)]
    scale_shape = data.draw(st.sampled_from(shapes))
    dtype = data.draw(st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]))
    scale = torch.rand(scale_shape) + 0.5
    scale = scale.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e8m0fnu])))
    weight = torch.randn(shape).to(dtype)
    suffix = data.draw(st.sampled_from(["_scale_inv", "_scale"]))
    config = {"quantization_config": {"weight_block_size": list(block)}}
    folder = tmp_path_factory.getbasetemp() / "fp8"
    save(folder / "tuned", {"x.weight": weight, f"x.weight{suffix}": scale}, config)
    save(folder / "base", {"x.weight": torch.zeros(shape, dtype=torch.bfloat16)})
    base, tuned = Checkpoint.open(folder / "base"), Checkpoint.open(folder / "tuned")
    pairing = checked(base, tuned)
    assert status(pairing, "tuned", "x.weight") == "cast"
    assert status(pairing, "tuned", f"x.weight{suffix}") == "scale"
    assert reason(pairing, "tuned", f"x.weight{suffix}") == "scale of x.weight"
    ref = pairing.pairs[0].tuned
    wide = (1, *shape) if len(shape) == 1 else shape
    expected = (weight.float().reshape(-1, rows, columns) * expanded(scale, wide, block)).reshape(-1, columns)
    start = data.draw(st.integers(0, ref.rows))
    stop = data.draw(st.integers(start, ref.rows))
    got = ref.read(tuned, start, stop)
    assert got.dtype == torch.float32 and ref.torch_dtype == torch.float32
    assert torch.equal(got, expected[start:stop])
    assert ref.stored_row_bytes == columns and ref.row_bytes == 5 * columns


def test_default_block_and_both_sides_fp8(tmp_path: Path) -> None:
    weight = torch.randn(200, 300).to(torch.float8_e4m3fn)
    one = {"w": weight, "w_scale_inv": torch.rand(2, 3)}
    pairing = pair_of(tmp_path, one, {"w": weight, "w_scale": torch.rand(200, 1)})
    assert pairing.complete and pairing.pairs[0].note == (
        "base F8_E4M3 with its scale rounded to bf16; tuned F8_E4M3 with its scale rounded to bf16"
    )
    assert pairing.counts() == {"base": {"cast": 1, "scale": 1}, "tuned": {"cast": 1, "scale": 1}}


def test_scale_that_is_missing_or_does_not_fit(tmp_path: Path) -> None:
    weight = torch.randn(200, 300).to(torch.float8_e4m3fn)
    for number, (extra, words) in enumerate(
        [
            ({}, "fp8 without its scale (no w_scale_inv or w_scale)"),
            ({"w_scale_inv": torch.rand(3, 2)}, "its scale w_scale_inv of shape [3, 2] is neither per tensor"),
            ({"w_scale": torch.ones(200, 1, dtype=torch.int32)}, "its scale w_scale has dtype I32, which is no scale"),
        ]
    ):
        pairing = pair_of(tmp_path / str(number), {"w": bf16(200, 300)}, {"w": weight, **extra})
        assert status(pairing, "base", "w") == status(pairing, "tuned", "w") == "refused"
        assert f"tuned: {words}" in reason(pairing, "base", "w")


def test_activation_scales_are_not_weights(tmp_path: Path) -> None:
    weight = torch.randn(4, 4).to(torch.float8_e4m3fn)
    tuned = {"x.weight": weight, "x.weight_scale": torch.rand(4, 1), "x.input_scale": torch.rand(1)}
    pairing = pair_of(tmp_path, {"x.weight": bf16(4, 4)}, tuned)
    assert pairing.complete and pairing.counts()["tuned"] == {"cast": 1, "scale": 1, "not_weight": 1}


def test_fused_fp8_experts_against_single_bf16_ones(tmp_path: Path) -> None:
    experts, inner, hidden = 2, 3, 10
    gate_up = torch.randn(experts, 2 * inner, hidden).to(torch.float8_e4m3fn)
    scale = torch.rand(experts, 2 * inner, 1)
    dense = gate_up.float() * scale
    split = {}
    for expert in range(experts):
        split[f"m.experts.{expert}.gate_proj.weight"] = dense[expert, :inner].clone()
        split[f"m.experts.{expert}.up_proj.weight"] = dense[expert, inner:].clone()
    pairing = pair_of(tmp_path, split, {"m.experts.gate_up_proj": gate_up, "m.experts.gate_up_proj_scale": scale})
    assert pairing.complete and len(pairing.pairs) == 4
    one, two = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "tuned")
    for found in pairing.pairs:
        assert torch.equal(found.base.read(one, 1, 3), found.tuned.read(two, 1, 3))
