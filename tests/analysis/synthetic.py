"""A directory as a finished analysis of large checkpoints leaves it, with made-up numbers and every column."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HIDDEN, HEADS, KV_HEADS, HEAD, MIDDLE = 1024, 16, 4, 64, 2816
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MIDDLE, HIDDEN),
    "mlp.up_proj": (MIDDLE, HIDDEN),
    "mlp.down_proj": (HIDDEN, MIDDLE),
}
K, ALPHA, RESOLUTION = 128, 0.5, 0.02
# name: (size of the update relative to the base, share of weights that change)
RUNS = {
    "dapo": (1.1e-3, 0.21),
    "grpo": (1.0e-3, 0.2),
    "rloo": (1.3e-3, 0.24),
    "ppo": (1.6e-3, 0.28),
    "sft": (2e-2, 0.93),
}
# as a sweep names them: long, and different in the middle
MANY = {
    f"org/qwen3-8b-grpo-lr1e-6-seed{i}-step320-of-a-sweep": (1e-3 * (1 + 0.05 * i), 0.2 + 0.01 * i) for i in range(14)
}
ALL_RUNS = RUNS | MANY


def write(root: Path, layers: int = 80, runs: tuple[str, ...] = tuple(RUNS), seed: int = 0) -> Path:
    """Tables and summary of 7 matrices in each layer, embedding and head."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    units = [
        (f"model.layers.{layer}.{module}.weight", layer, module.split(".")[1], shape, True)
        for layer in range(layers)
        for module, shape in SHAPES.items()
    ]
    units = [
        ("model.embed_tokens.weight", None, "embedding", (32000, HIDDEN), False),
        *units,
        ("lm_head.weight", None, "head", (32000, HIDDEN), False),
    ]
    tensors = [tensor(run, unit, rng) for unit in units for run in runs]
    table(root, "tensors", tensors)
    pairs = [pair(a, b, unit, rng) for unit in units for i, a in enumerate(runs) for b in runs[i + 1 :]]
    if pairs:
        table(root, "pairs", pairs)
    table(root, "stripes", [row for unit in units for run in runs for row in stripes(run, unit, rng)])
    geometry = [matrix(run, unit, rng) for unit in units if unit[4] for run in runs]
    table(root, "geometry", geometry)
    table(root, "curves", [curve(run, unit, rng) for unit in units if unit[4] for run in runs])
    (root / "summary.json").write_text(json.dumps(summary(tensors, pairs, runs, units)))
    return root


def table(root: Path, name: str, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), root / f"{name}.parquet", compression="zstd")


def place(unit: tuple) -> dict:
    name, layer, kind, shape, linear = unit
    return {"name": name, "layer": layer, "kind": kind, "linear": linear, "total": math.prod(shape)}


def tensor(run: str, unit: tuple, rng) -> dict:
    relative, share = ALL_RUNS[run]
    found, shape = place(unit), unit[3]
    wave = 0.02 * math.sin((unit[1] or 0) / 9)
    changed = round(found["total"] * min(0.98, share + wave + rng.normal(0, 0.004)))
    norm = math.sqrt(found["total"]) * 0.02
    return {
        "run": run, **found, "tuned_name": unit[0], "shape": list(shape), "rows": shape[0], "columns": shape[1],
        "base_dtype": "BF16", "tuned_dtype": "BF16", "status": "compared", "note": None, "rule": "bitwise",
        "changed": changed, "sparsity": 1 - changed / found["total"], "changed_bitwise": changed,
        "changed_uncast_bitwise": None, "changed_eta(0.001)": changed, "changed_uncast_eta(0.001)": None,
        "changed_atol(1e-05)": round(changed * 0.7), "changed_uncast_atol(1e-05)": None,
        "changed_isotropic": changed * (1.04 if run != "sft" else 1.01), "sign_flips": changed // 900,
        "flagged_nonfinite": False, "base_norm": norm, "update_norm": norm * relative, "relative_update": relative,
        "row_dispersion": 3.0 + rng.normal(0, 0.2), "column_dispersion": 6.0 + rng.normal(0, 0.2),
        "ulp_histogram": [0] * 34, "exponent_all": [0] * 256, "exponent_changed": [0] * 256,
    }  # fmt: skip


