"""LAMB under all the names that it has."""

from __future__ import annotations

from typing import Any

from .._missing import missing_attribute
from .optimizer import Optimizer2State

__all__ = ["LAMB", "LAMB8bit", "LAMB32bit"]


class _LAMB(Optimizer2State):
    """LAMB, without what bitsandbytes has not either."""

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
        for name, value, legal in (
            ("bias_correction", bias_correction, True),
            ("amsgrad", amsgrad, False),
            ("adam_w_mode", adam_w_mode, True),
        ):
            if value != legal:
                raise ValueError(f"{name} must be {legal}, got {value}")
        super().__init__("lamb", params, lr, betas, eps, weight_decay, optim_bits, args, min_8bit_size, max_unorm)


class _FixedLAMB(_LAMB):
    """Without `optim_bits`."""

    _bits: int = 32

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
        super().__init__(
            params, lr, bias_correction, betas, eps, weight_decay, amsgrad, adam_w_mode, self._bits, args,
            min_8bit_size, max_unorm,
        )  # fmt: skip


class LAMB(_LAMB):
    """LAMB (arXiv 1904.00962), of `optim_bits`-bit states.

    As in bitsandbytes, an update whose norm is more than `max_unorm` times that of the parameter is scaled down to
    that, and none is scaled up.
    """


class LAMB8bit(_FixedLAMB):
    """`LAMB`, of 8-bit states."""

    _bits = 8


class LAMB32bit(_FixedLAMB):
    """`LAMB`, of 32-bit states."""


__getattr__ = missing_attribute(__name__)
