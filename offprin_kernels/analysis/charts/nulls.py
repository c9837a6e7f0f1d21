"""How null models look, the same in every chart: grey, each with a symbol of its own."""

from __future__ import annotations

from collections.abc import Sequence

from .model import INK, Series, plain

# key: (name in legends, symbol)
NULLS = {
    "uniform": ("if uniform", "circle-open"),
    "exponent": ("if by exponent", "diamond-open"),
    "margin": ("if by margins", "square-open"),
    "isotropic": ("if isotropic", "x-thin"),
}
EXPLAINED = (
    "Nulls: uniform, masks of the same density shuffled over all weights (Bernoulli); by exponent, shuffled among "
    "weights of equal exponent, about what rounding alone brings; by margins, only the densities of rows and columns "
    "are kept; isotropic, a Gaussian update of the same norm, rounded to bf16."
)


def null_points(kind: str, x: Sequence[float], y: Sequence[float | None], hover: Sequence[str] = ()) -> Series:
    name, symbol = NULLS[kind]
    return Series(name, x, plain(y), "points", INK, symbol=symbol, hover=hover)