def pair(a: str, b: str, unit: tuple, rng) -> dict:
    found = place(unit)
    n, p, q = found["total"], ALL_RUNS[a][1], ALL_RUNS[b][1]
    changed_a, changed_b = round(n * p), round(n * q)
    uniform = n * p * q
    exponent = uniform + 0.55 * (min(changed_a, changed_b) - uniform)
    both = round(exponent * (1.02 + rng.normal(0, 0.002)))
    variance = exponent * 0.3

    def jaccard(x: float) -> float:
        return x / (changed_a + changed_b - x)

    return {
        "run_a": a, "run_b": b, **found, "changed_a": changed_a, "changed_b": changed_b, "intersection": both,
        "union": changed_a + changed_b - both, "jaccard": jaccard(both), "lift": both / uniform,
        "jaccard_bernoulli": jaccard(uniform), "jaccard_exponent": jaccard(exponent),
        "jaccard_margin": jaccard(1.05 * uniform), "jaccard_isotropic": jaccard(0.99 * exponent),
        "excess_over_exponent": jaccard(both) - jaccard(exponent), "z_bernoulli": 100.0,
        "z_exponent": (both - exponent) / math.sqrt(variance), "intersection_exponent": exponent,
        "intersection_exponent_variance": variance, "intersection_margin": 1.05 * uniform,
        "union_margin": changed_a + changed_b - 1.05 * uniform, "intersection_isotropic": 0.99 * exponent,
        "union_isotropic": changed_a + changed_b - 0.99 * exponent,
    }  # fmt: skip


