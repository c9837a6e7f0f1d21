"""Columns of the parquet tables and their types.

``tensors.parquet`` has, besides the columns below, ``changed_<rule>`` (on bf16 values) and ``changed_uncast_<rule>``
(on the stored values; null where they are bf16) for every rule asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NORM_COLUMNS = ("base_norm", "update_norm", "relative_update", "base_dot_update", "update_max")

# Of geometry.parquet; null where the metric was not asked for, or the note says why not.
SPECTRUM_COLUMNS = """
    left_degrees right_degrees left_median_degrees right_median_degrees left_mean_degrees
    right_mean_degrees resolution_degrees converged base_error_degrees
    method wedin_degrees gap nss nss_error nss_mirsky nss_isotropic nss_k nss_k_error nss_k_mirsky nss_k_isotropic
    largest_shift shift_error update_spectral_norm
    ky_fan ky_fan_shift ky_fan_error
    left_degrees_isotropic left_degrees_isotropic_low left_degrees_isotropic_high
    right_degrees_isotropic right_degrees_isotropic_low right_degrees_isotropic_high
    stable_rank_base stable_rank_tuned stable_rank_update update_top_energy
""".split()


class Shift(NamedTuple):
    """Columns of a spectral shift: what was seen, its error, null and bound; and its name."""

    observed: str
    error: str
    isotropic: str
    mirsky: str
    title: str


# by option nss; null in the columns of the full spectrum where only the top k were computed
SHIFTS = {
    "full": Shift("nss", "nss_error", "nss_isotropic", "nss_mirsky", "NSS"),
    "top": Shift("nss_k", "nss_k_error", "nss_k_isotropic", "nss_k_mirsky", "NSS, top k"),
}
ENERGY_COLUMNS = [
    f"energy_{side}{what}" for side in ("left", "right", "both") for what in ("", "_isotropic", "_rounded", "_z")
]  # fmt: skip
WEIGHT_MASKS = ("principal", "low", "safe")
# null models of an overlap: uniform (Bernoulli), by exponent of W0, by row and column densities, isotropic update
NULLS = ("uniform", "exponent", "margin", "isotropic")
OVERLAP_COLUMNS = (
    "size", "changed", *(f"expected_{null}" for null in NULLS),
    "variance_uniform", "variance_exponent", "excess", "z_uniform", "z_exponent",
)  # fmt: skip

GEOMETRY_KEYS = "run name layer kind rows columns k alpha note".split()
GEOMETRY_COLUMNS = {
    "spectrum": SPECTRUM_COLUMNS,
    "masks": ["changed", *(f"{kind}_{what}" for kind in WEIGHT_MASKS for what in OVERLAP_COLUMNS)],
    "energy": ENERGY_COLUMNS,
}

TEXT = frozenset("""run run_a run_b name tuned_name kind base_dtype tuned_dtype status note rule axis method""".split())
FLOAT = frozenset(
    [
        *NORM_COLUMNS,
        *(f"uncast_{name}" for name in NORM_COLUMNS),
        "sparsity",
        "row_dispersion",
        "column_dispersion",
        "jaccard",
        "jaccard_bernoulli",
        "jaccard_exponent",
        "excess_over_exponent",
        "lift",
        "z_bernoulli",
        "z_exponent",
        "intersection_exponent",
        "intersection_exponent_variance",
        "jaccard_margin",
        "intersection_margin",
        "union_margin",
        "jaccard_isotropic",
        "intersection_isotropic",
        "union_isotropic",
        "changed_isotropic",
        *(name for name in SPECTRUM_COLUMNS if name not in ("converged", "method")),
        *ENERGY_COLUMNS,
        "resolution_degrees",
        "alpha",
        *(f"{kind}_{what}" for kind in WEIGHT_MASKS for what in OVERLAP_COLUMNS[2:]),
    ]
)
BOOL = frozenset(["linear", "flagged_nonfinite", "converged"])
LIST = frozenset(["shape", "ulp_histogram", "exponent_all", "exponent_changed", "coordinates", "counts"])
CURVES = (
    *(
        f"{side}{what}"
        for side in ("left", "right")
        for what in ("", "_isotropic", "_isotropic_low", "_isotropic_high")
    ),
    "values_base",
    "values_tuned",
)
FLOAT_LIST = frozenset(["expected_uniform", "expected_exponent", *CURVES])

# Columns of tables that may be empty, in order; those of ``tensors`` come from its rows.
COLUMNS = {
    "pairs": """
        run_a run_b name layer kind linear total changed_a changed_b intersection union jaccard lift jaccard_bernoulli
        jaccard_exponent jaccard_margin excess_over_exponent z_bernoulli z_exponent intersection_exponent
        intersection_exponent_variance intersection_margin union_margin jaccard_isotropic intersection_isotropic
        union_isotropic
    """.split(),
    "consensus": "name layer kind runs total coordinates expected_uniform expected_exponent".split(),
    "stripes": "run name axis length counts".split(),
    "geometry": [*GEOMETRY_KEYS, *(column for columns in GEOMETRY_COLUMNS.values() for column in columns)],
    # one row per matrix and run: all k principal angles (null below resolution), those of an isotropic update of the
    # same norm, and the top k singular values
    "curves": ["run", "name", "layer", "kind", "k", "resolution_degrees", *CURVES],
}


def is_list(name: str) -> bool:
    return name in LIST or name in FLOAT_LIST


def arrow_schema(names: list[str]):
    """Arrow schema by column name, so that an all-null column has the same type in every run."""
    import pyarrow as pa

    def kind(name: str):
        if name in TEXT:
            return pa.string()
        if name in BOOL:
            return pa.bool_()
        if name in LIST:
            return pa.list_(pa.int64())
        if name in FLOAT_LIST:
            return pa.list_(pa.float64())
        return pa.float64() if name in FLOAT else pa.int64()

    return pa.schema([(name, kind(name)) for name in names])


def numpy_dtype(name: str) -> type:
    """dtype of a scalar column in numpy: missing floats become NaN, other columns with gaps stay objects."""
    if name in FLOAT:
        return np.float64
    if name in BOOL:
        return np.bool_
    return object if name in TEXT or name == "layer" or "uncast" in name else np.int64
