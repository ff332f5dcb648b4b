"""Adam under all the names that it has."""

from __future__ import annotations

from typing import Any

from .._missing import missing_attribute
from .optimizer import Optimizer2State

__all__ = ["Adam", "Adam8bit", "Adam32bit", "PagedAdam", "PagedAdam8bit", "PagedAdam32bit"]


class _Adam(Optimizer2State):
    """Adam, with the weight decay of AdamW."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        """Make the optimizer; see the class."""
        if amsgrad:
            raise ValueError("amsgrad must be False, got True")
        if self._bits == 8 and optim_bits != 32:
            raise ValueError(f"optim_bits must be left out, got {optim_bits}")
        super().__init__(
            "adam", params, lr, betas, eps, weight_decay, self._bits or optim_bits, args, min_8bit_size,
            is_paged=is_paged or self._paged,
        )  # fmt: skip


class Adam(_Adam):
    """Adam (arXiv 1412.6980), of `optim_bits`-bit states.

    `weight_decay` shrinks the parameter, as in AdamW and in bitsandbytes; torch.optim.Adam adds it to the gradient.
    """


class Adam8bit(_Adam):
    """`Adam`, of 8-bit states."""

    _bits = 8


class Adam32bit(_Adam):
    """`Adam`, of 32-bit states."""

    _bits = 32


class PagedAdam(_Adam):
    """`Adam`, paged."""

    _paged = True


class PagedAdam8bit(_Adam):
    """`Adam`, of 8-bit states, paged."""

    _bits, _paged = 8, True


class PagedAdam32bit(_Adam):
    """`Adam`, of 32-bit states, paged."""

    _bits, _paged = 32, True


__getattr__ = missing_attribute(__name__)
