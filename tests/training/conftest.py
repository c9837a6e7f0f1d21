from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="the reference loop's models are transformers'")

from offprin_kernels.training.stages import train

from . import tiny


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A checkpoint that solves some of its problems and not all, so that there is something to learn."""
    out = tmp_path_factory.mktemp("base") / "run"
    settings = tiny.pretrain(steps=70, eval_every=70, eval_problems=100, save_every=70)
    final = train("pretrain", settings, out)
    assert 0.1 < tiny.rows(out)[-1]["accuracy"] < 0.98
    return final
