"""One side of a pairing while it is being worked out: what is still open, and what is settled and why."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from . import names
from .ledger import INCOMPLETE, LedgerEntry, Status, TensorRef
from .reader import Checkpoint
from .roles import Role, role_of

Selection = Callable[..., bool]
EXCLUDED = "left out by --include or --exclude"


@dataclass(frozen=True)
class Match:
    """Two row ranges that belong together. The partners are what the ledger calls the other side."""

    name: str
    base: TensorRef
    tuned: TensorRef
    base_partner: str
    tuned_partner: str
    note: str = ""
    whole: bool = True  # both are whole tensors, so that their shapes must agree, not only their rows and columns


def selection(include: Sequence[str], exclude: Sequence[str]) -> Selection:
    """A predicate over the names of one tensor; globs see each name as stored and without its wrappers."""

    def hit(globs: Iterable[str], candidates: set[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) for glob in globs for name in candidates)

    def selected(*stored: str) -> bool:
        candidates = {*stored, *(names.canonical(name) for name in stored)}
        return (not include or hit(include, candidates)) and not hit(exclude, candidates)

    return selected


class Side:
    """Roles of all tensors of one checkpoint, and the ledger entries written so far."""

    def __init__(self, label: str, checkpoint: Checkpoint, selected: Selection) -> None:
        self.label = label
        self.checkpoint = checkpoint
        self.selected = selected
        self.roles: dict[str, Role] = {name: role_of(checkpoint, info) for name, info in checkpoint.tensors.items()}
        self.entries: dict[str, LedgerEntry] = {}
        # Insertion order is file order; a dict rather than a set keeps it.
        self.open: dict[str, Role] = {}
        for name, role in self.roles.items():
            if role.ref is None and role.status is not Status.REFUSED:
                self.settle(name, role.status, reason=role.reason)
            else:
                self.open[name] = role

    def ref(self, name: str) -> TensorRef | None:
        return self.roles[name].ref

    def settle(self, name: str, status: Status, partner: str | None = None, reason: str = "") -> None:
        """Write the ledger entry of a tensor. A part that is compared outweighs another part that is excluded."""
        self.open.pop(name, None)
        if status in INCOMPLETE and not self.selected(name):
            status, reason = Status.EXCLUDED, EXCLUDED
        known = self.entries.get(name)
        if known is None or known.status is Status.EXCLUDED:
            self.entries[name] = LedgerEntry(self.label, name, status, partner, reason)

    def outer(self, kind: str) -> list[str]:
        """Weights of this kind outside the layers, such as the one head."""
        return [
            name
            for name, role in self.roles.items()
            if role.ref is not None
            and name.endswith("weight")
            # The layer is looked at first: nearly all of the thousands of names of a model end there.
            and names.LAYER.search(name) is None
            and names.describe(name)[1] == kind
        ]

    def ledger(self) -> list[LedgerEntry]:
        """Entries in file order."""
        return [self.entries[name] for name in self.checkpoint.tensors]
