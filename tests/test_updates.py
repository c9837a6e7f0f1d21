"""The public functions: names, types and meanings on top of the ops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offprin_kernels import BackendUnavailable, BitMask, Rule, update_mask, update_scan, visible

from .ops.weights import tuned, weights, with_specials


def test_update_mask_is_inequality_of_bf16_values() -> None:
    base = with_specials(weights((40, 130)), seed=1)
    after = with_specials(tuned(base), seed=2)
    mask = update_mask(base, after)
    both_nan = base.isnan() & after.isnan()
    assert isinstance(mask, BitMask) and mask.shape == base.shape
    assert torch.equal(mask.to_dense(), (base != after) & ~both_nan)


def test_mask_is_written_into_a_given_one() -> None:
    base = weights((40, 130))
    out = BitMask.ones(base.shape)
    assert update_mask(base, tuned(base), out=out) is out
    assert out == update_mask(base, tuned(base))
    with pytest.raises(ValueError, match="out has shape"):
        update_mask(base, base, out=BitMask.zeros((40, 131)))


def test_scan_fields_agree_with_each_other() -> None:
    base = weights((64, 300))
    after = tuned(base)
    scan = update_scan(base, after, also=["eta", ("ulp", 2), Rule.parse("atol", 1e-5)])
    assert scan.total == 64 * 300
    assert 0 < scan.changed < scan.total
    assert scan.sparsity == 1 - scan.changed / scan.total
    assert scan.mask.count() == scan.changed == int(scan.row_counts.sum()) == int(scan.col_counts.sum())
    assert scan.counts["bitwise"] == scan.counts["eta(0.001)"] == scan.changed
    assert scan.counts["ulp(2)"] == int((distance(base, after) > 2).sum())
    assert scan.ulp_histogram[1:].sum() == scan.changed
    assert scan.exponent_histogram.sum(1).tolist() == [scan.total, scan.changed]
    assert scan.norms.base_squared == pytest.approx(float(base.double().square().sum()), rel=1e-12)
    assert scan.norms.update_max == float((after.float() - base.float()).abs().max())
    assert (scan.nan_base, scan.inf_tuned, scan.zero_to_nonzero) == (0, 0, 0)
    assert scan.uncast_counts is None and scan.uncast_norms is None


def distance(base: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    from offprin_kernels import numerics as num

    return num.ulp_distance(num.bf16_codes(base), num.bf16_codes(after))


def test_what_was_not_asked_for_is_none() -> None:
    base = weights((8, 64))
    scan = update_scan(base, tuned(base), outputs=["rows", "nonfinite"])
    assert scan.mask is None and scan.col_counts is None and scan.norms is None and scan.sign_flips is None
    assert scan.row_counts is not None and scan.nan_tuned == 0


def test_fp32_source_reports_both_comparisons() -> None:
    base = weights((32, 200), torch.float32)
    after = base * (1 + 1e-4)
    scan = update_scan(base, after, also=["eta"])
    changed = base.bfloat16() != after.bfloat16()
    assert scan.changed == int(changed.sum()) < scan.total // 4
    assert scan.uncast_counts["bitwise"] == scan.total
    assert scan.uncast_counts["eta(0.001)"] == 0
    assert scan.uncast_norms.update_squared == pytest.approx(float((after.double() - base.double()).square().sum()))


def test_visible_needs_about_half_a_ulp() -> None:
    weight = torch.full((1, 100), 1.0)
    ulp = 2.0**-7
    update = torch.linspace(0, ulp, 100).view(1, 100)
    assert torch.equal(visible(weight, update).to_dense(), update > ulp / 2)  # the tie at 1 goes to even: not visible


def test_visible_equals_rounding_the_sum() -> None:
    weight = weights((50, 77), torch.float32)
    update = weights((50, 77), torch.float32, seed=5, sigma=1e-4)
    want = (weight + update).bfloat16() != weight.bfloat16()
    assert torch.equal(visible(weight, update).to_dense(), want)


def test_forced_backend_never_falls_back(monkeypatch) -> None:
    base = torch.zeros(2, 2)
    with pytest.raises(BackendUnavailable, match="cuda"):
        update_mask(base, base, backend="cuda")
    with pytest.raises(ValueError, match="unknown backend"):
        update_mask(base, base, backend="tpu")
    monkeypatch.setenv("OFFPRIN_BACKEND", "cuda")
    with pytest.raises(BackendUnavailable, match="CUDA tensors"):
        update_mask(base, base)
    monkeypatch.setenv("OFFPRIN_BACKEND", "reference")
    assert update_mask(base, base).count() == 0


def test_one_more_rule_as_a_bare_name() -> None:
    base = weights((4, 64))
    for also in ("eta", Rule.parse("eta")):
        assert list(update_scan(base, base, also=also).counts) == ["bitwise", "eta(0.001)"]


def test_close_thresholds_have_counts_of_their_own() -> None:
    base, after = torch.ones(1, 1), torch.full((1, 1), 1.0078125)
    counts = update_scan(base, after, also=[("atol", 0.0078125), ("atol", 0.00781249)]).counts
    assert counts == {"bitwise": 1, "atol(0.0078125)": 0, "atol(0.00781249)": 1}
    with pytest.raises(ValueError, match=r"rule eta\(0.001\) is asked for twice"):
        update_scan(base, after, also=["eta", ("eta", 1e-3)])


@pytest.mark.parametrize(
    "call", [update_mask, update_scan, visible, lambda a, b: update_mask(a, b, out=BitMask.zeros((2, 2)))]
)
def test_what_is_no_tensor(call) -> None:
    fine = torch.zeros(2, 2)
    with pytest.raises(TypeError, match=r"is numpy.ndarray; use torch.from_numpy"):
        call(fine, np.zeros((2, 2), dtype=np.float32))
    with pytest.raises(TypeError, match=r"is builtins.list; pass a torch.Tensor"):
        call([[0.0]], fine)
    with pytest.raises(ValueError, match="on the meta device"):
        call(fine, fine.to("meta"))


def test_visible_speaks_of_weight_and_update() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \(2, 3\) and update \(3, 2\)"):
        visible(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(TypeError, match=r"update is torch\.int64"):
        visible(torch.zeros(2), torch.zeros(2, dtype=torch.int64))


def test_gradients_do_not_flow() -> None:
    base = torch.randn(4, 4, requires_grad=True)
    assert not update_scan(base, base + 1).raw.norms.requires_grad
