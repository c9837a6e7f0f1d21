"""Analysis of checkpoint pairs: plan -> measure -> run -> store -> report.

``plan`` decides what is compared with what, ``measure`` streams one tensor and counts, ``run`` drives all of them and
resumes, ``store`` writes results atomically, ``report`` turns them into something to read; ``load`` reads them back.
"""

from .load import Results, load
from .plan import Options, Plan, make_plan
from .run import Outcome, analyze

__all__ = ["Options", "Outcome", "Plan", "Results", "analyze", "load", "make_plan"]
