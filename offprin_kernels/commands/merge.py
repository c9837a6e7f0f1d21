"""``offprin merge``: finish what the shards of an analysis left."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .common import end, explain, fail, hindrance

if TYPE_CHECKING:
    from .common import Commands


def add(commands: Commands) -> None:
    merge = commands.add_parser(
        "merge",
        help="finish an analysis that was made in shards",
        description="Merge the parts that offprin analyze --shard left in DIR into its tables and summary. Parts made "
        "elsewhere, of the same plan and version and from copies of the same files, are taken from OTHER directories. "
        "Exit code 0: complete; 3: some tensors could not be compared; 2: parts are missing or belong to another plan, "
        "version or weights.",
    )
    merge.add_argument("out", metavar="DIR", type=Path, help="the --out directory of the shards")
    merge.add_argument("others", metavar="OTHER", nargs="*", type=Path, help="further directories with parts")
    merge.add_argument("--figures", action="store_true", help="also PNG and PDF figures, into DIR/figures")
    merge.add_argument("--no-report", action="store_true", help="tables and summary only, no report.html")
    merge.add_argument("--json", action="store_true", help="print summary.json instead of tables")
    merge.set_defaults(call=run)


def run(arguments: argparse.Namespace) -> int:
    from ..analysis.merge import merge

    if why := hindrance(arguments):
        return fail(why)
    try:
        outcome = merge(arguments.out, arguments.others)
    except (ValueError, OSError) as error:
        return explain(error, arguments.out)
    return end(outcome, arguments)
