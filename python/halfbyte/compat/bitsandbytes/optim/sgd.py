"""SGD with momentum under all the names that it has."""

from __future__ import annotations

from typing import Any

from .._missing import missing_attribute
from .optimizer import Optimizer1State

__all__ = ["SGD", "SGD8bit", "SGD32bit"]


class SGD(Optimizer1State):
    """SGD, of `optim_bits`-bit states."""

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        """Make the optimizer; see the class."""
        if momentum == 0:
            raise NotImplementedError("momentum must be positive, got 0")
        if nesterov or dampening:
            raise NotImplementedError(f"nesterov and dampening must be left out, got {nesterov} and {dampening}")
        super().__init__(
            "momentum", params, lr, (momentum, dampening), 0.0, weight_decay, optim_bits, args, min_8bit_size
        )


class SGD8bit(Optimizer1State):
    """SGD, of 8-bit states."""

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        """Make the optimizer; see the class."""
        if momentum == 0:
            raise NotImplementedError("momentum must be positive, got 0")
        if nesterov or dampening:
            raise NotImplementedError(f"nesterov and dampening must be left out, got {nesterov} and {dampening}")
        super().__init__("momentum", params, lr, (momentum, dampening), 0.0, weight_decay, 8, args, min_8bit_size)


class SGD32bit(Optimizer1State):
    """SGD, of 32-bit states."""

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        """Make the optimizer; see the class."""
        if momentum == 0:
            raise NotImplementedError("momentum must be positive, got 0")
        if nesterov or dampening:
            raise NotImplementedError(f"nesterov and dampening must be left out, got {nesterov} and {dampening}")
        super().__init__("momentum", params, lr, (momentum, dampening), 0.0, weight_decay, 32, args, min_8bit_size)


__getattr__ = missing_attribute(__name__)
