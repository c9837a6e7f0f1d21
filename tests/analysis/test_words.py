"""What a report says in words and draws beside: no more than nulls, resolution and bounds allow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from offprin_kernels.analysis.charts import charts
from offprin_kernels.analysis.charts.agreement import jaccards
from offprin_kernels.analysis.charts.energy import ROUNDED
from offprin_kernels.analysis.charts.model import Chart
from offprin_kernels.analysis.charts.sparsity import linear, shares
from offprin_kernels.analysis.html import finding
from offprin_kernels.analysis.html import words as in_words
from offprin_kernels.analysis.tables import Tables

from . import synthetic


def said(tables: Tables) -> tuple[str, dict[str, dict[str, finding.Finding]]]:
    short, found = in_words.summary(tables)
    return " ".join(short), {run: {f.topic: f for f in findings} for run, findings in found.items()}


def changed_rows(root: Path, table: str, **columns) -> Path:
    """The table with these columns replaced, or left out where the value is None."""
    import pyarrow.parquet as pq

    rows = pq.read_table(root / f"{table}.parquet").to_pylist()
    for row in rows:
        for name, value in columns.items():
            if value is None:
                del row[name]
            else:
                row[name] = value(row)
    synthetic.table(root, table, rows)
    return root


@pytest.fixture
def small(tmp_path):
    return synthetic.write(tmp_path / "small", layers=2, runs=("dapo", "grpo"))


def test_words_of_clear_differences(small) -> None:
    short, found = said(Tables(small))
    verdicts = {topic: one.verdict for topic, one in found["dapo"].items()}
    assert verdicts[finding.ISOTROPIC] == "fewer" and verdicts[finding.ENERGY] == "more than isotropic"
    assert verdicts[finding.ANGLES] == "smaller" and verdicts[finding.SPECTRUM] == "larger"
    assert "fewer (both runs)" in short and "beyond what the exponents of the base bring" in short


def test_no_claim_without_a_null(small) -> None:
    changed_rows(small, "tensors", changed_isotropic=None)
    changed_rows(small, "geometry", energy_both_rounded=None, left_degrees_isotropic=None, right_degrees_isotropic=None)
    _, found = said(Tables(small))
    texts = {topic: one.text for topic, one in found["dapo"].items()}
    assert "was not measured" in texts[finding.ISOTROPIC] and "no verdict" in texts[finding.ENERGY]
    assert "neither large nor small" in texts[finding.ANGLES]


def test_no_claim_below_resolution(small) -> None:
    none = dict.fromkeys(("left_degrees", "right_degrees"), lambda row: float("nan"))
    null = dict.fromkeys((f"{side}_degrees_isotropic" for side in ("left", "right")), lambda row: 0.01)
    changed_rows(small, "geometry", **none, **null, nss_error=lambda row: 1.0)
    _, found = said(Tables(small))
    assert found["dapo"][finding.ANGLES].verdict == "below resolution, as is the null"
    assert found["dapo"][finding.SPECTRUM].verdict == "below its error"


def test_agreement_that_isotropic_updates_have_too(small) -> None:
    for name in ("intersection", "union"):
        changed_rows(small, "pairs", **{f"{name}_isotropic": lambda row, name=name: float(row[name])})
    short, _ = said(Tables(small))
    assert "But it is not above what isotropic updates of the same norms have in that pair." in short
    changed_rows(small, "pairs", intersection_isotropic=None)
    assert "was not measured" in said(Tables(small))[0]


def test_small_z_is_called_small(small) -> None:
    changed_rows(small, "pairs", intersection=lambda row: round(row["intersection_exponent"]))
    changed_rows(small, "geometry", principal_changed=lambda row: round(row["principal_expected_exponent"]))
    changed_rows(small, "tensors", changed_isotropic=lambda row: float(row["changed"]))
    short, found = said(Tables(small))
    assert "z is small" in found["dapo"][finding.PRINCIPAL].text
    assert found["dapo"][finding.ISOTROPIC].verdict == "about as many"
    assert "no difference that the null can resolve (z below 3 or less than 0.005 apart)" in short


def of(root: Path, topic: str, run: str = "dapo") -> finding.Finding:
    return said(Tables(root))[1][run][topic]


def drawn(root: Path, key: str) -> Chart:
    (found,) = (chart for chart in charts(Tables(root)) if chart.key == key)
    return found


# ---- energies


def test_energy_is_held_against_the_rounded_null(small) -> None:
    """Rounding moves an isotropic update's share: one that is at the rounded null is no finding, far as k/m may be."""
    changed_rows(small, "geometry", energy_both_rounded=lambda row: 1.003 * row["energy_both"])
    assert of(small, finding.ENERGY).verdict == finding.UNRESOLVED
    changed_rows(small, "geometry", energy_both_rounded=lambda row: 1.3 * row["energy_both"],
                 energy_both_z=lambda row: -9.0)  # fmt: skip
    assert of(small, finding.ENERGY).verdict == "less than isotropic"
    chart = drawn(small, "energy")
    (ticks,) = (series for series in chart.panels[2].series if series.name == ROUNDED)
    points = {x: y for s in chart.panels[2].series if s.marks == "points" for x, y in zip(s.x, s.y, strict=True)}
    assert ticks.marks == "ticks" and len(ticks.y) == len(points)
    for x, y in zip(ticks.x, ticks.y, strict=True):
        assert y == pytest.approx(1.3 * points[x], rel=0.1)


