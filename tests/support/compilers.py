"""Which releases of PyTorch trace halfbyte's layers."""

from __future__ import annotations

import pytest
import torch

# Dynamo of 2.6 refuses a parameter of a class of its own as an operation's argument. 2.11 and 2.15 take it; releases in
# between were not tried.
needs_compiler = pytest.mark.skipif(
    tuple(int(number) for number in torch.__version__.split(".")[:2]) < (2, 11),
    reason="torch.compile and torch.export of 4-bit layers are tested with PyTorch 2.11 and later",
)
