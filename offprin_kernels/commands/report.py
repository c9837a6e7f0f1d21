"""``offprin report``: make the page of a finished analysis anew from its tables."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .common import COMPLETE, fail

if TYPE_CHECKING:
    from .common import Commands


def add(commands: Commands) -> None:
    report = commands.add_parser(
        "report",
        help="make the page of a finished analysis",
        description="Make report.html of a finished analysis from its tables: one file that any browser opens, also "
        "without a network. Prints, for each run, every published definition of sparsity and of rotation beside its "
        "value. Exit code 0: the page is made; 2: no finished analysis, or the page cannot be written.",
    )
    report.add_argument("directory", metavar="DIR", type=Path, help="what offprin analyze --out has written")
    report.add_argument("--out", metavar="FILE", type=Path, help="where the page goes (default: DIR/report.html)")
    report.add_argument("--figures", action="store_true", help="also PNG and PDF figures, into DIR/figures")
    report.set_defaults(call=run)


def run(arguments: argparse.Namespace) -> int:
    from ..analysis.html import write_report
    from ..analysis.reconciliation import reconcile, render
    from ..analysis.tables import Tables

    try:
        page = write_report(arguments.directory, arguments.figures, arguments.out)
        text = render(reconcile(Tables(arguments.directory)))
    except ValueError as error:
        # OutputError has one clear sentence
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.strerror or error} ({error.filename or arguments.directory}); the page was not written")
    print(f"{text}\n\nthe report is {page}")
    if arguments.figures:
        print(f"figures are in {arguments.directory / 'figures'}")
    return COMPLETE
