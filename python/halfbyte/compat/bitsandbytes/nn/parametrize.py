"""Parameters of any module, packed to 4 bits and dequantized when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from .. import functional as F
from .._missing import missing_attribute

__all__ = ["Bnb4bitParametrization", "replace_parameter_4bit", "replace_parameter_4bit_prequantized"]


class Bnb4bitParametrization(nn.Module):
    """Dequantizes a packed parameter whenever it is read."""

    def __init__(self, quant_state: F.QuantState) -> None:
        """Keep the state of the packed values."""
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        """The parameter's values, in its own shape and dtype."""
        return F.dequantize_4bit(quantized_param, self.quant_state)


def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: Mapping[str, Any], device: torch.device | str | int
) -> None:
    """Have a parameter that holds packed values read as what they stand for.

    Args:
        module: Whose parameter.
        param_name: Its name in `module`.
        qs_dict: The state, as `QuantState.as_dict(packed=True)` gives it.
        device: Where the state goes.

    Raises:
        AttributeError: `module` has no such attribute.
        TypeError: It is not a parameter.
    """
    _parameter(module, param_name)
    _register(module, param_name, F.QuantState.from_dict(dict(qs_dict), device=device))


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: str = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantize a parameter, in place, and dequantize it whenever it is read.

    A state dict has the packed values under the parameter's own name, with its state beside them. Within one forward
    of `module` the parameter is dequantized once.

    Args:
        module: Whose parameter.
        param_name: Its name in `module`.
        compress_statistics: Quantize the scales too.
        quant_type: "nf4" or "fp4".
        blocksize: Values per scale, default 64.

    Raises:
        AttributeError: `module` has no such attribute.
        TypeError: It is not a parameter.
    """
    packed, state = F.quantize_4bit(
        _parameter(module, param_name).data,
        blocksize=blocksize,
        compress_statistics=compress_statistics,
        quant_type=quant_type,
    )
    setattr(module, param_name, nn.Parameter(packed, requires_grad=False))
    _register(module, param_name, state)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    if not hasattr(module, name):
        raise AttributeError(f"Module does not have parameter '{name}'")
    parameter = getattr(module, name)
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"Parameter '{name}' is not an instance of nn.Parameter")
    return parameter


def _register(module: nn.Module, name: str, state: F.QuantState) -> None:
    # unsafe=True: the dequantized weight has another shape and dtype than the packed one.
    P.register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)
    _register_parametrization_hooks(module, name)


def _register_parametrization_hooks(module: nn.Module, param_name: str) -> None:
    hook = partial(_parametrized_state_dict_post_hook, param_name=param_name)
    module.register_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
    module.register_forward_pre_hook(_enable_parametrization_cache)
    # Always: activation checkpointing ends the forward of its second pass by an exception, and a count that is not
    # taken back keeps every dequantized parameter in the cache from then on.
    module.register_forward_hook(_disable_parametrization_cache, always_call=True)


def _enable_parametrization_cache(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    P._cache_enabled += 1


def _disable_parametrization_cache(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    # Not below 0: it is also called when an earlier hook failed before the count went up.
    P._cache_enabled = max(0, P._cache_enabled - 1)
    if not P._cache_enabled:
        P._cache = {}


def _parametrized_state_dict_post_hook(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    *,
    param_name: str = "weight",
    **kwargs: Any,
) -> None:
    """Write the packed values under the parameter's own name, and their state beside them."""
    held = f"{prefix}parametrizations.{param_name}.original"
    if held not in state_dict:
        return
    state_dict[f"{prefix}{param_name}"] = state_dict.pop(held)
    chain: Any = module.parametrizations[param_name]  # type: ignore[index]
    state = next(p.quant_state for p in chain if isinstance(p, Bnb4bitParametrization))
    for key, value in state.as_dict(packed=True).items():
        state_dict[f"{prefix}{param_name}.{key}"] = value


__getattr__ = missing_attribute(__name__)
