"""The experts of a layer on the CPU: check, allocate, hand addresses to the compiled core."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from halfbyte import _native
from halfbyte.backends.cpu import _NAMES, _follow_threads
from halfbyte.ops.checks_experts import check_experts


@functools.lru_cache(maxsize=256)
def _kernel(*kind: Any) -> Any:
    return _native.CpuExperts(*kind)


def takes(dtype: torch.dtype, **kind: Any) -> bool:
    """Whether experts of this kind are taken: all are."""
    return dtype in _NAMES


def experts_4bit(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    table: Tensor,
    maps: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    intermediate: int,
    blocksize: int,
    quant_type: str,
    nested: bool,
    activation: str,
) -> Tensor:
    """See `halfbyte.ops.experts`."""
    check_experts(x, ids, weights, table, maps, up_bias, down_bias, intermediate, blocksize, quant_type, activation)
    tokens, hidden = x.shape
    projections, experts, _ = table.shape
    kernel = _kernel(
        _NAMES[x.dtype], experts, hidden, intermediate, projections == 3, quant_type, blocksize, nested
    )  # fmt: skip
    x, ids, weights, table = x.contiguous(), ids.contiguous(), weights.contiguous(), table.contiguous()
    up_bias = None if up_bias is None else up_bias.contiguous()
    down_bias = None if down_bias is None else down_bias.contiguous()
    y = x.new_empty(tokens, hidden)
    kernel.forward(
        tokens,
        ids.shape[1],
        x.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        _NAMES[weights.dtype],
        table.data_ptr(),
        0 if up_bias is None else up_bias.data_ptr(),
        0 if down_bias is None else down_bias.data_ptr(),
        activation,
        y.data_ptr(),
        _follow_threads(),
    )
    return y
