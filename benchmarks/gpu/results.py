"""The result file of a device: runs that are never mixed, slices that are added one by one, written whole or not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offprin_kernels.checkpoint.write import atomic_write_bytes
from offprin_kernels.output import OutputError, dump, read_json, strict

FOLDER = Path(__file__).resolve().parents[1] / "results"
FORMAT = 1
STATUSES = ("ok", "failed", "skipped", "partial")


@dataclass(frozen=True)
class Identity:
    """What results must share to stand in one run."""

    device: str
    driver: str
    versions: dict[str, str | None]
    date: str

    def of_run(self) -> dict[str, Any]:
        return {"date": self.date, "driver": self.driver, "versions": self.versions}


def path_for(device: str, folder: Path = FOLDER) -> Path:
    return folder / f"gpu-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def read(path: Path) -> dict[str, Any]:
    """A result file. Raises OutputError where it is none."""
    found = read_json(path, "restore it or move it away")
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("runs"), list):
        raise OutputError(f"{path} is not a result file of format {FORMAT}; move it away")
    return found


class Results:
    """The run of one identity in the file of its device."""

    def __init__(self, identity: Identity, properties: dict[str, Any] | None = None, folder: Path = FOLDER) -> None:
        self.identity, self.properties = identity, properties or {}
        self.path = path_for(identity.device, folder)

    def tell(self) -> dict[str, Any]:
        """What :meth:`told` makes the same of in another process."""
        folder = str(self.path.parent.resolve())
        return {"identity": asdict(self.identity), "properties": self.properties, "folder": folder}

    @classmethod
    def told(cls, said: Mapping[str, Any]) -> Results:
        return cls(Identity(**said["identity"]), said["properties"], Path(said["folder"]))

    def _file(self) -> dict[str, Any]:
        if not self.path.exists():
            return {"format": FORMAT, "device": self.identity.device, "runs": []}
        found = read(self.path)
        if found["device"] != self.identity.device:
            raise OutputError(f"{self.path} is of {found['device']}, not of {self.identity.device}; move it away")
        return found

    def _run(self, file: dict[str, Any]) -> dict[str, Any] | None:
        own = self.identity.of_run()
        return next((run for run in file["runs"] if {key: run.get(key) for key in own} == own), None)

    def slices(self) -> dict[str, dict[str, Any]]:
        """What has been found under this identity."""
        run = self._run(self._file())
        return {} if run is None else run["slices"]

    def add(self, name: str, outcome: dict[str, Any]) -> None:
        """Store one slice's outcome. The file before stays as it was until the new one is on the disk."""
        if outcome.get("status") not in STATUSES:
            raise ValueError(f"status of slice {name!r} is {outcome.get('status')!r}, none of {', '.join(STATUSES)}")
        file = self._file()
        run = self._run(file)
        if run is None:
            run = {**self.identity.of_run(), "properties": self.properties, "slices": {}}
            file["runs"].append(run)
        run["slices"][name] = json.loads(json.dumps(strict(outcome)))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(self.path, dump(file))
