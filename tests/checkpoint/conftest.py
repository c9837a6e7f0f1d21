"""Processes are expensive: what they save is made once for all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import workers


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of checkpoints saved by 3 and by 4 processes; not to be written to."""
    folder = tmp_path_factory.mktemp("saved")
    workers.launch(folder)
    return folder
