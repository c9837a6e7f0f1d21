"""Writing files so that an interruption or a full disk never costs what was there before."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch

from . import dtypes

ONE_WRITE = 1 << 30  # Linux writes at most 2 GiB - 4 KiB at once
Layout = Mapping[str, tuple[str, Sequence[int]]]


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all: into a temporary file beside it, synced, then renamed over it.

    Raises:
        OSError: for example a full disk; the previous file is then as it was.
    """
    with _replacing(Path(path)) as descriptor:
        _write_all(descriptor, memoryview(data), 0)


def save_safetensors_atomic(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors (any device, any strides) as safetensors, whole or not at all.

    Raises:
        ValueError: a dtype that safetensors has no name for.
        OSError: for example a full disk; the previous file is then as it was.
    """
    layout = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes.TAGS:
            raise ValueError(f"tensor {name} has dtype {tensor.dtype}, which safetensors cannot store")
        layout[name] = (dtypes.TAGS[tensor.dtype], tuple(tensor.shape))
    header, places = _header(layout, metadata or {})
    with _replacing(Path(path)) as descriptor:
        _write_all(descriptor, memoryview(header), 0)
        for name, tensor in tensors.items():
            _write_all(descriptor, _bytes_of(tensor), places[name][0])


class SafetensorsWriter:
    """Writes a safetensors file of known layout in any order, into ``<path>.partial``, and renames it when finished.

    Args:
        path: the file to make.
        layout: name -> (dtype tag such as ``"BF16"``, shape).
        metadata: strings for the header.
        resume: go on with an existing partial file of the same header; one with another header is started anew.

    Attributes:
        resumed: whether an earlier partial file is being continued.

    Raises:
        ValueError: an unknown dtype tag.
        OSError: as the system reports it, a full disk included; the partial file stays for a later ``resume``.
    """

    def __init__(
        self, path: str | Path, layout: Layout, metadata: Mapping[str, str] | None = None, *, resume: bool = False
    ) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        header, self._places = _header(layout, metadata or {})
        size = max((begin + nbytes for begin, nbytes in self._places.values()), default=len(header))
        self._descriptor = os.open(self.partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            same = os.fstat(self._descriptor).st_size == size and os.pread(self._descriptor, len(header), 0) == header
            self.resumed = resume and same
            if not self.resumed:
                os.ftruncate(self._descriptor, 0)
                # The header goes last: a partial file with a whole header is then sure to have its full length too.
                os.ftruncate(self._descriptor, size)
                _write_all(self._descriptor, memoryview(header), 0)
        except OSError:
            self.close()
            raise

    def write(self, name: str, offset: int, data: bytes | bytearray | memoryview | torch.Tensor) -> None:
        """Write bytes of tensor ``name`` from byte ``offset`` within it.

        Raises:
            KeyError: a tensor that is not in the layout.
            ValueError: bytes beyond the tensor's end.
            OSError: for example a full disk.
        """
        begin, nbytes = self._places[name]
        view = _bytes_of(data) if isinstance(data, torch.Tensor) else memoryview(data).cast("B")
        if offset < 0 or offset + len(view) > nbytes:
            raise ValueError(f"bytes {offset} to {offset + len(view)} of tensor {name}, which has {nbytes}")
        _write_all(self._descriptor, view, begin + offset)

    def sync(self) -> None:
        """Force what was written so far to the disk."""
        os.fsync(self._descriptor)

    def finish(self) -> None:
        """Sync, and give the file its name."""
        os.fsync(self._descriptor)
        self.close()
        os.replace(self.partial, self.path)
        _sync_directory(self.path.parent)

    def close(self) -> None:
        """Close the partial file and leave it for a later ``resume``."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def discard(self) -> None:
        """Close and delete the partial file."""
        self.close()
        self.partial.unlink(missing_ok=True)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _header(layout: Layout, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Header bytes, and (first byte in the file, bytes) of each tensor."""
    for name, (tag, _) in layout.items():
        if tag not in dtypes.BITS:
            raise ValueError(f"tensor {name} has dtype {tag!r}, which safetensors does not define")
    # Widest elements first, as the safetensors library orders them: every tensor is then aligned to its own elements.
    ordered = sorted(layout, key=lambda name: -dtypes.BITS[layout[name][0]])
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position, spans = 0, {}
    for name in ordered:
        tag, shape = layout[name]
        nbytes = dtypes.byte_size(tag, shape)
        header[name] = {"dtype": tag, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        spans[name] = (position, nbytes)
        position += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {name: (start + begin, nbytes) for name, (begin, nbytes) in spans.items()}
    return len(text).to_bytes(8, "little") + text, places


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # An empty tensor cannot be viewed as another dtype in every torch version, and has no bytes anyway.
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + ONE_WRITE], offset + done)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[int]:
    """A descriptor of a new file beside ``path`` that takes its name at the end, or vanishes where anything fails."""
    # Made by open and not by tempfile, whose files are for the owner's eyes only; the name is this process's alone.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(temporary, flags, 0o666)
    try:
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    # The rename itself is on the disk only once the directory is. Some network file systems cannot sync a directory;
    # the file is whole there too, so that is no failure.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
