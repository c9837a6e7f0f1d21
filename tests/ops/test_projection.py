"""Projections against dense fp64, under autograd, compile and in place, with nothing of the size of x on the side."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offprin_kernels.ops.projection import SIDES, blocked, project, project_out


def factors(m: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(m + n + k)
    u, v = (torch.linalg.qr(torch.randn(size, k, generator=generator, dtype=torch.float64))[0] for size in (m, n))
    return SimpleNamespace(U=u.to(dtype), Vh=v.T.contiguous().to(dtype))


def dense(x: torch.Tensor, f: SimpleNamespace, side: str) -> torch.Tensor:
    """By the definition, in fp64."""
    x, u, vh = x.double(), f.U.double(), f.Vh.double()
    if side != "right":
        x = u @ (u.T @ x)
    return x if side == "left" else (x @ vh.T) @ vh


@pytest.fixture
def many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "WIDENED", 100)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n", "k"), [(37, 23, 5), (23, 37, 23), (1, 9, 1), (9, 1, 1)])
def test_against_the_definition(side: str, dtype: torch.dtype, m: int, n: int, k: int, many_blocks: None) -> None:
    f = factors(m, n, k, torch.float64 if dtype == torch.float64 else torch.float32)
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    inside = dense(x, f, side)
    # one rounding to the dtype, and sums of up to 37 terms in the working precision
    size = float(x.double().abs().max()) * max(m, n) ** 0.5
    work = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * 40 * size
    for function, expected in ((project, inside), (project_out, x.double() - inside)):
        got = function(x, f, side)
        assert got.dtype == dtype and got.shape == x.shape
        close = work + torch.finfo(dtype).eps / 2 * expected.abs() * 1.01
        assert bool(((got.double() - expected).abs() <= close).all())
        for y in (x.clone(), torch.empty(n, m, dtype=dtype).T.copy_(x)):
            before = y._version
            assert function(y, f, side, inplace=True) is y
            # the same products, except that rounding inside a product may depend on the layout
            assert bool(((y.double() - expected).abs() <= close).all()) and y._version > before
    assert torch.equal(x, x.clone())


@pytest.mark.parametrize("side", SIDES)
def test_projections_are_idempotent_and_complementary(side: str) -> None:
    f, x = factors(60, 40, 6), torch.randn(60, 40, generator=torch.Generator().manual_seed(1))
    once = project(x, f, side)
    assert torch.allclose(project(once, f, side), once, atol=1e-5)
    assert float(project(project_out(x, f, side), f, side).abs().max()) < 1e-5
    assert torch.allclose(once + project_out(x, f, side), x, atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("function", [project, project_out])
def test_autograd(function, side: str) -> None:
    f = factors(8, 6, 3, torch.float64)
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: function(y, f, side), (x,))


@pytest.mark.traced
@pytest.mark.parametrize("side", SIDES)
def test_opcheck(side: str) -> None:
    f = factors(9, 7, 2)
    for requires_grad in (False, True):
        x = torch.randn(9, 7, requires_grad=requires_grad)
        torch.library.opcheck(torch.ops.offprin.project.default, (x, f.U, f.Vh, side, True))
    torch.library.opcheck(torch.ops.offprin.project_.default, (torch.randn(9, 7), f.U, f.Vh, side, False))


@pytest.mark.traced
def test_compile() -> None:
    f, x = factors(12, 10, 3), torch.randn(12, 10)
    compiled = torch.compile(lambda y: project_out(y, f, "both") * 2, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), project_out(x, f, "both") * 2)


class Sizes(TorchDispatchMode):
    """Largest number of elements that any operator returned in new memory."""

    def __init__(self, known: torch.Tensor) -> None:
        super().__init__()
        self.largest, self.known = 0, known.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, torch.Tensor) and item.untyped_storage().data_ptr() != self.known:
                self.largest = max(self.largest, item.untyped_storage().nbytes() // item.element_size())
        return result


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_of_the_size_of_x_is_made(side: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "WIDENED", 1000)
    f, x = factors(100, 80, 4), torch.randn(100, 80).to(dtype)
    with Sizes(x) as sizes:
        blocked.project(x, f.U, f.Vh, side, True, x)
    assert 0 < sizes.largest <= 1000


def test_bad_input() -> None:
    f, x = factors(9, 7, 2), torch.randn(9, 7)
    with pytest.raises(ValueError, match="unknown side"):
        project(x, f, "top")
    with pytest.raises(TypeError, match="int64"):
        project(torch.ones(9, 7, dtype=torch.int64), f)
    with pytest.raises(ValueError, match="9 x 7 weight and x is 7 x 9"):
        project(x.T, f)
    with pytest.raises(ValueError, match="1-D x"):
        project(x[0], f)
    with pytest.raises(ValueError, match="meta"):
        project(x.to("meta"), f)
    leaf = torch.randn(9, 7, requires_grad=True)
    with pytest.raises(RuntimeError, match="requires grad"):
        project(leaf, f, inplace=True)


def test_empty_and_nan() -> None:
    nothing = project(torch.empty(0, 7), SimpleNamespace(U=torch.empty(0, 0), Vh=torch.empty(0, 7)), "left")
    assert nothing.shape == (0, 7)
    f, x = factors(9, 7, 2), torch.randn(9, 7)
    x[3, 4] = torch.nan
    assert bool(project(x, f, "left")[:, 4].isnan().all()) and not bool(project(x, f, "left")[:, :4].isnan().any())
