"""Sweeps of which a few cases are quick, and all are run before a change is merged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import pytest

T = TypeVar("T")


def thorough(values: Iterable[T], quick: Iterable[T]) -> list[T | object]:
    """Values for `parametrize`: those that are not among `quick` are left out by `-m "not slow"`."""
    values, quick = list(values), list(quick)
    assert all(value in values for value in quick), quick
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]
