"""Which layers and matrices are shown in full, and where the heads of attention lie in them."""

from __future__ import annotations

import numpy as np

from ..tables import Tables

PAPERS_LAYER = 13  # shown where there is one: published values are of this layer
ORDER = "q_proj k_proj v_proj qkv_proj o_proj gate_proj up_proj gate_up_proj down_proj".split()
MOST_KINDS = 8


def layers(tables: Tables) -> list[int]:
    """The first layer, layer 13 or else the middle one, and the last."""
    rows = tables.tensors
    linear = np.array([bool(flag) for flag in rows.values("linear")])
    found = sorted({int(layer) for layer in rows.numbers("layer")[linear] if np.isfinite(layer)})
    if not found:
        return []
    middle = PAPERS_LAYER if PAPERS_LAYER in found else found[len(found) // 2]
    return sorted({found[0], middle, found[-1]})


def matrices(tables: Tables, layer: int) -> dict[str, str]:
    """Name of one linear matrix for each kind in the layer, in the order of a block; of experts the first."""
    rows = tables.tensors
    keep = (rows.numbers("layer") == layer) & np.array([bool(flag) for flag in rows.values("linear")])
    found: dict[str, str] = {}
    for name, kind in zip(rows.texts("name")[keep], rows.texts("kind")[keep], strict=True):
        found.setdefault(kind, name)
    ordered = sorted(found, key=lambda kind: ORDER.index(kind) if kind in ORDER else len(ORDER))
    return {kind: found[kind] for kind in ordered[:MOST_KINDS]}


def heads(config: dict, kind: str, axis: str, length: int) -> int:
    """How many attention heads lie along this axis of the weight; 0 where there are none, or nothing tells.

    Heads are rows of q, k and v, and columns of o.
    """
    query = config.get("num_attention_heads")
    if not query or (kind, axis) not in (("q_proj", "row"), ("k_proj", "row"), ("v_proj", "row"), ("o_proj", "column")):
        return 0
    size = config.get("head_dim") or (config["hidden_size"] // query if config.get("hidden_size") else 0)
    wanted = config.get("num_key_value_heads") or query if kind in ("k_proj", "v_proj") else query
    return wanted if size and wanted * size == length else 0
