"""A checkpoint opened for reading: the headers are in memory, the weights come row by row."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch

from . import adapter, adapter_config, dcp, dtypes, fsdp_ranks, plain
from .errors import CheckpointError
from .json_file import load_json
from .rows import Contents, Rows, TensorInfo
from .source import Source, locate
from .storage import Files, Slab

__all__ = ["Checkpoint", "TensorInfo"]

IO_MODES = ("auto", "mmap", "read")


class Checkpoint:
    """Tensors of one model, by name. Open with :meth:`open`; usable as a context manager and from several threads.

    Attributes:
        source: what was asked for.
        revision: commit of a hub snapshot, else None.
        root: the directory.
        files: every file that the numbers depend on with size and time, as they were when opened; of an adapter the
            base's files come first.
        tensors: every tensor by its stored name, in file and offset order.
        config: ``config.json``, or an empty dict.
        notes: what a reader should know, one sentence each.
        ignored: entries of a PyTorch checkpoint that are not tensors of the model.
        adapted: the base under a LoRA adapter, else None.
        aliases: names of a PyTorch checkpoint whose bytes are another name's bytes too.
    """

    def __init__(self, source: str, located: Source, contents: Contents, io: str) -> None:
        self.source = source
        self.revision = located.revision
        self.root = located.root
        self.config = _config(self.root) if contents.config is None else contents.config
        self.files = contents.files
        ordered = sorted(contents.tensors, key=lambda found: (found[0].file, found[0].offset))
        self.tensors: dict[str, TensorInfo] = {info.name: info for info, _ in ordered}
        self.notes = contents.notes
        self.ignored = contents.ignored
        self.aliases = contents.aliases
        self.adapted: Checkpoint | None = None
        self._rows: dict[str, Rows] = {info.name: rows for info, rows in ordered}
        self._files = Files(self.files, io)
        self._opened: tuple[Checkpoint, ...] = ()

    @classmethod
    def open(
        cls, source: str | Path, *, io: str = "auto", download: bool = False, base: Checkpoint | None = None
    ) -> Checkpoint:
        """Open a directory, a weight file or its index, or a hub id ``org/name[@revision]``.

        Args:
            source: a directory; a ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file; an ``.index.json``; or a hub
                id, which is looked up in the local cache. A local path wins over a hub id of the same name. A directory
                may hold safetensors or PyTorch files, a distributed checkpoint (``.metadata`` and ``.distcp`` files),
                one file per rank (``model_world_size_N_rank_R.pt``), or a LoRA adapter, which is read as the model that
                merging it into its base would give.
            io: ``"mmap"``, ``"read"``, or ``"auto"``: read on network file systems, map elsewhere.
            download: fetch a hub id with ``huggingface_hub`` first. Nothing else here uses the network.
            base: what a LoRA adapter is merged into; unused by every other source. Where this is itself an adapter on
                the same model, both share that model. Without it the adapter's own ``base_model_name_or_path`` is
                opened, a path or a hub id.

        Raises:
            CheckpointError: nothing there; a file that is corrupt, truncated, incomplete or would run code; a format
                that is known and not read, such as GGUF; an adapter that does not fit its base.
            ValueError: an unknown ``io``.
        """
        if io not in IO_MODES:
            raise ValueError(f"unknown io {io!r}; choose one of {', '.join(IO_MODES)}")
        located = locate(str(source), download)
        if located.format == "peft":
            return cls._open_adapter(str(source), located, io, download, base)
        contents = {"dcp": _load_dcp, "fsdp": _load_ranks}.get(located.format, plain.load)(located)
        if (located.root / adapter_config.CONFIG).is_file():
            contents.notes.append(
                f"{adapter_config.CONFIG} lies beside a whole model, which was read without the adapter"
            )
        return cls(str(source), located, contents, io)

    @classmethod
    def _open_adapter(
        cls, source: str, located: Source, io: str, download: bool, base: Checkpoint | None
    ) -> Checkpoint:
        if base is None:
            base = cls._base_of(located.root, io, download)
            opened = [base]
        else:
            base, opened = _unadapted(located.root, base), []
        whole = Source(located.root, None, located.paths, plain.format_of(located.paths[0]))
        factors = cls(source, whole, plain.load(whole), io)
        found = cls(source, located, adapter.load(located.root, factors, base), io)
        found.adapted, found._opened = base, (factors, *opened)
        return found

    @classmethod
    def _base_of(cls, root: Path, io: str, download: bool) -> Checkpoint:
        name = adapter_config.base_source(root)
        if name is None:
            raise CheckpointError(f"{root} is an adapter that names no base; give the base, or {adapter_config.MERGE}")
        try:
            inner = locate(name, download)
        except CheckpointError as error:
            raise CheckpointError(f"{root} is an adapter on {name}, which is needed to read it: {error}") from None
        if inner.format == "peft":
            raise CheckpointError(f"{root} is an adapter on {name}, itself an adapter; {adapter_config.MERGE}")
        return cls.open(name, io=io, download=download)

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
        if info.dtype not in dtypes.TORCH:
            raise CheckpointError(f"{self.path_of(name)}: tensor {name} has dtype {info.dtype}, which cannot be read")
        stop = info.rows if stop_row is None else stop_row
        if not 0 <= start_row <= stop <= info.rows:
            raise IndexError(f"rows {start_row} to {stop} of {name}, which has {info.rows}")
        return self._rows[name].read(self._files, info, start_row, stop, slab)

    def info(self, name: str) -> TensorInfo:
        """Raises CheckpointError where there is no such tensor."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.root} has no tensor {name}; check the name") from None

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor, of one in several pieces that of its first rows."""
        return self.files[self.info(name).file].path

    def close(self) -> None:
        """Close the files, of an adapter also those of a base that was opened with it.

        Slabs already read stay valid; a later read opens its file again.
        """
        for checkpoint in self._opened:
            checkpoint.close()
        self._files.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _load_dcp(located: Source) -> Contents:
    return dcp.load(located.root)


def _load_ranks(located: Source) -> Contents:
    return fsdp_ranks.load(located.paths)


def _config(root: Path) -> dict[str, object]:
    """``config.json``, also from the folder in which verl puts it; empty where there is none."""
    path = next((path for path in (root / "config.json", root / "huggingface" / "config.json") if path.is_file()), None)
    return load_json(path) if path else {}


def _unadapted(root: Path, base: Checkpoint) -> Checkpoint:
    """The model to merge an adapter into, where the base that was given may be an adapter too."""
    if base.adapted is None:
        return base
    name, other = adapter_config.base_source(root), adapter_config.base_source(base.root)
    if name is not None and (name == other or _one_commit(root, base.root)):
        return base.adapted
    if name is not None and Path(name).expanduser().resolve() == base.root.resolve():
        return base
    raise CheckpointError(
        f"{root} is an adapter on {name}, and its base was to be {base.root}, an adapter on {other}; "
        f"give both on one model, or {adapter_config.MERGE}"
    )


def _one_commit(root: Path, other: Path) -> bool:
    """Whether two adapters name one base, by revisions that are one commit in the local cache."""
    if adapter_config.base_name(root) != adapter_config.base_name(other):
        return False
    found = [
        adapter.commit_of(adapter_config.base_name(folder) or "", adapter_config.base_revision(folder))
        for folder in (root, other)
    ]
    return found[0] is not None and found[0] == found[1]
