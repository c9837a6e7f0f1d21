"""``report.html``: an analysis as one self-contained page."""

from __future__ import annotations

from pathlib import Path

from ...checkpoint.write import atomic_write_bytes
from ..store import REPORT
from ..tables import Tables
from .page import build


def write_report(root: str | Path, figures: bool = False, out: str | Path | None = None) -> Path:
    """Make the report of a finished analysis from its tables, whole or not at all.

    Args:
        root: the directory of the analysis.
        figures: also draw PNG and PDF files into ``root/figures``.
        out: another place for the page; default ``root/report.html``.

    Returns:
        Path of the page.

    Raises:
        OutputError: no finished analysis, or a library is missing; one sentence says which.
        OSError: the page cannot be written; the previous one is then as it was.
    """
    tables = Tables(root)
    path = Path(root) / REPORT if out is None else Path(out)
    atomic_write_bytes(path, build(tables).encode())
    if figures:
        from ..figures import write_figures

        write_figures(tables)
    return path
