"""Names, rules and parts of a plan."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from offprin_kernels import Rule
from offprin_kernels.analysis import Options, make_plan, plan
from offprin_kernels.analysis.store import digest
from offprin_kernels.checkpoint import Checkpoint

from .checkpoints import base_weights, save


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
