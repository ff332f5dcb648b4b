"""What several test files share: no test asks a model hub, and checkpoints are made once for the whole session."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from checkpoints import Workshop

# Before anything imports huggingface_hub, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Makes checkpoints when a test first asks for them. Tests only read what is in it."""
    from checkpoints import Workshop

    return Workshop(tmp_path_factory.mktemp("checkpoints"))
