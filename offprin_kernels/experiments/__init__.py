"""Experiments on the reference loop, after the figures and tables of arXiv 2511.08567: runs, analysis, table, figure.

Each module has ``run(lab) -> Result``. Numbers come from ``offprin analyze``, nulls beside them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .names import EXPERIMENTS

if TYPE_CHECKING:
    from .lab import Lab
    from .results import Result


def run(name: str, lab: Lab) -> Result:
    """Carry out an experiment, or what is left of it; table and figure lie in ``lab.results(name)``.

    Raises:
        ValueError: an unknown name.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"unknown experiment {name!r}; choose from {', '.join(EXPERIMENTS)}")
    result = importlib.import_module(f".{name}", __package__).run(lab)
    result.write(lab.results(name))
    return result
