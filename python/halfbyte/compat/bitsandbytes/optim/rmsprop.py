"""RMSprop under all the names that it has."""

from __future__ import annotations

from typing import Any

from .._missing import missing_attribute
from .optimizer import Optimizer1State

__all__ = ["RMSprop", "RMSprop8bit", "RMSprop32bit"]


class _RMSprop(Optimizer1State):
    """RMSprop, without what bitsandbytes has not either."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        """Make the optimizer; see the class."""
        if alpha == 0:
            raise NotImplementedError("alpha must be positive, got 0")
        if centered:
            raise NotImplementedError("centered must be False, got True")
        super().__init__("rmsprop", params, lr, (alpha, momentum), eps, weight_decay, optim_bits, args, min_8bit_size)


class _FixedRMSprop(_RMSprop):
    """Without `optim_bits`."""

    _bits: int = 32

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        """Make the optimizer; see the class."""
        super().__init__(params, lr, alpha, eps, weight_decay, momentum, centered, self._bits, args, min_8bit_size)


class RMSprop(_RMSprop):
    """RMSprop, of `optim_bits`-bit states."""


class RMSprop8bit(_FixedRMSprop):
    """`RMSprop`, of 8-bit states."""

    _bits = 8


class RMSprop32bit(_FixedRMSprop):
    """`RMSprop`, of 32-bit states."""


__getattr__ = missing_attribute(__name__)
