"""The operations of optimizers: one step, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._define import check_dtype, check_float, define
from ._updates import update_8bit_blockwise, update_32bit


def _check_pair(g: Tensor, p: Tensor) -> None:
    torch._check(g.numel() == p.numel(), lambda: f"g must have {p.numel()} elements, as p, got {g.numel()}")
    check_float("g", g.dtype)
    check_dtype("g", g, p.dtype)


def _fake_32bit(optimizer_name: str, g: Tensor, p: Tensor, *rest: Any, **named: Any) -> None:
    _check_pair(g, p)


@define(
    "optimizer_update_32bit",
    "(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, "
    "Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, float beta3, float alpha, "
    "float eps, float weight_decay, int step, float lr, float gnorm_scale, bool skip_zeros=False) -> ()",
    _fake_32bit,
)
def _optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    unorm_vec: Tensor | None,
    max_unorm: float,
    param_norm: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    step: int,
    lr: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    _check_pair(g, p)
    update_32bit(
        optimizer_name, g, p, state1, state2, beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale,
        unorm_vec, max_unorm, skip_zeros, param_norm,
    )  # fmt: skip


def _fake_8bit(
    optimizer_name: str, g: Tensor, p: Tensor, state1: Tensor, state2: Tensor | None, *rest: Any, **named: Any
) -> None:
    _check_pair(g, p)
    check_dtype("state1", state1, torch.uint8)
    if state2 is not None:
        check_dtype("state2", state2, torch.uint8)


@define(
    "optimizer_update_8bit_blockwise",
    "(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, float beta1, "
    "float beta2, float beta3, float alpha, float eps, int step, float lr, Tensor(a4!) qmap1, Tensor(a5!)? qmap2, "
    "Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay, float gnorm_scale, bool skip_zeros=False) -> ()",
    _fake_8bit,
)
def _optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    _check_pair(g, p)
    update_8bit_blockwise(
        optimizer_name, g, p, (state1, qmap1, absmax1), (state2, qmap2, absmax2), beta1, beta2, beta3, alpha, eps,
        weight_decay, step, lr, gnorm_scale, skip_zeros,
    )  # fmt: skip
