"""What `Linear8bitLt` and `Embedding8bit` share: a weight of 8-bit rows, and how its scales are kept beside it.

The module owns the scales, in its `state`: they are right even where the weight was replaced by a bare parameter, as
wrappers do that shard or flatten parameters. They follow the weight that is assigned, every move, and what is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from halfbyte.functional import int8_vectorwise_dequant
from halfbyte.nn._joint import JOINT, STANDS_FOR, new_module, portable
from halfbyte.nn._quantized import _as_bytes
from halfbyte.nn.int8_params import Int8Params, quantize_weight
from halfbyte.ops._torch_internals import can_hold
from halfbyte.ops.checks import FLOAT_DTYPES, DTypeError, names
from halfbyte.ops.checks_8bit import check_statistics
from halfbyte.ops.matmul_8bit import MatmulLtState

_ROW_FORMAT = 0
"""What `weight_format` says of codes that are stored row by row. There are no others."""


class QuantizedRows(torch.nn.Module):
    """A module whose `weight`, of `_weight_shape()`, has rows of 8 bits a value."""

    weight: Tensor
    state: MatmulLtState

    # Whether codes are loaded into a weight that is not quantized yet. bitsandbytes' layer refuses that: so does the
    # one that stands in for it.
    _loads_codes_early: bool = True

    def _weight_shape(self) -> tuple[int, int]:
        """Of the weight."""
        raise NotImplementedError

    # ---- weight and scales -------------------------------------------------------------------------------------------

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        """Assigning `weight` ends here: the state follows."""
        if isinstance(param, Int8Params) and type(param) in JOINT and STANDS_FOR in type(self).__dict__:
            param.__class__ = JOINT[type(param)]
        super().register_parameter(name, param)
        if name == "weight" and isinstance(param, Int8Params):
            self._follow(param)

    def _follow(self, weight: Any) -> None:
        """Let the state say what the weight does."""
        if isinstance(weight, Int8Params):
            self.state.CB, self.state.SCB = weight.CB, weight.SCB

    def _scales(self, weight: Tensor) -> Tensor:
        """The scales of codes: the weight's own, or else the module's."""
        scales: Tensor | None = getattr(weight, "SCB", None)
        if scales is None:
            scales = self.state.SCB
            if scales is None:
                raise RuntimeError(
                    f"{type(self).__name__}: the weight is torch.int8, but its scales are missing: weight.SCB and "
                    f"state.SCB are None; expected float32 [{self._weight_shape()[0]}]"
                )
            if isinstance(weight, Int8Params) and not torch.compiler.is_compiling():
                weight.SCB = scales
        elif scales is not self.state.SCB and not torch.compiler.is_compiling():
            self._follow(weight)
        return scales

    def _not_quantized(self) -> RuntimeError:
        return RuntimeError(
            f"{type(self).__name__}: the weight is not quantized yet; move the module to its device first, "
            'as in module.to("cuda") or module.to("cpu"), or load a state dict'
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a dense tensor: float32, or `dtype`."""
        weight = self.weight
        if weight.dtype is torch.int8:
            dense = int8_vectorwise_dequant(weight.data, self._scales(weight))
        else:
            dense = weight.detach().to(torch.float32)
        return dense if dtype is None else dense.to(dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As torch's modules, but that a joint class is never named: see `halfbyte.integrations.bitsandbytes`."""
        named = portable(type(self))
        if named is type(self):
            return super().__reduce_ex__(protocol)
        return new_module, (named,), self.__dict__

    # ---- moving ------------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedRows:
        """Move codes and scales by what `fn` does to bytes: casts do not touch them."""
        weight = self._parameters.get("weight")
        if weight is None:
            return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]
        if weight.dtype is not torch.int8 and not (isinstance(weight, Int8Params) and not weight.has_fp16_weights):
            # A float weight to be trained; what was made of it is made again.
            self.state.reset_grads()
            return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]
        super()._apply(  # type: ignore[no-untyped-call]
            lambda tensor: tensor if tensor is weight else fn(tensor), recurse
        )
        with torch.no_grad():
            if weight.dtype is not torch.int8:
                self._replace(weight, fn(weight), None)
            else:
                scales = getattr(weight, "SCB", None)
                scales = self.state.SCB if scales is None else scales
                moved = None if scales is None else _as_bytes(scales, fn)
                self._replace(weight, _as_bytes(weight.data, fn), moved)
                self.state.CB, self.state.SCB = self._parameters["weight"].data, moved  # type: ignore[union-attr]
                return self
        self._follow(self._parameters["weight"])
        return self

    def _replace(self, weight: torch.nn.Parameter, data: Tensor, scales: Tensor | None) -> None:
        """Put `data` into the parameter, or where torch cannot, into a new one."""
        if data is weight:
            return
        if can_hold(weight, data):
            weight.data = data
            if isinstance(weight, Int8Params):
                weight.SCB = scales
        elif isinstance(weight, Int8Params):
            self._parameters["weight"] = weight._like(data, scales)
        else:
            self._parameters["weight"] = torch.nn.Parameter(data, requires_grad=weight.requires_grad)

    # ---- state dicts -------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Add the scales beside the codes."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self._parameters.get("weight")
        if weight is None or weight.dtype is not torch.int8:
            return
        scales = self._scales(weight)
        destination[f"{prefix}SCB"] = scales if keep_vars else scales.detach()
        destination[f"{prefix}weight_format"] = torch.tensor(_ROW_FORMAT, dtype=torch.uint8)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take a float weight, which is quantized, or codes with their scales."""
        name, scales_name, format_name = (f"{prefix}{key}" for key in ("weight", "SCB", "weight_format"))
        own = {name, scales_name, format_name}
        # The bias, and whatever a subclass has, are torch's business.
        rest = {key: value for key, value in state_dict.items() if key not in own}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if name not in state_dict:
            if scales_name in state_dict:
                error_msgs.append(f"{name}: missing, but its scales are there: {scales_name}")
            return
        if name in missing_keys:
            missing_keys.remove(name)
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        try:
            self._load_weight(
                name, state_dict[name], state_dict.get(scales_name), state_dict.get(format_name), scales_name, assign
            )
        except (ValueError, TypeError) as error:
            error_msgs.append(str(error))

    def _load_weight(self, name: str, value: Any, scales: Any, layout: Any, scales_name: str, assign: bool) -> None:
        """Check one entry of a state dict, and hold it."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: {type(value).__name__} is not a torch.Tensor")
        weight, shape = self.weight, self._weight_shape()
        value = value.detach()
        if tuple(value.shape) != shape:
            raise ValueError(f"{name}: shape {list(value.shape)} is not the layer's {list(shape)}")
        if value.dtype is not torch.int8 and value.dtype not in FLOAT_DTYPES:
            raise DTypeError(f"{name}: dtype {value.dtype} is not torch.int8, or one of {names(FLOAT_DTYPES)}")
        target = value.device if assign else weight.device
        if target.type == "meta" and not value.is_meta:
            raise ValueError(
                f"{name}: the module is on the meta device, and cannot hold {value.dtype} {list(value.shape)}; "
                "call load_state_dict(..., assign=True)"
            )
        trained = bool(self.state.has_fp16_weights)
        if value.dtype is not torch.int8:
            if scales is not None:
                raise ValueError(f"{scales_name}: given, but {name} is {value.dtype}; scales belong to torch.int8")
            if trained or (weight.dtype is not torch.int8 and not isinstance(weight, Int8Params)):
                self._take_float(value, target, assign)
                return
            if value.is_meta:
                raise ValueError(f"{name}: is a float tensor on the meta device, of which there is nothing to quantize")
            self._take(*quantize_weight(value.to(target), name), target, assign)
            return
        if trained:
            raise ValueError(
                f"{name}: dtype torch.int8 is quantized already, but has_fp16_weights is True; legal are "
                f"{names(FLOAT_DTYPES)}"
            )
        if layout is not None:
            number = int(layout) if isinstance(layout, (int, Tensor)) else layout
            if number not in (_ROW_FORMAT, "row"):
                raise ValueError(f"{prefix_of(name)}weight_format: {number!r} is not {_ROW_FORMAT} (codes row by row)")
        if scales is None:
            raise ValueError(f"{scales_name}: missing, but {name} is torch.int8; expected float32 [{shape[0]}]")
        if isinstance(scales, Tensor):
            check_statistics(scales_name, scales, shape[0], name, scales.device)
        else:
            raise TypeError(f"{scales_name}: {type(scales).__name__} is not a torch.Tensor")
        if weight.dtype is not torch.int8 and not (self._loads_codes_early and isinstance(weight, Int8Params)):
            raise RuntimeError(
                f"Loading a quantized checkpoint into non-quantized {type(self).__name__} is not supported: {name}; "
                "call module.to(device) first"
            )
        self._take(value, scales.detach().view(-1), target, assign)

    def _take_float(self, value: Tensor, device: torch.device, assign: bool) -> None:
        """Hold a float weight as it is."""
        weight = self.weight
        self.state.reset_grads()
        if not assign:
            with torch.no_grad():
                weight.copy_(value)
        elif isinstance(weight, Int8Params):
            self.weight = weight._like(value.to(device), None)
        else:
            self.weight = torch.nn.Parameter(value.to(device), requires_grad=weight.requires_grad)

    def _take(self, codes: Tensor, scales: Tensor, device: torch.device, assign: bool) -> None:
        """Hold codes and scales, in memory of our own unless `assign`."""
        weight = self.weight
        scales, codes = scales.to(device, copy=not assign), codes.to(device)
        if not assign and weight.dtype is torch.int8:
            with torch.no_grad():
                weight.data.copy_(codes)
            codes = weight.data
        elif not assign:
            codes = codes.clone()
        if not isinstance(weight, Int8Params):
            self.state.CB, self.state.SCB = codes, scales
            if assign:
                self.weight = Int8Params(codes, requires_grad=False, SCB=scales)
            else:
                weight.data = codes
            return
        if assign:
            self.weight = type(weight)(codes, requires_grad=False, SCB=scales)
            return
        weight._hold(codes, scales)
        self._follow(weight)


def prefix_of(name: str) -> str:
    """What stands before `weight` in a name."""
    return name.removesuffix("weight")
