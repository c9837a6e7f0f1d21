"""Geometry of updates through the command: every column against a direct computation, resumption, bad options."""

from __future__ import annotations

import json
import math

import pyarrow.parquet as pq
import pytest
import torch

from offprin_kernels import geometry, masks, nulls, update_mask
from offprin_kernels.analysis import plan
from offprin_kernels.analysis.plan import METRICS
from offprin_kernels.analysis.schema import CURVES
from offprin_kernels.ops.subspace import topk_svd
from offprin_kernels.ops.update_scan import Rule

from ..ops.weights import weights
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
    factors = topk_svd(w, 5, tol_degrees=0.0125)
    angles = geometry.principal_angles(factors, t, 5, tol_degrees=0.05)
    assert row["left_degrees"] == angles.max_left and row["right_degrees"] == angles.max_right
    assert row["resolution_degrees"] == angles.resolution_degrees and row["converged"]
    shift = geometry.normalized_spectral_shift(w, t)
    assert (row["nss"], row["nss_mirsky"]) == (pytest.approx(shift.nss, rel=1e-8), pytest.approx(shift.mirsky))
    values = torch.linalg.svdvals(w.double())
    moved = nulls.isotropic_shift(values, *w.shape, len(values), float((t.float() - w.float()).norm()))
    assert row["nss_isotropic"] == pytest.approx(float(moved.norm() / values.norm()), rel=1e-6)
    assert row["nss_k_isotropic"] == pytest.approx(float(moved[:5].norm() / values[:5].norm()), rel=1e-6)
    assert row["nss_isotropic"] == pytest.approx(shift.isotropic, rel=0.05), "to first order"
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


def test_nulls_and_bounds_against_a_direct_computation(pair, tmp_path) -> None:
    base, runs, paths = pair
    out = tmp_path / "out"
    assert offprin(*paths, "--out", out, *ALL) == 0
    row = next(row for row in table(out) if row["name"] == NAME and row["run"] == "one")
    w, t = base[NAME], runs[0][NAME]
    update = t.double() - w.double()
    before, after, own = (torch.linalg.svdvals(x.double()) for x in (w, t, update))
    norm, largest = float(update.norm()), float(own[0])
    assert row["update_spectral_norm"] == pytest.approx(largest, rel=1e-5)
    assert row["update_top_energy"] == pytest.approx(float((own[:5] ** 2).sum()) / norm**2, rel=1e-5)
    assert row["stable_rank_update"] == pytest.approx((norm / largest) ** 2, rel=1e-4)
    for side, values in (("base", before), ("tuned", after)):
        assert row[f"stable_rank_{side}"] == pytest.approx(float((values**2).sum() / values[0] ** 2), rel=1e-6)
    assert row["ky_fan"] == pytest.approx(5 * largest, rel=1e-5)
    assert row["ky_fan_shift"] == pytest.approx(abs(float((after - before)[:5].sum())), abs=1e-5 * float(before[0]))
    assert row["nss"] <= row["nss_mirsky"] and row["largest_shift"] <= row["update_spectral_norm"]
    assert row["ky_fan_shift"] <= row["ky_fan"]
    # energies against the exact law of isotropic shares, masks against margins and isotropic updates
    factors = topk_svd(w, 5, tol_degrees=0.0125)
    exponents = torch.bincount(((w.view(torch.int16).int() >> 7) & 0xFF).flatten(), minlength=256).numpy()
    rounded = nulls.rounded_energy_nulls(w, factors.U, factors.Vh, nulls.isotropic_sigma(exponents, norm))
    for side in nulls.SIDES:
        assert row[f"energy_{side}_isotropic"] == nulls.energy_null(*w.shape, 5, side).mean
        assert row[f"energy_{side}_rounded"] == pytest.approx(rounded[side].mean, rel=1e-5)
        assert row[f"energy_{side}_z"] == pytest.approx(rounded[side].z_score(row[f"energy_{side}"]), abs=1e-3)
    changed = update_mask(w, t).to_dense()
    low = masks.low_magnitude_mask(w, 0.3).to_dense()
    margin = nulls.margin_null(low.sum(1), low.sum(0), changed.sum(1), changed.sum(0))
    assert row["low_expected_margin"] == pytest.approx(margin.intersection)
    exponent = ((w.view(torch.int16).int() >> 7) & 0xFF).flatten()
    counts = torch.bincount(exponent, minlength=256).numpy()
    inside = nulls.isotropic_inside(counts, torch.bincount(exponent[low.flatten()], minlength=256).numpy(), norm)
    assert row["low_expected_isotropic"] == pytest.approx(inside.overlap * row["changed"], rel=1e-6)
    tensor = next(
        r for r in pq.read_table(out / "tensors.parquet").to_pylist() if r["name"] == NAME and r["run"] == "one"
    )
    assert tensor["changed_isotropic"] == pytest.approx(inside.changed, rel=1e-6)
    excess = (row["low_changed"] - row["low_expected_exponent"]) / row["changed"]
    assert row["low_excess"] == pytest.approx(excess)
    assert row["low_z_exponent"] == pytest.approx(excess * row["changed"] / math.sqrt(row["low_variance_exponent"]))


