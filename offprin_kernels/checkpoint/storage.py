"""Byte ranges of files as tensors: mapped page by page, or read into memory.

Measured on a cached 1 GiB file (2 cores, ext4, slabs of 32 MiB, consumed once): mapping per slab 24 GB/s, reading into
a reused buffer 6-8 GB/s, reading into fresh memory 2 GB/s, because each new page is zeroed before it is overwritten.
So local files are mapped. On network file systems a page fault is a round trip, and there they are read.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import CheckpointError

# fmt: off
NETWORK_FILE_SYSTEMS = frozenset({
    "nfs", "nfs4", "lustre", "cifs", "smb3", "smbfs", "smb2", "9p", "ceph", "gpfs", "beegfs", "afs", "afpfs",
    "ncpfs", "glusterfs", "pvfs2", "orangefs", "panfs", "wekafs", "virtiofs", "fuse", "vastnfs", "efs",
})
# fmt: on
MAX_OPEN_FILES = 64
ONE_READ = 1 << 30  # Linux reads at most 2 GiB - 4 KiB at once


@dataclass(frozen=True)
class FileInfo:
    """One file of a checkpoint, as it was when it was opened."""

    path: Path
    size: int
    format: str  # "safetensors", "torch", "dcp", "fsdp" or "peft"
    mtime_ns: int


def file_info(path: Path, format: str) -> FileInfo:
    """A file as it is now; raises CheckpointError where it cannot be looked at."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None
    return FileInfo(path, status.st_size, format, status.st_mtime_ns)


class Slab:
    """A buffer that a streaming caller uses again and again: fresh memory costs more than the read itself."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], uninitialised; what was taken before is overwritten."""
        if self._memory.numel() < nbytes:
            # The old memory goes first, so that the peak is the new size and not both.
            self._memory = torch.empty(0, dtype=torch.uint8)
            self._memory = torch.empty(nbytes, dtype=torch.uint8)
        return self._memory[:nbytes]


def file_system(path: Path, mounts: str = "/proc/self/mounts") -> str | None:
    """Type of the file system that holds ``path`` (symlinks followed), or None where the system does not tell."""
    try:
        lines = Path(mounts).read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    target = os.path.realpath(path)
    best, found = -1, None
    for line in lines:
        fields = line.split()
        if len(fields) < 3:
            continue
        # Blanks in mount points are written as octal escapes; a later mount on the same point hides the earlier.
        point = fields[1].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
        if (target == point or target.startswith(point.rstrip("/") + "/")) and len(point) >= best:
            best, found = len(point), fields[2]
    return found


def choose_io(path: Path, io: str) -> str:
    """``"mmap"`` or ``"read"`` for a file; ``"auto"`` decides by its file system."""
    if io != "auto":
        return io
    kind = file_system(path)
    return "read" if kind is not None and kind.split(".")[0] in NETWORK_FILE_SYSTEMS else "mmap"


class _OpenFile:
    """A descriptor that closes when its last user is done with it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        # os.open may have failed, and then there is nothing to close.
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Files:
    """Reads byte ranges of a checkpoint's files; safe to use from several threads."""

    def __init__(self, files: tuple[FileInfo, ...], io: str) -> None:
        self.files = files
        self.modes = tuple(choose_io(file.path, io) for file in files)
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def _file(self, index: int, name: str) -> _OpenFile:
        info = self.files[index]
        try:
            with self._lock:
                handle = self._open.pop(index, None) or _OpenFile(info.path)
                self._open[index] = handle
                if len(self._open) > MAX_OPEN_FILES:
                    self._open.popitem(last=False)
            now = os.fstat(handle.descriptor)
        except OSError as error:
            raise CheckpointError(
                f"{info.path} can no longer be opened ({error.strerror}), needed for tensor {name}; "
                f"leave the files in place until the run is over"
            ) from None
        if (now.st_size, now.st_mtime_ns) != (info.size, info.mtime_ns):
            raise CheckpointError(
                f"{info.path} changed since it was opened (tensor {name}, {info.size} bytes then, {now.st_size} now); "
                f"wait until it is written and start again"
            )
        return handle

    def read(
        self, index: int, offset: int, nbytes: int, name: str, align: int = 1, slab: Slab | None = None
    ) -> torch.Tensor:
        """Bytes of a file as uint8 [nbytes], at an address that is a multiple of ``align``.

        A mapped range is unmapped when the last tensor on it is gone. With ``slab`` nothing new is allocated, and the
        result is overwritten by the next read into the same slab.
        """
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        handle = self._file(index, name)
        if self.modes[index] == "mmap" and offset % align == 0:
            return self._map(handle, index, offset, nbytes, name)
        target = torch.empty(nbytes, dtype=torch.uint8) if slab is None else slab.take(nbytes)
        self._fill(handle, index, offset, target, name)
        return target

    def read_into(self, index: int, offset: int, target: torch.Tensor, name: str) -> None:
        """Bytes of a file into contiguous uint8 memory, as many as it holds; for results put together from pieces."""
        if target.numel():
            self._fill(self._file(index, name), index, offset, target, name)

    def _map(self, handle: _OpenFile, index: int, offset: int, nbytes: int, name: str) -> torch.Tensor:
        skip = offset % mmap.ALLOCATIONGRANULARITY
        try:
            # Copy-on-write rather than read-only: torch then hands out an ordinary tensor, and the file stays as it is.
            mapped = mmap.mmap(handle.descriptor, skip + nbytes, access=mmap.ACCESS_COPY, offset=offset - skip)
        except OSError as error:
            raise CheckpointError(
                f"{self.files[index].path} cannot be mapped ({error.strerror}), needed for tensor {name}; try --io read"
            ) from None
        if hasattr(mmap, "MADV_WILLNEED"):
            mapped.madvise(mmap.MADV_WILLNEED)
        return torch.frombuffer(mapped, dtype=torch.uint8, count=nbytes, offset=skip)

    def _fill(self, handle: _OpenFile, index: int, offset: int, target: torch.Tensor, name: str) -> None:
        view = target.numpy().data
        done = 0
        while done < len(view):
            try:
                got = os.preadv(handle.descriptor, [view[done : done + ONE_READ]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.files[index].path} cannot be read ({error.strerror}) at tensor {name}; "
                    f"check the disk, then download or copy this file again"
                ) from None
            if got == 0:
                raise CheckpointError(
                    f"{self.files[index].path} became shorter while tensor {name} was read; "
                    f"wait until it is written and start again"
                )
            done += got
