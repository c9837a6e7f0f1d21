"""The charts of a report, in its order."""

from __future__ import annotations

from ..tables import Tables
from . import agreement, angles, energy, overlap, sparsity, spectra, stripes
from .model import Chart


def charts(tables: Tables) -> list[Chart]:
    """Every chart that this analysis has the measurements for."""
    found = [
        sparsity.by_layer(tables),
        sparsity.by_kind(tables),
        *stripes.chart(tables),
        agreement.consensus(tables),
        angles.by_layer(tables),
        *angles.curves(tables),
        *spectra.values(tables),
        spectra.nss_by_layer(tables),
        energy.chart(tables),
        overlap.chart(tables),
        agreement.pairs(tables),
        agreement.by_group(tables),
    ]
    return [chart for chart in found if chart is not None]
