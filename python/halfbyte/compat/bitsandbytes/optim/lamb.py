"""LAMB (arXiv 1904.00962) under all the names that it has."""

from __future__ import annotations

from typing import Any

from .._missing import missing_attribute
from .optimizer import Optimizer2State

__all__ = ["LAMB", "LAMB8bit", "LAMB32bit"]


class LAMB(Optimizer2State):
    """LAMB, of `optim_bits`-bit states."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
    ) -> None:
        """Make the optimizer; see the class."""
        if amsgrad or not bias_correction or not adam_w_mode:
            raise ValueError("amsgrad must be False, bias_correction and adam_w_mode True")
        super().__init__("lamb", params, lr, betas, eps, weight_decay, optim_bits, args, min_8bit_size, max_unorm)


class LAMB8bit(Optimizer2State):
    """LAMB, of 8-bit states."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
    ) -> None:
        """Make the optimizer; see the class."""
        if amsgrad or not bias_correction or not adam_w_mode:
            raise ValueError("amsgrad must be False, bias_correction and adam_w_mode True")
        super().__init__("lamb", params, lr, betas, eps, weight_decay, 8, args, min_8bit_size, max_unorm)


class LAMB32bit(Optimizer2State):
    """LAMB, of 32-bit states."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
    ) -> None:
        """Make the optimizer; see the class."""
        if amsgrad or not bias_correction or not adam_w_mode:
            raise ValueError("amsgrad must be False, bias_correction and adam_w_mode True")
        super().__init__("lamb", params, lr, betas, eps, weight_decay, 32, args, min_8bit_size, max_unorm)


__getattr__ = missing_attribute(__name__)
