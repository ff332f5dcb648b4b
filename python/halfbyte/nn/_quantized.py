"""What `Linear4bit` and `Embedding4bit` share: a weight that is packed, its state, and how both are kept together.

The module owns the state: `module.quant_state` is right even where the weight was replaced by a bare parameter, as
wrappers do that shard or flatten parameters. It follows the weight that is assigned, every move, and `load_state_dict`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from halfbyte.codebooks import quant_map
from halfbyte.functional import dequantize_4bit, quantize_4bit
from halfbyte.nn._joint import JOINT, STANDS_FOR, is_foreign, new_module, portable
from halfbyte.nn._requantized import watching
from halfbyte.nn.params import Params4bit, check_state
from halfbyte.ops._torch_internals import can_hold
from halfbyte.ops.checks import FLOAT_DTYPES, STORAGE_DTYPES, names
from halfbyte.state import PACKED_KEYS, TENSOR_KEYS, QuantState

_STATE_KEYS = (*TENSOR_KEYS, *PACKED_KEYS)


class Quantized(torch.nn.Module):
    """A module whose `weight`, of `_weight_shape()`, is packed to 4 bits."""

    weight: Tensor
    quant_state: QuantState | None
    quant_storage: torch.dtype

    def _weight_shape(self) -> tuple[int, int]:
        """Of the weight that is packed."""
        raise NotImplementedError

    def _pack(
        self, weight: Tensor, compress_statistics: bool, quant_type: str, quant_storage: torch.dtype, blocksize: int
    ) -> None:
        """Replace the float weight by a parameter that will be quantized."""
        self.quant_state = None
        self.quant_storage = quant_storage
        self.weight = Params4bit(
            weight.detach(),
            requires_grad=False,
            blocksize=blocksize,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )

    # ---- weight and state --------------------------------------------------------------------------------------------

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        """Assigning `weight` ends here: the state follows."""
        if name == "weight" and param is not None and not isinstance(param, Params4bit) and is_foreign(param):
            # PEFT makes one when it merges an adapter.
            param = Params4bit.adopt(param)
        if isinstance(param, Params4bit) and type(param) in JOINT and STANDS_FOR in type(self).__dict__:
            param.__class__ = JOINT[type(param)]
        watch = watching()
        if watch is not None and name == "weight" and isinstance(param, Params4bit):
            watch.assigned(self, self._parameters.get(name), param)
        super().register_parameter(name, param)
        if name == "weight" and isinstance(param, Params4bit):
            param.module = self
            if param.quant_state is not None or not param.bnb_quantized:
                self.quant_state = param.quant_state
            self.quant_storage = param.quant_storage

    def _state(self, weight: Tensor | None = None) -> QuantState:
        """The state of the weight, which is `weight` where that is known: its own, or else the module's."""
        weight = self.weight if weight is None else weight
        state: QuantState | None = getattr(weight, "quant_state", None)
        if state is not None:
            return state
        state = self.quant_state
        if state is None or not getattr(weight, "bnb_quantized", True):
            raise RuntimeError(
                f"{type(self).__name__}: the weight is not quantized yet; move the module to its device first, "
                'as in module.to("cuda") or module.to("cpu"), or load a state dict'
            )
        if isinstance(weight, Params4bit) and not torch.compiler.is_compiling():
            weight.quant_state = state
        return state

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a dense tensor, in the dtype that it was quantized from or in `dtype`."""
        dense = dequantize_4bit(self.weight.data, self._state())
        return dense if dtype is None else dense.to(dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As torch's modules, but that a joint class is never named: see `halfbyte.integrations.bitsandbytes`."""
        named = portable(type(self))
        if named is type(self):
            return super().__reduce_ex__(protocol)
        return new_module, (named,), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After unpickling, the weight knows its module again."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        weight = self._parameters.get("weight")
        if isinstance(weight, Params4bit):
            weight.module = self

    # ---- moving ------------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantized:
        """Move weight and state by what `fn` does to bytes: casts do not touch them."""
        weight = self._parameters.get("weight")
        if weight is None:
            return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]
        with without_weight(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            if isinstance(weight, Params4bit) and not weight.bnb_quantized:
                self._replace(weight, fn(weight))
                return self
            state = getattr(weight, "quant_state", None) or self.quant_state
            moved = None
            if state is not None:
                moved = state.map(lambda tensor: _as_bytes(tensor, fn))
                if state.code is not None and state.code.is_meta and not moved.absmax.is_meta:
                    # Of maps, the numbers are known: they come back even from the meta device.
                    moved.code = quant_map(state.weight()[2], moved.absmax.device)
            self._replace(weight, _as_bytes(weight.data, fn))
            if moved is not None:
                self.quant_state = moved
                new = self._parameters["weight"]
                if isinstance(new, Params4bit):
                    new.quant_state = moved
        return self

    def _replace(self, weight: torch.nn.Parameter, data: Tensor) -> None:
        """Put `data` into the parameter, or where torch cannot, into a new one."""
        if data is weight:
            return
        if can_hold(weight, data):
            weight.data = data
        elif isinstance(weight, Params4bit):
            self._parameters["weight"] = weight._like(data, weight.quant_state)
        else:
            self._parameters["weight"] = torch.nn.Parameter(data, requires_grad=weight.requires_grad)

    # ---- state dicts -------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Add the tensors of the state beside the packed weight."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self._parameters.get("weight")
        state = getattr(weight, "quant_state", None) or self.quant_state
        if weight is None or state is None or not getattr(weight, "bnb_quantized", True):
            return
        for key, value in state.as_dict(packed=True).items():
            destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

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
        """Take a float weight, which is quantized, or a packed one with its state."""
        name = f"{prefix}weight"
        stats = {
            key.removeprefix(f"{name}."): key
            for key in state_dict
            if key.startswith(f"{name}.") and key.removeprefix(f"{name}.") in _STATE_KEYS
        }
        own = {name, *stats.values()}
        # The bias, and whatever a subclass has, are torch's business.
        rest = {key: value for key, value in state_dict.items() if key not in own}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if name not in state_dict:
            if stats:
                error_msgs.append(f"{name}: missing, but its state is there: {', '.join(sorted(stats.values()))}")
            return
        if name in missing_keys:
            missing_keys.remove(name)
        try:
            self._load_weight(
                name,
                state_dict[name],
                {key: state_dict[full] for key, full in stats.items()},
                bool(local_metadata.get("assign_to_params_buffers", False)),
            )
        except (ValueError, TypeError, NotImplementedError) as error:
            error_msgs.append(f"{name}: {error}")

    def _load_weight(self, name: str, value: Any, stats: dict[str, Any], assign: bool) -> None:
        """Check one entry of a state dict, and hold it."""
        if not isinstance(value, Tensor):
            raise TypeError(f"is {type(value).__name__}, expected a tensor")
        weight, shape = self.weight, self._weight_shape()
        value = value.detach()
        target = value.device if assign else weight.device
        if target.type == "meta" and not value.is_meta:
            raise ValueError(
                f"the module is on the meta device, and cannot hold {value.dtype} {list(value.shape)}; "
                "call load_state_dict(..., assign=True)"
            )
        quant_type, blocksize, nested = self._recipe()
        if stats:
            state = QuantState.from_dict(stats)
            if state.shape is None or tuple(state.shape) != shape:
                raise ValueError(f"holds a weight {list(state.shape or ())}, the module has {list(shape)}")
            if state.quant_type != quant_type:
                raise ValueError(f"is of quant_type {state.quant_type!r}, the module of {quant_type!r}")
            check_state(value, state)
            # `dequantize_4bit` takes a packed weight of shape [1, n] for a transposed one.
            value = value.reshape(-1, 1)
            self._take(_as_storage(value, value.dtype if assign else self.quant_storage), state, target, assign)
            return
        if value.dtype in FLOAT_DTYPES and tuple(value.shape) == shape:
            if value.is_meta:
                raise ValueError("is a float tensor on the meta device, of which there is nothing to quantize")
            dtype = self.quant_state.dtype if self.quant_state is not None else weight.dtype
            if not assign and dtype in FLOAT_DTYPES:
                value = value.to(dtype)
            packed, state = quantize_4bit(
                value.to(target),
                blocksize=blocksize,
                compress_statistics=nested,
                quant_type=quant_type,
                quant_storage=self.quant_storage,
            )
            self._take(packed, state, target, assign)
            return
        if value.dtype in STORAGE_DTYPES and value.dim() == 2 and value.shape[1] == 1 and tuple(value.shape) != shape:
            raise ValueError(
                f"is packed, {value.dtype} {list(value.shape)}, but its state is missing: "
                f"{name}.absmax, {name}.quant_map, {name}.{PACKED_KEYS[0]} (or {PACKED_KEYS[1].rpartition('.')[2]})"
            )
        raise ValueError(
            f"is {value.dtype} {list(value.shape)}; expected a weight {list(shape)} of {names(FLOAT_DTYPES)}, "
            f"or a packed one with its state"
        )

    def _recipe(self) -> tuple[str, int, bool]:
        """How the weight is, or is to be, quantized: `quant_type`, `blocksize`, and whether scales are nested."""
        weight = self.weight
        if isinstance(weight, Params4bit):
            return weight.quant_type, weight.blocksize, weight.compress_statistics
        if self.quant_state is None:
            raise ValueError("the module's weight is a bare parameter, and how it was quantized is not known")
        _, blocksize, quant_type = self.quant_state.weight()
        return quant_type, blocksize, self.quant_state.nested

    def _take(self, packed: Tensor, state: QuantState, device: torch.device, assign: bool) -> None:
        """Hold packed bytes and their state, in memory of our own unless `assign`."""
        weight = self.weight
        state = state.map(lambda tensor: tensor.to(device, copy=not assign))
        packed = packed.to(device)
        if not assign:
            if weight.shape == packed.shape and weight.dtype == packed.dtype:
                with torch.no_grad():
                    _bytes(weight.data).copy_(_bytes(packed))
                packed = weight.data
            else:
                packed = packed.clone()
        self.quant_state = state
        if not isinstance(weight, Params4bit):
            if assign:
                self.weight = Params4bit(packed, quant_state=state, quant_storage=packed.dtype, bnb_quantized=True)
            else:
                weight.data = packed
            return
        if assign:
            weight = weight._like(packed, state)
        weight.quant_storage = packed.dtype
        weight.module = self
        weight._hold(packed, state)
        if assign:
            self.weight = weight


def fix_4bit_weight_quant_state_from_module(module: Quantized) -> None:
    """Give a weight that lost its state, or its class, what its module knows of it.

    Wrappers that shard or flatten parameters leave bare ones behind. The layers here work with those; this is for code
    that reads `module.weight.quant_state`.
    """
    if getattr(module.weight, "quant_state", None) is not None:
        return
    state = module._state()
    if not isinstance(module.weight, Params4bit):
        _, blocksize, quant_type = state.weight()
        module.weight = Params4bit(
            module.weight.data,
            quant_state=state,
            blocksize=blocksize,
            compress_statistics=state.nested,
            quant_type=quant_type,
            quant_storage=module.quant_storage,
            bnb_quantized=True,
        )
    module.weight.quant_state = state


@contextlib.contextmanager
def without_weight(module: torch.nn.Module) -> Iterator[None]:
    """Hide the weight, which the module moves itself.

    `torch.nn.Module._apply` wraps or swaps what it is given where `torch.__future__` says so, or where a parameter
    cannot hold it, and does not know the classes of packed weights.
    """
    parameters = module._parameters
    before = dict(parameters)
    del parameters["weight"]
    try:
        yield
    finally:
        after = dict(parameters)
        parameters.clear()
        # In the same order.
        parameters.update({name: after.get(name, before[name]) for name in before})


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, uint8 [k]; a view."""
    return tensor.reshape(-1).view(torch.uint8)


def _as_bytes(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """`fn` of a tensor's bytes, put back as they were: numbers survive whatever `fn` does to floats."""
    moved = fn(_bytes(tensor))
    if moved.dtype is not torch.uint8:
        moved = _bytes(tensor).to(moved.device)
    return moved.view(tensor.dtype).view(tensor.shape)


def _as_storage(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Packed bytes viewed as another storage dtype, where whole elements of it hold them."""
    if packed.dtype == dtype or (packed.numel() * packed.element_size()) % dtype.itemsize:
        return packed
    return _bytes(packed.contiguous()).view(dtype).view(-1, 1)
