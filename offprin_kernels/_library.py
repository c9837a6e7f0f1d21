"""Registers ops with PyTorch's dispatcher, so that torch.compile, profilers and fake tensors know them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch

# By op: what holds its registrations, so that a module can be loaded again.
LIBRARIES: dict[str, torch.library.Library] = {}


class Op:
    """An op of the library ``offprin``; called like the function that implements it."""

    def __init__(self, name: str, implementation: Callable) -> None:
        if name in LIBRARIES:
            LIBRARIES.pop(name)._destroy()
        self.name, self.library = f"offprin::{name}", torch.library.Library("offprin", "FRAGMENT")
        LIBRARIES[name] = self.library
        schema = torch.library.infer_schema(implementation, mutates_args=())
        torch.library.define(self.name, schema, lib=self.library, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(self.name, "default", outside_of_graphs(implementation), lib=self.library)
        torch.library.register_autograd(self.name, self.backward, lib=self.library)
        self.call = getattr(torch.ops.offprin, name).default

    def __call__(self, *arguments):
        return self.call(*arguments)

    def backward(self, *_):
        raise RuntimeError(f"{self.name} counts or compares stored values and has no gradient; detach its inputs")

    def register_fake(self, function: Callable) -> Callable:
        """Shapes and dtypes of the results, for tracing."""
        torch.library.register_fake(self.name, function, lib=self.library)
        return function


def functional_op(name: str) -> Callable[[Callable], Op]:
    """Register a function of tensors and numbers that changes none of its arguments and returns new tensors.

    As ``torch.library.custom_op`` does, but for its import of torch.compile at the first call, which takes a second.
    """
    return lambda implementation: Op(name, implementation)


def outside_of_graphs(function: Callable) -> Callable:
    """``function``, which torch.compile, where it is in use at all, is not to look into."""

    @functools.wraps(function)
    def call(*arguments):
        if "torch._dynamo" not in sys.modules:
            return function(*arguments)
        return hidden(function)(*arguments)

    return call


@functools.cache
def hidden(function: Callable) -> Callable:
    return torch.compiler.disable(function)
