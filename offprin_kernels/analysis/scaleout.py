"""Who does which part: one process all of them, shards a fixed share each, the processes of a group whatever is next.

No process needs to know what another found. Parts are claimed, largest first, through the key-value store by which
torchrun's processes meet; no collective is used, so that a slow process holds up no other.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol

from ..output import OutputError
from .plan import Plan

# How often a process that waits looks.
PATIENCE = 0.05
# Seconds between two signs of life of a process, and without one until it is taken for dead.
BEAT, SILENCE = 2.0, 60.0
# How long a process that ends waits for a sign of life under way, in seconds.
STOPPING = 10.0
# How long rank 0, which may host the store, waits for the others to hear that it leaves, in seconds; after a failure
# they may be in the middle of a part.
FAREWELL, FAREWELL_AFTER_FAILURE = 30.0, 2.0


class Claims(Protocol):
    """The parts that this process makes, in order, claimed one by one."""

    def __call__(self, plan: Plan) -> Iterator[int]: ...


def alone(plan: Plan) -> Iterator[int]:
    """All parts: in the order of the files, or, where computing takes longer than reading, as :func:`by_cost`."""
    yield from by_cost(plan) if plan.options.metrics else range(len(plan.parts))


def by_cost(plan: Plan) -> list[int]:
    """Parts, the most expensive first: what is claimed last is small, and no process waits long for another."""
    return sorted(range(len(plan.parts)), key=lambda index: (-plan.part_cost(index), index))


@dataclass(frozen=True)
class Shard:
    """One of ``count`` processes that never meet, such as the tasks of a job array; ``index`` counts from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``i/n``. Raises ValueError for anything else."""
        first, slash, second = text.partition("/")
        if not (slash and first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
            raise ValueError(f"--shard {text}: give i/n with 1 <= i <= n, such as 1/8 to 8/8")
        return cls(int(first), int(second))

    def __call__(self, plan: Plan) -> Iterator[int]:
        """A fixed share of about equal cost: each part, largest first, goes to the shard with least so far."""
        loads = [0.0] * self.count
        for index in by_cost(plan):
            least = loads.index(min(loads))
            loads[least] += plan.part_cost(index)
            if least == self.index - 1:
                yield index


class Group:
    """The processes that torchrun started, meeting in its store. Rank 0 holds the directory and finishes.

    Not a torch.distributed process group: nothing is exchanged but keys. Used in a ``with`` statement around all that a
    process has to do: a failure is then every process's, and the others leave no sooner than rank 0 has printed its
    report, because launchers end what still runs when one process ends badly.

    A thread gives signs of life meanwhile. Of a process without any, rank 0 makes the missing parts itself.
    """

    def __init__(self, rank: int, world: int, store: Any) -> None:
        self.rank, self.world, self.store = rank, world, store
        self.silent: list[int] = []  # ranks that rank 0 has waited for in vain
        self._failed, self._gone = False, ""
        self._heard: dict[int, tuple[int, float]] = {}  # rank: signs of life, and when the last one was new
        # bytes of weights: dealt with here, told to the store, dealt with by all, shown
        self._here = self._told = self._all = self._shown = 0
        self._total, self._bar = 0, None  # type: int, Callable[[int], None] | None
        self._beating, self._end = threading.Lock(), threading.Event()
        self._heart = threading.Thread(target=self._live, name="heartbeat", daemon=True)
        self._heart.start()
        # a thread inside the store while Python ends would abort the process
        atexit.register(self.stop)

    @classmethod
    def from_environment(cls) -> Group | None:
        """The group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or None.

        Raises OutputError where the others do not come.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return None
        import torch.distributed as dist

        try:
            store, rank, world = next(iter(dist.rendezvous("env://", timeout=timedelta(minutes=10))))
        except RuntimeError as error:
            raise OutputError(f"the processes did not meet ({first_line(error)})") from None
        # torchrun may start all processes again in the same store
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(rank, world, dist.PrefixStore(f"offprin/{attempt}", store))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def ask(self, what: str, *arguments: Any) -> Any:
        """A call of the store. Raises OutputError where it is gone."""
        if not self._gone:
            try:
                return getattr(self.store, what)(*arguments)
            except RuntimeError as error:  # DistError is one
                self._gone = f"rank 0 or torchrun's store is gone ({first_line(error)})"
        # not asked again: torch prints a trace each time
        raise OutputError(self._gone)

    # ---- how far rank 0 is, and failures

    def tell(self, state: str, detail: str = "") -> None:
        """Rank 0 says how far it is: ``open``, ``finished``, ``left``."""
        self.ask("set", state, detail)

    def reached(self, state: str) -> bool:
        return self.ask("check", [state])

    def fail(self, error: BaseException) -> None:
        """Say why this process ends, so that all do. The first failure is the one that all name."""
        self._failed = True
        why = "interrupted" if isinstance(error, KeyboardInterrupt) else first_line(error)
        with contextlib.suppress(OutputError):
            self.ask("compare_set", "failed", "", f"rank {self.rank} failed: {why}")

    def check(self) -> None:
        """Raise OutputError where a process has failed."""
        if self.reached("failed"):
            raise OutputError(self.ask("get", "failed").decode())

    def wait_for(self, state: str) -> str | None:
        """What rank 0 said of a state; None where it has finished already. Raises OutputError where one has failed."""
        while True:
            self.check()
            for found in ("finished", state):
                if self.reached(found):
                    return self.ask("get", state).decode() if found == state else None
            if self.is_silent(0):
                raise OutputError(f"rank 0 has shown no sign of life for {SILENCE:.0f} s; the same command continues")
            time.sleep(PATIENCE)

    def is_silent(self, rank: int) -> bool:
        """Whether a process has given no sign of life for SILENCE seconds, by the clock of the one that asks."""
        beats, now = self.ask("add", f"beat/{rank}", 0), time.monotonic()
        if rank not in self._heard or self._heard[rank][0] != beats:
            self._heard[rank] = (beats, now)
        return now - self._heard[rank][1] > SILENCE

    def _live(self) -> None:
        while not self._end.wait(BEAT):
            try:
                self.beat()
            except OutputError:  # the process itself will find out
                return

    def beat(self) -> None:
        """A sign of life; and how many bytes were dealt with, here and by all."""
        with self._beating:
            here = self._here
            self._all = self.ask("add", "bytes", here - self._told)
            self._told = here
            self.ask("add", f"beat/{self.rank}", 1)

    # ---- parts

    def __call__(self, plan: Plan) -> Iterator[int]:
        """Whatever is next, until nothing is left. Raises OutputError where a process has failed."""
        order = by_cost(plan)
        while True:
            self.check()
            turn = self.ask("add", "claimed", 1) - 1
            if turn >= len(order):
                return
            yield order[turn]

    def done(self) -> list[int]:
        """This process makes no more parts. Rank 0 waits here for the others, and returns those that fell silent.

        Raises OutputError where a process has failed.
        """
        self.beat()
        self.tell(f"done/{self.rank}")
        waited_for = set(range(1, self.world)) if self.first else set()
        while waited_for:
            self.check()
            waited_for = {rank for rank in waited_for if not self.reached(f"done/{rank}")}
            lost = sorted(rank for rank in waited_for if self.is_silent(rank))
            self.silent += lost
            waited_for -= set(lost)
            self.show()
            time.sleep(PATIENCE)
        return self.silent

    # ---- progress

    def watch(self, total: int, bar: Callable[[int], None] | None) -> None:
        """Show on ``bar`` what all processes have dealt with, of ``total`` bytes."""
        self._total, self._bar = total, bar

    def count(self, nbytes: int) -> None:
        self._here += nbytes
        self.show()

    def show(self) -> None:
        news = min(self._all, self._total) - self._shown
        if self._bar and news > 0:
            self._bar(news)
            self._shown += news

    # ---- leaving

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.fail(error)
        with contextlib.suppress(OutputError):  # the store is gone, and with it those to wait for
            self._leave()
        self.stop()

    def stop(self) -> None:
        """End the signs of life."""
        self._end.set()
        self._heart.join(timeout=STOPPING)
        atexit.unregister(self.stop)

    def _leave(self) -> None:
        """Rank 0 says that it leaves, and waits to be heard; the others, unless they failed, wait for that."""
        if not self.first:
            while not self._failed and not self.reached("left") and not self.is_silent(0):
                time.sleep(PATIENCE)
            self.tell(f"heard/{self.rank}")
            return
        self.tell("left")
        deadline = time.monotonic() + (FAREWELL_AFTER_FAILURE if self._failed else FAREWELL)
        waited_for = set(range(1, self.world)) - set(self.silent)
        while waited_for and time.monotonic() < deadline:
            time.sleep(PATIENCE)
            waited_for = {rank for rank in waited_for if not self.reached(f"heard/{rank}")}


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
