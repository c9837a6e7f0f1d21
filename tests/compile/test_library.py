"""How ops are registered: no gradient is made up, torch.compile stays outside and unloaded, modules load again."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch

from offprin_kernels.ops import mask_algebra, update_scan


def scanned(base: torch.Tensor, tuned: torch.Tensor, way: str) -> tuple[torch.Tensor, ...]:
    return torch.ops.offprin.update_scan(base, tuned, [0.0, 0.0], update_scan.Output.all().value, False, way)


@pytest.mark.traced
@pytest.mark.parametrize("way", ["cpu", "reference"])
def test_a_scan_has_no_gradient(way) -> None:
    base, tuned = torch.randn(2, 8, 64).bfloat16()
    arguments = (base.requires_grad_(), tuned, [0.0, 0.0], update_scan.Output.all().value, False, way)
    torch.library.opcheck(
        torch.ops.offprin.update_scan.default,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    with pytest.raises(RuntimeError, match="has no gradient"):
        scanned(base, tuned, way)[-1].sum().backward()
    assert base.grad is None


@pytest.mark.traced
def test_what_an_op_does_is_not_compiled() -> None:
    """Not even where it is called from a frame that torch.compile has given up on."""
    graphs: list[str] = []

    def count(graph: torch.fx.GraphModule, _) -> torch.fx.GraphModule:
        graphs.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    def counted(words: torch.Tensor) -> torch.Tensor:
        for _ in range(1):
            with open(os.devnull):
                torch._dynamo.graph_break()
                found = torch.ops.offprin.mask_row_counts(words, "reference")
        return found

    words = torch.randint(0, 256, (4, 8), dtype=torch.uint8)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(counted, backend=count)(words), mask_algebra.row_counts(words))
    assert set(graphs) <= {"offprin.mask_row_counts.default"}, graphs


def test_the_first_call_does_not_load_the_compiler() -> None:
    script = (
        "import sys, torch, offprin_kernels as o\n"
        "w = torch.ones(4, 8).bfloat16()\n"
        "assert o.update_scan(w, 2 * w).changed == 32\n"
        "assert 'torch._dynamo' not in sys.modules, 'the first call takes a second more'"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_module_loads_again() -> None:
    words = torch.full((2, 8), 255, dtype=torch.uint8)
    for _ in range(2):
        assert importlib.reload(mask_algebra).row_counts(words).tolist() == [64, 64]
