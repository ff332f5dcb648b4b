"""Adagrad under all the names that it has."""

from __future__ import annotations

from typing import Any

from .._missing import missing_attribute
from .optimizer import Optimizer1State

__all__ = ["Adagrad", "Adagrad8bit", "Adagrad32bit"]


class _Adagrad(Optimizer1State):
    """Adagrad, without what bitsandbytes has not either."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        """Make the optimizer; see the class."""
        for name, value in (("initial_accumulator_value", initial_accumulator_value), ("lr_decay", lr_decay)):
            if value:
                raise ValueError(f"{name} must be 0, got {value}")
        if self._bits is not None and optim_bits != self._bits:
            raise ValueError(f"optim_bits must be {self._bits}, got {optim_bits}")
        super().__init__("adagrad", params, lr, (0.0, 0.0), eps, weight_decay, optim_bits, args, min_8bit_size)


class Adagrad(_Adagrad):
    """Adagrad, of `optim_bits`-bit states."""


class Adagrad8bit(_Adagrad):
    """`Adagrad`, of 8-bit states."""

    _bits = 8

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 8,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        """Make the optimizer; see the class."""
        super().__init__(
            params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, optim_bits, args, min_8bit_size
        )


class Adagrad32bit(_Adagrad):
    """`Adagrad`, of 32-bit states."""

    _bits = 32


__getattr__ = missing_attribute(__name__)
