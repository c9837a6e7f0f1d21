"""Pickles read as inert records: what the file says is kept, and nothing in it is ever called.

Files of distributed training name classes of torch that change from release to release, and building their objects
needs a process group or modules that may be missing. Only shapes, offsets and storage keys matter here, so every
permitted global becomes a class of :class:`Record`, which remembers its arguments and its state; any other global is
refused by its name. Files of any torch version are read the same way, and no class of torch takes part.
"""

from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Callable, Iterable
from typing import BinaryIO

from . import dtypes


class Forbidden(pickle.UnpicklingError):
    """A global that such a file has no business to name; the message is that name."""


class Record:
    """An object of a pickle, never built: the ``args`` it would be made from, and the ``state`` it would be given."""

    name = ""  # of the global, "module.qualname"
    args: tuple
    state: object

    def __new__(cls, *args: object, **options: object) -> Record:
        self = object.__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state: object) -> None:
        self.state = state

    def get(self, field: str) -> object:
        """A field of the state, which pickle stores as a dict or, with slots, as (dict or None, dict); else None."""
        parts = self.state if isinstance(self.state, tuple) else (self.state,)
        return next((part[field] for part in parts if isinstance(part, dict) and field in part), None)

    def kind(self) -> str:
        """The last part of the class's name."""
        return self.name.rpartition(".")[2]


class _Mapping(dict):
    def __setstate__(self, state: object) -> None:
        """Attributes such as a state dict's ``_metadata`` are dropped."""


class _Nested(Record):
    """``getattr`` in a pickle: how it names a class inside a class."""

    def __new__(cls, owner: object, field: object) -> type:  # type: ignore[misc]
        if not (isinstance(owner, type) and issubclass(owner, Record) and isinstance(field, str)):
            raise Forbidden("builtins.getattr")
        return type(field, (Record,), {"name": f"{owner.name}.{field}"})


_BUILTINS: dict[str, type] = {"set": set, "frozenset": frozenset, "list": list, "dict": _Mapping, "tuple": tuple}
# Also those that this torch does not know: only their names are read.
_DTYPE = re.compile(r"torch\.(?:bool|(?:b?float|complex|q?u?int|bits)\d+\w*)")
MOST_DIMENSIONS = 64  # as in torch


class Unpickler(pickle.Unpickler):
    """Reads one pickle. Raises Forbidden, or what pickle raises on damaged input."""

    def __init__(
        self, file: BinaryIO, allowed: Iterable[str], storage: Callable[[tuple], object] | None = None
    ) -> None:
        super().__init__(file)
        self._allowed = frozenset(allowed)
        self._storage = storage
        self._known: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> type:
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return _Mapping
        if module in ("builtins", "__builtin__"):
            if name in _BUILTINS:
                return _BUILTINS[name]
            if name == "getattr" and "builtins.getattr" in self._allowed:
                return _Nested
        if full == "torch.Size":
            return tuple
        if full in self._allowed or _DTYPE.fullmatch(full):
            # A class of this file alone: whatever a hostile file hangs on it dies with the file.
            return self._known.setdefault(full, type(name, (Record,), {"name": full}))
        raise Forbidden(full)

    def persistent_load(self, pid: object) -> object:
        if self._storage is None or not isinstance(pid, tuple):
            raise Forbidden("a reference to another file")
        return self._storage(pid)


def tag_of(dtype: object) -> str | None:
    """The tag of a torch dtype's record, None where it is none; a dtype without a tag keeps its name."""
    if isinstance(dtype, type) and issubclass(dtype, Record) and _DTYPE.fullmatch(dtype.name):
        return _TAGS.get(dtype.name, dtype.name)
    return None


def sizes_of(value: object) -> tuple[int, ...] | None:
    """A tuple of sizes or offsets, or None where the value is none."""
    if (
        isinstance(value, list | tuple)
        and len(value) <= MOST_DIMENSIONS
        and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
    ):
        return tuple(value)
    return None


def text(value: object, depth: int = 3) -> str:
    """A short text of anything in a pickle, for a message: in a few bytes lists of lists can be endlessly long."""
    if isinstance(value, str | bytes):
        return ascii(value[:80]) + ("..." if len(value) > 80 else "")
    if isinstance(value, list | tuple | dict):
        shown = [text(item, depth - 1) for item in itertools.islice(value, 4)] if depth else []
        return f"[{', '.join(shown + ['...'] * (len(shown) < len(value)))}]"
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 1 << 64):
        return str(value)
    return f"a {type(value).__name__[:80]}"


_TAGS = {str(dtype): tag for dtype, tag in dtypes.TAGS.items()}
