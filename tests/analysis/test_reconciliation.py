"""Definitions of sparsity and rotation against counts made here, and against the published ranges."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from offprin_kernels.analysis import published
from offprin_kernels.analysis.bounds import beside
from offprin_kernels.analysis.html import published as of_page
from offprin_kernels.analysis.reconciliation import ALL, LINEAR, reconcile, render
from offprin_kernels.analysis.tables import Tables

from . import synthetic
from .checkpoints import base_weights, offprin, save, tuned_weights

METRICS = ("--metrics", "spectrum,energy", "--k", "5", "--also", "eta:1e-3", "atol:1e-5")


def rows_of(root, run: str) -> dict:
    return {(row.definition, row.scope): row for row in reconcile(Tables(root)) if row.run == run}


@pytest.fixture
def big(tmp_path):
    return synthetic.write(tmp_path / "big", layers=3)


def test_counts_against_the_weights(pair, tmp_path) -> None:
    base, runs, paths = pair
    assert offprin(*paths, "--out", tmp_path / "out", *METRICS) == 0
    found = rows_of(tmp_path / "out", "one")
    for scope, names in ((ALL, list(base)), (LINEAR, [name for name in base if "proj" in name])):
        kept = sum(int((base[name] == runs[0][name]).sum()) for name in names)
        total = sum(base[name].numel() for name in names)
        for definition in ("bitwise, bf16", "bitwise, as stored"):
            row = found[definition, scope]
            assert (row.numerator, row.denominator, row.tensors) == (kept, total, len(names))
            assert row.value == kept / total
        near = sum(int(((base[name].float() - runs[0][name].float()).abs() <= 1e-5).sum()) for name in names)
        assert found["atol 1e-5, bf16", scope].numerator == near
        assert found["atol 1e-8, bf16", scope].shown == "not counted: add --also atol:1e-8"
        assert found["atol 1e-8, bf16", scope].numerator is None


def test_uncast_values_are_counted_where_there_are_some(tmp_path) -> None:
    """In fp32 more weights differ than in bf16; tensors stored in bf16 count as they are."""
    base = base_weights(torch.float32)
    tuned = {name: weight * 1.0001 for name, weight in base.items()}
    paths = [save(tmp_path / "base", base), save(tmp_path / "one", tuned)]
    assert offprin(*paths, "--out", tmp_path / "out", "--also", "eta:1e-3", "atol:1e-8") == 0
    found = rows_of(tmp_path / "out", "one")
    cast, stored = found["bitwise, bf16", ALL], found["bitwise, as stored", ALL]
    assert stored.numerator == sum(int((base[name] == tuned[name]).sum()) for name in base) < cast.numerator
    assert found["eta 1e-3, as stored", ALL].value == 1.0 and not stored.note
    assert found["atol 1e-8, as stored", ALL].numerator is not None


def test_rotation_is_the_median_over_matrices(pair, tmp_path) -> None:
    assert offprin(*pair[2], "--out", tmp_path / "out", *METRICS) == 0
    tables = Tables(tmp_path / "out")
    found = rows_of(tmp_path / "out", "two")
    mine = tables.geometry.where(tables.geometry.texts("run") == "two")
    for definition, column in (("largest left angle", "left_degrees"), ("NSS, full spectrum", "nss")):
        row = found[definition, LINEAR]
        assert row.value == pytest.approx(np.median(mine.numbers(column))) and row.tensors == 4
    energy, norm = found["energy share, both sides", LINEAR], found["norm ratio, both sides", LINEAR]
    assert norm.value == pytest.approx(math.sqrt(energy.value))
    ratio, squared = found["norm ratio", LINEAR], found["energy ratio", LINEAR]
    assert squared.value == pytest.approx(ratio.value**2)


def test_what_is_below_resolution_is_no_number(big) -> None:
    row = rows_of(big, "dapo")["median left angle", LINEAR]
    assert row.value is None and row.shown == "below resolution (< 0.020°)" and row.inside_rlvr is None


def changed_geometry(root, **columns) -> None:
    import pyarrow.parquet as pq

    rows = [row | columns for row in pq.read_table(root / "geometry.parquet").to_pylist()]
    synthetic.table(root, "geometry", rows)


@pytest.mark.parametrize(("resolution", "rlvr", "sft"), [(0.02, True, False), (2.0, None, False), (20.0, None, None)])
def test_a_resolution_may_decide_a_range(big, resolution, rlvr, sft) -> None:
    """Below 0.02 degrees is below 0.5 as well; below 2 may be or not."""
    changed_geometry(big, left_degrees=None, left_median_degrees=None, resolution_degrees=resolution)
    found = rows_of(big, "dapo")
    row = found["largest left angle", LINEAR]
    assert row.value is None and (row.inside_rlvr, row.inside_sft) == (rlvr, sft)
    middle = found["median left angle", LINEAR]
    assert middle.rlvr is middle.sft is middle.inside_rlvr is None
    page = of_page.reconciliation(reconcile(Tables(big)))
    assert ('below resolution (&lt; 0.020\N{DEGREE SIGN})<br><span class="inside">inside RLVR' in page) == bool(rlvr)


def test_tensors_are_counted_by_run(big) -> None:
    import pyarrow.parquet as pq

    rows = pq.read_table(big / "geometry.parquet").to_pylist()
    synthetic.table(big, "geometry", rows[1:])
    page = of_page.reconciliation(reconcile(Tables(big)))
    assert "20 tensors</small></td>" in page and "21 tensors</small></td>" in page


def test_published_jaccard_indices_beside_those_observed(big) -> None:
    found = of_page.agreement(Tables(big))
    assert "Table 2" in found and "<td>0.5800</td><td>0.4130</td>" in found and "observed: all layers" in found
    assert published.JACCARD["o_proj"] == (0.552, 0.373) and found.count("<tr><td>") == 7


def test_published_ranges_and_flags(big) -> None:
    assert published.SPARSITY[0].text == "36.3 to 91.7 %" and published.SPARSITY[1].text == "0.6 to 18.8 %"
    assert published.NORM_RATIO[0].holds(0.069874 / 62.2631)
    dapo, sft = rows_of(big, "dapo"), rows_of(big, "sft")
    assert dapo["bitwise, bf16", ALL].inside_rlvr and not dapo["bitwise, bf16", ALL].inside_sft
    assert sft["bitwise, bf16", ALL].inside_sft and not sft["bitwise, bf16", ALL].inside_rlvr
    assert sft["largest left angle", LINEAR].inside_sft and not dapo["largest left angle", LINEAR].inside_rlvr
    assert sft["NSS, full spectrum", LINEAR].inside_sft and dapo["norm ratio", LINEAR].inside_rlvr
    assert dapo["atol 1e-5, bf16", ALL].inside_rlvr is None


def test_without_geometry(pair, tmp_path) -> None:
    assert offprin(*pair[2], "--out", tmp_path / "out", "--also") == 0
    text = render(reconcile(Tables(tmp_path / "out")))
    assert "not measured: add --metrics spectrum" in text and "not counted: add --also eta:1e-3" in text
    assert max(map(len, text.splitlines())) < 200
    assert not beside(Tables(tmp_path / "out"))


def test_bounds_hold_on_a_real_analysis(pair, tmp_path) -> None:
    assert offprin(*pair[2], "--out", tmp_path / "out", *METRICS) == 0
    found = {(b.run, b.bound.name): b for b in beside(Tables(tmp_path / "out"))}
    for run in ("one", "two"):
        for name in ("Mirsky", "Weyl"):
            bound = found[run, name]
            assert bound.matrices == 4 and bound.exceeded == 0 and bound.observed <= bound.allowed


def test_a_violated_bound_is_counted(big) -> None:
    import pyarrow.parquet as pq

    rows = pq.read_table(big / "geometry.parquet").to_pylist()
    rows[0]["largest_shift"] = 2 * rows[0]["update_spectral_norm"]
    synthetic.table(big, "geometry", rows)
    (weyl,) = [b for b in beside(Tables(big)) if b.run == rows[0]["run"] and b.bound.name == "Weyl"]
    assert weyl.exceeded == 1 and weyl.closest == pytest.approx(2)


def test_a_bound_of_90_degrees_says_nothing(big) -> None:
    changed_geometry(big, wedin_degrees=90.0)
    (wedin,) = [b for b in beside(Tables(big)) if b.run == "dapo" and b.bound.name == "Wedin"]
    assert (wedin.matrices, wedin.without) == (0, 21) and wedin.observed is None
    assert wedin.bound.formula == "largest angle <= asin(||D||_2 / (gap - ||D||_2))" and wedin.bound.unit == "degrees"


def test_records_are_json(big) -> None:
    from offprin_kernels.analysis.reconciliation import as_records

    records = json.loads(json.dumps(as_records(reconcile(Tables(big)))))
    assert {record["run"] for record in records} == set(synthetic.RUNS) and records[0]["shown"].endswith("%")


def test_tuned_weights_differ() -> None:
    """The fixture's own promise: without changes the counts above would prove nothing."""
    base = base_weights()
    assert any(not torch.equal(base[name], tuned) for name, tuned in tuned_weights(base, 1).items())
