"""Distributed checkpoints (``torch.distributed.checkpoint``): a ``.metadata`` file and ``.distcp`` files of chunks.

``.metadata`` says which chunk of which tensor lies at which bytes of which file; each chunk there is a ``torch.save``
zip. Opening reads ``.metadata`` alone; a chunk's zip is looked into when its rows are first asked for.
"""

from __future__ import annotations

import functools
import math
import os
import pickle
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from . import dtypes, inert
from .chunks import Chunk, Chunked, Place
from .errors import CheckpointError
from .inert import Record
from .rows import Contents, Rows, Span, TensorInfo
from .storage import FileInfo, file_info
from .torch_file import DAMAGE, first_line
from .torch_zip import NotPlain, Zip, tensor_of

METADATA = ".metadata"
REMEDY = "copy this directory again"
_PLACES = ("torch.distributed.checkpoint.metadata", "torch.distributed._shard.sharded_tensor.metadata")
_CLASSES = (
    "Metadata MetadataIndex StorageMeta TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata "
    "TensorProperties _MEM_FORMAT_ENCODING MEM_FORMAT_ENCODING"
)
ALLOWED = frozenset(
    {
        *(f"{module}.{name}" for module in _PLACES for name in _CLASSES.split()),
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.distributed.checkpoint.filesystem._StoragePrefix",
        "torch.serialization._get_layout",
        "builtins.getattr",  # how Python 3.11 names the member of an enum
        *(
            f"{module}.{name}Path"
            for module in ("pathlib", "pathlib._local")
            for name in ("Posix", "Windows", "PurePosix")
        ),
    }
)
# First parts of names that trainers give to everything but the model.
TRAINING = frozenset(
    "optimizer optimizers optim optims optimizer_state_dict optim_state_dict lr_scheduler lr_schedulers scheduler "
    "schedulers train_state trainer_state training_state dataloader dataloaders rng rng_state rng_states scaler "
    "extra_state client_state loop loops callbacks param_groups".split()
)
WRAPPERS = frozenset("app state state_dict model_state_dict model module".split())
# What a model's own names begin with; behind "model." they show that it is a wrapper and not transformers' inner model.
OUTERMOST = frozenset("model transformer gpt_neox language_model lm_head module _orig_mod base_model".split())


class Item(NamedTuple):
    """Where one chunk's zip lies."""

    file: int
    offset: int
    length: int


def load(root: Path) -> Contents:
    """Opens a directory that holds ``.metadata``.

    Raises:
        CheckpointError: metadata that is damaged or names other classes than its own, a missing or truncated file,
            a chunk that is missing, twice there, or stored in a way that has no byte ranges, or no model in it.
    """
    path = root / METADATA
    metadata, info = _read_metadata(path), file_info(path, "dcp")
    entries, storage = metadata.get("state_dict_metadata"), metadata.get("storage_data")
    if metadata.kind() != "Metadata" or not isinstance(entries, dict) or not isinstance(storage, dict):
        raise CheckpointError(f"{path} is not the metadata of a distributed checkpoint; {REMEDY}")
    shapes, ignored = _tensors(path, entries)
    wrapper, model = _model(shapes)
    ignored += [name for name in shapes if name not in model]
    if not model:
        held = f"only {', '.join(sorted({name.split('.')[0][:80] for name in ignored})[:4])}" if ignored else "nothing"
        raise CheckpointError(f"{path} lists no tensors of a model ({held}); give the directory that holds the model")
    items, names = _items(path, storage, model)
    files = tuple(file_info(root / name, "dcp") for name in names)
    reader = _Reader(files)
    tensors = [_tensor(path, reader, name, model[name], *shapes[name], items[name]) for name in model]
    notes = [f"names are those below {wrapper}"] if wrapper else []
    # The metadata comes last, so that the numbers of the files are those of the tensors.
    return Contents((*files, info), tensors, ignored, notes, {})


