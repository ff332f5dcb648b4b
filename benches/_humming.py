"""humming (PyPI: humming-kernels) as a contender: vLLM's kernels for weights of 4 bits and activations of 16."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

GROUP = 64


def humming_calls(n: int, k: int, count: int) -> Callable[[torch.Tensor, torch.Tensor], list[Callable[[], object]]]:
    """Copies of one layer [n, k]; returns what makes of x and y one call for each copy.

    int4 with a bfloat16 scale for each 64 weights of a row, packed as its kernels want it, is the nearest that it has
    to NF4 in blocks of 64: as many codes, and half the bytes of scales. The kernels of a shape are compiled here and at
    the first call with a number of rows.

    Raises:
        ImportError: It is not installed.
        RuntimeError: Its product is not that of the weight it was given.
    """
    from humming.layer import HummingLayer

    weight = torch.randn(n, k, dtype=torch.bfloat16, device="cuda")
    config: dict[str, Any] = {"dtype": "int4", "group_size": GROUP}
    layer = HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=torch.bfloat16).cuda()
    layer.load_from_unquantized(weight)
    layer.transform()
    x = torch.randn(16, k, dtype=torch.bfloat16, device="cuda")
    expected = torch.nn.functional.linear(x, weight).float()
    # 4 bits of normal weights are off by a tenth.
    error = float((layer(x).float() - expected).norm() / expected.norm())
    if not error < 0.25:
        raise RuntimeError(f"the product of {n}x{k} is off by {error:.2f}")
    layers = [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]

    def calls(x: torch.Tensor, y: torch.Tensor) -> list[Callable[[], object]]:
        layer(x, outputs=y)
        torch.cuda.synchronize()
        return [functools.partial(each, x, outputs=y) for each in layers]

    return calls
