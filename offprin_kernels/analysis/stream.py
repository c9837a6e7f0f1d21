"""Reads ahead: while one slab is looked at, a thread fetches the next, and copies it to the GPU where there is one."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from ..checkpoint import Checkpoint, TensorRef

# Small tensors are fetched together up to these bytes: handing a request to the thread costs as much as reading one.
TOGETHER = 1 << 22
# How many such batches (or large slabs) are read ahead: the base's and a run's slab are then there together.
AHEAD = 2


class Request(NamedTuple):
    """Rows [start, stop) of a tensor."""

    checkpoint: Checkpoint
    ref: TensorRef
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.ref.row_bytes


@contextlib.contextmanager
def stream(requests: Sequence[Request], device: torch.device) -> Iterator[Iterator[torch.Tensor]]:
    """The requested rows on the device, in order. Raises CheckpointError, at its turn, where a file cannot be read."""
    fetch = Copies(device) if device.type == "cuda" else read
    ahead: deque[Future] = deque()
    queue = deque(batches(requests))

    def ordered() -> Iterator[torch.Tensor]:
        while queue or ahead:
            while queue and len(ahead) < AHEAD:
                ahead.append(reader.submit(lambda batch: [fetch(request) for request in batch], queue.popleft()))
            for weight in drain(ahead.popleft().result()):
                yield weight.wait() if isinstance(weight, Copy) else weight

    with ThreadPoolExecutor(max_workers=1) as reader:
        try:
            yield ordered()
        finally:
            queue.clear()
            for future in ahead:
                future.cancel()


def batches(requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Consecutive requests, together while they are small."""
    batch: list[Request] = []
    size = 0
    for request in requests:
        if batch and size + request.nbytes > TOGETHER:
            yield batch
            batch, size = [], 0
        batch.append(request)
        size += request.nbytes
    if batch:
        yield batch


def drain(weights: list) -> Iterator:
    """Each in turn, kept no longer than it is used."""
    weights.reverse()
    while weights:
        yield weights.pop()


def read(request: Request) -> torch.Tensor:
    return request.ref.read(request.checkpoint, request.start, request.stop)


class Copy(NamedTuple):
    """A weight on its way to the GPU, and the event after which it is there."""

    weight: torch.Tensor
    arrived: torch.cuda.Event

    def wait(self) -> torch.Tensor:
        """Make the current stream wait, not the processor; the memory belongs to that stream from then on."""
        current = torch.cuda.current_stream(self.weight.device)
        current.wait_event(self.arrived)
        self.weight.record_stream(current)
        return self.weight


class Copies:
    """Fetches through pinned memory and a stream of its own, so that copies and kernels run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def __call__(self, request: Request) -> Copy:
        pinned = read(request).pin_memory()
        with torch.cuda.stream(self.stream):
            weight = pinned.to(self.device, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self.stream)
        return Copy(weight, arrived)
