"""Projections, factors and masks that they make: on a device against fp64 and against the CPU's."""

from __future__ import annotations

import pytest
import torch

from offprin_kernels import low_magnitude_mask, principal_mask, random_mask, topk_svd
from offprin_kernels._backend import interpreting
from offprin_kernels.masks import count_for
from offprin_kernels.ops.projection import SIDES, project, project_out

from ..ops.test_projection import dense, factors
from ..ops.test_subspace import errors, largest_angle, slow

BACKENDS = ("triton",)
TOL = 0.05  # degrees
ALPHAS = (0.001, 0.1, 0.5)
# odd, larger than a block of any kernel, tall and wide; the last below every block
SHAPES = ((129, 65), (3, 5)) if interpreting() else ((1031, 517), (517, 1031), (2049, 255), (3, 5))


def to(device: torch.device, found) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return found.U.to(device), found.S.to(device), found.Vh.to(device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_projections(backend, device, shape, side, dtype) -> None:
    """Out of place and in place, by rows and by columns of storage."""
    m, n = shape
    f = factors(m, n, min(17, m, n))
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    inside = dense(x, f, side)
    f.U, f.Vh, there = f.U.to(device), f.Vh.to(device), x.to(device)
    # fp32 sums of up to 2049 products with orthonormal rows: errors add up like their root, 40 of the unit at most
    length = max(float(x.double().norm(dim=dim).max()) for dim in (0, 1))
    work = torch.finfo(torch.float32).eps * 40 * length
    for function, expected in ((project, inside), (project_out, x.double() - inside)):
        # and one rounding to the dtype
        close = work + torch.finfo(dtype).eps / 2 * expected.abs() * 1.01
        got = function(there, f, side)
        assert got.device == there.device and got.dtype == dtype
        assert bool(((got.cpu().double() - expected).abs() <= close).all())
        for y in (there.clone(), torch.empty(n, m, dtype=dtype, device=device).T.copy_(there)):
            assert function(y, f, side, inplace=True) is y
            assert bool(((y.cpu().double() - expected).abs() <= close).all())
    assert torch.equal(there.cpu(), x)


@pytest.mark.parametrize("method", ["auto", "gram", "correction"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES[:1] if interpreting() else SHAPES[:3])
def test_topk_svd(backend, device, shape, dtype, method) -> None:
    """Within its certificate of the truth, and within both certificates of what the CPU finds."""
    weight, k = slow(*shape).to(dtype), 9
    ours, theirs = (topk_svd(w, k, tol_degrees=TOL, method=method) for w in (weight.to(device), weight))
    assert ours.U.device.type == device.type
    assert ours.converged and theirs.converged and max(ours.error_degrees, theirs.error_degrees) <= TOL
    u, s, vh = to(torch.device("cpu"), ours)
    apart = max(largest_angle(theirs.U, u), largest_angle(theirs.Vh.T, vh.T))
    assert apart <= ours.error_degrees + theirs.error_degrees
    angle, off = errors(weight, type("Found", (), {"U": u, "S": s, "Vh": vh, "k": k}))
    assert angle <= ours.error_degrees and off <= 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_principal_mask(backend, device, shape, alpha) -> None:
    """From the same factors: as many, and the same but where a sum of k products could round to either side."""
    m, n = shape
    found = topk_svd(slow(m, n), min(9, m, n), method="reference")
    want = principal_mask(to(torch.device("cpu"), found), shape, alpha, backend="reference")
    got = principal_mask(to(device, found), shape, alpha, backend=backend).to("cpu")
    count = count_for(alpha, m * n)
    assert got.count() == want.count() == count
    u, s, vh = (factor.float().double() for factor in to(torch.device("cpu"), found))
    exact, magnitudes = ((u * s) @ vh).abs(), (u.abs() * s) @ vh.abs()
    threshold = exact.flatten().sort(descending=True).values[count - 1]
    differing = exact[(got ^ want).to_dense()]
    # k + 1 roundings for each term of a sum, in either of the two (Higham, section 3.1)
    bound = 2 * 2 * (len(s) + 1) * 2.0**-24 * float(magnitudes.max())
    assert bool(((differing - threshold).abs() <= bound).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_masks_that_are_exact(backend, device, shape, dtype) -> None:
    """Compared exactly, ties by place: the same on every device."""
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    weight.view(-1)[::7] = 0.0
    weight.view(-1)[3::14] = -0.0
    for alpha in ALPHAS:
        want = low_magnitude_mask(weight, alpha, backend="reference")
        assert low_magnitude_mask(weight.to(device), alpha, backend=backend).to("cpu") == want
        want = random_mask(shape, alpha, 5, backend="reference")
        assert random_mask(shape, alpha, 5, device=device, backend=backend).to("cpu") == want
