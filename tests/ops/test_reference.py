"""The reference itself, against a scalar definition written with Python floats and struct, one coordinate at a time."""

from __future__ import annotations

import math
import struct

import numpy as np
import torch

from offprin_kernels import numerics as num
from offprin_kernels.ops.update_scan import Rule, reference

from .weights import SPECIAL_CODES, random_bits

RULES = (
    Rule.parse("bitwise"),
    Rule.parse("ulp", 0),
    Rule.parse("ulp", 5),
    Rule.parse("eta"),
    Rule.parse("eta", 0.5),
    Rule.parse("atol", 1e-5),
    Rule.parse("storage"),
)


def value(code: int) -> float:
    return struct.unpack("<f", struct.pack("<I", code << 16))[0]


def line(code: int) -> int:
    """Position on the ordered line, from the value rather than from the bits."""
    x = value(code)
    if math.isinf(x):
        return int(math.copysign(0x7F80, x))
    if abs(x) < 2.0**-126:  # subnormals: one ULP is 2^-133
        return int(x / 2.0**-133)
    exponent = math.frexp(abs(x))[1] - 1
    steps = (exponent + 127) * 128 + (abs(x) / 2.0**exponent - 1) * 128
    return int(math.copysign(steps, x))


def changed(a: int, b: int, rule: Rule) -> bool:
    x, y = value(a), value(b)
    name = rule.code.name
    if name == "STORAGE":
        return a != b
    if math.isnan(x) or math.isnan(y):
        return math.isnan(x) != math.isnan(y)
    if name == "BITWISE":
        return x != y
    if name == "ULP":
        return abs(line(a) - line(b)) > rule.threshold
    if math.isinf(x) or math.isinf(y):
        return x != y
    with np.errstate(over="ignore"):
        distance = abs(np.float32(y) - np.float32(x))
        limit = np.float32(rule.threshold)
        if name == "ETA":
            limit = limit * max(abs(np.float32(x)), abs(np.float32(y)))
        return bool(distance > limit)


def test_rules_by_scalar_definition() -> None:
    codes = torch.tensor([*SPECIAL_CODES, *range(0x3F70, 0x3F90), *range(0x8000, 0x8010), *range(0x7F70, 0x7F90)])
    a, b = torch.meshgrid(codes, codes, indexing="ij")
    for rule in RULES:
        got = reference.changed(a.int(), b.int(), rule)
        want = [[changed(int(x), int(y), rule) for y in codes] for x in codes]
        assert got.tolist() == want, str(rule)


def test_eta_equals_bitwise_on_normal_values() -> None:
    codes = torch.arange(0x0080, 0x7F80)  # all positive normals, each against its neighbour
    eta = reference.changed(codes[:-1].int(), codes[1:].int(), Rule.parse("eta"))
    assert bool(eta.all())
    assert not bool(reference.changed(codes.int(), codes.int(), Rule.parse("eta")).any())


def test_rounding_is_torch_rounding_on_numbers() -> None:
    x = random_bits((1 << 20,), torch.float32, 0)
    x = torch.cat([x, torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, 3.4e38, 1e-45, float("inf")])])
    numbers = x[~x.isnan()]
    want = numbers.to(torch.bfloat16).view(torch.int16).int() & 0xFFFF
    assert torch.equal(num.round_to_bf16_codes(numbers), want)


def test_rounding_keeps_nan_nan() -> None:
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1, -(2**23) + 1], dtype=torch.int64).to(torch.int32)
    codes = num.round_to_bf16_codes(bits.view(torch.float32))
    assert bool(num.is_nan_code(codes).all())


def test_ties_go_to_even() -> None:
    ties = torch.tensor([1 + 1 / 256, 1 + 3 / 256, -(1 + 1 / 256)])
    assert num.codes_to_fp32(num.round_to_bf16_codes(ties)).tolist() == [1.0, 1 + 4 / 256, -1.0]


def test_ordered_line_joins_zeros() -> None:
    codes = torch.tensor([0x8001, 0x8000, 0x0000, 0x0001], dtype=torch.int32)
    assert num.ordered(codes).tolist() == [-1, 0, 0, 1]


def test_norms_against_numpy() -> None:
    a = random_bits((64, 65), torch.bfloat16, 3)
    a = torch.where(a.float().abs() < 1e4, a, torch.zeros((), dtype=torch.bfloat16))
    b = (a.float() * 1.01).to(torch.bfloat16)
    row = reference.norm_row(a.float(), b.float()).tolist()
    x, y = a.double().numpy(), b.double().numpy()
    want = [(x * x).sum(), ((y - x) ** 2).sum(), (x * (y - x)).sum(), np.abs((y - x).astype(np.float32)).max()]
    np.testing.assert_allclose(row, want, rtol=1e-12)