def _read_metadata(path: Path) -> Record:
    try:
        with open(path, "rb") as file:
            loaded = inert.Unpickler(file, ALLOWED).load()
    except inert.Forbidden as error:
        raise CheckpointError(
            f"{path} names {first_line(error)}, which the metadata of a checkpoint has no use for, and nothing of it "
            f"was run; save the checkpoint again where you trust it"
        ) from None
    except (*DAMAGE, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is damaged ({first_line(error)}); {REMEDY}") from None
    if not isinstance(loaded, Record):
        raise CheckpointError(f"{path} is not the metadata of a distributed checkpoint; {REMEDY}")
    return loaded


def _tensors(path: Path, entries: dict) -> tuple[dict[str, tuple[str, tuple[int, ...], list]], list[str]]:
    """Name -> (dtype tag, shape, chunks) of every tensor, and the names of everything else."""
    tensors, others = {}, []
    for name, entry in entries.items():
        if not isinstance(entry, Record) or entry.kind() != "TensorStorageMetadata":
            others.append(name if isinstance(name, str) else inert.text(name))
            continue
        properties = entry.get("properties")
        state = properties.state if isinstance(properties, Record) else None
        tag = inert.tag_of(state[0]) if isinstance(state, tuple) and state else None
        shape, chunks = inert.sizes_of(entry.get("size")), entry.get("chunks")
        if not isinstance(name, str) or tag is None or shape is None or not isinstance(chunks, list):
            raise CheckpointError(
                f"{path} is damaged: tensor {inert.text(name)} has no dtype, shape or chunks; {REMEDY}"
            )
        tensors[name] = tag, shape, chunks
    return tensors, others


def _model(names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """The prefix that wraps the model's names ("app.model."), and stored name -> name without it."""
    prefix, left = "", list(names)
    for _ in range(4):
        left = [name for name in left if name[len(prefix) :].split(".")[0] not in TRAINING]
        firsts = {name[len(prefix) :].split(".")[0] for name in left}
        if len(firsts) != 1:
            break
        (first,) = firsts
        inner = {name[len(prefix) + len(first) + 1 :].split(".")[0] for name in left}
        # "model.layers" is a name of transformers; "model.model.layers" is one of them inside a wrapper.
        if first not in WRAPPERS or "" in inner or (first == "model" and not inner & (OUTERMOST | TRAINING)):
            break
        prefix += f"{first}."
    return prefix, {name: name[len(prefix) :] for name in left}


def _items(path: Path, storage: dict, model: dict[str, str]) -> tuple[dict[str, dict[tuple, Item]], list[str]]:
    """Name -> offsets -> item of every chunk of the model, and the files they are in."""
    items: dict[str, dict[tuple, Item]] = {name: {} for name in model}
    numbers: dict[str, int] = {}
    for index, info in storage.items():
        name = index.get("fqn") if isinstance(index, Record) else None
        if not isinstance(name, str) or name not in model or not isinstance(info, Record):
            continue
        file, place = info.get("relative_path"), inert.sizes_of((info.get("offset"), info.get("length")))
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts or place is None:
            raise CheckpointError(f"{path} places tensor {name} in {inert.text(file)}, which is no file beside it")
        transforms = info.get("transform_descriptors")
        if transforms:
            raise CheckpointError(
                f"{path} stores tensor {name} transformed ({inert.text(transforms)}), so that its rows have no place "
                f"of their own; save the checkpoint without extensions"
            )
        # os.path rather than Path: a name that no file system could hold is missing too.
        if not os.path.isfile(path.parent / file):
            shown = file if len(file) <= 80 and file.isprintable() else inert.text(file)
            raise CheckpointError(
                f"{path} names file {shown} (tensor {name}, among others), which is missing; {REMEDY}"
            )
        assert isinstance(index, Record)
        items[name][inert.sizes_of(index.get("offset")) or ()] = Item(numbers.setdefault(file, len(numbers)), *place)
    # Disks read forward in the order of the files' names, whatever the order in which they were listed.
    order = sorted(numbers)
    renumbered = {numbers[file]: number for number, file in enumerate(order)}
    return {
        name: {offsets: item._replace(file=renumbered[item.file]) for offsets, item in found.items()}
        for name, found in items.items()
    }, order


def _tensor(
    path: Path,
    reader: _Reader,
    stored: str,
    name: str,
    tag: str,
    shape: tuple[int, ...],
    listed: list,
    items: dict[tuple, Item],
) -> tuple[TensorInfo, Rows]:
    bits = dtypes.BITS.get(tag)
    if bits is None:
        # Named, and refused when it is read.
        return TensorInfo(name, tag, shape, 0, 0, 0), Span()
    chunks, first = [], Item(0, 0, 0)
    for entry in listed:
        offsets = inert.sizes_of(entry.get("offsets")) if isinstance(entry, Record) else None
        sizes = inert.sizes_of(entry.get("sizes")) if isinstance(entry, Record) else None
        if offsets is None or sizes is None:
            raise CheckpointError(f"{path} is damaged: tensor {stored} has a chunk without offsets or sizes; {REMEDY}")
        if 0 in sizes:
            continue
        # A tensor in one piece may be listed without an offset.
        item = items.get(offsets) or (items.get(()) if len(listed) == 1 else None)
        if item is None:
            raise CheckpointError(f"{path} does not say where the chunk of {stored} at {list(offsets)} lies; {REMEDY}")
        reader.check(item, stored, math.prod(sizes) * bits // 8)
        chunks.append(Chunk(item.file, offsets, sizes, functools.partial(reader.place, item, stored, tag, sizes)))
        if len(chunks) == 1 or not any(offsets):
            first = item
    try:
        rows = Chunked(shape, chunks)
    except ValueError as error:
        raise CheckpointError(f"{path} does not hold tensor {stored} of shape {list(shape)} whole: {error}") from None
    return TensorInfo(name, tag, shape, math.prod(shape) * bits // 8, first.file, first.offset), rows


class _Reader:
    """Finds chunks' bytes within their zips, each of which is looked into once."""

    def __init__(self, files: tuple[FileInfo, ...]) -> None:
        self.files = files
        self._places: dict[Item, Place] = {}
        self._lock = threading.Lock()

    def check(self, item: Item, name: str, nbytes: int) -> None:
        """What can be said about a chunk without opening its file."""
        path, size = self.files[item.file].path, self.files[item.file].size
        if item.offset + item.length > size:
            end = item.offset + item.length
            raise CheckpointError(f"{path} is truncated: tensor {name} reaches to byte {end} of {size}; {REMEDY}")
        if nbytes > item.length:
            raise CheckpointError(
                f"{path} holds {item.length} bytes for a chunk of tensor {name} that has {nbytes}; {REMEDY}"
            )

    def place(self, item: Item, name: str, tag: str, sizes: tuple[int, ...]) -> Place:
        with self._lock:
            known = self._places.get(item)
        if known is not None:
            return known
        path = self.files[item.file].path
        where = f"{path}: the chunk of tensor {name} at byte {item.offset}"
        try:
            archive = Zip(path, item.offset, item.length)
            stored = tensor_of(archive.load())
            offset = archive.place(stored) if stored and stored.dtype in dtypes.BITS else 0
        except NotPlain as error:
            raise CheckpointError(f"{where} cannot be read by ranges: {error}") from None
        except inert.Forbidden as error:
            raise CheckpointError(
                f"{where} holds {first_line(error)} and no plain tensor; save the checkpoint with the default format"
            ) from None
        except (*DAMAGE, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{where} is damaged ({first_line(error)}); {REMEDY}") from None
        if stored is None or stored.dtype != tag or stored.shape != sizes:
            found = f"{stored.dtype} of shape {list(stored.shape)}" if stored else "no tensor"
            raise CheckpointError(f"{where} should be {tag} of shape {list(sizes)} and is {found}; {REMEDY}")
        with self._lock:
            return self._places.setdefault(item, Place(offset, stored.strides))
