"""``offprin merge``: finish what the shards of an analysis left."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .common import COMPLETE, PARTIAL, can_draw, fail, make_page

if TYPE_CHECKING:
    from .common import Commands


def add(commands: Commands) -> None:
    merge = commands.add_parser(
        "merge",
        help="finish an analysis that was made in shards",
        description="Merge the parts that offprin analyze --shard left in DIR into its tables and summary. Parts made "
        "elsewhere, of the same plan and version, are taken from OTHER directories. Exit code 0: complete; 3: some "
        "tensors could not be compared; 2: parts are missing or belong to another plan or version.",
    )
    merge.add_argument("out", metavar="DIR", type=Path, help="the --out directory of the shards")
    merge.add_argument("others", metavar="OTHER", nargs="*", type=Path, help="further directories with parts")
    merge.add_argument("--figures", action="store_true", help="also PNG and PDF figures, into DIR/figures")
    merge.add_argument("--no-report", action="store_true", help="tables and summary only, no report.html")
    merge.add_argument("--json", action="store_true", help="print summary.json instead of tables")
    merge.set_defaults(call=run)


def run(arguments: argparse.Namespace) -> int:
    from ..analysis import report
    from ..analysis import run as running

    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError:
        return fail("analysis writes parquet files; pip install 'offprin-kernels[analysis]'")
    if arguments.figures and (why := can_draw()):
        return fail(f"--figures: {why}")
    try:
        outcome = running.merge(arguments.out, tuple(arguments.others))
    except ValueError as error:
        return fail(str(error))
    except OSError as error:
        print(
            f"offprin: error: {error.strerror or error} ({error.filename or arguments.out}); parts are kept: "
            "free space or fix the path, and the same command continues",
            file=sys.stderr,
        )
        return PARTIAL
    assert outcome.summary is not None
    if not arguments.no_report:
        make_page(outcome.root, figures=arguments.figures)
    print(json.dumps(outcome.summary, indent=1) if arguments.json else report.render(outcome.summary, outcome.root))
    return COMPLETE if outcome.complete else PARTIAL
