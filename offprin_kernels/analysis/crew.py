"""Small parts side by side: a core each for as many matrices serves better than all cores for one small matrix.

Eigensolvers and thin products of matrices of a thousand rows hardly gain by a second core, and what lies between them
has one. Parts with a large matrix are made one at a time with all cores, and memory stays what that needs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType

import torch

from .. import _backend
from . import memory
from .plan import Plan


class Crew:
    """Workers for the small parts of a plan, used in a ``with`` statement; every part gets its cores by its size alone.

    So that the results of a part do not depend on what is made beside it.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan = plan
        self.threads, native = torch.get_num_threads(), _backend.threads()
        self.workers = memory.workers(plan.options, min(self.threads, native), device)
        self.share, self.native_share = self.threads // self.workers, native // self.workers
        self.busy: set[Future] = set()
        self.stopping = threading.Event()
        self.pool = ThreadPoolExecutor(self.workers, "part", self.prepare) if self.workers > 1 else None

    def prepare(self) -> None:
        """Of each worker: its share of the cores."""
        torch.set_num_threads(self.share)
        _backend.limit_threads(self.native_share)

    def do(self, index: int, job: Callable[[], None]) -> None:
        """Make a part: here and now, or, if it is small, by a worker; returns once another could be taken on.

        Raises what ``job`` raises, then or later.
        """
        if self.pool is None:
            job()
        elif all(memory.is_small(self.plan.units[unit], self.plan.options) for unit in self.plan.parts[index]):
            self.busy.add(self.pool.submit(self.unless_stopping, job))
            self.finish(self.workers - 1)
        else:
            self.finish(0)
            torch.set_num_threads(self.threads)  # workers share one setting of the product library
            job()

    def unless_stopping(self, job: Callable[[], None]) -> None:
        self.prepare()
        if not self.stopping.is_set():
            job()

    def finish(self, left: int) -> None:
        """Wait until no more than ``left`` parts are under way. Raises what one of them raised."""
        while len(self.busy) > left:
            done, self.busy = wait(self.busy, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()

    def check(self) -> None:
        """Called between two pieces of work; raises in a worker whose part is not wanted any more."""
        if self.stopping.is_set():
            raise Stopped

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pool is None:
            return
        try:
            if error is None:
                self.finish(0)
        finally:
            self.stopping.set()
            self.leave(self.pool)
            torch.set_num_threads(self.threads)

    def leave(self, pool: ThreadPoolExecutor) -> None:
        """Wait for what is under way: a part ends at its next check. However often one interrupts, not before.

        The directory's lock, which the caller holds, must not be given up while a worker writes.
        """
        again: KeyboardInterrupt | None = None
        while True:
            try:
                pool.shutdown()
                break
            except KeyboardInterrupt as interrupt:
                again = interrupt
        if again:
            raise again


class Stopped(Exception):
    """Another part has failed, or the analysis was interrupted."""
