"""Starts an analysis in several processes, and kills some: run as a script, so that workers fork before any thread is.

python -m tests.analysis.ranks WORLD KILLS SEED ARGUMENTS OF offprin ANALYZE...

TROUBLE="RANK fail|kill|stop" in the environment befalls the first part that a rank makes. The last line that is printed
are the exit codes of the ranks.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from offprin_kernels.analysis import plan, run, scaleout  # imported once, before the forks
from offprin_kernels.cli import main

from .checkpoints import files

ROOT = Path(__file__).parents[2]


def make_parts_small(setting=setattr) -> None:
    """A part for every tensor or two."""
    for name, value in (("PART_BYTES", 20_000), ("SMALLEST_PART", 1), ("FEWEST_PARTS", 1000), ("SMALLEST_FLOPS", 1)):
        setting(plan, name, value)


def same(a: Path, b: Path) -> None:
    """Equal files, but for the command line in the summary, which names the directory."""
    ours, theirs = files(a), files(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name == "summary.json":
            one, two = (json.loads(found[name]) for found in (ours, theirs))
            for summary in (one, two):
                del summary["provenance"]["command"]
            assert one == two
        elif name.endswith(".html"):
            continue
        else:
            assert ours[name] == theirs[name], name


def ranks(world: int, kills: int, arguments: tuple, seed: int = 0, trouble: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.analysis.ranks", world, kills, seed, *arguments]
    environment = {**os.environ, **({"TROUBLE": trouble} if trouble else {})}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def befall(what: str) -> None:
    """Let this happen to this process in the middle of its first part; or make it slow."""
    real = run.measure

    def measure(*arguments, **options):
        if what == "slow":
            time.sleep(0.3)
            return real(*arguments, **options)
        run.measure = real
        if what == "fail":
            raise OSError(28, "No space left on device", "here")
        os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
        return real(*arguments, **options)

    run.measure = measure


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
            afflicted, _, what = os.environ.get("TROUBLE", "").partition(" ")
            if afflicted:
                befall(what if afflicted == str(rank) else "slow")
            code = main(["analyze", *arguments, "--quiet", "--no-report"])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        ranks.append(child)
    return ranks


def end(ranks: list[int]) -> list[int]:
    """Exit codes. A process that was stopped goes on once rank 0 has ended."""
    codes = []
    for rank in ranks:
        codes.append(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]))
        if rank == ranks[0] and "stop" in os.environ.get("TROUBLE", ""):
            for other in ranks[1:]:
                os.kill(other, signal.SIGCONT)
    return codes


if __name__ == "__main__":
    world, kills, seed = map(int, sys.argv[1:4])
    chance = random.Random(seed)
    import pyarrow.parquet  # noqa: F401
    import torch

    make_parts_small()
    torch.set_num_threads(1)
    if "TROUBLE" in os.environ:
        scaleout.BEAT, scaleout.SILENCE = 0.1, 2.0
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
    print("exit codes", *codes)
    sys.exit(max(codes))