def test_curves_are_the_angles_and_values(pair, tmp_path) -> None:
    base, _, paths = pair
    out = tmp_path / "out"
    assert offprin(*paths, "--out", out, *ALL) == 0
    curves = pq.read_table(out / "curves.parquet").to_pylist()
    rows = {(row["run"], row["name"]): row for row in table(out)}
    assert {(row["run"], row["name"]) for row in curves} == set(rows) and len(curves) == len(rows)
    for curve in curves:
        row = rows[curve["run"], curve["name"]]
        assert all(len(curve[column]) == 5 for column in CURVES)
        assert curve["left"][0] == row["left_degrees"] and curve["right_isotropic"][0] == row["right_degrees_isotropic"]
        truth = torch.linalg.svdvals(base[curve["name"]].double())[:5]
        assert curve["values_base"] == pytest.approx(truth.tolist(), rel=1e-5)
    pairs = pq.read_table(out / "pairs.parquet").to_pylist()
    assert all(0 <= row["jaccard_isotropic"] <= 1 for row in pairs)


@pytest.mark.filterwarnings("error")
def test_a_base_compared_with_itself(pair, tmp_path, capsys) -> None:
    base = pair[2][0]
    assert offprin(base, base, base, "--out", tmp_path / "out", *ALL) == 0
    for row in table(tmp_path / "out"):
        assert row["left_degrees"] is None and row["right_degrees"] is None and row["changed"] == 0
        assert row["nss"] == row["nss_mirsky"] == row["ky_fan"] == row["ky_fan_shift"] == 0
        assert row["low_changed"] == row["low_expected_exponent"] == row["low_z_exponent"] == 0
        assert row["left_degrees_isotropic"] == 0 and row["energy_both"] is None
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["runs"][0]["all"]["sparsity"] == 1 and summary["pairs"][0]["pooled"]["jaccard"] == 1
    assert "complete" in capsys.readouterr().out


