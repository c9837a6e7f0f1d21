"""Hub ids: resolved in the local cache, by its own layout and environment variables, and never over the network."""

from __future__ import annotations

import socket
import sys
import types
from pathlib import Path

import pytest

from offprin_kernels.checkpoint import Checkpoint, CheckpointError, hub

from .files import bf16, save

COMMIT = "0123456789abcdef0123456789abcdef01234567"
VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def fill(cache: Path, repo: str = "org/name", commit: str = COMMIT, refs: tuple[str, ...] = ("main",)) -> None:
    """A cache entry as the hub client lays it out: blobs, and a snapshot of symlinks to them."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    blob = save(folder / "made", {"w": bf16(4, 4)}) / "model.safetensors"
    (folder / "blobs").mkdir()
    blob.rename(folder / "blobs" / "abc")
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    for ref in refs:
        reference = folder / "refs" / ref
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)


@pytest.mark.parametrize(
    ("variable", "below"),
    [("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")],
)
def test_cache_of_each_environment_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, below: str
) -> None:
    fill(tmp_path / "there" / below)
    monkeypatch.setenv(variable, str(tmp_path / "there"))
    checkpoint = Checkpoint.open("org/name")
    assert checkpoint.revision == COMMIT and list(checkpoint.tensors) == ["w"]


def test_default_cache_and_earlier_variables_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.cache_directory() == tmp_path / "home" / ".cache" / "huggingface" / "hub"
    for variable in reversed(VARIABLES):
        monkeypatch.setenv(variable, f"~/{variable}")
        assert str(hub.cache_directory()).startswith(str(tmp_path / "home" / variable))


def test_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    fill(tmp_path / "cache", refs=("v1.0", "refs/pr/7"))
    for revision in ("v1.0", "refs/pr/7", COMMIT):
        assert Checkpoint.open(f"org/name@{revision}").revision == COMMIT
    with pytest.raises(CheckpointError, match=r"models--org--name has no revision main; .* --download"):
        Checkpoint.open("org/name")
    with pytest.raises(CheckpointError, match="has no revision v2"):
        Checkpoint.open("org/name@v2")
    with pytest.raises(CheckpointError, match="no file or directory"):
        Checkpoint.open("org/name@../../refs")


def test_missing_entry_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open("org/other")
    message = str(caught.value)
    assert str(tmp_path / "cache" / "models--org--other") in message
    assert "--download" in message and "give a path" in message and "\n" not in message


def test_half_downloaded_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    fill(tmp_path / "cache")
    (tmp_path / "cache" / "models--org--name" / "blobs" / "abc").unlink()
    with pytest.raises(CheckpointError):
        Checkpoint.open("org/name")


def test_local_directory_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    fill(tmp_path / "cache")
    save(tmp_path / "org" / "name", {"mine": bf16(1, 1)})
    assert list(Checkpoint.open("org/name").tensors) == ["mine"]


def client(monkeypatch: pytest.MonkeyPatch, download) -> None:
    errors = types.ModuleType("huggingface_hub.errors")
    errors.HfHubHTTPError = type("HfHubHTTPError", (Exception,), {})
    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = download
    module.errors = errors
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)


def test_download_through_the_hub_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, "*.safetensors" in allow_patterns))
        return str(save(tmp_path / "snapshots" / COMMIT, {"w": bf16(2, 2)}))

    client(monkeypatch, download)
    assert Checkpoint.open("org/name@v1", download=True).revision == COMMIT
    assert asked == [("org/name", "v1", True)]


def test_download_that_fails_and_client_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise sys.modules["huggingface_hub.errors"].HfHubHTTPError("404 Client Error\nmore")

    client(monkeypatch, download)
    with pytest.raises(CheckpointError, match=r"download of org/name at revision main failed \(404 Client Error\);"):
        Checkpoint.open("org/name", download=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        Checkpoint.open("org/name", download=True)
