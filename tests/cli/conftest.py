"""What tests of the command share."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import write_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source")
