"""Totals, nulls and the printed report where tensors are missing, empty or not finite."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import torch

from offprin_kernels import nulls
from offprin_kernels.analysis import report

from .checkpoints import offprin, save

UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def summary_of(out) -> dict:
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads((out / "summary.json").read_text(), parse_constant=refuse)


def checkpoints(tmp_path, *sides: dict[str, torch.Tensor]) -> list:
    return [save(tmp_path / f"side{i}", tensors, shards=1) for i, tensors in enumerate(sides)]


def moved(tensor: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """A copy in which that share of the entries changes."""
    pick = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) < share
    return torch.where(pick, tensor + 1, tensor)


def test_uncast_share_of_nothing(tmp_path, capsys) -> None:
    base = {UP: torch.zeros(0, 8), DOWN: torch.ones(4, 8).bfloat16()}
    assert offprin(*checkpoints(tmp_path, base, base), "--out", tmp_path / "out") == 0
    assert "(un-cast - of 0)" in capsys.readouterr().out


def test_runs_without_a_tensor_in_common(tmp_path, capsys) -> None:
    base = {name: torch.ones(8, 8).bfloat16() for name in (UP, DOWN)}
    sides = checkpoints(tmp_path, base, {UP: base[UP] * 2}, {DOWN: base[DOWN] * 2})
    assert offprin(*sides, "--out", tmp_path / "out") == 3
    found = summary_of(tmp_path / "out")
    assert found["pairs"][0]["pooled"] is None and found["consensus"] is None and found["mean_jaccard"] is None
    text = capsys.readouterr().out
    assert "side1 ~ side2: no tensor in common" in text and "Consensus" not in text


def test_consensus_is_over_tensors_that_all_runs_share(tmp_path) -> None:
    base = {name: torch.ones(8, 8).bfloat16() for name in (UP, DOWN)}
    sides = checkpoints(tmp_path, base, base, base, {DOWN: base[DOWN]})
    assert offprin(*sides, "--out", tmp_path / "out") == 3
    found = summary_of(tmp_path / "out")["consensus"]
    assert (found["runs"], found["tensors"], found["total"]) == (3, 1, 64)
    only = checkpoints(tmp_path / "two", base, {UP: base[UP]}, {UP: base[UP]}, {DOWN: base[DOWN]})
    assert offprin(*only, "--out", tmp_path / "none") == 3
    assert summary_of(tmp_path / "none")["consensus"] is None


def test_pooled_nulls_keep_tensors_apart(tmp_path) -> None:
    """Two runs that change much of one tensor and little of the other, but agree on no coordinate more than chance."""
    base = {name: torch.ones(200, 200).bfloat16() for name in (UP, DOWN)}
    runs = [{UP: moved(base[UP], 0.9, seed), DOWN: moved(base[DOWN], 0.05, 10 + seed)} for seed in (1, 2)]
    assert offprin(*checkpoints(tmp_path, base, *runs), "--out", tmp_path / "out") == 0
    found = summary_of(tmp_path / "out")
    pooled = found["pairs"][0]["pooled"]
    rows = pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    mean = sum(row["changed_a"] * row["changed_b"] / row["total"] for row in rows)
    assert pooled["lift"] == pytest.approx(pooled["intersection"] / mean) == pytest.approx(1, abs=0.01)
    assert pooled["jaccard_bernoulli"] == pytest.approx(mean / (pooled["changed_a"] + pooled["changed_b"] - mean))
    assert abs(pooled["z_bernoulli"]) < 4
    assert found["consensus"]["expected_uniform"][2] == pytest.approx(mean)


def test_margins_explain_stripes(tmp_path, capsys) -> None:
    """Two runs that change the same rows, and nothing else in common: far above uniform, not above the margins."""
    base = {UP: torch.ones(100, 100).bfloat16(), DOWN: torch.ones(60, 30).bfloat16()}
    stripes = torch.where(torch.arange(100) < 30, 0.8, 0.1)[:, None]
    runs = []
    for seed in (1, 2):
        pick = torch.rand(100, 100, generator=torch.Generator().manual_seed(seed)) < stripes
        runs.append({UP: base[UP] + pick, DOWN: moved(base[DOWN], 0.3, seed)})
    assert offprin(*checkpoints(tmp_path, base, *runs), "--out", tmp_path / "out") == 0
    rows = pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    row = next(row for row in rows if row["name"] == UP)
    counts = [(run[UP] != 1).sum(axis).numpy() for run in runs for axis in (1, 0)]
    assert row["jaccard_margin"] == nulls.margin_null(*counts).jaccard
    assert row["jaccard"] > 1.5 * row["jaccard_bernoulli"] and abs(row["jaccard"] - row["jaccard_margin"]) < 0.03
    pooled = summary_of(tmp_path / "out")["pairs"][0]["pooled"]
    both, either = (sum(row[key] for row in rows) for key in ("intersection_margin", "union_margin"))
    assert pooled["jaccard_margin"] == pytest.approx(both / either)
    assert "if by margins" in capsys.readouterr().out


def test_means_leave_out_tensors_that_neither_run_changed(tmp_path) -> None:
    base = {name: torch.ones(20, 20).bfloat16() for name in (UP, DOWN)}
    runs = [{UP: moved(base[UP], 0.5, seed), DOWN: base[DOWN]} for seed in (1, 2)]
    assert offprin(*checkpoints(tmp_path, base, *runs), "--out", tmp_path / "out") == 0
    found = summary_of(tmp_path / "out")
    for mean in (found["mean_jaccard"], found["pairs"][0]["mean_over_tensors"]):
        assert mean["counted"] == 1 and mean["jaccard"] == found["pairs"][0]["pooled"]["jaccard"] < 1


def test_empty_tables_have_the_columns_of_full_ones(pair, tmp_path) -> None:
    *_, paths = pair
    for out, tuned in (("full", paths[1:]), ("empty", paths[1:2])):
        assert offprin(paths[0], *tuned, "--out", tmp_path / out) == 0
    full, empty = (pq.read_schema(tmp_path / out / "pairs.parquet") for out in ("full", "empty"))
    assert full.equals(empty)


def test_one_row_has_no_stripes(tmp_path) -> None:
    base = {name: torch.ones(shape).bfloat16() for name, shape in ((UP, (1, 50)), (DOWN, (50, 1)))}
    runs = {name: moved(tensor, 0.5, 1) for name, tensor in base.items()}
    assert offprin(*checkpoints(tmp_path, base, runs), "--out", tmp_path / "out") == 0
    for row in pq.read_table(tmp_path / "out" / "tensors.parquet").to_pylist():
        assert row["row_dispersion"] is None and row["column_dispersion"] is None


def test_summary_is_strict_json(tmp_path, capsys) -> None:
    """Norms beyond fp64 become null; no NaN or Infinity in the file or on the screen."""
    base = {UP: torch.full((4, 4), 3e38).bfloat16()}
    after = {UP: torch.full((4, 4), -3e38).bfloat16()}
    assert offprin(*checkpoints(tmp_path, base, after), "--out", tmp_path / "out", "--json") == 0
    found = summary_of(tmp_path / "out")
    assert found["runs"][0]["all"]["update_max"] is None
    assert json.loads(capsys.readouterr().out) == found
    assert report.render(found, tmp_path)
