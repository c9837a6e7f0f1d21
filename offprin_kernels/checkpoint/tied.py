"""The head that shares its numbers with the embedding, which a checkpoint may store once or twice.

Three different things: stored once on one side; stored twice and identical on both sides; stored twice and different.
Only the last is two tensors. Identity is decided on the stored bytes, never on the config alone.
"""

from __future__ import annotations

import torch

from .ledger import Status
from .reader import Checkpoint
from .side import Match, Side
from .storage import Slab

CHUNK = 8 << 20  # bytes compared at a time: untied heads differ in the first chunk


def identical(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors of a checkpoint hold the same bytes. Reads in chunks and stops at the first difference."""
    first, second = checkpoint.info(one), checkpoint.info(other)
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if checkpoint.aliases.get(one, one) == checkpoint.aliases.get(other, other):
        return True
    rows = first.rows
    step = max(1, CHUNK * rows // max(first.nbytes, 1))
    slabs = Slab(), Slab()
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        left, right = (
            checkpoint.read(name, start, stop, slab=slab).view(torch.uint8)
            for name, slab in zip((one, other), slabs, strict=True)
        )
        if not torch.equal(left, right):
            return False
    return True


def declared(checkpoint: Checkpoint) -> bool | None:
    """What ``config.json`` says about ``tie_word_embeddings``, or None."""
    inner = checkpoint.config.get("text_config")
    for config in (checkpoint.config, inner if isinstance(inner, dict) else {}):
        value = config.get("tie_word_embeddings")
        if isinstance(value, bool):
            return value
    return None


def settle_tied(base: Side, tuned: Side, matches: list[Match]) -> list[Match]:
    """Settles heads that are their embedding, and returns the matches that remain to be compared."""
    kinds = {side.label: (side.outer("head"), side.outer("embedding")) for side in (base, tuned)}
    if any(len(found) > 1 for pair in kinds.values() for found in pair):
        return matches
    single = {label: tuple(found[0] if found else None for found in pair) for label, pair in kinds.items()}
    for side, other in ((base, tuned), (tuned, base)):
        head, embedding = single[side.label]
        if head is None or embedding is None:
            continue
        other_head, other_embedding = single[other.label]
        if other_head is None and other_embedding is not None and head in side.open:
            _settle_missing(side, other, head, embedding, "head")
        if other_embedding is None and other_head is not None and embedding in side.open:
            _settle_missing(side, other, embedding, head, "embedding")
    twice = [
        match for match in matches if (match.base.name, match.tuned.name) == (single["base"][0], single["tuned"][0])
    ]
    if twice and _stored_twice(base, tuned, twice[0], single["base"][1], single["tuned"][1]):
        return [match for match in matches if match is not twice[0]]
    return matches + _across(base, tuned, single)


def _stored_twice(
    base: Side, tuned: Side, head: Match, base_embedding: str | None, tuned_embedding: str | None
) -> bool:
    """Settles a head that both sides store and that is the embedding on both; False where it is not."""
    if base_embedding is None or tuned_embedding is None or not base.selected(base_embedding, tuned_embedding):
        return False
    if not base.selected(head.base.name, head.tuned.name):
        return False
    for side, name, embedding in ((base, head.base.name, base_embedding), (tuned, head.tuned.name, tuned_embedding)):
        if not identical(side.checkpoint, name, embedding):
            return False
    for side, ref, partner, embedding in (
        (base, head.base, head.tuned.name, base_embedding),
        (tuned, head.tuned, head.base.name, tuned_embedding),
    ):
        reason = f"identical to {embedding} on both sides; counted once, as the embedding"
        side.settle(ref.name, Status.TIED, partner, reason)
    return True


def _settle_missing(side: Side, other: Side, name: str, partner: str, kind: str) -> None:
    """``name`` is the head (or embedding) that ``other`` does not store; ``partner`` is what it may be tied to."""
    if not side.selected(name):
        return
    if declared(other.checkpoint) is False:
        side.settle(
            name,
            Status.UNMATCHED,
            reason=f"{other.label} has no {kind}, and its config.json says it is not tied; get the complete checkpoint",
        )
    elif identical(side.checkpoint, name, partner):
        reason = f"identical to {partner}, counted once, there; {other.label} stores no {kind}"
        side.settle(name, Status.TIED, partner, reason)
    else:
        side.settle(
            name,
            Status.UNMATCHED,
            reason=f"{other.label} stores no {kind} (tied there), and here it differs from {partner}",
        )


def _across(base: Side, tuned: Side, single: dict[str, tuple[str | None, ...]]) -> list[Match]:
    """One side stores the shared tensor as the embedding only, the other as the head only and its config says tied."""
    for side, other in ((base, tuned), (tuned, base)):
        head, own_embedding = single[side.label]
        other_head, embedding = single[other.label]
        if head is None or embedding is None or own_embedding is not None or other_head is not None:
            continue
        refs = {side.label: side.ref(head), other.label: other.ref(embedding)}
        one, two = refs["base"], refs["tuned"]
        if head in side.open and embedding in other.open and declared(side.checkpoint) and one and two:
            note = f"{side.label} stores the tied embedding under the name of the head"
            return [Match(one.name, one, two, two.name, one.name, note)]
    return []
