"""Directories and files of safetensors or PyTorch weights, one tensor in one place each, with or without an index."""

from __future__ import annotations

from pathlib import Path

from .errors import CheckpointError
from .rows import Contents, Resident, Rows, Span, TensorInfo
from .safetensors_file import Entry, read_header
from .source import Source
from .storage import FileInfo, file_info
from .torch_file import TorchFile, read_torch_file, sharing

# In the metadata of safetensors shards that torch's HuggingFaceStorageWriter left unjoined.
SHARDS = "DCP_SHARDING_INFO"


def load(located: Source) -> Contents:
    """Opens the files of a source and checks them against its index.

    Raises:
        CheckpointError: a damaged or hostile file, one name in two files, an index that places a tensor elsewhere.
    """
    return _Loader(located).contents()


def format_of(path: Path) -> str:
    """The format of one weight file, by its suffix."""
    return "safetensors" if path.suffix == ".safetensors" else "torch"


class _Loader:
    def __init__(self, located: Source) -> None:
        self.located = located
        self.files = tuple(file_info(path, located.format) for path in located.paths)
        self.tensors: dict[str, tuple[TensorInfo, Rows]] = {}
        self.notes: list[str] = []
        self.ignored: list[str] = []
        self.aliases: dict[str, str] = {}
        for index, file in enumerate(self.files):
            self._add_file(index, file)
        self._check_index()

    def contents(self) -> Contents:
        return Contents(self.files, list(self.tensors.values()), self.ignored, self.notes, self.aliases)

    def _add_file(self, index: int, file: FileInfo) -> None:
        resident, joint = {}, True
        if file.format == "safetensors":
            try:
                entries, metadata = read_header(file.path)
            except OSError as error:
                raise CheckpointError(f"{file.path} cannot be read ({error.strerror}); check its permissions") from None
            joint = SHARDS not in metadata
        else:
            torch_file = read_torch_file(file.path)
            entries, resident = torch_file.entries, torch_file.resident
            self._tell(file, torch_file)
        for entry in entries:
            self._add_tensor(
                index, entry, file, Resident(resident[entry.name]) if entry.name in resident else Span(), joint
            )

    def _tell(self, file: FileInfo, torch_file: TorchFile) -> None:
        self.ignored.extend(torch_file.ignored)
        self.aliases.update(torch_file.aliases)
        self.notes += [sharing(name, first) for name, first in torch_file.aliases.items()]
        held = sum(tensor.numel() > 0 for tensor in torch_file.resident.values())
        if held:
            self.notes.append(
                f"{held} tensors of {file.path.name} are held in memory (old format, or not contiguous); "
                f"safetensors would be read row by row"
            )

    def _add_tensor(self, index: int, entry: Entry, file: FileInfo, rows: Rows, joint: bool) -> None:
        located = self.located
        shard = located.index.get(entry.name)
        if located.index and shard is None:
            self.notes.append(f"tensor {entry.name} of {file.path.name} is not in the index; it is included")
        if shard is not None and located.root / shard != file.path:
            self.notes.append(f"tensor {entry.name} of {file.path.name} is left out: the index places it in {shard}")
            return
        if entry.name in self.tensors:
            first = self.files[self.tensors[entry.name][0].file].path
            raise CheckpointError(
                f"tensor {entry.name} is both in {first} and in {file.path}; "
                + (
                    "give the one file to be compared, or add an index"
                    if joint
                    else "these are shards of a distributed save: join them with "
                    "torch.distributed.checkpoint's consolidate_safetensors_files"
                )
            )
        info = TensorInfo(entry.name, entry.dtype, entry.shape, entry.nbytes, index, entry.offset)
        self.tensors[entry.name] = info, rows

    def _check_index(self) -> None:
        for name, shard in self.located.index.items():
            if name not in self.tensors:
                raise CheckpointError(
                    f"{self.located.index_path} places tensor {name} in {shard}, which lacks it; "
                    f"download or copy that shard and the index again"
                )
