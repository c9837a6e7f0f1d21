"""Geometry of updates through the command: every column against a direct computation, resumption, bad options."""

from __future__ import annotations

import json
import math

import pyarrow.parquet as pq
import pytest
import torch

from offprin_kernels import geometry, masks, update_mask
from offprin_kernels.analysis import plan
from offprin_kernels.analysis.plan import METRICS

from .checkpoints import base_weights, files, offprin, save, tuned_weights

ALL = ("--metrics", ",".join(METRICS), "--k", "5", "--alpha", "0.3")
NAME = "model.layers.0.mlp.down_proj.weight"


def table(out) -> list[dict]:
    return pq.read_table(out / "geometry.parquet").to_pylist()


def test_every_column_against_a_direct_computation(pair, tmp_path) -> None:
    base, runs, paths = pair
    out = tmp_path / "out"
    assert offprin(*paths, "--out", out, *ALL) == 0
    rows = table(out)
    # linear layers only, each run
    assert sorted((row["run"], row["name"]) for row in rows) == sorted(
        (run, name) for run in ("one", "two") for name in base if "proj" in name
    )
    row = next(row for row in rows if row["name"] == NAME and row["run"] == "two")
    w, t = base[NAME], runs[1][NAME]
    factors = geometry.topk_svd(w, 5, tol_degrees=0.0125)
    angles = geometry.principal_angles(factors, t, 5, tol_degrees=0.05)
    assert row["left_degrees"] == angles.max_left and row["right_degrees"] == angles.max_right
    assert row["resolution_degrees"] == angles.resolution_degrees and row["converged"]
    shift = geometry.normalized_spectral_shift(w, t)
    assert (row["nss"], row["nss_mirsky"], row["nss_isotropic"]) == (shift.nss, shift.mirsky, shift.isotropic)
    truth = torch.linalg.svdvals(t.double()) - torch.linalg.svdvals(w.double())
    assert row["nss"] == pytest.approx(float(truth.norm() / torch.linalg.svdvals(w.double()).norm()), rel=1e-6)
    energy = geometry.update_energy(factors, t.float() - w.float())
    assert (row["energy_left"], row["energy_right"], row["energy_both"]) == (energy.left, energy.right, energy.both)
    changed = update_mask(w, t).to_dense()
    assert row["changed"] == int(changed.sum())
    principal = masks.principal_mask(factors, w.shape, 0.3)
    low = masks.low_magnitude_mask(w, 0.3)
    exponent = (w.view(torch.int16).int() >> 7) & 0xFF
    for kind, mask in (("principal", principal), ("low", low), ("safe", low | ~principal)):
        dense = mask.to_dense()
        assert row[f"{kind}_size"] == int(dense.sum()) and row[f"{kind}_changed"] == int((dense & changed).sum())
        assert row[f"{kind}_expected_uniform"] == pytest.approx(float(changed.sum()) * float(dense.double().mean()))
        expected = 0.0
        for e in exponent.unique():
            here = exponent == e
            expected += float((dense & here).sum()) * float((changed & here).sum()) / float(here.sum())
        assert row[f"{kind}_expected_exponent"] == pytest.approx(expected)


def test_summary_and_report(pair, tmp_path, capsys) -> None:
    assert offprin(*pair[2], "--out", tmp_path / "out", *ALL) == 0
    text = capsys.readouterr().out
    assert "one: geometry of 4 linear layers, k = 5" in text and "if isotropic" in text and "safe mask" in text
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    found = summary["geometry"][0]
    assert found["all"]["matrices"] == 4 and set(found["by_kind"]) == {"q_proj", "down_proj"}
    rows = [row for row in table(tmp_path / "out") if row["run"] == "one"]
    pooled = sum(row["low_changed"] for row in rows) / sum(row["changed"] for row in rows)
    assert found["all"]["overlaps"]["low"]["overlap"] == pytest.approx(pooled)
    nss = sorted(row["nss"] for row in rows)
    assert found["all"]["nss"] == pytest.approx((nss[1] + nss[2]) / 2)


def test_one_metric_at_a_time(pair, tmp_path) -> None:
    for metric in METRICS:
        assert offprin(*pair[2][:2], "--out", tmp_path / metric, "--metrics", metric, "--k", "3") == 0
        row = table(tmp_path / metric)[0]
        assert ("nss" in row, "changed" in row, "energy_left" in row) == tuple(metric == m for m in METRICS)
    assert offprin(*pair[2][:2], "--out", tmp_path / "none") == 0
    assert not (tmp_path / "none" / "geometry.parquet").exists()


def test_no_update_and_broken_weights(tmp_path, capsys) -> None:
    base = base_weights()
    broken = tuned_weights(base, 1)
    broken[NAME][2, 3] = math.nan
    paths = [save(tmp_path / name, tensors) for name, tensors in (("base", base), ("same", base), ("broken", broken))]
    assert offprin(*paths, "--out", tmp_path / "out", *ALL) == 0
    assert "left out: " + NAME + ": NaN or Inf in the tuned weight" in capsys.readouterr().out
    rows = table(tmp_path / "out")
    same = next(row for row in rows if row["run"] == "same" and row["name"] == NAME)
    assert same["left_degrees"] is None and same["nss"] == 0 and same["energy_left"] is None and same["changed"] == 0
    assert rows[0]["name"] == NAME or rows[0]["nss"] is not None
    bad = next(row for row in rows if row["run"] == "broken" and row["name"] == NAME)
    assert bad["note"] == "NaN or Inf in the tuned weight" and bad["nss"] is None
    base[NAME][0, 0] = math.inf
    paths[0] = save(tmp_path / "infinite", base)
    assert offprin(paths[0], paths[1], "--out", tmp_path / "out2", *ALL) == 0
    assert next(row for row in table(tmp_path / "out2") if row["name"] == NAME)["note"] == "NaN or Inf in the base"


def test_resumed_geometry_is_the_same(pair, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(plan, "PART_BYTES", 20_000)
    monkeypatch.setattr(plan, "SMALLEST_PART", 1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert offprin(*pair[2], "--out", whole, *ALL) == 0
    from offprin_kernels.analysis import measure

    calls = []
    real = measure.measure_geometry

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(measure, "measure_geometry", interrupted)
    assert offprin(*pair[2], "--out", cut, *ALL) == 3
    monkeypatch.setattr(measure, "measure_geometry", real)
    assert offprin(*pair[2], "--out", cut, *ALL) == 0
    ours, theirs = files(cut), files(whole)
    assert ours.keys() == theirs.keys() and ours["geometry.parquet"] == theirs["geometry.parquet"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--metrics", "angles"), "unknown metric 'angles'"),
        (("--metrics", "energy", "--k", "0"), "k must be at least 1"),
        (("--metrics", "masks", "--alpha", "0"), "alpha must lie in (0, 1]"),
        (("--metrics", "masks", "--alpha", "nan"), "alpha must lie in (0, 1]"),
        (("--metrics", "spectrum", "--tol-degrees", "0"), "tol_degrees must lie between"),
    ],
)
def test_bad_options(pair, tmp_path, capsys, options, words) -> None:
    assert offprin(*pair[2], "--out", tmp_path / "out", *options) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()
