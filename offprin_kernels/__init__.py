"""Kernels that show, and use, where post-training moves a language model's weights."""

from ._backend import BackendUnavailable
from .bitmask import BitMask
from .ops.update_scan import Output, Rule
from ._version import __version__
from .updates import Norms, UpdateScan, update_mask, update_scan, visible



__all__ = [
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
