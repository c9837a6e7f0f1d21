"""Kernels that show, and use, where post-training moves a language model's weights."""

from ._backend import BackendUnavailable
from ._version import __version__
from .bitmask import BitMask
from .ops.update_scan import Output, Rule
from .updates import Norms, UpdateScan, update_mask, update_scan, visible

__all__ = [
    "__version__",
    "BackendUnavailable",
    "BitMask",
    "Norms",
    "Output",
    "Rule",
    "UpdateScan",
    "update_mask",
    "update_scan",
    "visible",
]
