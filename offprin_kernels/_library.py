"""Registers ops with PyTorch's dispatcher, so that torch.compile, profilers and fake tensors know them."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Op:
    """An op of the library ``offprin``; called like the function that implements it."""

    def __init__(self, name: str, implementation: Callable) -> None:
        self.name = f"offprin::{name}"
        schema = torch.library.infer_schema(implementation, mutates_args=())
        torch.library.define(self.name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(self.name, "default", implementation)
        self.call = getattr(torch.ops.offprin, name).default

    def __call__(self, *arguments):
        return self.call(*arguments)

    def register_fake(self, function: Callable) -> Callable:
        """Shapes and dtypes of the results, for tracing."""
        torch.library.register_fake(self.name, function)
        return function


def functional_op(name: str) -> Callable[[Callable], Op]:
    """Register a function of tensors and numbers that changes none of its arguments and returns new tensors.

    Unlike ``torch.library.custom_op``, the first call does not import torch.compile, which takes a second.
    """
    return lambda implementation: Op(name, implementation)
