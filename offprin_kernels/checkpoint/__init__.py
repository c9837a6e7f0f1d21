"""Model checkpoints: read lazily, pair by name with a full ledger, write atomically.

``Checkpoint.open(source)`` reads headers only, of safetensors, PyTorch files, distributed checkpoints, files per rank
and LoRA adapters; ``pair(base, tuned)`` says what can be compared and accounts for every tensor of both sides; weights
then come in row slabs, ``pair.base.read(base, start, stop)``.
"""

from .errors import CheckpointError
from .ledger import LedgerEntry, Pairing, Status, TensorPair, TensorRef
from .names import canonical, describe, is_linear
from .pairing import pair
from .reader import Checkpoint, TensorInfo
from .storage import FileInfo, Slab
from .write import SafetensorsWriter, atomic_write_bytes, save_safetensors_atomic

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "FileInfo",
    "LedgerEntry",
    "Pairing",
    "SafetensorsWriter",
    "Slab",
    "Status",
    "TensorInfo",
    "TensorPair",
    "TensorRef",
    "atomic_write_bytes",
    "canonical",
    "describe",
    "is_linear",
    "pair",
    "save_safetensors_atomic",
]
