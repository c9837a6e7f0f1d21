"""What ``torch.save`` writes, read without torch: a zip of one pickle and the bytes of each storage, uncompressed.

The zip may be a file of its own or, in a distributed checkpoint, lie somewhere inside a file.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from . import dtypes, inert
from .inert import Record

LOCAL_HEADER = 30  # bytes before name and extra field of a zip member
OLD_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # the pickle that such a file begins with
REBUILD = "torch._utils._rebuild_"
TENSORS = frozenset(
    {
        *(f"{REBUILD}{name}" for name in ("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state")),
        *(
            f"torch.{kind}Storage"
            for kind in "BFloat16 Half Float Double Char Byte Short Int Long Bool ComplexFloat ComplexDouble".split()
        ),
        "torch.storage.UntypedStorage",
        "torch.serialization._get_layout",
        "torch.device",
    }
)
STORAGES = {
    "torch.BFloat16Storage": "BF16",
    "torch.HalfStorage": "F16",
    "torch.FloatStorage": "F32",
    "torch.DoubleStorage": "F64",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.ShortStorage": "I16",
    "torch.IntStorage": "I32",
    "torch.LongStorage": "I64",
    "torch.BoolStorage": "BOOL",
    "torch.ComplexFloatStorage": "C64",
    "torch.ComplexDoubleStorage": "torch.complex128",
}
EXPANDED = 1 << 20  # bytes that a tensor of fewer stored numbers may come to


class NotPlain(ValueError):
    """A tensor that is more than numbers in their places, or a file of another format; the message says which."""


class Stored(NamedTuple):
    """A tensor of a zip: ``offset`` and ``strides`` count elements within its storage."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    key: str
    offset: int

    @property
    def contiguous(self) -> bool:
        return 0 in self.shape or self.strides == row_major(self.shape, self.strides)


class Storage(NamedTuple):
    """A storage that a pickle refers to; ``dtype`` is None for one of plain bytes."""

    dtype: str | None
    key: str


class Zip:
    """The members of a ``torch.save`` zip that takes ``length`` bytes of a file from byte ``start``.

    Raises:
        OSError, or any of ``torch_file.DAMAGE``: not such a zip.
    """

    def __init__(self, path: Path, start: int = 0, length: int | None = None) -> None:
        self.start = start
        _check_format(path, start)
        with _Part(path, start, length) as part, zipfile.ZipFile(cast(BinaryIO, part)) as archive:
            # Not read by zipfile, which insists on checksums that torch can be told to leave out.
            places = {info.filename.partition("/")[2]: (_place(part, info), info) for info in archive.infolist()}
            if "byteorder" in places and _member(part, places["byteorder"]).strip() != b"little":
                raise ValueError("its bytes are in big-endian order")
            self.pickle = _member(part, places["data.pkl"])
        data = {name[5:]: found for name, found in places.items() if name.startswith("data/")}
        self._crc = {key: info.CRC for key, (_, info) in data.items()}
        self._data = {key: (start + begin, info.file_size) for key, (begin, info) in data.items()}

    def load(self, allowed: frozenset[str] = frozenset()) -> object:
        """The pickle as records; tensors are records of ``_rebuild_...``, see :func:`tensor_of`."""
        return inert.Unpickler(io.BytesIO(self.pickle), allowed | TENSORS, _storage).load()

    def place(self, stored: Stored) -> int:
        """Where in the file a tensor's first element lies. Raises ValueError where its bytes are not all there."""
        begin, size = self._range(stored)
        item = dtypes.BITS[stored.dtype] // 8
        last = sum((length - 1) * stride for length, stride in zip(stored.shape, stored.strides, strict=True))
        if 0 not in stored.shape and (stored.offset + last + 1) * item > size:
            raise ValueError(f"its storage {stored.key[:80]!a} has {size} bytes, too few for {list(stored.shape)}")
        if math.prod(stored.shape) * item > max(size, EXPANDED):
            raise ValueError(f"its storage {stored.key[:80]!a} has {size} bytes, repeated to {list(stored.shape)}")
        return begin + stored.offset * item

    def checksum(self, stored: Stored) -> int | None:
        """The checksum of a tensor's bytes; None where it was left out (as a 0) or is that of a larger storage."""
        whole = stored.contiguous and self._range(stored)[1] == dtypes.byte_size(stored.dtype, stored.shape)
        return self._crc[stored.key] or None if whole else None

    def _range(self, stored: Stored) -> tuple[int, int]:
        if stored.key not in self._data:
            raise ValueError(f"its storage {stored.key[:80]!a} is not in the file")
        return self._data[stored.key]


