"""Who does which part: one process all of them, shards a fixed share each, the processes of a group whatever is next.

No process needs to know what another found. Parts are claimed, largest first, through the key-value store by which
torchrun's processes meet; no collective is used, so that a slow process holds up no other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

from ..output import OutputError
from .plan import Plan

# How often a process that waits looks.
PATIENCE = 0.05
# How long rank 0, which may host the store, waits for the others to hear how it ended, in seconds.
FAREWELL = {"finished": 30.0, "failed": 2.0}


class Claims(Protocol):
    """The parts that this process makes, in order, claimed one by one."""

    def __call__(self, plan: Plan) -> Iterator[int]: ...


def alone(plan: Plan) -> Iterator[int]:
    """All parts, in the order of the files."""
    yield from range(len(plan.parts))


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

    Not a torch.distributed process group: nothing is exchanged but keys.
    """

    def __init__(self, rank: int, world: int, store: Any) -> None:
        self.rank, self.world, self.store = rank, world, store

    @classmethod
    def from_environment(cls) -> Group | None:
        """The group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or None."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return None
        import torch.distributed as dist

        store, rank, world = next(iter(dist.rendezvous("env://", timeout=timedelta(minutes=10))))
        # torchrun may start all processes again in the same store
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(rank, world, dist.PrefixStore(f"offprin/{attempt}", store))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def tell(self, state: str, detail: str = "") -> None:
        """Rank 0 says how far it is: ``open``, then ``finished`` or ``failed``, after which it waits to be heard."""
        self.store.set(f"reached/{state}", detail)
        deadline = time.monotonic() + FAREWELL.get(state, 0.0)
        while time.monotonic() < deadline and self.store.add("heard", 0) < self.world - 1:
            time.sleep(PATIENCE)

    def wait_for(self, state: str) -> str | None:
        """What rank 0 said of a state; None where it has finished already. Raises OutputError where it failed."""
        import torch.distributed as dist

        try:
            while True:
                for reached in ("failed", "finished", state):
                    if self.store.check([f"reached/{reached}"]):
                        detail = self.store.get(f"reached/{reached}").decode()
                        if reached != "open":
                            self.store.add("heard", 1)
                        if reached == "failed":
                            raise OutputError(f"rank 0 failed: {detail}")
                        return detail if reached == state else None
                time.sleep(PATIENCE)
        except dist.DistError as error:
            raise OutputError(f"rank 0 or torchrun's store is gone ({str(error).splitlines()[0]})") from None

    def __call__(self, plan: Plan) -> Iterator[int]:
        """Whatever is next, until nothing is left."""
        order = by_cost(plan)
        while (turn := self.store.add("claimed", 1) - 1) < len(order):
            yield order[turn]

    def done(self) -> None:
        """This process makes no more parts; rank 0 waits here for the others."""
        self.store.add("done", 1)
        while self.first and self.store.add("done", 0) < self.world:
            time.sleep(PATIENCE)
