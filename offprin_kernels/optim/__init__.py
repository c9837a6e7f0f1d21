"""Optimizers that move chosen weights only."""

from .masked_adamw import MaskedAdamW
from .saved import adamw_state, load_adamw_state, master_weight

__all__ = ["MaskedAdamW", "adamw_state", "load_adamw_state", "master_weight"]
