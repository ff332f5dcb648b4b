"""LARS under all the names that it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from .._missing import missing_attribute
from .optimizer import Optimizer1State
from .sgd import check_momentum

__all__ = ["LARS", "LARS8bit", "LARS32bit", "PytorchLARS"]


class _LARS(Optimizer1State):
    """LARS, without what bitsandbytes has not either."""

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
        check_momentum(momentum, dampening, nesterov)
        super().__init__(
            "lars", params, lr, (momentum, 0.0), 0.0, weight_decay, optim_bits, args, min_8bit_size, max_unorm
        )  # fmt: skip


class _FixedLARS(_LARS):
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
        max_unorm: float = 0.02,
    ) -> None:
        """Make the optimizer; see the class."""
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, self._bits, args, min_8bit_size, max_unorm
        )  # fmt: skip


class LARS(_LARS):
    """LARS (arXiv 1708.03888), of `optim_bits`-bit states.

    As in bitsandbytes, an update whose norm is more than `max_unorm` times that of the parameter is scaled down to
    that, and none is scaled up.
    """


class LARS8bit(_FixedLARS):
    """`LARS`, of 8-bit states."""

    _bits = 8


class LARS32bit(_FixedLARS):
    """`LARS`, of 32-bit states."""


class PytorchLARS(torch.optim.Optimizer):
    """LARS by torch's operations, in float32: with dampening and Nesterov's momentum too."""

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
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if value < 0.0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(f"nesterov must be False without momentum or with dampening, got {momentum}, {dampening}")
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "max_unorm": max_unorm,
        }  # fmt: skip
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(group, p, p.grad)
        return loss

    def _update(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> None:
        if p.dtype is not torch.float32:
            raise TypeError(f"params must be float32, got {p.dtype}")
        update = grad.add(p, alpha=group["weight_decay"])
        if group["momentum"]:
            moment = self.state[p].get("momentum_buffer")
            if moment is None:
                moment = self.state[p]["momentum_buffer"] = update.clone()
            else:
                moment.mul_(group["momentum"]).add_(update, alpha=1 - group["dampening"])
            update = update.add(moment, alpha=group["momentum"]) if group["nesterov"] else moment
        scale = 1.0
        if group["max_unorm"] > 0.0:
            norm, limit = float(update.norm()), group["max_unorm"] * float(p.norm())
            scale = limit / norm if norm > limit else 1.0
        p.add_(update, alpha=-group["lr"] * scale)


__getattr__ = missing_attribute(__name__)