def test_energy_without_the_rounded_null(small) -> None:
    changed_rows(
        small, "geometry", **{f"energy_{side}_rounded": lambda row: None for side in ("left", "right", "both")}
    )
    assert of(small, finding.ENERGY).verdict == "no rounded null, so no verdict"
    chart = drawn(small, "energy")
    assert ROUNDED not in chart.legend and "no share is large or small" in chart.caption


# ---- angles


def angles_of(root: Path, seen, low: float = 0.9, high: float = 1.1, null: float = 1.0) -> finding.Finding:
    """The verdict where ``seen`` is what each row observes, as a share of the median draw."""
    columns = {}
    for side in ("left", "right"):
        columns[f"{side}_degrees"] = seen
        for end, value in (("", null), ("_low", low * null), ("_high", high * null)):
            columns[f"{side}_degrees_isotropic{end}"] = lambda row, value=value: value
    changed_rows(root, "geometry", **columns)
    return of(root, finding.ANGLES)


def test_angles_by_their_rank_among_draws(small) -> None:
    far, near = angles_of(small, lambda row: 0.5), angles_of(small, lambda row: 0.95)
    assert far.verdict == "smaller" and "below all draws in 14, above all in 0, among them in 0" in far.text
    assert near.verdict == "slightly smaller, inside the scatter of most" and "among them in 14" in near.text
    assert angles_of(small, lambda row: 2.0).verdict == "larger"
    mixed = angles_of(small, lambda row: 1.5 if "q_proj" in row["name"] or "mlp" in row["name"] else 0.5)
    assert mixed.verdict == "no clear difference"


def test_no_verdict_where_the_null_does_not_hold(small) -> None:
    assert angles_of(small, lambda row: 9.0, null=12.0).verdict == "no verdict: updates too large for the null"
    assert angles_of(small, lambda row: 5.0, null=9.0).verdict == "smaller"


def test_an_unresolved_angle_is_smaller_than_a_null_above_the_resolution(small) -> None:
    found = angles_of(small, lambda row: None)
    assert found.verdict == "smaller" and "below resolution" in found.text
    # those whose null is not resolved either are undecided, and both medians are of the rest
    found = angles_of(small, lambda row: None if "mlp" in row["name"] else 0.5)
    changed_rows(small, "geometry", **{f"{side}_degrees_isotropic": lambda row: 0.01 if "mlp" in row["name"] else 1.0
                                       for side in ("left", "right")})  # fmt: skip
    text = of(small, finding.ANGLES).text
    assert "over the 8 matrices that can be compared" in text and "6 matrices undecided" in text
    assert "gives about 1.00\N{DEGREE SIGN} where 0.50\N{DEGREE SIGN} is observed" in text


def test_bands_of_draws_are_drawn(small) -> None:
    for key in ("angles-by-layer", "angle-curves-layer-0"):
        chart = drawn(small, key)
        for panel in chart.panels:
            bands = [series for series in panel.series if series.marks == "band"]
            assert len(bands) == 2
            assert all(low < high for band in bands for low, high in zip(band.y, band.top, strict=True))
        assert "from the smallest draw to the largest" in chart.caption
    none = {f"{side}_degrees_isotropic_{end}": None for side in ("left", "right") for end in ("low", "high")}
    changed_rows(small, "geometry", **none)
    assert "its scatter was not measured" in drawn(small, "angles-by-layer").caption
    assert of(small, finding.ANGLES).verdict == "smaller, its scatter not measured"


# ---- tensors without a null