def _check_format(path: Path, start: int) -> None:
    """Raises NotPlain for the formats that are written in place of a zip."""
    with open(path, "rb") as file:
        file.seek(start)
        head = file.read(len(OLD_MAGIC))
    if head == OLD_MAGIC:
        raise NotPlain("it is in torch's old format, which is no zip; load it and save it again with torch.save")
    if head[8:9] == b"{" and head[:4] != b"PK\x03\x04":
        raise NotPlain("it is written as safetensors; save the checkpoint in torch's own serialization format")


def _place(part: _Part, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin, which only its own header tells."""
    part.seek(info.header_offset)
    header = part.read(LOCAL_HEADER) or b""
    if header[:4] != b"PK\x03\x04" or info.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"member {info.filename[:80]!a} is damaged or compressed")
    name, extra = struct.unpack("<HH", header[26:30])
    begin = info.header_offset + LOCAL_HEADER + name + extra
    if begin + info.file_size > part.length:
        raise zipfile.BadZipFile(f"member {info.filename[:80]!a} reaches beyond its end")
    return begin


def _member(part: _Part, place: tuple[int, zipfile.ZipInfo]) -> bytes:
    begin, info = place
    part.seek(begin)
    content = bytearray(info.file_size)
    done = 0
    while done < len(content):
        got = part.readinto(memoryview(content)[done:])
        if not got:
            raise EOFError("the file became shorter while it was read")
        done += got
    return bytes(content)


class _Part(io.RawIOBase):
    """Bytes [start, start + length) of a file as a file of their own."""

    def __init__(self, path: Path, start: int, length: int | None) -> None:
        # Unbuffered: a buffer would read pages of weights around every header.
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        size = self._file.seek(0, io.SEEK_END)
        self._start = start
        self.length = size - start if length is None else length
        self._position = 0
        if start + self.length > size or self.length < 0:
            self._file.close()
            raise ValueError(f"it should reach to byte {start + self.length} and the file has {size}")

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.length}[whence]
        if origin + offset < 0:
            raise ValueError("a position before its beginning")
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self.length - self._position))
        self._file.seek(self._start + self._position)
        got = self._file.readinto(memoryview(buffer)[:count]) or 0
        self._position += got
        return got

    def close(self) -> None:
        self._file.close()
        super().close()


def row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor; a dimension of size 1 keeps the stride that it has."""
    expected = []
    for position, size in enumerate(shape):
        expected.append(strides[position] if size == 1 else math.prod(shape[position + 1 :]))
    return tuple(expected)


def tensor_of(value: object) -> Stored | None:
    """The tensor (or parameter) that a record describes, None where it is none; its dtype may be one without numbers.

    Raises:
        ValueError: a malformed one.
    """
    if not isinstance(value, Record) or not value.name.startswith(REBUILD):
        return None
    kind = value.name.removeprefix(REBUILD)
    if kind.startswith("parameter"):
        return tensor_of(value.args[0]) if value.args else None
    if kind not in ("tensor", "tensor_v2", "tensor_v3"):
        return None
    if len(value.args) < 4:
        raise ValueError("a tensor without shape and strides")
    storage, offset, shape, strides = value.args[:4]
    shape, strides = inert.sizes_of(shape), inert.sizes_of(strides)
    if not isinstance(storage, Storage) or inert.sizes_of([offset]) is None or shape is None or strides is None:
        raise ValueError("a tensor whose storage, shape or strides are none")
    dtype = inert.tag_of(value.args[6]) if kind == "tensor_v3" and len(value.args) > 6 else storage.dtype
    if dtype is None or len(shape) != len(strides):
        raise ValueError(f"a tensor of dtype {dtype}, {len(shape)} sizes and {len(strides)} strides")
    extra = value.args[7 if kind == "tensor_v3" else 6 :]
    for bit in ("neg", "conj"):
        if extra and isinstance(extra[0], dict) and extra[0].get(bit):
            raise NotPlain(f"a tensor is stored with its {bit} bit set; save it after resolve_{bit}()")
    return Stored(dtype, shape, strides, storage.key, offset)


def _storage(pid: tuple) -> Storage:
    # ("storage", class, key, device, elements)
    if len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[2], str):
        raise inert.Forbidden("a reference that is no storage")
    name = pid[1].name if isinstance(pid[1], type) and issubclass(pid[1], Record) else ""
    return Storage(STORAGES.get(name), pid[2])
