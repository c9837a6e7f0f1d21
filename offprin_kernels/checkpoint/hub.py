"""Hugging Face hub ids, resolved in the local cache; the network is used only where a download was asked for."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import CheckpointError

HUB_ID = re.compile(r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")
LONGEST_ID = 250  # the hub allows 96 for the name; no file system holds a folder name of more
WEIGHTS = ("*.safetensors", "*.json")
OLD_WEIGHTS = ("*.bin", "*.json")


def cache_directory() -> Path:
    """The hub cache, from HF_HUB_CACHE, HUGGINGFACE_HUB_CACHE, HF_HOME, XDG_CACHE_HOME or the home directory."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.path.expanduser(os.environ[variable]))
    if os.environ.get("HF_HOME"):
        return Path(os.path.expanduser(os.environ["HF_HOME"])) / "hub"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(cache)) / "huggingface" / "hub"


def resolve(source: str, download: bool) -> tuple[Path, str]:
    """Snapshot directory and commit of ``org/name`` or ``org/name@revision``.

    Raises:
        CheckpointError: not a hub id, not in the cache, or a download that failed.
    """
    match = HUB_ID.fullmatch(source)
    if match is None or ".." in source or len(source) > LONGEST_ID:
        raise CheckpointError(f"no file or directory {source[:LONGEST_ID]!r}; check the path")
    repo, revision = match["repo"], match["revision"] or "main"
    if download:
        snapshot = _download(repo, revision)
        return snapshot, snapshot.name
    folder = cache_directory() / f"models--{repo.replace('/', '--')}"
    reference = folder / "refs" / revision
    try:
        commit = reference.read_text().strip() if os.path.isfile(reference) else revision
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{reference} cannot be read ({error}); fetch the model again with --download") from None
    snapshot = folder / "snapshots" / commit
    if "/" in commit or not commit or not os.path.isdir(snapshot):
        where = f"{folder} has no revision {revision}" if os.path.isdir(folder) else f"there is no {folder}"
        raise CheckpointError(
            f"no file or directory {source}, and in the local hub cache {where}; "
            f"give a path, or fetch the model with --download"
        )
    return snapshot, commit


def _download(repo: str, revision: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise CheckpointError(
            f"downloading {repo} needs huggingface_hub; pip install huggingface_hub, or give a local path"
        ) from None
    try:
        path = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(WEIGHTS)))
        if not any(path.glob("*.safetensors")):
            path = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(OLD_WEIGHTS)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"download of {repo} at revision {revision} failed ({reason}); "
            f"check the name, the connection and, for gated models, your access token"
        ) from None
    return path
