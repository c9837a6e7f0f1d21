"""A checkpoint opened for reading: the headers are in memory, the weights come row by row."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from .. import packing
from . import dtypes
from .errors import CheckpointError
from .safetensors_file import Entry, read_header
from .source import Source, load_json, locate
from .storage import FileInfo, Files, Slab
from .torch_file import read_torch_file

IO_MODES = ("auto", "mmap", "read")


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor. ``file`` indexes :attr:`Checkpoint.files`; ``offset`` is in bytes from that file's start."""

    name: str
    dtype: str  # safetensors tag: "BF16", "F32", "F8_E4M3", ...
    shape: tuple[int, ...]
    nbytes: int
    file: int
    offset: int

    @property
    def rows(self) -> int:
        return packing.matrix_shape(self.shape)[0]

    @property
    def columns(self) -> int:
        return packing.matrix_shape(self.shape)[1]


class Checkpoint:
    """Tensors of one model, by name. Open with :meth:`open`; usable as a context manager and from several threads.

    Attributes:
        source: what was asked for.
        revision: commit of a hub snapshot, else None.
        root: the directory.
        files: the weight files with size and time, as they were when opened.
        tensors: every tensor by its stored name, in file and offset order.
        config: ``config.json``, or an empty dict.
        notes: what a reader should know, one sentence each.
        ignored: entries of a PyTorch checkpoint that are not tensors.
        aliases: names of a PyTorch checkpoint whose bytes are another name's bytes too.
    """

    def __init__(self, source: str, located: Source, io: str) -> None:
        self.source = source
        self.revision = located.revision
        self.root = located.root
        self.tensors: dict[str, TensorInfo] = {}
        self.notes: list[str] = []
        self.ignored: list[str] = []
        self.aliases: dict[str, str] = {}
        self._resident: dict[tuple[int, str], torch.Tensor] = {}
        config_path = self.root / "config.json"
        self.config: dict[str, object] = load_json(config_path) if config_path.is_file() else {}
        self.files = tuple(_file_info(path, located.format) for path in located.paths)
        for index, file in enumerate(self.files):
            self._add_file(index, file, located)
        self._check_index(located)
        order = sorted(self.tensors.values(), key=lambda info: (info.file, info.offset))
        self.tensors = {info.name: info for info in order}
        self._files = Files(self.files, io)

    @classmethod
    def open(cls, source: str | Path, *, io: str = "auto", download: bool = False) -> Checkpoint:
        """Open a directory, a weight file or its index, or a hub id ``org/name[@revision]``.

        Args:
            source: a directory, a ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file, an ``.index.json``, or a hub
                id, which is looked up in the local cache. A local path wins over a hub id of the same name.
            io: ``"mmap"``, ``"read"``, or ``"auto"``: read on network file systems, map elsewhere.
            download: fetch a hub id with ``huggingface_hub`` first. Nothing else here uses the network.

        Raises:
            CheckpointError: nothing there, or a file that is corrupt, truncated, incomplete or would run code.
            ValueError: an unknown ``io``.
        """
        if io not in IO_MODES:
            raise ValueError(f"unknown io {io!r}; choose one of {', '.join(IO_MODES)}")
        return cls(str(source), locate(str(source), download), io)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def io(self) -> dict[Path, str]:
        """``"mmap"`` or ``"read"`` for each file."""
        return dict(zip((file.path for file in self.files), self._files.modes, strict=True))

    def read(
        self, name: str, start_row: int = 0, stop_row: int | None = None, *, slab: Slab | None = None
    ) -> torch.Tensor:
        """Rows [start_row, stop_row) of a tensor's matrix view (leading dimensions flattened), in its stored dtype.

        Only the bytes of these rows are touched. With ``slab``, reads that need memory of their own use it, and the
        result is valid until the next read into the same slab. The result must not be written to.

        Raises:
            CheckpointError: no such tensor, a dtype that has no numbers, or a file that changed or cannot be read.
            IndexError: rows outside the tensor.
        """
        info = self.info(name)
        dtype = dtypes.TORCH.get(info.dtype)
        if dtype is None:
            raise CheckpointError(f"{self.path_of(name)}: tensor {name} has dtype {info.dtype}, which cannot be read")
        rows, columns = packing.matrix_shape(info.shape)
        stop = rows if stop_row is None else stop_row
        if not 0 <= start_row <= stop <= rows:
            raise IndexError(f"rows {start_row} to {stop} of {name}, which has {rows}")
        resident = self._resident.get((info.file, name))
        if resident is not None:
            return resident.reshape(rows, columns)[start_row:stop].contiguous()
        item = dtypes.BITS[info.dtype] // 8
        begin = info.offset + start_row * columns * item
        data = self._files.read(info.file, begin, (stop - start_row) * columns * item, name, item, slab)
        return data.view(dtype).view(stop - start_row, columns)

    def info(self, name: str) -> TensorInfo:
        """Raises CheckpointError where there is no such tensor."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.root} has no tensor {name}; check the name") from None

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.files[self.info(name).file].path

    def close(self) -> None:
        """Close the files. Slabs already read stay valid; a later read opens its file again."""
        self._files.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add_file(self, index: int, file: FileInfo, located: Source) -> None:
        if file.format == "safetensors":
            try:
                entries, _ = read_header(file.path)
            except OSError as error:
                raise CheckpointError(f"{file.path} cannot be read ({error.strerror}); check its permissions") from None
        else:
            torch_file = read_torch_file(file.path)
            entries = torch_file.entries
            self.ignored.extend(torch_file.ignored)
            self.aliases.update(torch_file.aliases)
            self.notes += [f"tensor {name} shares its bytes with {first}" for name, first in torch_file.aliases.items()]
            held = sum(tensor.numel() > 0 for tensor in torch_file.resident.values())
            if held:
                self.notes.append(
                    f"{held} tensors of {file.path.name} are held in memory (old format, or not contiguous); "
                    f"safetensors would be read row by row"
                )
            self._resident.update({(index, name): tensor for name, tensor in torch_file.resident.items()})
        for entry in entries:
            self._add_tensor(index, entry, file, located)

    def _add_tensor(self, index: int, entry: Entry, file: FileInfo, located: Source) -> None:
        shard = located.index.get(entry.name)
        if located.index and shard is None:
            self.notes.append(f"tensor {entry.name} of {file.path.name} is not in the index; it is included")
        if shard is not None and located.root / shard != file.path:
            self.notes.append(f"tensor {entry.name} of {file.path.name} is left out: the index places it in {shard}")
            return
        if entry.name in self.tensors:
            raise CheckpointError(
                f"tensor {entry.name} is both in {self.path_of(entry.name)} and in {file.path}; "
                f"give the one file to be compared, or add an index"
            )
        self.tensors[entry.name] = TensorInfo(entry.name, entry.dtype, entry.shape, entry.nbytes, index, entry.offset)

    def _check_index(self, located: Source) -> None:
        for name, shard in located.index.items():
            if name not in self.tensors:
                raise CheckpointError(
                    f"{located.index_path} places tensor {name} in {shard}, which lacks it; "
                    f"download or copy that shard and the index again"
                )


def _file_info(path: Path, format: str) -> FileInfo:
    try:
        status = os.stat(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None
    return FileInfo(path, status.st_size, format, status.st_mtime_ns)
