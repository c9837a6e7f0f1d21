"""One Triton launch as a value: it can be run, or handed to the ahead-of-time compiler without a GPU.

Planning a launch and running it are apart, so that ``tests/compile`` compiles exactly what a user would run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

ELEMENTS = {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.uint32: "u32",
    torch.int64: "i64",
    torch.uint64: "u64",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


def arch(device: torch.device) -> str:
    """``"hip"`` or ``"cuda"``: what launch settings may depend on."""
    return "hip" if torch.version.hip and device.type == "cuda" else "cuda"


def signature_of(value: Any, annotation: str) -> Any:
    """The type of an argument, as Triton spells it; integers have 32 bits unless an annotation says otherwise."""
    if isinstance(value, tuple):
        return tuple(signature_of(v, annotation) for v in value)
    return f"*{ELEMENTS[value.dtype]}" if isinstance(value, torch.Tensor) else annotation or "i32"


@dataclass(frozen=True)
class Launch:
    kernel: Any  # a @triton.jit function whose integer arguments are annotated tl.int64 and not specialised
    programs: int
    args: Mapping[str, Any]  # tensors, tuples of tensors, integers
    constexprs: Mapping[str, Any]
    num_warps: int

    def options(self) -> dict[str, Any]:
        # Fused multiply-adds would change bits, and Triton's default for them differs between versions.
        return {"num_warps": self.num_warps, "enable_fp_fusion": False}

    def run(self) -> None:
        tensor = next(v for v in self.args.values() if isinstance(v, torch.Tensor))
        on_device = torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
        with on_device:
            self.kernel[(self.programs,)](**self.args, **self.constexprs, **self.options())

    def source(self) -> dict[str, Any]:
        """``signature``, ``constexprs`` and ``attrs`` for triton.compiler.ASTSource, as the JIT would derive them."""
        names = self.kernel.arg_names
        everything = {**self.args, **dict.fromkeys(self.constexprs)}
        signature = {
            p.name: "constexpr" if p.name in self.constexprs else signature_of(everything[p.name], p.annotation_type)
            for p in self.kernel.params
        }
        attrs = {}
        for i, name in enumerate(names):
            value = everything[name]
            paths = [((i, j), v) for j, v in enumerate(value)] if isinstance(value, tuple) else [((i,), value)]
            for path, v in paths:
                if isinstance(v, torch.Tensor) and v.data_ptr() % 16 == 0:
                    attrs[path] = [["tt.divisibility", 16]]
        return {"signature": signature, "constexprs": dict(self.constexprs), "attrs": attrs}