def test_tensors_without_a_null_are_in_neither_sum(small) -> None:
    first = "model.layers.0.self_attn.q_proj.weight"

    def is_first(row: dict) -> bool:
        return row["name"] == first

    before = drawn(small, "sparsity-by-layer").rows
    changed_rows(
        small, "tensors", changed_isotropic=lambda row: None if is_first(row) else row["changed_isotropic"],
        flagged_nonfinite=is_first, changed=lambda row: row["total"] if is_first(row) else row["changed"],
    )  # fmt: skip
    frame = linear(Tables(small))
    observed, null = shares(frame.where(frame.numbers("layer") == 0))
    rest = [row for row in frame.rows() if row["layer"] == 0 and not is_first(row)]
    total = sum(row["total"] for row in rest)
    assert observed == pytest.approx(1 - sum(row["changed"] for row in rest) / total)
    assert null == pytest.approx(1 - sum(row["changed_isotropic"] for row in rest) / total)
    text = of(small, finding.ISOTROPIC).text
    assert "1 of 16 tensors left out: NaN or Inf" in text
    chart = drawn(small, "sparsity-by-layer")
    assert "2 of 28 tensors left out: NaN or Inf" in chart.caption
    assert abs(float(chart.rows[0][1][:-2]) - float(before[0][1][:-2])) < 1


def test_agreement_leaves_them_out_as_well(small) -> None:
    first = "model.layers.0.self_attn.q_proj.weight"
    names = ("intersection", "union")
    lost = {f"{name}_isotropic": lambda row, name=name: None if row["name"] == first else row[f"{name}_isotropic"]
            for name in names}  # fmt: skip
    changed_rows(small, "pairs", intersection=lambda row: 0 if row["name"] == first else row["intersection"], **lost)
    rows = Tables(small).pairs
    found = jaccards(rows)
    rest = [row for row in rows.rows() if row["name"] != first]
    both = sum(row["intersection"] for row in rest)
    assert found["observed"] == pytest.approx(both / (sum(row["changed_a"] + row["changed_b"] for row in rest) - both))
    top, bottom = (sum(row[f"{name}_isotropic"] for row in rest) for name in names)
    assert found["isotropic"] == pytest.approx(top / bottom)
    assert "1 of 16 pairs of tensors are left out" in drawn(small, "jaccard-pairs").caption


def test_no_null_at_all(small) -> None:
    changed_rows(small, "tensors", changed_isotropic=lambda row: None, status=lambda row: "cast")
    found = of(small, finding.ISOTROPIC)
    assert found.verdict == "no null for these tensors" and "not stored in bf16" in found.text
    assert np.isfinite(shares(linear(Tables(small)))[0]) and np.isnan(shares(linear(Tables(small)))[1])


# ---- differences too small to be called one


def test_spectra_within_the_nulls_accuracy(small) -> None:
    changed_rows(small, "geometry", nss_isotropic=lambda row: row["nss"] / 1.04)
    assert of(small, finding.SPECTRUM).verdict == finding.UNRESOLVED
    changed_rows(small, "geometry", nss_isotropic=lambda row: row["nss"] / 1.07)
    assert of(small, finding.SPECTRUM).verdict == "larger"


def test_card_and_caption_have_one_ratio(small) -> None:
    changed_rows(
        small, "geometry", nss_isotropic=lambda row: row["nss"] / (1.2 + (row["layer"] + len(row["kind"])) % 5)
    )
    ratio = of(small, finding.SPECTRUM).text.split(" times")[0].rsplit(" ", 1)[1]
    assert f"dapo 5.50e-05, {ratio} times that of an isotropic update" in drawn(small, "nss-by-layer").says


def test_a_large_z_of_a_small_difference_is_no_finding(small) -> None:
    """Masks of millions of weights make any difference many standard deviations."""
    changed_rows(small, "pairs", intersection=lambda row: round(1.004 * row["intersection_exponent"]))
    short, found = said(Tables(small))
    assert "no difference that the null can resolve" in short and "beyond what" not in short
    assert found["dapo"][finding.PRINCIPAL].verdict == finding.UNRESOLVED
    changed_rows(small, "geometry", principal_changed=lambda row: round(1.02 * row["principal_expected_exponent"]))
    assert of(small, finding.PRINCIPAL).verdict.startswith("more, by ")


# ---- charts


def test_stripes_are_named_only_beyond_chance(small) -> None:
    assert "are the most striped" in drawn(small, "stripes-layer-0").says
    rng = np.random.default_rng(1)
    changed_rows(small, "stripes", counts=lambda row: rng.binomial(row["length"], 0.2, len(row["counts"])).tolist())
    says = drawn(small, "stripes-layer-0").says
    assert "most striped" not in says and "no stripes are to be told from chance" in says


def test_axes_have_titles_and_nulls_of_equal_value_do_not_hide_each_other(small) -> None:
    for key in ("angle-curves-layer-0", "spectra-layer-0", "stripes-layer-0"):
        assert all(panel.x_title for panel in drawn(small, key).panels)
    series = [one for one in drawn(small, "jaccard-pairs").panels[0].series if one.name.startswith("if")]
    assert len({place for one in series for place in one.y}) == len(series) == 4
