"""The header parser: agrees with the safetensors library on good files, and refuses every bad one in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from offprin_kernels.checkpoint import Checkpoint, CheckpointError
from offprin_kernels.checkpoint.safetensors_file import read_header

from .files import raw, refused

ONE = {"w": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}


def entry(**changes: object) -> dict:
    return {"w": {**ONE["w"], **changes}}


BAD = {
    "empty": (b"", "truncated"),
    "half_length": (b"\x01\x02", "truncated"),
    "length_beyond_file": ((1000).to_bytes(8, "little") + b"{}", "header takes 1008 bytes"),
    "absurd_length": ((1 << 60).to_bytes(8, "little"), "not a safetensors file"),
    "not_json": (raw(b"hello"), "not readable as JSON"),
    "not_utf8": (raw(b"\xff\xfe{}"), "not readable as JSON"),
    "deep_json": (raw(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "not readable as JSON"),
    "not_object": (raw([1]), "not a JSON object"),
    "duplicate": (
        raw(
            b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
        ),
        "w appears twice",
    ),
    "metadata": (raw({"__metadata__": 3}), "__metadata__"),
    "surrogate": (
        raw(b'{"a\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
        "tensor name 'a\\ud800' is no text",
    ),
    "no_shape": (raw({"w": {"dtype": "BF16", "data_offsets": [0, 8]}}, bytes(8)), "tensor w lacks"),
    "not_a_tensor": (raw({"w": 5}), "tensor w lacks"),
    "dtype_number": (raw(entry(dtype=5), bytes(8)), "tensor w has a dtype"),
    "negative_shape": (raw(entry(shape=[-2, -2]), bytes(8)), "tensor w has shape"),
    "bool_shape": (raw(entry(shape=[True, 4]), bytes(8)), "tensor w has shape"),
    "float_shape": (raw(entry(shape=[2.0, 2]), bytes(8)), "tensor w has shape"),
    "three_offsets": (raw(entry(data_offsets=[0, 4, 8]), bytes(8)), "tensor w has offsets"),
    "backwards": (raw(entry(data_offsets=[8, 0]), bytes(8)), "tensor w ends at byte 0 before"),
    "wrong_bytes": (raw(entry(shape=[2, 3]), bytes(8)), "needs 12 bytes and has 8"),
    "half_byte": (raw(entry(dtype="F4", shape=[3], data_offsets=[0, 1]), b"0"), "not whole bytes"),
    "truncated_data": (raw(ONE, bytes(7)), "truncated: tensor w"),
    "trailing": (raw(ONE, bytes(9)), "1 bytes follow"),
    "gap": (raw(entry(data_offsets=[1, 9]), bytes(9)), "tensor w leaves a gap"),
    "overlap": (raw({**ONE, "v": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [4, 12]}}, bytes(12)), "overlaps"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_refused_by_name(tmp_path: Path, case: str) -> None:
    content, expected = BAD[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    message = str(caught.value)
    assert expected in message and str(path) in message and "download or copy this file again" in message
    assert "\n" not in message


def library_accepts(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except SafetensorError:
        return False


GOOD = save({"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)})


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_raise_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(len(content) - 30, len(content)))]
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content)
    message = refused(lambda: read_header(path))
    assert message is None or str(path) in message
    if message is not None:
        return
    entries, _ = read_header(path)
    assert sum(item.nbytes for item in entries) + entries[0].offset == len(content)


SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4))
JSON = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["BF16", "F32", "F4", "U8", "X9"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 20), min_size=2, max_size=2) | JSON,
    },
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), FIELDS | JSON), st.integers(0, 20))
def test_no_header_is_accepted_that_the_library_refuses(
    tmp_path_factory: pytest.TempPathFactory, header: dict, size: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(raw(json.dumps(header).encode(), bytes(size)))
    try:
        entries, _ = read_header(path)
    except CheckpointError:
        return
    # Only a dtype that is unknown to the library, and metadata that are not strings, are taken more gently.
    known = {"BF16", "F32", "U8"}
    strings = all(isinstance(value, str) for value in header.get("__metadata__", {}).values())
    if strings and all(item.dtype in known for item in entries):
        assert library_accepts(path)


def test_unknown_dtype_opens_and_only_that_tensor_is_refused(tmp_path: Path) -> None:
    header = {
        "new": {"dtype": "F7_NEW", "shape": [4], "data_offsets": [0, 4]},
        "old": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [4, 8]},
    }
    (tmp_path / "model.safetensors").write_bytes(raw(header, bytes(4) + b"\x80\x3f\x80\x3f"))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensors["new"].dtype == "F7_NEW"
    assert checkpoint.read("old").tolist() == [[1.0, 1.0]]
    with pytest.raises(CheckpointError, match="tensor new has dtype F7_NEW"):
        checkpoint.read("new")
