"""What several test files share: no hub is asked, a busy machine fails no test, and checkpoints are made once."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
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


# The files that take longest, longest first. Processes that share the files among them begin with these, so that none
# is left alone with a long one at the end.
LONGEST = (
    "interop/test_processes.py",
    "emulator/test_emulator_sanitizers.py",
    "test_examples.py",
    "test_docs.py",
    "emulator/test_emulator_engine.py",
    "emulator/test_emulator_blockwise.py",
    "emulator/test_emulator_gemm.py",
    "torch/test_joint.py",
    "interop/test_peft_fuse.py",
    "emulator/test_emulator_hopper.py",
    "emulator/test_emulator_int8_tile.py",
    "emulator/test_emulator_products.py",
    "offline/test_interop.py",
    "torch/test_int8_ops.py",
    "interop/test_experts.py",
    "emulator/test_emulator_collectives.py",
    "torch/test_ops.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        tests = Path(__file__).parent
        places = {tests / name: place for place, name in enumerate(LONGEST)}
        assert all(path.is_file() for path in places), "LONGEST names a file that is not there"
        items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Makes checkpoints when a test first asks for them. Tests only read what is in it."""
    from checkpoints import Workshop

    return Workshop(tmp_path_factory.mktemp("checkpoints"))