def test_k_beyond_a_matrix_and_tensors_without_geometry(pair, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert offprin(*pair[2], "--out", out, "--metrics", "update,spectrum,masks,energy", "--k", "1000") == 0
    assert {(row["k"], row["columns"]) for row in table(out)} == {(40, 40), (40, 130)}
    assert "3 tensors skipped: no linear layer" in capsys.readouterr().out
    skipped = json.loads((out / "summary.json").read_text())["geometry"][0]["skipped"]["names"]
    assert sorted(skipped) == sorted(name for name in pair[0] if "proj" not in name)


def test_layers_and_kinds_are_rolled_up(pair, tmp_path) -> None:
    out = tmp_path / "out"
    assert offprin(*pair[2], "--out", out, *ALL) == 0
    found = json.loads((out / "summary.json").read_text())["geometry"][0]
    assert set(found["by_layer"]) == {"0", "1"}
    for groups in (found["by_layer"], found["by_kind"]):
        assert sum(group["matrices"] for group in groups.values()) == found["all"]["matrices"] == 4
    assert found["all"]["bounds"]["mirsky"]["exceeded"] == 0 and found["all"]["bounds"]["weyl"]["matrices"] == 4


def test_every_tensor_is_read_once(pair, tmp_path, monkeypatch) -> None:
    from offprin_kernels.checkpoint import Checkpoint

    seen = []
    real = Checkpoint.read

    def read(self, name, start_row=0, stop_row=None, **options):
        seen.append((str(self.root), name, start_row))
        return real(self, name, start_row, stop_row, **options)

    monkeypatch.setattr(Checkpoint, "read", read)
    assert offprin(*pair[2], "--out", tmp_path / "out", *ALL) == 0
    # pairing looks at embedding and head, to see whether they are tied
    seen = [entry for entry in seen if "proj" in entry[1]]
    assert len(seen) == len(set(seen)) == 3 * sum("proj" in name for name in pair[0])


def test_experts_are_factorised_in_batches(tmp_path, monkeypatch) -> None:
    """As on a GPU; one of them broken, and a run without update among them."""
    from offprin_kernels.analysis import measure, spectral

    shapes = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": (48, 32) for i in range(9)}
    base = {name: weights(shape, torch.bfloat16, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    after = tuned_weights(base, 1)
    broken = "model.layers.0.mlp.experts.4.up_proj.weight"
    after[broken][0, 0] = math.nan
    paths = [save(tmp_path / name, tensors) for name, tensors in (("base", base), ("after", after), ("same", base))]
    assert offprin(*paths, "--out", tmp_path / "alone", *ALL) == 0
    batches = []
    real = spectral.topk_svd

    def counted(weight, *arguments, **options):
        batches.append(weight.shape)
        return real(weight, *arguments, **options)

    monkeypatch.setattr(spectral, "topk_svd", counted)
    monkeypatch.setattr(measure, "BATCHING", ("cpu",))
    assert offprin(*paths, "--out", tmp_path / "together", *ALL) == 0
    assert batches == [(8, 48, 32)] * 3
    one, two = (table(tmp_path / out) for out in ("alone", "together"))
    assert len(one) == len(two) == 18
    for a, b in zip(one, two, strict=True):
        for key, value in a.items():
            close = pytest.approx(b[key], rel=1e-3, abs=1e-9) if isinstance(value, float) else b[key]
            assert (
                key in ("resolution_degrees", "base_error_degrees", "gap", "method", "wedin_degrees") or value == close
            )


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
    from offprin_kernels.analysis.spectral import Geometry

    calls = []
    real = Geometry.rows

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(Geometry, "rows", interrupted)
    assert offprin(*pair[2], "--out", cut, *ALL) == 3
    monkeypatch.setattr(Geometry, "rows", real)
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


def test_top_of_the_spectrum_alone(pair, tmp_path, capsys) -> None:
    """--nss top: what the whole spectrum says is left out, all else is there, nulls within a few per cent."""
    base, runs, paths = pair
    metrics = ("--metrics", "spectrum", "--k", "5")
    assert offprin(*paths, "--out", tmp_path / "full", *metrics) == 0
    capsys.readouterr()
    assert offprin(*paths, "--out", tmp_path / "top", *metrics, "--nss", "top") == 0
    assert "NSS, top k" in capsys.readouterr().out
    for full, top in zip(table(tmp_path / "full"), table(tmp_path / "top"), strict=True):
        assert [top[name] for name in ("nss", "nss_error", "nss_mirsky", "nss_isotropic")] == [None] * 4
        w, t = base[top["name"]].double(), runs[("one", "two").index(top["run"])][top["name"]].double()
        before, after = torch.linalg.svdvals(w)[:5], torch.linalg.svdvals(t)[:5]
        truth = float((after - before).norm() / before.norm())
        for row in (full, top):
            assert abs(row["nss_k"] - truth) <= row["nss_k_error"] < 1e-5
            assert row["nss_k"] <= row["nss_k_mirsky"] == pytest.approx(float((t - w).norm() / before.norm()), rel=1e-6)
            assert row["left_degrees"] == pytest.approx(full["left_degrees"], abs=0.1)
            assert row["left_degrees_isotropic"] == pytest.approx(full["left_degrees_isotropic"], rel=0.1)
            for name, weight in (("base", w), ("tuned", t)):
                truth_rank = float(weight.norm() ** 2 / torch.linalg.matrix_norm(weight, 2) ** 2)
                assert row[f"stable_rank_{name}"] == pytest.approx(truth_rank, rel=1e-5)
    found = json.loads((tmp_path / "top" / "summary.json").read_text())["geometry"][0]["all"]
    assert found["nss"] is None and found["nss_k"] > 0 and found["bounds"]["mirsky"]["matrices"] == 0
    assert found["bounds"]["mirsky_k"]["exceeded"] == 0


def test_nss_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="full, top"):
        plan.Options((Rule.parse("bitwise"),), nss="some")


def isotropic_pair(tmp_path, spread: float, relative: float, count: int = 6) -> tuple:
    """A base whose rows differ in size, and the base plus Gaussian noise, rounded."""
    generator = torch.Generator().manual_seed(7)
    base, tuned = {}, {}
    for layer in range(count):
        scale = 0.02 * torch.exp(spread * torch.randn(192, 1, generator=generator))
        weight = (scale * torch.randn(192, 128, generator=generator)).bfloat16()
        noise = torch.randn(192, 128, generator=generator)
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        base[name] = weight
        tuned[name] = (
            weight.float() + noise * (relative * float(weight.float().norm()) / float(noise.norm()))
        ).bfloat16()
    return save(tmp_path / "base", base), save(tmp_path / "tuned", tuned)


@pytest.mark.parametrize("relative", [4e-4, 3e-3, 0.1])
def test_an_isotropic_update_is_no_finding(tmp_path, relative) -> None:
    """Gaussian noise, rounded: energies, angles, shifts lie where their nulls say, also where rows differ in size."""
    pair = isotropic_pair(tmp_path, 0.6, relative)
    assert offprin(*pair, "--out", tmp_path / "out", "--metrics", "spectrum,masks,energy", "--k", "12") == 0
    rows = table(tmp_path / "out")
    for side in nulls.SIDES:
        z = [row[f"energy_{side}_z"] for row in rows]
        assert abs(sum(z)) / len(z) ** 0.5 < 3.5
    if relative == 4e-4:
        # k / m would be many standard deviations away
        assert all(row["energy_left"] < 0.95 * row["energy_left_isotropic"] for row in rows)
    ratio = [row["nss"] / row["nss_isotropic"] for row in rows]
    assert 0.9 < sum(ratio) / len(ratio) < 1.1
    if relative < 0.1:
        inside = [
            row["left_degrees_isotropic_low"] <= row["left_degrees"] <= row["left_degrees_isotropic_high"]
            for row in rows
        ]
        assert sum(inside) >= 1
        assert len({row["left_degrees_isotropic"] for row in rows}) == len(rows), "draws of their own"
    seen, expected = (sum(row[f"low_{what}"] for row in rows) for what in ("changed", "expected_isotropic"))
    assert seen == pytest.approx(expected, rel=0.02)


def test_nulls_that_do_not_apply_are_left_out(tmp_path, capsys) -> None:
    """NaN, weights that were not bf16, rules that ask for more than a change: no isotropic null, and no 0 for it."""
    paths = isotropic_pair(tmp_path, 0.0, 3e-3)
    from safetensors.torch import load_file

    tuned = {name: t for file in (tmp_path / "tuned").glob("*.safetensors") for name, t in load_file(file).items()}
    broken = "model.layers.0.mlp.up_proj.weight"
    cast = "model.layers.1.mlp.up_proj.weight"
    tuned[broken][0, 0] = math.nan
    tuned[cast] = tuned[cast].float()
    other = save(tmp_path / "other", tuned)
    metrics = ("--metrics", "masks,energy", "--k", "12")
    assert offprin(paths[0], other, paths[1], "--out", tmp_path / "out", *metrics) == 0
    rows = {(row["run"], row["name"]): row for row in pq.read_table(tmp_path / "out" / "tensors.parquet").to_pylist()}
    for (run, name), row in rows.items():
        assert (row["changed_isotropic"] is None) == (run == "other" and name in (broken, cast))
    pairs = pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    assert sum(pair["jaccard_isotropic"] is None for pair in pairs) == 2
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    totals = summary["runs"][0]["all"]
    assert (totals["isotropic_tensors"], totals["tensors"]) == (4, 6)
    good = [row for (run, _), row in rows.items() if run == "other" and row["changed_isotropic"] is not None]
    assert totals["isotropic_observed"] == sum(row["changed"] for row in good)
    assert totals["changed_isotropic"] == pytest.approx(sum(row["changed_isotropic"] for row in good))
    assert "not known of 2 of 6 tensors" in capsys.readouterr().out
    cast_row = next(row for row in table(tmp_path / "out") if row["run"] == "other" and row["name"] == cast)
    assert cast_row["energy_left_z"] is None and cast_row["energy_left_rounded"] is None
    assert cast_row["energy_left"] > 0 and cast_row["low_expected_isotropic"] is None
    rule = ("--rule", "atol", "--threshold", "1e-4", "--also")
    assert offprin(*paths, "--out", tmp_path / "atol", *metrics, *rule) == 0
    rows = pq.read_table(tmp_path / "atol" / "tensors.parquet").to_pylist()
    assert all(row["changed_isotropic"] is None for row in rows)
    assert "isotropic update" not in capsys.readouterr().out


def test_zero_base_tiny_updates_and_doubled_weights(tmp_path, capsys) -> None:
    """Bounds hold, or are said to say nothing; a matrix of zeros spoils no median."""
    generator = torch.Generator().manual_seed(0)
    base = {
        f"model.layers.{i}.mlp.up_proj.weight": torch.randn(96, 64, generator=generator).bfloat16() for i in range(4)
    }
    names = list(base)
    base[names[0]] = torch.zeros(96, 64).bfloat16()
    tuned = {name: weight.clone() for name, weight in base.items()}
    small = base[names[1]].abs().flatten().argmin()
    flat = tuned[names[1]].flatten()
    flat[small] *= 1 + 2**-7
    tuned[names[1]] = flat.reshape(96, 64)
    tuned[names[2]] = 2 * base[names[2]]
    paths = [save(tmp_path / name, weights) for name, weights in (("base", base), ("tuned", tuned))]
    for option in ("full", "top"):
        out = tmp_path / option
        arguments = ("--metrics", "spectrum,energy", "--k", "8", "--nss", option)
        assert offprin(*paths, "--out", out, *arguments) == 0
        found = json.loads((out / "summary.json").read_text())["geometry"][0]["all"]
        assert all(bound["exceeded"] == 0 for bound in found["bounds"].values())
        shown = "nss" if option == "full" else "nss_k"
        assert found[shown] is not None and found["resolution_degrees"] <= 90
    again = tmp_path / "same"
    assert offprin(paths[0], paths[0], "--out", again, "--metrics", "spectrum", "--k", "8") == 0
    found = json.loads((again / "summary.json").read_text())["geometry"][0]["all"]
    assert found["nss"] == found["nss_mirsky"] == found["nss_isotropic"] == 0


def test_medians_of_angles_below_resolution() -> None:
    from offprin_kernels.analysis.geometry_summary import resolved_median
    from offprin_kernels.analysis.spectral import middle

    nan = math.nan
    assert middle(torch.tensor([3.0, 2.0, nan])) == 2.0 and middle(torch.tensor([3.0, nan, nan])) is None
    assert middle(torch.tensor([5.0, 4.0, 3.0, nan])) == 3.0
    rows = [{"a": angle} for angle in (None, 8.0)]
    assert resolved_median(rows, "a") == 4.0
    assert resolved_median([*rows, {"a": None}], "a") is None
    assert resolved_median([*rows, {"a": 6.0}], "a") == 6.0


def test_reasons_are_told_where_no_matrix_is_left(tmp_path, capsys) -> None:
    weights = {
        "model.embed_tokens.weight": torch.ones(32, 16).bfloat16(),
        "model.norm.weight": torch.ones(16).bfloat16(),
    }
    path = save(tmp_path / "a", weights)
    assert offprin(path, path, "--out", tmp_path / "out", "--metrics", "spectrum,masks,energy", "--k", "4") == 0
    text = capsys.readouterr().out
    assert "geometry of 0 linear layers" in text and "2 tensors skipped: no linear layer" in text
