"""AdamW under all the names that it has."""

from __future__ import annotations

from typing import Any

from .._missing import missing_attribute
from .adam import _Adam

__all__ = ["AdamW", "AdamW8bit", "AdamW32bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit"]


class _AdamW(_Adam):
    """Another default of `weight_decay`."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        """Make the optimizer; see the class."""
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size, is_paged
        )  # fmt: skip


class _PagedAdamW(_AdamW):
    """Without `is_paged`."""

    _paged = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        """Make the optimizer; see the class."""
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size)


class AdamW(_AdamW):
    """AdamW (arXiv 1711.05101), of `optim_bits`-bit states."""


class AdamW8bit(_AdamW):
    """`AdamW`, of 8-bit states."""

    _bits = 8


class AdamW32bit(_AdamW):
    """`AdamW`, of 32-bit states."""

    _bits = 32


class PagedAdamW(_PagedAdamW):
    """`AdamW`, paged."""


class PagedAdamW8bit(_PagedAdamW):
    """`AdamW`, of 8-bit states, paged."""

    _bits = 8


class PagedAdamW32bit(_PagedAdamW):
    """`AdamW`, of 32-bit states, paged."""

    _bits = 32


__getattr__ = missing_attribute(__name__)
