"""What `Linear8bitLt` and `Embedding8bit` share: a weight of 8-bit rows, and how its scales are kept beside it.

The module owns the scales, in its `state`: they are right even where the weight was replaced by a bare parameter, as
wrappers do that shard or flatten parameters. They follow the weight that is assigned, every move, and what is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from halfbyte.functional import int8_vectorwise_dequant
from halfbyte.nn._joint import JOINT, STANDS_FOR, is_foreign, new_module, portable
from halfbyte.nn._quantized import _as_bytes, without_weight
from halfbyte.nn._requantized import watching
from halfbyte.nn.int8_params import Int8Params, quantize_weight
from halfbyte.ops._torch_internals import can_hold
from halfbyte.ops.checks import FLOAT_DTYPES, DTypeError, check_tensor, names
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

    # The scales of a weight that is offloaded: accelerate's hooks bring its codes for each forward, in a parameter of
    # their own making, and forget those of the state behind it.
    offloaded_scales: Tensor | None = None

    def _weight_shape(self) -> tuple[int, int]:
        """Of the weight."""
        raise NotImplementedError

    # ---- weight and scales -------------------------------------------------------------------------------------------

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        """Assigning `weight` ends here: the state follows."""
        if name == "weight" and not isinstance(param, Int8Params) and is_foreign(param, "Int8Params"):
            # PEFT makes one when it merges an adapter.
            param = Int8Params.adopt(param)
        if isinstance(param, Int8Params) and type(param) in JOINT and STANDS_FOR in type(self).__dict__:
            param.__class__ = JOINT[type(param)]
        watch = watching()
        if watch is not None and name == "weight" and isinstance(param, Int8Params):
            watch.assigned(self, self._parameters.get(name), param)
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
            if scales is None and self.offloaded_scales is not None:
                return self.offloaded_scales if weight.is_meta else self.offloaded_scales.to(weight.device)
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
        return new_module, (named,), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        """All but the codes in the state, which the weight has too."""
        state = copy.copy(self.state)
        if self._parameters.get("weight") is not None and self.weight.dtype is torch.int8:
            state.CB = None
        return {**self.__dict__, "state": state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what `__getstate__` gave."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.state.CB is None:
            self._follow(self._parameters.get("weight"))

    # ---- moving ------------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedRows:
        """Move codes and scales by what `fn` does to bytes: casts do not touch them."""
        weight = self._parameters.get("weight")
        if weight is None:
            return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]
        with without_weight(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            if weight.dtype is not torch.int8 and not (isinstance(weight, Int8Params) and not weight.has_fp16_weights):
                # A float weight to be trained; what was made of it is made again.
                self.state.reset_grads()
                grad = weight.grad
                self._replace(weight, fn(weight).data, None)
                if grad is not None:
                    self.weight.grad = fn(grad)
                return self
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
        known = (getattr(weight, "SCB", None), self.state.SCB, self.offloaded_scales)
        if weight.is_meta and all(scales is None for scales in known):
            # An empty layer, whose codes are to be loaded.
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
        name, scales_name = f"{prefix}weight", f"{prefix}SCB"
        own = {key: state_dict[key] for key in (name, scales_name, f"{prefix}weight_format") if key in state_dict}
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        try:
            hold = self._checked(prefix, own, assign)
        except (ValueError, TypeError, RuntimeError) as error:
            # Nothing of the module changes then.
            error_msgs.append(str(error))
            return
        # The bias, and whatever a subclass has, are torch's business.
        said = len(error_msgs)
        rest = {key: value for key, value in state_dict.items() if key not in own}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if hold is not None:
            if name in missing_keys:
                missing_keys.remove(name)
            if len(error_msgs) == said:
                hold()

    def _checked(self, prefix: str, own: Mapping[str, Any], assign: bool) -> Callable[[], None] | None:
        """Check the entries of a state dict, and return what holds them: None where there are none."""
        name, scales_name, format_name = (f"{prefix}{key}" for key in ("weight", "SCB", "weight_format"))
        if name not in own:
            if own:
                raise ValueError(f"{name}: missing, but given are {', '.join(own)}")
            return None
        value, scales = own[name], own.get(scales_name)
        check_tensor(name, value)
        weight, shape = self.weight, self._weight_shape()
        value = value.detach()
        if tuple(value.shape) != shape:
            raise ValueError(f"{name}: shape {list(value.shape)} is not the layer's {list(shape)}")
        target = value.device if assign else weight.device
        if target.type == "meta" and not value.is_meta:
            raise ValueError(
                f"{name}: the module is on the meta device, and cannot hold {value.dtype} {list(value.shape)}; "
                "call load_state_dict(..., assign=True)"
            )
        quantized = isinstance(weight, Int8Params) or weight.dtype is torch.int8
        trained = bool(self.state.has_fp16_weights)
        if value.dtype in FLOAT_DTYPES:
            if scales is not None and quantized:
                raise ValueError(f"{scales_name}: given, but {name} is {value.dtype}; scales belong to torch.int8")
            if trained or not quantized:
                if scales is None:
                    return partial(self._take_float, value, target, assign)
                raise self._too_early(name)
            if value.is_meta:
                raise ValueError(f"{name}: is a float tensor on the meta device, of which there is nothing to quantize")
            return partial(self._take, *quantize_weight(value.to(target), name), target, assign)
        if trained:
            raise ValueError(
                f"{name}: dtype {value.dtype}, but has_fp16_weights is True, which keeps a weight of "
                f"{names(FLOAT_DTYPES)}"
            )
        if value.dtype is not torch.int8:
            raise DTypeError(f"{name}: dtype {value.dtype} is not torch.int8, or one of {names(FLOAT_DTYPES)}")
        _check_format(format_name, own.get(format_name, _ROW_FORMAT))
        if scales is None:
            raise ValueError(f"{scales_name}: missing, but {name} is torch.int8; expected float32 [{shape[0]}]")
        check_tensor(scales_name, scales)
        check_statistics(scales_name, scales, shape[0], name, scales.device)
        if not quantized or (weight.dtype is not torch.int8 and not self._loads_codes_early):
            raise self._too_early(name)
        return partial(self._take, value, scales.detach().view(-1), target, assign)

    def _too_early(self, name: str) -> RuntimeError:
        return RuntimeError(
            f"Loading a quantized checkpoint into non-quantized {type(self).__name__} is not supported: {name}; "
            "call module.to(device) first"
        )

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


def _check_format(name: str, found: Any) -> None:
    """How codes are laid out: row by row."""
    value = found.item() if isinstance(found, Tensor) and found.numel() == 1 and not found.is_meta else found
    if value not in (_ROW_FORMAT, "row") and not (isinstance(found, Tensor) and found.is_meta):
        raise ValueError(f"{name}: {value!r} is not {_ROW_FORMAT}, codes row by row")
