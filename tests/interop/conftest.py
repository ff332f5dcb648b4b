"""What tests beside other libraries share."""

from __future__ import annotations

import pytest


@pytest.fixture
def logs_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said once is said once a test."""
    from halfbyte.integrations import peft as integration
    from halfbyte.integrations.peft import layers

    monkeypatch.setattr(integration, "_said", set())
    monkeypatch.setattr(layers, "_said", set())
