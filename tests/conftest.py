"""What several test files share: no hub is asked, a busy machine fails no test, and checkpoints are made once."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from checkpoints import Workshop

# Before anything imports huggingface_hub, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

if find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    # Both ask how long an example takes, which another process decides.
    settings.register_profile("halfbyte", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("halfbyte")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Makes checkpoints when a test first asks for them. Tests only read what is in it."""
    from checkpoints import Workshop

    return Workshop(tmp_path_factory.mktemp("checkpoints"))
