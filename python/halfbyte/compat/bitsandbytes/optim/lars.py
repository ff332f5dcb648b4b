"""LARS (arXiv 1708.03888) under all the names that it has."""

from __future__ import annotations

from typing import Any

from .._missing import missing_attribute
from .optimizer import Optimizer1State

__all__ = ["LARS", "LARS8bit", "LARS32bit", "PytorchLARS"]


class LARS(Optimizer1State):
    """LARS, of `optim_bits`-bit states."""

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
        max_unorm: float = 0.02,
    ) -> None:
        """Make the optimizer; see the class."""
        if momentum == 0:
            raise NotImplementedError("momentum must be positive, got 0")
        if nesterov or dampening:
            raise NotImplementedError(f"nesterov and dampening must be left out, got {nesterov} and {dampening}")
        super().__init__(
            "lars", params, lr, (momentum, dampening), 0.0, weight_decay, optim_bits, args, min_8bit_size, max_unorm
        )


class LARS8bit(Optimizer1State):
    """LARS, of 8-bit states."""

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
        max_unorm: float = 0.02,
    ) -> None:
        """Make the optimizer; see the class."""
        if momentum == 0:
            raise NotImplementedError("momentum must be positive, got 0")
        if nesterov or dampening:
            raise NotImplementedError(f"nesterov and dampening must be left out, got {nesterov} and {dampening}")
        super().__init__(
            "lars", params, lr, (momentum, dampening), 0.0, weight_decay, 8, args, min_8bit_size, max_unorm
        )


class LARS32bit(Optimizer1State):
    """LARS, of 32-bit states."""

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
        max_unorm: float = 0.02,
    ) -> None:
        """Make the optimizer; see the class."""
        if momentum == 0:
            raise NotImplementedError("momentum must be positive, got 0")
        if nesterov or dampening:
            raise NotImplementedError(f"nesterov and dampening must be left out, got {nesterov} and {dampening}")
        super().__init__(
            "lars", params, lr, (momentum, dampening), 0.0, weight_decay, 32, args, min_8bit_size, max_unorm
        )


class PytorchLARS(LARS):
    """LARS under the name of bitsandbytes' reference in torch."""

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        max_unorm: float = 0.02,
    ) -> None:
        """Make the optimizer; see the class."""
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, max_unorm=max_unorm)


__getattr__ = missing_attribute(__name__)
