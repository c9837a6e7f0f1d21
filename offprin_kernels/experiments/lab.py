"""Where experiments keep their runs. Two experiments in one directory share what both need: it is trained once."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..training.model import load_checkpoint
from ..training.runs import Run, read_log
from ..training.settings import RLVR, SFT, Common, Pretrain
from ..training.stages import train

# Every run of an experiment has one thread, so that as many run at once as there are cores
FULL: dict[str, dict[str, Any]] = {
    "pretrain": {"threads": 1},
    "rlvr": {"threads": 1},
    "sft": {"threads": 1},
}
SMALL = {"threads": 1, "most": 16, "eval_problems": 32, "tasks": {"sort": [2], "reverse": [2]}}
QUICK: dict[str, dict[str, Any]] = {
    "pretrain": {
        **SMALL, "steps": 150, "batch": 32, "hidden": 64, "layers": 2, "head_dim": 16, "intermediate": 128,
        "eval_every": 150, "save_every": 150,
    },
    "rlvr": {**SMALL, "steps": 4, "prompts": 8, "samples": 4, "eval_every": 4, "save_every": 2, "k": 8},
    "sft": {**SMALL, "steps": 4, "batch": 16, "eval_every": 2, "save_every": 2, "k": 8},
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A run to be had: its directory's name tells what is special about it."""

    name: str
    stage: str
    settings: Common


class Lab:
    """Trains and remembers.

    Args:
        root: of all runs and results.
        quick: seconds instead of minutes per run; shows that an experiment works, and nothing else.
        workers: runs at once.
        base: a checkpoint to tune instead of one made here.
    """

    def __init__(
        self, root: str | Path, *, quick: bool = False, workers: int = 2, base: str = "", quiet: bool = True
    ) -> None:
        if workers < 1:
            raise ValueError(f"at least one run at a time is needed, got {workers}")
        self.root, self.quick, self.workers, self.quiet = Path(root), quick, workers, quiet
        self.profile = QUICK if quick else FULL
        self.given = base
        if base:
            load_checkpoint(base)  # refused now, before anything is written
        self.seeds = (0, 1) if quick else (0, 1, 2)
        self.k = 8 if quick else 16  # of principal subspaces
        self.asked = 64 if quick else 1024  # problems that checkpoints are examined with
        self.one_task = {"sort": [2]} if quick else {"add": [2, 3, 4]}  # for a run on other data

    def base(self) -> str:
        """The checkpoint that everything is tuned from."""
        if not self.given:
            self.run([Job("base", "pretrain", Pretrain(**self.profile["pretrain"]))])
            self.given = str(self.root / "runs" / "base" / "final")
        return self.given

    def rlvr(self, name: str, seed: int, **special: Any) -> Job:
        """A job of reinforcement learning; ``special`` is what differs from the defaults."""
        settings = RLVR(**{"base": self.base(), **self.profile["rlvr"], "seed": seed, **special})
        return Job(f"{name}-seed{seed}", "rlvr", settings)

    def sft(self, name: str, seed: int, **special: Any) -> Job:
        settings = SFT(**{"base": self.base(), **self.profile["sft"], "seed": seed, **special})
        return Job(f"{name}-seed{seed}", "sft", settings)

    def path(self, job: Job) -> Path:
        return self.root / "runs" / job.name

    def run(self, jobs: list[Job]) -> list[Path]:
        """Runs what is not yet complete, several at once; the directories, in order.

        Raises what the first run that failed raised.
        """
        for job in jobs:
            if self.path(job).exists():
                Run(self.path(job), job.stage, job.settings).close()  # refuses a run of other settings
        left = [job for job in {job.name: job for job in jobs}.values() if not (self.path(job) / "final").exists()]
        began = time.monotonic()
        for number, job in enumerate(self.finished(left), 1):
            self.say(f"{job.name} ({number} of {len(left)}, {time.monotonic() - began:.0f} s)")
        return [self.path(job) for job in jobs]

    def finished(self, jobs: list[Job]) -> Iterator[Job]:
        """The jobs as they end: in this process one after the other, or in several at once."""
        if self.workers == 1 or len(jobs) < 2:
            for job in jobs:
                train(job.stage, job.settings, self.path(job))
                yield job
            return
        # fresh processes: threads of PyTorch do not survive a fork
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(self.workers, len(jobs)), mp_context=context) as pool:
            waiting = {pool.submit(train, job.stage, job.settings, self.path(job)): job for job in jobs}
            try:
                for future in as_completed(waiting):
                    future.result()
                    yield waiting[future]
            except BaseException:
                # or what is queued would run first, and what went wrong be told last
                pool.shutdown(cancel_futures=True)
                raise

    def evaluated(self, path: Path) -> float:
        """A run's accuracy at its own last evaluation."""
        return [row["accuracy"] for row in read_log(path) if "accuracy" in row][-1]

    def log(self, path: Path) -> list[dict[str, Any]]:
        return read_log(path)

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def results(self, experiment: str) -> Path:
        path = self.root / experiment
        path.mkdir(parents=True, exist_ok=True)
        return path
