"""Interventions on attention heads that keep a model's function: rotations and permutations.

:func:`rotate` and :func:`permute` work on state dicts, :func:`write` on checkpoints. A :class:`Intervention` is the
record of either, with which :func:`undo` goes back and :func:`invert_mask` maps masks back.

They ask whether updates follow the weights' geometry: a rotation gives V and O another basis, a permutation moves heads
to other places, and the function stays. Source: arXiv 2511.08567, section 4.3 and appendix D.
"""

from .attention import Heads
from .files import Report, write
from .record import Intervention, Order
from .transform import apply, invert_mask, permute, plan, rotate, undo
from .verify import LayerCheck, LogitCheck, VerificationError

__all__ = [
    "Heads",
    "Intervention",
    "LayerCheck",
    "LogitCheck",
    "Order",
    "Report",
    "VerificationError",
    "apply",
    "invert_mask",
    "permute",
    "plan",
    "rotate",
    "undo",
    "write",
]