def stripes(run: str, unit: tuple, rng) -> list[dict]:
    """Every fourth head, and a few columns that all runs share, change more than the rest."""
    rows, columns = unit[3]
    density = ALL_RUNS[run][1]
    by_head = np.where(np.arange(rows) // HEAD % 4 == 1, 1.06, 0.98)
    by_column = 1 + 0.15 * np.cos(np.arange(columns) / 37 + (unit[1] or 0)) ** 8
    found = []
    for axis, shape, length in (("row", by_head, columns), ("column", by_column, rows)):
        counts = rng.binomial(length, np.clip(density * shape / shape.mean(), 0, 0.99)).tolist()
        found.append({"run": run, "name": unit[0], "axis": axis, "length": length, "counts": counts})
    return found


def matrix(run: str, unit: tuple, rng) -> dict:
    relative, share = ALL_RUNS[run]
    rows, columns = unit[3]
    n, side, left = rows * columns, max(rows, columns), relative * 900 * math.exp(rng.normal(0, 0.1))
    spectral = relative * 1.2
    row: dict = {
        "run": run, "name": unit[0], "layer": unit[1], "kind": unit[2], "rows": rows, "columns": columns, "k": K,
        "alpha": ALPHA, "note": None, "left_degrees": min(80.0, left), "right_degrees": min(85.0, 1.1 * left),
        "left_median_degrees": None if relative < 2e-3 else left / 60, "right_median_degrees": left / 55,
        "resolution_degrees": RESOLUTION, "converged": True, "base_error_degrees": 0.004, "method": "gram",
        "wedin_degrees": None if relative > 1e-2 else 20 * left, "gap": 0.002, "nss": relative * 0.05,
        "nss_error": 1e-8, "nss_mirsky": relative, "nss_isotropic": relative / math.sqrt(side),
        "nss_k": relative * 0.04, "largest_shift": spectral * 0.4, "update_spectral_norm": spectral,
        "stable_rank_base": 30.0, "stable_rank_update": 12.0, "stable_rank_tuned": 30.0, "ky_fan": K * spectral,
        "ky_fan_shift": 9 * spectral, "update_top_energy": 0.6, "nss_k_isotropic": relative / 50,
        "nss_k_error": 1e-8, "nss_k_mirsky": 2 * relative, "changed": round(n * share),
    }  # fmt: skip
    for side in ("left", "right"):
        for end, factor in (("", 1.4), ("_low", 1.25), ("_high", 1.6)):
            row[f"{side}_degrees_isotropic{end}"] = min(70.0, factor * left)
    for name, null, factor in (("left", K / rows, 0.8), ("right", K / columns, 1.3), ("both", K * K / n, 1.1)):
        value = null * factor * math.exp(rng.normal(0, 0.05))
        row |= {f"energy_{name}": value, f"energy_{name}_isotropic": null, f"energy_{name}_rounded": 0.99 * null,
                f"energy_{name}_z": (factor - 1) * 200}  # fmt: skip
    for kind, density, factor in (("principal", 0.5, 0.94), ("low", 0.5, 1.08), ("safe", 0.74, 1.04)):
        uniform, exponent, observed = (row["changed"] * density * f for f in (1.0, factor, factor * 0.999))
        sd = math.sqrt(row["changed"]) / 3
        row |= {
            f"{kind}_size": round(n * density), f"{kind}_changed": round(observed), f"{kind}_expected_uniform": uniform,
            f"{kind}_expected_exponent": exponent, f"{kind}_variance_exponent": sd**2,
            f"{kind}_expected_margin": uniform * 1.01, f"{kind}_expected_isotropic": exponent * 0.998,
            f"{kind}_excess": (observed - exponent) / row["changed"], f"{kind}_z_exponent": (observed - exponent) / sd,
            f"{kind}_z_uniform": (observed - uniform) / sd,
        }  # fmt: skip
    return row


def curve(run: str, unit: tuple, rng) -> dict:
    relative, _ = ALL_RUNS[run]
    index = np.arange(1, K + 1)
    base = 6.0 * index**-0.35
    angles = np.minimum(80.0, relative * 900 / index**1.1 * np.exp(rng.normal(0, 0.03, K)))
    angles = np.sort(angles)[::-1]
    seen = [float(angle) if angle > RESOLUTION else None for angle in angles]
    null = np.minimum(70.0, relative * 1200 / index)
    return {
        "run": run, "name": unit[0], "layer": unit[1], "kind": unit[2], "k": K, "resolution_degrees": RESOLUTION,
        "left": seen, "right": seen, 
        **{f"{side}_isotropic{end}": (factor * null).tolist() for side in ("left", "right")
           for end, factor in (("", 1.0), ("_low", 0.9), ("_high", 1.15))},
        "values_base": base.tolist(),
        "values_tuned": np.sort(base + relative * rng.normal(0.2, 0.3, K))[::-1].tolist(),
    }  # fmt: skip


def summary(tensors: list[dict], pairs: list[dict], runs: tuple[str, ...], units: list[tuple]) -> dict:
    """What the report reads of ``summary.json``."""
    total = sum(math.prod(unit[3]) for unit in units)
    votes = np.array([math.comb(len(runs), j) for j in range(len(runs) + 1)], dtype=float)
    votes *= total / votes.sum()
    totals = {}
    for run in runs:
        rows = [row for row in tensors if row["run"] == run]
        count, changed = sum(row["total"] for row in rows), sum(row["changed"] for row in rows)
        totals[run] = {"tensors": len(rows), "total": count, "changed": changed, "sparsity": 1 - changed / count}
    entries = [{"side": side, "name": unit[0], "status": "compared", "partner": unit[0], "reason": None}
               for side in ("base", "tuned") for unit in units]  # fmt: skip
    counts = {side: {"compared": len(units), "unmatched": 0} for side in ("base", "tuned")}
    where = {"revision": None, "files": [{"name": "model.safetensors", "bytes": 2 * total}], "tensors": len(units)}
    config = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD}
    return {
        "complete": True,
        "options": {"rules": ["bitwise", "eta(0.001)", "atol(1e-05)"], "include": [], "exclude": [],
                    "save_masks": False, "metrics": ["spectrum", "masks", "energy"], "k": K, "alpha": ALPHA,
                    "tol_degrees": 0.05},
        "runs": [{"run": run, "all": totals[run], "cast": [], "partial": [], "flagged_nonfinite": []} for run in runs],
        "pairs": [{"run_a": a, "run_b": b} for i, a in enumerate(runs) for b in runs[i + 1 :]],
        "mean_jaccard": None,
        "consensus": {"runs": len(runs), "tensors": len(units), "total": total, "coordinates": votes.round().tolist(),
                      "expected_uniform": votes.tolist(), "expected_exponent": votes.tolist()} if pairs else None,
        "geometry": [{"run": run, "left_out": []} for run in runs],
        "provenance": {
            "command": ["offprin", "analyze", "base", *runs],
            "environment": {"offprin-kernels": "0.0", "python": "3.11"},
            "base": {"source": "org/base", "root": "/models/base", "dtypes": {"BF16": len(units)}, **where,
                     "config": config},
            "tuned": [{"source": f"org/{run}", "root": f"/models/{run}", "dtypes": {"BF16": len(units)}, **where}
                      for run in runs],
        },
        "ledger": {run: {"counts": counts, "entries": entries} for run in runs},
    }  # fmt: skip
