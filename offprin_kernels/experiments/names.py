"""What experiments there are, a line each."""

from __future__ import annotations

EXPERIMENTS = {
    "paths": "RLVR and SFT from one base: sparsity, spectra, angles, overlaps (Fig. 4 and 5, Tab. 1)",
    "agreement": "do RLVR runs of other seeds, data and objectives change the same weights? (Fig. 2 and 3, Tab. 2)",
    "precision": "learning rate and storage precision against sparsity (Sec. 2.3)",
    "interventions": "rotated and permuted layers: where does agreement go? (Fig. 6)",
    "masked": "RLVR inside principal, non-principal, low, safe and random masks (Fig. 9, Tab. 4)",
    "adapters": "LoRA and PiSSA across learning rates (Fig. 10)",
}
