"""What commands share: exit codes, the one sentence of an error, devices, rules, the progress bar."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..analysis import Outcome
    from ..ops.update_scan import Rule

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

COMPLETE, BAD_INPUT, PARTIAL = 0, 2, 3


def fail(sentence: str) -> int:
    print(f"offprin: error: {sentence}", file=sys.stderr)
    return BAD_INPUT


def explain(error: Exception, out: Path | None) -> int:
    """One sentence for an error that an analysis may meet, and its exit code."""
    if isinstance(error, BrokenPipeError):  # no one reads our output
        raise error
    if not isinstance(error, OSError):
        # CheckpointError, OutputError and bad options are ValueErrors with one clear sentence
        return fail(str(error))
    print(
        f"offprin: error: {error.strerror or error} ({error.filename or out}); finished parts are kept: "
        "free space or fix the path, and the same command continues",
        file=sys.stderr,
    )
    return PARTIAL


def interrupted(sentence: str) -> int:
    exec("")  # or Python ends by SIGINT where the interrupt came inside an exec of text, as imports do many
    print(f"offprin: interrupted; {sentence}", file=sys.stderr)
    return PARTIAL


def parse_rule(text: str) -> Rule:
    """``name`` or ``name:threshold``."""
    from ..ops.update_scan import Rule

    name, _, threshold = text.partition(":")
    try:
        return Rule.parse(name, float(threshold) if threshold else None)
    except ValueError as error:
        raise ValueError(f"--also {text}: {error}") from None


def pick_device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    found = re.fullmatch(r"cpu|cuda(?::(\d{1,9}))?", name, re.ASCII)
    if not found:
        raise ValueError(f"--device {name}: not a device to analyze on; use auto, cpu, cuda or cuda:N")
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this PyTorch sees no CUDA device; use --device cpu")
    if found[1] and int(found[1]) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: the last of {torch.cuda.device_count()} is cuda:{torch.cuda.device_count() - 1}"
        )
    return torch.device(name)


@contextlib.contextmanager
def progress_bar(total: int, quiet: bool, label: str = "weights") -> Iterator[Callable[[int], None] | None]:
    """Bytes of weights on stderr, with bytes per second; every ten seconds where stderr is no terminal."""
    if quiet:
        yield None
        return
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        print("offprin: no progress bar without tqdm; pip install 'offprin-kernels[analysis]'", file=sys.stderr)
        yield None
        return
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=total, unit="B", unit_scale=True, desc=label, file=sys.stderr, mininterval=interval) as bar:
        yield bar.update


def hindrance(arguments: argparse.Namespace) -> str | None:
    """Why the results asked for cannot be written, or None; asked before hours of work, not after."""
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError:
        return "analysis writes parquet files; pip install 'offprin-kernels[analysis]'"
    if arguments.figures and arguments.no_report:
        return "--figures draws what the report shows; leave out --no-report"
    if arguments.figures and (why := can_draw()):
        return f"--figures: {why}"
    return None


def can_draw() -> str | None:
    """Why figures cannot be drawn, or None."""
    try:
        import matplotlib  # noqa: F401
        import plotly  # noqa: F401
    except ModuleNotFoundError:
        return "figures need plotly and matplotlib; pip install 'offprin-kernels[report]'"
    return None


def end(outcome: Outcome, arguments: argparse.Namespace) -> int:
    """The page and the figures of a finished analysis, its numbers on the terminal, and the exit code."""
    from ..analysis import report

    assert outcome.summary is not None
    for rank in outcome.silent_ranks:
        print(f"offprin: rank {rank} fell silent; rank 0 made its parts", file=sys.stderr)
    if not arguments.no_report:
        make_page(outcome.root, figures=arguments.figures)
    print(json.dumps(outcome.summary, indent=1) if arguments.json else report.render(outcome.summary, outcome.root))
    return COMPLETE if outcome.complete else PARTIAL


def make_page(root: Path, *, figures: bool) -> None:
    """``report.html`` of an analysis that has just finished; where it cannot be made, say why: its numbers stand."""
    from ..analysis.html import write_report

    try:
        write_report(root, figures)
    except ValueError as error:  # OutputError has one clear sentence
        why = str(error)
    except OSError as error:
        why = f"{error.strerror or error} ({error.filename or root})"
    else:
        return
    print(f"offprin: no report.html: {why}; then: offprin report {root}", file=sys.stderr)
