"""SGD with momentum under all the names that it has."""

from __future__ import annotations

from typing import Any

from .._missing import missing_attribute
from .optimizer import Optimizer1State

__all__ = ["SGD", "SGD8bit", "SGD32bit"]


class _SGD(Optimizer1State):
    """SGD with momentum, without what bitsandbytes has not either."""

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
        check_momentum(momentum, dampening, nesterov)
        super().__init__("momentum", params, lr, (momentum, 0.0), 0.0, weight_decay, optim_bits, args, min_8bit_size)


class _FixedSGD(_SGD):
    """Without `optim_bits`."""

    _bits: int = 32

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
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, self._bits, args, min_8bit_size
        )  # fmt: skip


def check_momentum(momentum: float, dampening: float, nesterov: bool) -> None:
    """Of SGD and LARS.

    Raises:
        NotImplementedError: There is no momentum, or one that is not plain.
    """
    if momentum == 0:
        raise NotImplementedError("momentum must be positive, got 0")
    if nesterov or dampening:
        raise NotImplementedError(f"nesterov and dampening must be left out, got {nesterov} and {dampening}")


class SGD(_SGD):
    """SGD with momentum, of `optim_bits`-bit states."""


class SGD8bit(_FixedSGD):
    """`SGD`, of 8-bit states."""

    _bits = 8


class SGD32bit(_FixedSGD):
    """`SGD`, of 32-bit states."""


__getattr__ = missing_attribute(__name__)
