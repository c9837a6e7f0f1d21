"""Kernels that show, and use, where post-training moves a language model's weights."""

import importlib
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from ._backend import BackendUnavailable
    from .bitmask import BitMask
    from .geometry import (
        Angles,
        Bounds,
        Energy,
        Shift,
        Spectrum,
        base_spectrum,
        bounds,
        normalized_spectral_shift,
        principal_angles,
        spectrum,
        stable_rank,
        update_energy,
    )
    from .masks import low_magnitude_mask, principal_mask, random_mask, safe_mask, weight_masks
    from .ops.projection import project, project_out
    from .ops.subspace import TopK, topk_svd
    from .ops.update_scan import Output, Rule
    from .optim import MaskedAdamW
    from .updates import Norms, UpdateScan, update_mask, update_scan, visible
    from .watch import UpdateWatch

__all__ = [
    "__version__",
    "Angles",
    "BackendUnavailable",
    "BitMask",
    "Bounds",
    "Energy",
    "MaskedAdamW",
    "Norms",
    "Output",
    "Rule",
    "Shift",
    "Spectrum",
    "TopK",
    "UpdateScan",
    "UpdateWatch",
    "base_spectrum",
    "bounds",
    "low_magnitude_mask",
    "normalized_spectral_shift",
    "principal_angles",
    "principal_mask",
    "project",
    "project_out",
    "random_mask",
    "safe_mask",
    "spectrum",
    "stable_rank",
    "topk_svd",
    "update_energy",
    "update_mask",
    "update_scan",
    "visible",
    "weight_masks",
]

# Loaded at first use, so that the command line is up, and can be interrupted, before PyTorch is.
HOMES = {
    "_backend": ("BackendUnavailable",),
    "bitmask": ("BitMask",),
    "geometry": (
        "Angles",
        "Bounds",
        "Energy",
        "Shift",
        "Spectrum",
        "base_spectrum",
        "bounds",
        "normalized_spectral_shift",
        "principal_angles",
        "spectrum",
        "stable_rank",
        "update_energy",
    ),
    "masks": ("low_magnitude_mask", "principal_mask", "random_mask", "safe_mask", "weight_masks"),
    "ops.projection": ("project", "project_out"),
    "ops.subspace": ("TopK", "topk_svd"),
    "ops.update_scan": ("Output", "Rule"),
    "optim": ("MaskedAdamW",),
    "updates": ("Norms", "UpdateScan", "update_mask", "update_scan", "visible"),
    "watch": ("UpdateWatch",),
}

if not TYPE_CHECKING:  # a type checker is to know every name, and to miss the others

    def __getattr__(name):
        for module, names in HOMES.items():
            if name in names:
                value = globals()[name] = getattr(importlib.import_module(f".{module}", __name__), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
