"""The directory of a run: its settings, its log, its checkpoints, and where it goes on after an interruption.

settings.json        what it was started with
log.jsonl            a line per step
state.pt             weights in full precision, optimizer, step; the newest only
step-00020/          a Hugging Face checkpoint in bf16
final/               the last one; where it is, the run is complete
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.write import atomic_write_bytes
from ..output import LOCK, OutputError, dump, lock, read_json, strict
from .adapters import merged
from .model import save_checkpoint
from .settings import Common

# What progress shows of a row of the log
SHOWN = {"loss": ".3f", "reward": "+.3f", "accuracy": ".3f", "kl_base": ".4f", "visible_fraction": ".4f"}


class Run:
    """One stage in one directory.

    Args:
        root: made where it does not exist; goes on where it holds this very run.
        quiet: no progress on stderr.

    Raises:
        OutputError: the directory holds something else, or another run, or a process is at work in it.
    """

    def __init__(self, root: str | Path, stage: str, settings: Common, *, quiet: bool = True) -> None:
        self.root, self.stage, self.settings, self.quiet = Path(root), stage, settings, quiet
        wanted = described(stage, settings)
        self.check(wanted)
        self.root.mkdir(parents=True, exist_ok=True)
        self.descriptor = lock(self.root)
        try:
            # once more: a process that was here until now may have made another run
            self.check(wanted)
            for unfinished in self.root.glob(".*.tmp"):
                unfinished.unlink()
            if not (self.root / "settings.json").exists():
                atomic_write_bytes(self.root / "settings.json", dump(wanted))
        except BaseException:
            self.close()
            raise
        self.done = 0  # steps taken
        self.stopped = False  # before the last step, because the target was met
        self.started, self.first = time.monotonic(), 0
        self.last: dict[str, Any] = {}

    def check(self, wanted: dict[str, Any]) -> None:
        """Raises OutputError where the directory holds something else."""
        path = self.root / "settings.json"
        if path.exists():
            held = read_json(path, "choose another --out")
            # not by their places: a lab may be moved
            keys = {*held, *wanted} - {"base", "masks"}
            different = sorted(key for key in keys if held.get(key) != wanted.get(key))
            if different:
                raise OutputError(
                    f"{self.root} holds another run, which differs in {', '.join(different)}; choose another --out"
                )
        elif self.root.exists() and (not self.root.is_dir() or any(map(foreign, self.root.iterdir()))):
            raise OutputError(f"{self.root} exists and is no run of `offprin train`; choose another --out")

    @property
    def complete(self) -> bool:
        return (self.root / "final").exists()

    def close(self) -> None:
        """Let other processes in."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def resume(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take model and optimizer to where the run was saved last, and the log with them."""
        path, log, kept = self.root / "state.pt", self.root / "log.jsonl", 0
        if path.exists():
            state = torch.load(path, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            self.done, self.stopped, kept = state["step"], state["stopped"], state["log_bytes"]
        with open(log, "ab") as file:
            file.truncate(kept)
        self.started, self.first = time.monotonic(), self.done

    def steps(self) -> Iterator[int]:
        """The steps that are left, from 0."""
        while self.done < self.settings.steps and not self.stopped:
            yield self.done

    def due(self, every: int) -> bool:
        """Whether something done every so many steps is due after this one."""
        return (self.done + 1) % every == 0 or self.done + 1 == self.settings.steps

    def finish_step(
        self, row: dict[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer, stop: bool = False
    ) -> None:
        """Log a step, show it, and save where that is due."""
        due = self.due(self.settings.save_every) or stop
        self.done, self.stopped = self.done + 1, stop
        with open(self.root / "log.jsonl", "a") as file:
            file.write(json.dumps(strict({"step": self.done, **row}), allow_nan=False) + "\n")
        self.last |= row
        self.show()
        if due:
            self.save(model, optimizer)

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        save_checkpoint(merged(model), self.root / f"step-{self.done:05d}")
        buffer = io.BytesIO()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": self.done}
        bytes_logged = (self.root / "log.jsonl").stat().st_size
        torch.save({**state, "stopped": self.stopped, "log_bytes": bytes_logged}, buffer)
        atomic_write_bytes(self.root / "state.pt", buffer.getvalue())

    def show(self) -> None:
        """One line on stderr: rewritten on a terminal, every tenth step elsewhere."""
        if self.quiet:
            return
        terminal = sys.stderr.isatty()
        if not terminal and self.done % 10 and self.done < self.settings.steps and not self.stopped:
            return
        spent = time.monotonic() - self.started
        left = spent / (self.done - self.first) * (self.settings.steps - self.done)
        values = " ".join(f"{key} {self.last[key]:{form}}" for key, form in SHOWN.items() if key in self.last)
        rate = f"{self.last['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in self.last else ""
        text = f"{self.stage} {self.done}/{self.settings.steps} {values} {rate}, {left:.0f} s left"
        print(f"\r{text}\x1b[K" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)
        if terminal and (self.done == self.settings.steps or self.stopped):
            print(file=sys.stderr)


def foreign(path: Path) -> bool:
    """Whether a file is none of those that a run has before its settings; a kill may leave those half-written."""
    return path.name != LOCK and not (path.name.startswith(".settings.json.") and path.suffix == ".tmp")


def described(stage: str, settings: Common) -> dict[str, Any]:
    """What tells one run from another, as JSON holds it; the weights and masks it starts from by their contents."""
    found = {"stage": stage, **json.loads(json.dumps(asdict(settings), default=list))}
    for name in ("base", "masks"):
        if found.get(name):
            found[f"{name}_sha256"] = digest(Path(found[name]))
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a directory's safetensors files."""
    content = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        content.update(file.read_bytes())
    return content.hexdigest()


def read_log(root: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's log."""
    return [json.loads(line) for line in (Path(root) / "log.jsonl").read_text().splitlines()]
