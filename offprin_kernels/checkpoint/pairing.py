"""Pairs the tensors of two checkpoints by name and accounts for every one of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from . import names
from .experts import match_experts
from .ledger import Pairing, Status, TensorPair
from .reader import Checkpoint
from .roles import packed_counterpart
from .side import EXCLUDED, Match, Selection, Side, selection
from .tied import settle_tied


def pair(base: Checkpoint, tuned: Checkpoint, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Pairing:
    """Pair two checkpoints: exact names first, then names without wrapper prefixes, then experts, then tied heads.

    Args:
        base, tuned: open checkpoints. Only heads that may be tied are read, to compare them with their embedding.
        include: globs (``fnmatch``, case-sensitive); where given, only tensors with a name that matches are compared.
        exclude: globs of what is left out; stronger than ``include``. Globs see stored and prefix-free names.

    Raises:
        CheckpointError: a file that changed or cannot be read.
    """
    selected = selection(include, exclude)
    one, other = Side("base", base, selected), Side("tuned", tuned, selected)
    matches: list[Match] = []
    for stage in (_match_exact, _match_canonical, match_experts):
        found = stage(one, other)
        for match in found:
            one.open.pop(match.base.name, None)
            other.open.pop(match.tuned.name, None)
        matches += found
    matches = settle_tied(one, other, matches)
    judged = [_judge(match, one, other, selected) for match in matches]
    pairs = [item for item in judged if item is not None]
    for side, opposite in ((one, other), (other, one)):
        for name in list(side.open):
            _settle_rest(side, opposite, name)
    return Pairing(tuple(_stream_order(base, pairs)), tuple(one.ledger() + other.ledger()))


def _match_exact(one: Side, other: Side) -> list[Match]:
    found = [name for name in one.open if name in other.open]
    return [match for name in found if (match := _match(one, name, other, name, "")) is not None]


def _match_canonical(one: Side, other: Side) -> list[Match]:
    groups: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for position, side in enumerate((one, other)):
        for name in side.open:
            groups[names.canonical(name)][position].append(name)
    matches = []
    for bases, tuneds in groups.values():
        if len(bases) == 1 and len(tuneds) == 1:
            match = _match(one, bases[0], other, tuneds[0], "names equal once wrapper prefixes are set aside")
            if match is not None:
                matches.append(match)
        elif bases and tuneds:
            every = ", ".join([f"base {name}" for name in bases] + [f"tuned {name}" for name in tuneds])
            reason = f"one name once wrapper prefixes are set aside: {every}; rename or exclude all but one"
            for side, members in ((one, bases), (other, tuneds)):
                for name in members:
                    side.settle(name, Status.REFUSED, reason=reason)
    return matches


def _match(one: Side, base: str, other: Side, tuned: str, note: str) -> Match | None:
    """A match, or None where either side is refused by its dtype, which then settles both."""
    base_ref, tuned_ref = one.ref(base), other.ref(tuned)
    if base_ref is not None and tuned_ref is not None:
        return Match(base, base_ref, tuned_ref, tuned, base, note)
    both = ((one, base), (other, tuned))
    reason = "; ".join(f"{side.label}: {side.roles[name].reason}" for side, name in both if side.ref(name) is None)
    one.settle(base, Status.REFUSED, tuned, reason)
    other.settle(tuned, Status.REFUSED, base, reason)
    return None


def _judge(match: Match, one: Side, other: Side, selected: Selection) -> TensorPair | None:
    """Settles both tensors of a match; the pair, or None where it is not compared."""
    base, tuned = match.base, match.tuned
    if not selected(match.name, base.name, tuned.name):
        one.settle(base.name, Status.EXCLUDED, match.base_partner, EXCLUDED)
        other.settle(tuned.name, Status.EXCLUDED, match.tuned_partner, EXCLUDED)
        return None
    notes = [match.note] if match.note else []
    status = Status.COMPARED
    if base.dtype != "BF16" or tuned.dtype != "BF16":
        status = Status.CAST
        notes += [
            f"{side} {ref.dtype}{' with its scale' if ref.scale else ''} rounded to bf16"
            for side, ref in (("base", base), ("tuned", tuned))
            if ref.dtype != "BF16"
        ]
    if (base.rows, base.columns) != (tuned.rows, tuned.columns) or (match.whole and base.shape != tuned.shape):
        if not _padded(match):
            reason = f"shape {list(base.shape)} in base, {list(tuned.shape)} in tuned; compare checkpoints of one model"
            one.settle(base.name, Status.REFUSED, match.base_partner, reason)
            other.settle(tuned.name, Status.REFUSED, match.tuned_partner, reason)
            return None
        status, rows = Status.PARTIAL, min(base.rows, tuned.rows)
        notes.append(f"vocabulary padding: {rows} common rows compared, base has {base.rows}, tuned {tuned.rows}")
        base, tuned = replace(base, rows=rows), replace(tuned, rows=rows)
    note = "; ".join(notes)
    one.settle(base.name, status, match.base_partner, note)
    other.settle(tuned.name, status, match.tuned_partner, note)
    return TensorPair(match.name, base, tuned, status, note)


def _padded(match: Match) -> bool:
    base, tuned = match.base, match.tuned
    if len(base.shape) != 2 or len(tuned.shape) != 2 or base.columns != tuned.columns:
        return False
    return names.describe(match.base.name)[1] in ("embedding", "head")


def _settle_rest(side: Side, opposite: Side, name: str) -> None:
    role = side.roles[name]
    if role.ref is None:
        side.settle(name, Status.REFUSED, reason=role.reason)
        return
    packed = packed_counterpart(opposite.checkpoint, name)
    if packed is not None:
        side.settle(name, Status.REFUSED, packed, f"{opposite.label} holds it packed as {packed}; dequantize it first")
    else:
        side.settle(name, Status.UNMATCHED, reason=f"{opposite.label} has no tensor of this name")


def _stream_order(base: Checkpoint, pairs: list[TensorPair]) -> list[TensorPair]:
    def place(pair: TensorPair) -> tuple[int, int, int]:
        info = base.info(pair.base.name)
        return info.file, info.offset, pair.base.start_row

    return sorted(pairs, key=place)
