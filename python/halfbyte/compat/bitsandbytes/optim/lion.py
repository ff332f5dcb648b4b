"""Lion under all the names that it has."""

from __future__ import annotations

from typing import Any

from .._missing import missing_attribute
from .optimizer import Optimizer1State

__all__ = ["Lion", "Lion8bit", "Lion32bit", "PagedLion", "PagedLion8bit", "PagedLion32bit"]


class _Lion(Optimizer1State):
    """What all of them do with their arguments."""

    def _start(
        self,
        params: Any,
        lr: float,
        betas: Any,
        weight_decay: float,
        optim_bits: int,
        args: Any,
        min_8bit_size: int,
        is_paged: bool,
    ) -> None:
        Optimizer1State.__init__(
            self, "lion", params, lr, betas, 0.0, weight_decay, optim_bits, args, min_8bit_size, is_paged=is_paged
        )


class _FixedLion(_Lion):
    """Without `optim_bits`."""

    _bits: int = 32

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        """Make the optimizer; see the class."""
        self._start(params, lr, betas, weight_decay, self._bits, args, min_8bit_size, is_paged)


class _FixedPagedLion(_Lion):
    """Without `optim_bits` and `is_paged`."""

    _bits: int = 32

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        """Make the optimizer; see the class."""
        self._start(params, lr, betas, weight_decay, self._bits, args, min_8bit_size, True)


class Lion(_Lion):
    """Lion (arXiv 2302.06675), of `optim_bits`-bit states."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        """Make the optimizer; see the class."""
        self._start(params, lr, betas, weight_decay, optim_bits, args, min_8bit_size, is_paged)


class Lion8bit(_FixedLion):
    """`Lion`, of 8-bit states."""

    _bits = 8


class Lion32bit(_FixedLion):
    """`Lion`, of 32-bit states."""


class PagedLion(_Lion):
    """`Lion`, paged."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        """Make the optimizer; see the class."""
        self._start(params, lr, betas, weight_decay, optim_bits, args, min_8bit_size, True)


class PagedLion8bit(_FixedPagedLion):
    """`Lion`, of 8-bit states, paged."""

    _bits = 8


class PagedLion32bit(_FixedPagedLion):
    """`Lion`, of 32-bit states, paged."""


__getattr__ = missing_attribute(__name__)
