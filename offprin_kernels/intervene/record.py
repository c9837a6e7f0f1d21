"""What was done to a model, completely: enough to repeat it, to undo it, and to map its masks back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import atomic_write_bytes
from ..numerics import mixed, signed, splitmix64
from .attention import Heads

FORMAT = "offprin-intervention-1"
FILE = "intervention.json"
KINDS = ("rotate", "permute")


@dataclass(frozen=True)
class Order:
    """One layer's heads after a permutation: new head ``i`` was head ``query[i]``, new KV head ``j`` was ``kv[j]``."""

    query: tuple[int, ...]
    kv: tuple[int, ...]


@dataclass(frozen=True)
class Intervention:
    """A function-preserving intervention on attention heads.

    Attributes:
        kind: ``"rotate"`` or ``"permute"``.
        seed: 0 <= seed < 2^63. Rotations are functions of (seed, layer, KV head, head size); they are not stored.
        layers: numbers of the layers it touches.
        heads: query heads, KV heads and head size of the model.
        orders: for a permutation, the order of each layer.

    Source: arXiv 2511.08567, section 4.3 and appendix D.
    """

    kind: str
    seed: int
    layers: tuple[int, ...]
    heads: Heads
    orders: Mapping[int, Order] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown intervention {self.kind!r}; choose one of {', '.join(KINDS)}")
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 63:
            raise ValueError(f"the seed must be an integer from 0 to 2^63 - 1, got {self.seed!r}")
        sizes = (self.heads.query, self.heads.kv, self.heads.size)
        if any(type(n) is not int or n < 1 for n in sizes) or self.heads.query % self.heads.kv:
            raise ValueError(
                f"no attention has {sizes[0]!r} query heads, {sizes[1]!r} KV heads and head size {sizes[2]!r}"
            )
        if any(type(n) is not int or n < 0 for n in self.layers):
            raise ValueError(f"layers {list(self.layers)} are no layer numbers")
        for layer in self.layers if self.kind == "permute" else ():
            if layer not in self.orders or not _fits(self.orders[layer], self.heads):
                raise ValueError(f"layer {layer} has no order of its heads that keeps query groups together")

    def save(self, path: str | Path, notes: Mapping[str, Any] | None = None) -> None:
        """Write JSON, whole or not at all; ``notes`` are further entries for the reader."""
        orders = {str(n): {"query": list(o.query), "kv": list(o.kv)} for n, o in self.orders.items()}
        content = {
            "format": FORMAT,
            "kind": self.kind,
            "seed": self.seed,
            "layers": list(self.layers),
            "query_heads": self.heads.query,
            "kv_heads": self.heads.kv,
            "head_dim": self.heads.size,
            **({"orders": orders} if self.kind == "permute" else {}),
            **(notes or {}),
        }
        atomic_write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Intervention:
        """Read what :meth:`save` wrote, from the file or from a directory with ``intervention.json``.

        Raises:
            ValueError: not such a file, or one that contradicts itself. OSError: it cannot be read.
        """
        path = Path(path) / FILE if Path(path).is_dir() else Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            orders = {int(n): Order(tuple(o["query"]), tuple(o["kv"])) for n, o in content.get("orders", {}).items()}
            heads = Heads(content["query_heads"], content["kv_heads"], content["head_dim"])
            return cls(content["kind"], content["seed"], tuple(content["layers"]), heads, orders)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no record of an intervention ({error}); write it again") from None


def draw(kind: str, seed: int, layers: Sequence[int], heads: Heads) -> Intervention:
    """The intervention that a seed stands for. Raises ValueError for a bad kind or seed, or where nothing can move."""
    record = Intervention("rotate", seed, tuple(layers), heads)  # checks the seed before it is used
    if kind == "rotate":
        return record
    if heads.query == 1:
        raise ValueError("a model with one query head has nothing to permute")
    return Intervention(kind, seed, tuple(layers), heads, {layer: _order(seed, layer, heads) for layer in layers})


def _order(seed: int, layer: int, heads: Heads) -> Order:
    kv = _shuffled(seed, layer, 0, heads.kv, moved=heads.kv > 1)
    groups = [_shuffled(seed, layer, 1 + old, heads.group, moved=heads.kv == 1) for old in kv]
    query = [old * heads.group + member for old, group in zip(kv, groups, strict=True) for member in group]
    return Order(tuple(query), tuple(kv))


def _shuffled(seed: int, layer: int, place: int, count: int, moved: bool) -> list[int]:
    """Uniform among all orders, or among those that are ``moved``: not the one that leaves all in place."""
    index = torch.arange(count)
    while True:
        order = splitmix64(stream(seed, layer, place), index).argsort(stable=True).tolist()
        if not moved or order != list(range(count)):
            return order
        index += count


def stream(seed: int, layer: int, place: int) -> int:
    """Where the random bits of one place in one layer begin."""
    return signed(mixed(mixed(mixed(seed) ^ layer) ^ place))


def _fits(order: Order, heads: Heads) -> bool:
    """Both are permutations, and each new group holds the query heads of its new KV head."""
    if sorted(order.query) != list(range(heads.query)) or sorted(order.kv) != list(range(heads.kv)):
        return False
    return all(old // heads.group == order.kv[new // heads.group] for new, old in enumerate(order.query))
