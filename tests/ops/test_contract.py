"""The codes and layouts that Python and C++ must agree on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from offprin_kernels import packing
from offprin_kernels.ops.lowrank_select import contract as lowrank_select
from offprin_kernels.ops.masked_adamw import contract as masked_adamw
from offprin_kernels.ops.update_scan import contract as c

HEADER = Path(__file__).resolve().parents[2] / "csrc" / "kernels.h"


@pytest.fixture(scope="module")
def header() -> str:
    return HEADER.read_text()


def enumerators(header: str, name: str) -> dict[str, int]:
    body = re.search(rf"enum (?:class )?{name}[^{{]*{{([^}}]*)}}", header)[1]
    values, following = {}, 0
    for item in body.replace("\n", " ").split(","):
        key, _, value = item.partition("=")
        if key.strip():
            following = int(value) if value.strip() else following
            values[key.strip()] = following
            following += 1
    return values


def constant(header: str, name: str) -> int:
    return int(re.search(rf"constexpr \w+ {name} = (-?\d+);", header)[1])


def test_rule_codes(header) -> None:
    assert enumerators(header, "RuleCode") == {rule.name: rule.value for rule in c.RuleCode}


def test_dtype_codes(header) -> None:
    names = {"BF16": "bfloat16", "FP16": "float16", "FP32": "float32"}
    found = {f"torch.{names[name]}": value for name, value in enumerators(header, "Dtype").items()}
    assert found == {str(dtype): code for dtype, code in c.DTYPE_CODES.items()}
    assert lowrank_select.DTYPE_CODES == c.DTYPE_CODES


def test_counters_and_norms(header) -> None:
    for enum in ("Counter", "Norm"):
        for name, value in enumerators(header, enum).items():
            assert getattr(c, name) == value, name


def test_sizes(header) -> None:
    for name in ("MAX_RULES", "ULP_BINS", "ULP_NAN_BIN", "EXPONENT_BINS", "UNDEFINED"):
        assert constant(header, name) == getattr(c, name)
    assert [packing.row_bytes(n) for n in (0, 1, 64, 65, 128)] == [0, 8, 8, 16, 16]
    assert "(columns + 63) / 64 * 8" in header


def test_masked_adamw(header) -> None:
    assert constant(header, "BLOCK") == masked_adamw.BLOCK
    assert enumerators(header, "Rounding") == {rounding.name: rounding.value for rounding in masked_adamw.Rounding}
    for name in ("Slot", "Hyper", "Cohort"):
        columns = getattr(masked_adamw, name)
        expected = {column.name: column.value for column in columns}
        assert enumerators(header, name) == {**expected, f"{name.upper()}S": len(columns)}, name
    codes = enumerators(header, "Dtype")
    assert {torch.bfloat16: codes["BF16"], torch.float32: codes["FP32"]} == masked_adamw.DTYPE_CODES
