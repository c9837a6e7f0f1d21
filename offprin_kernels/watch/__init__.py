"""What training has moved so far, measured on a live model: :class:`UpdateWatch`."""

from .change import TensorChange, summary
from .watch import UpdateWatch

__all__ = ["TensorChange", "UpdateWatch", "summary"]
