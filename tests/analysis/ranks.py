"""Starts an analysis in several processes, and kills some: run as a script, so that workers fork before any thread is.

python -m tests.analysis.ranks WORLD KILLS SEED ARGUMENTS OF offprin ANALYZE...
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time

from offprin_kernels.analysis import plan, run  # noqa: F401  # imported once, before the forks
from offprin_kernels.cli import main


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(world: int, arguments: list[str]) -> list[int]:
    """Process ids of the ranks, which meet as torchrun's do."""
    port = free_port()
    ranks = []
    for rank in range(world):
        child = os.fork()
        if not child:
            os.environ |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            code = main(["analyze", *arguments, "--quiet", "--no-report"])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        ranks.append(child)
    return ranks


def end(ranks: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]


if __name__ == "__main__":
    world, kills, seed = map(int, sys.argv[1:4])
    chance = random.Random(seed)
    import pyarrow.parquet  # noqa: F401
    import torch

    plan.PART_BYTES, plan.SMALLEST_PART, plan.FEWEST_PARTS, plan.SMALLEST_FLOPS = 20_000, 1, 1000, 1
    torch.set_num_threads(1)
    for _ in range(kills):
        ranks = start(world, sys.argv[4:])
        time.sleep(chance.uniform(0.0, 0.5))
        os.kill(chance.choice(ranks), signal.SIGKILL)
        time.sleep(0.02)
        # what torchrun does to the others
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
        end(ranks)
    codes = end(start(world, sys.argv[4:]))
    sys.exit(max(codes))
