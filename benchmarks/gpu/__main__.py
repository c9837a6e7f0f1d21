"""``python -m benchmarks.gpu``: every slice that today's run lacks, in order; see ``--help``."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import torch

from offprin_kernels.output import OutputError

from . import machine, results
from .runner import run_slices
from .slices import SLICES


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Test and measure the kernels on this machine's CUDA device. Runs the slices that today's run in "
        "the result file lacks, and stores each as it ends, rows as they are made; interrupted, the same command goes "
        "on. Exit code 1 where a slice failed or is still missing.",
    )
    parser.add_argument(
        "--slice",
        metavar="NAME",
        nargs="+",
        default=[],
        help="only these, where they are not ok yet, or of other sources (see --again)",
    )
    parser.add_argument("--list", action="store_true", help="print the slices and what the result file says of them")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument(
        "--within",
        metavar="MINUTES",
        type=float,
        help="for all slices; one that this stops half-way is run again next time",
    )
    parser.add_argument(
        "--results",
        metavar="DIR",
        type=Path,
        default=results.FOLDER,
        help="where result files are read and written; made if missing",
    )
    return parser.parse_args()


def main() -> int:
    chosen = arguments()
    if not torch.cuda.is_available():
        if chosen.list:
            print("\n".join(f"{item.name:16}  {item.says}" for item in SLICES))
            return 0
        sys.exit("this PyTorch sees no CUDA device; GPU tests and benchmarks run on a CUDA machine")
    # as Ctrl-C does, so that the slice at work is ended too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))
    try:
        kept = results.Results(machine.identity(), machine.properties(), chosen.results)
        if chosen.list:
            done, sources = kept.slices(), machine.sources()
            for item in SLICES:
                found = done.get(item.name, {"status": "missing", "sources": sources})
                changed = "" if found["sources"] == sources else "  (sources have changed since; run again by name)"
                print(f"{item.name:16}  {found['status']:8}  {item.says}{changed}")
            return 0
        within = None if chosen.within is None else 60 * chosen.within
        return run_slices(
            SLICES, kept, chosen.slice, again=chosen.again, within=within, sources=machine.sources(), say=say
        )
    except (OutputError, ValueError) as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
