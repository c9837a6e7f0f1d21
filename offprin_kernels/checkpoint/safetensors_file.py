"""The header of a safetensors file: 8 bytes of length, then JSON, then the tensors' bytes without a gap.

Parsed here rather than by the safetensors library because a refusal must name file, tensor and remedy, and because a
dtype that this version of the library does not know must not keep the other tensors from being read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from . import dtypes
from .errors import CheckpointError

MAX_HEADER = 100_000_000  # the safetensors library's own limit
REMEDY = "download or copy this file again"


class Entry(NamedTuple):
    """One tensor of one file; ``offset`` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class DuplicateKey(ValueError):
    """A JSON object that holds one key twice."""


def _unique(items: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(items)
    if len(found) < len(items):
        keys = [key for key, _ in items]
        raise DuplicateKey(next(key for key in keys if keys.count(key) > 1))
    return found


def read_header(path: Path) -> tuple[list[Entry], dict[str, str]]:
    """Tensors in file order, and the metadata.

    Raises:
        CheckpointError: a truncated or corrupt file, with the tensor at fault where one is.
        OSError: the file cannot be opened or read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path} is truncated: {size} bytes hold no safetensors header; {REMEDY}")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER:
            raise CheckpointError(f"{path} is not a safetensors file: its header would take {length} bytes; {REMEDY}")
        if 8 + length > size:
            raise CheckpointError(
                f"{path} is truncated: its header takes {8 + length} bytes and the file has {size}; {REMEDY}"
            )
        raw = file.read(length)
    if len(raw) < length:
        raise CheckpointError(f"{path} became shorter while its header was read; {REMEDY}")
    header = _parse(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path} has a corrupt header: __metadata__ is not an object; {REMEDY}")
    entries = [_entry(path, name, value, 8 + length) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.offset + entry.nbytes))
    _check_layout(path, entries, 8 + length, size)
    return entries, {str(key): str(value) for key, value in metadata.items()}


def _parse(path: Path, raw: bytes) -> dict[str, object]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except DuplicateKey as error:
        raise CheckpointError(f"{path} has a corrupt header: {error} appears twice; {REMEDY}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a corrupt header: not readable as JSON ({error}); {REMEDY}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a corrupt header: not a JSON object; {REMEDY}")
    return header


def _count(value: object) -> bool:
    # bool is an int in Python, and JSON true is no size; sizes above 2^63 are no sizes of this world.
    return type(value) is int and 0 <= value < 1 << 63


def _entry(path: Path, name: str, value: object, start: int) -> Entry:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{path} has a corrupt header: tensor name {name!a} is no text; {REMEDY}") from None
    bad = f"{path} has a corrupt header: tensor {name}"
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise CheckpointError(f"{bad} lacks dtype, shape or data_offsets; {REMEDY}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str):
        raise CheckpointError(f"{bad} has a dtype that is not a name; {REMEDY}")
    if not isinstance(shape, list) or not all(_count(item) for item in shape):
        raise CheckpointError(f"{bad} has shape {str(shape)[:60]}; {REMEDY}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_count(item) for item in offsets):
        raise CheckpointError(f"{bad} has offsets {str(offsets)[:60]}; {REMEDY}")
    begin, end = offsets
    if begin > end:
        raise CheckpointError(f"{bad} ends at byte {end} before it begins at {begin}; {REMEDY}")
    if dtype in dtypes.BITS:
        try:
            expected = dtypes.byte_size(dtype, shape)
        except ValueError as error:
            raise CheckpointError(f"{bad}, {dtype} of shape {shape}: {error}; {REMEDY}") from None
        if expected != end - begin:
            raise CheckpointError(
                f"{bad}, {dtype} of shape {shape}, needs {expected} bytes and has {end - begin}; {REMEDY}"
            )
    return Entry(name, dtype, tuple(shape), start + begin, end - begin)


def _check_layout(path: Path, entries: list[Entry], start: int, size: int) -> None:
    position = start
    for entry in entries:
        if entry.offset + entry.nbytes > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {entry.name} ends at byte {entry.offset + entry.nbytes} "
                f"and the file has {size}; {REMEDY}"
            )
        if entry.offset != position:
            what = "overlaps another tensor" if entry.offset < position else "leaves a gap before it"
            raise CheckpointError(f"{path} has a corrupt header: tensor {entry.name} {what}; {REMEDY}")
        position = entry.offset + entry.nbytes
    if position != size:
        raise CheckpointError(f"{path} is corrupt: {size - position} bytes follow its last tensor; {REMEDY}")
