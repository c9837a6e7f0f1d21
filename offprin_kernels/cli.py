"""The ``offprin`` command: parse, call, print."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ._version import __version__
from .commands import analyze, env, intervene, mask, merge, report, train
from .commands.common import COMPLETE, interrupted


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 complete, 3 partial, 2 bad input."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        arguments = parser().parse_args(argv)
        arguments.command = ["offprin", *argv]
        return arguments.call(arguments)
    except KeyboardInterrupt:
        return interrupted("the same command continues where it stopped")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return COMPLETE


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="offprin", description="Where post-training moves a model's weights.")
    top.add_argument("--version", action="version", version=f"offprin-kernels {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for command in (analyze, merge, report, mask, intervene, train, env):
        command.add(commands)
    return top
