"""Adagrad under all the names that it has."""

from __future__ import annotations

from typing import Any

from .._missing import missing_attribute
from .optimizer import Optimizer1State

__all__ = ["Adagrad", "Adagrad8bit", "Adagrad32bit"]


class Adagrad(Optimizer1State):
    """Adagrad, of `optim_bits`-bit states."""

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
        if initial_accumulator_value or lr_decay:
            raise ValueError(
                f"initial_accumulator_value and lr_decay must be 0, got {initial_accumulator_value} and {lr_decay}"
            )
        super().__init__("adagrad", params, lr, (0.0, 0.0), eps, weight_decay, optim_bits, args, min_8bit_size)


class Adagrad8bit(Optimizer1State):
    """Adagrad, of 8-bit states."""

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
        if initial_accumulator_value or lr_decay:
            raise ValueError(
                f"initial_accumulator_value and lr_decay must be 0, got {initial_accumulator_value} and {lr_decay}"
            )
        if optim_bits != 8:
            raise ValueError(f"optim_bits must be 8, got {optim_bits}")
        super().__init__("adagrad", params, lr, (0.0, 0.0), eps, weight_decay, 8, args, min_8bit_size)


class Adagrad32bit(Optimizer1State):
    """Adagrad, of 32-bit states."""

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
        if initial_accumulator_value or lr_decay:
            raise ValueError(
                f"initial_accumulator_value and lr_decay must be 0, got {initial_accumulator_value} and {lr_decay}"
            )
        if optim_bits != 32:
            raise ValueError(f"optim_bits must be 32, got {optim_bits}")
        super().__init__("adagrad", params, lr, (0.0, 0.0), eps, weight_decay, 32, args, min_8bit_size)


__getattr__ = missing_attribute(__name__)
