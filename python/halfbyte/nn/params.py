"""`Params4bit`: a parameter that is quantized when it is first moved to a device, and only moves afterwards."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from halfbyte.functional import quantize_4bit
from halfbyte.nn._joint import JOINT, foreign_parts, portable
from halfbyte.nn._requantized import watching
from halfbyte.ops._torch_internals import DisableTorchFunctionSubclass, make_subclass, parse_to
from halfbyte.ops.checks import (
    blocks_of,
    check_blocksize,
    check_packed_length,
    check_quant_type,
    check_scales,
    check_storage,
)
from halfbyte.ops.dispatch import PLAIN_TYPES
from halfbyte.state import QuantState

_SPLITTERS = (torch.chunk, torch.split, Tensor.chunk, Tensor.split)


def check_state(packed: Tensor, state: QuantState) -> None:
    """That packed bytes and a 4-bit state fit each other, wherever they are. Errors have the names of a state dict."""
    shape, blocksize, quant_type = state.weight()
    absmax, absmax2, offset = state.scales()
    check_blocksize(blocksize)
    check_quant_type(quant_type)
    n = prod(shape)
    check_packed_length("weight", packed, n)
    blocks = blocks_of(n, blocksize)
    check_scales(absmax, absmax2, offset, blocks, absmax.device, ("nested_absmax", "nested_offset"))


def _is_dense(data: Tensor, state: QuantState) -> bool:
    """Whether this is the weight itself that the state describes, and not its packed bytes."""
    return data.is_floating_point() and state.shape is not None and data.shape == state.shape and data.numel() > 1


class _State:
    """An attribute of the quantization state, read through the parameter: `weight.absmax`.

    Code that walks the dotted keys of a state dict finds their tensors so.
    """

    def __init__(self, name: str, nested: bool = False) -> None:
        self.name, self.nested = name, nested

    def __set_name__(self, owner: type, name: str) -> None:
        self.public = name

    def __get__(self, param: Params4bit | None, owner: type) -> Any:
        if param is None:
            return self
        state = param.__dict__.get("quant_state")
        if state is not None and self.nested:
            state = state.state2
        if state is None:
            raise AttributeError(f"{owner.__name__!r} object has no attribute {self.public!r}")
        return getattr(state, self.name)


class Params4bit(torch.nn.Parameter):
    """A weight that is, or is to be, packed to 4 bits.

    Made from a float tensor it holds that tensor, until `.to(device)`, `.cuda()` or `.cpu()` quantizes it, in place, on
    that device; from then on it holds packed bytes, which only move. Casts leave packed bytes as they are. The
    constructor takes the `__dict__` of another parameter, so that `Params4bit(data, **old.__dict__)` makes one of the
    same kind; with `bnb_quantized` set to False in it, one that is quantized anew.

    Args:
        data: A float tensor; or packed codes, together with `quant_state` and `bnb_quantized=True`.
        requires_grad: Packed weights have no gradient: False.
        quant_state: The state of packed `data`.
        blocksize: How many consecutive values share a scale, default 64.
        compress_statistics: Quantize the scales too.
        quant_type: "nf4" or "fp4".
        quant_storage: The dtype as which packed bytes are viewed.
        module: The module that this is the weight of; it is told the state. Kept as a weak reference.
        bnb_quantized: Whether `data` is packed. A float tensor of the shape that `quant_state` has is not packed,
            whatever this says.
        kwargs: Whatever else was found in another parameter's `__dict__`; ignored.

    >>> import torch
    >>> from halfbyte.nn import Params4bit
    >>> weight = Params4bit(torch.randn(32, 64), quant_type="nf4").to("cpu")
    >>> weight.shape, weight.dtype, weight.quant_state.shape
    (torch.Size([1024, 1]), torch.uint8, torch.Size([32, 64]))
    """

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_state: QuantState | None
    quant_storage: torch.dtype
    bnb_quantized: bool

    absmax = _State("absmax")
    code = _State("code")
    quant_map = _State("code")
    offset = _State("offset")
    state2 = _State("state2")
    nested_offset = _State("offset")
    nested_absmax = _State("absmax", nested=True)
    nested_blocksize = _State("blocksize", nested=True)
    nested_quant_map = _State("code", nested=True)
    nested_dtype = _State("dtype", nested=True)

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool | None = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: torch.nn.Module | None = None,
        bnb_quantized: bool = False,
        _module: weakref.ref[torch.nn.Module] | None = None,
        **kwargs: Any,
    ) -> Params4bit:
        """Make the parameter; see the class."""
        check_quant_type(quant_type)
        check_storage(quant_storage)
        blocksize = 64 if blocksize is None else blocksize
        check_blocksize(blocksize)
        if quant_state is not None and not isinstance(quant_state, QuantState):
            raise TypeError(f"quant_state: {type(quant_state).__name__} is not a QuantState")
        if data is None:
            data = torch.empty(0)
        elif not isinstance(data, Tensor):
            raise TypeError(f"data: {type(data).__name__} is not a torch.Tensor")
        if bnb_quantized and quant_state is not None and _is_dense(data, quant_state):
            # Some of PEFT's merges hand over the attributes of the old weight as they are.
            bnb_quantized = False
        self: Params4bit = make_subclass(cls, data, requires_grad)
        self.blocksize = blocksize
        self.compress_statistics = bool(compress_statistics)
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module if _module is None else _module()
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: Mapping[str, Any],
        requires_grad: bool = False,
        device: torch.device | str | int | None = None,
        module: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> Params4bit:
        """Make a parameter from packed bytes and the entries of a state dict that describe them.

        `data` is viewed as it is: its dtype is the storage dtype. `device` is where everything goes; by default
        everything stays where `data` is. Raises ValueError when the entries and the bytes do not fit each other.
        """
        target = torch.device(device) if device is not None else data.device
        state = QuantState.from_dict(quantized_stats, target)
        check_state(data, state)
        self = cls(
            data.detach().to(target),
            requires_grad=requires_grad,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type or "",
            quant_storage=data.dtype,
            module=module,
            bnb_quantized=True,
        )
        if module is not None:
            module.quant_state = state  # type: ignore[assignment]
        return self

    @classmethod
    def adopt(cls, param: Any, module: torch.nn.Module | None = None) -> Params4bit:
        """Make a parameter of this class from one of bitsandbytes, whose bytes it shares."""
        data, stats = foreign_parts(param)
        if stats is not None:
            return cls.from_prequantized(data, stats, device=data.device, module=module)
        return cls(
            data,
            requires_grad=param.requires_grad,
            blocksize=param.blocksize,
            compress_statistics=param.compress_statistics,
            quant_type=param.quant_type,
            quant_storage=param.quant_storage,
            module=module,
        )

    # ---- the module ------------------------------------------------------------------------------------------------

    @property
    def module(self) -> torch.nn.Module | None:
        """The module that this is the weight of, while it lives."""
        reference = self.__dict__.get("_module")
        return None if reference is None else reference()

    @module.setter
    def module(self, module: torch.nn.Module | None) -> None:
        # A strong reference would make a cycle, and a deleted model would keep its memory until the collector runs.
        self.__dict__["_module"] = None if module is None else weakref.ref(module)

    # ---- quantize and move -------------------------------------------------------------------------------------------

    def _quantize(self, device: torch.device) -> Params4bit:
        """Quantize the float tensor held, on `device`, in place."""
        if self.requires_grad:
            raise ValueError("requires_grad: True; a packed weight has no gradient, call requires_grad_(False) first")
        expected = getattr(self.module, "_weight_shape", lambda: None)()
        if expected is not None and tuple(self.data.shape) != expected:
            raise ValueError(
                f"weight: shape {list(self.data.shape)} is not the layer's {list(expected)}, so it cannot be quantized"
                "; packed bytes of a 4-bit checkpoint need their state, which is loaded by from_pretrained, "
                "load_state_dict or halfbyte.load_quantized(model, folder), and not tensor by tensor"
            )
        before, data = self.quant_state, self.data.to(device)
        packed, state = quantize_4bit(
            data,
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        self._hold(packed, state)
        watch = watching()
        if watch is not None and before is not None:
            watch.quantized(self, data)
        return self

    def _hold(self, packed: Tensor, state: QuantState) -> None:
        """Hold these packed bytes from now on, and tell the module."""
        self.data = packed
        self.quant_state = state
        self.blocksize = state.blocksize or self.blocksize
        self.compress_statistics = state.nested
        self.quant_type = state.quant_type or self.quant_type
        self.bnb_quantized = True
        if self.module is not None:
            self.module.quant_state = state  # type: ignore[assignment]

    def _like(self, data: Tensor, state: QuantState | None) -> Params4bit:
        """A parameter of the same kind with other data."""
        return type(self)(
            data,
            requires_grad=self.requires_grad,
            quant_state=state,
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
            module=self.module,
            bnb_quantized=self.bnb_quantized,
        )

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:
        """Quantize, in place, if there is a device and this is not quantized yet; else as `torch.Tensor.to`.

        Packed bytes are never cast. On the meta device, where there is nothing to read, nothing is quantized, and a
        packed parameter keeps its state where it is, for when its bytes come back.
        """
        device, dtype, non_blocking, _ = parse_to(*args, **kwargs)
        if not self.bnb_quantized:
            if device is not None and device.type != "meta":
                return self._quantize(device)
            return self._like(self.data.to(device=device, dtype=dtype, non_blocking=non_blocking), self.quant_state)
        if device is None or device == self.device:
            return self
        state = self.quant_state
        if state is not None and device.type != "meta":
            state = state.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return self._like(self.data.to(device=device, non_blocking=non_blocking), state)

    def cpu(self, *args: Any, **kwargs: Any) -> Params4bit:
        """`.to("cpu")`."""
        return self.to("cpu")

    def cuda(  # type: ignore[override]
        self, device: torch.device | str | int | None = None, non_blocking: bool = False, **kwargs: Any
    ) -> Params4bit:
        """`.to("cuda")`."""
        if isinstance(device, int):
            device = torch.device("cuda", device)
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def xpu(  # type: ignore[override]
        self, device: torch.device | str | int | None = None, non_blocking: bool = False, **kwargs: Any
    ) -> Params4bit:
        """`.to("xpu")`."""
        if isinstance(device, int):
            device = torch.device("xpu", device)
        return self.to("xpu" if device is None else device, non_blocking=non_blocking)

    def _cast(self, dtype: torch.dtype) -> Params4bit:
        return self if self.bnb_quantized else self._like(self.data.to(dtype), self.quant_state)

    def half(self, *args: Any, **kwargs: Any) -> Params4bit:
        """`.to(torch.float16)`; packed bytes stay what they are."""
        return self._cast(torch.float16)

    def bfloat16(self, *args: Any, **kwargs: Any) -> Params4bit:
        """`.to(torch.bfloat16)`; packed bytes stay what they are."""
        return self._cast(torch.bfloat16)

    def float(self, *args: Any, **kwargs: Any) -> Params4bit:
        """`.to(torch.float32)`; packed bytes stay what they are."""
        return self._cast(torch.float32)

    def double(self, *args: Any, **kwargs: Any) -> Params4bit:
        """`.to(torch.float64)`; packed bytes stay what they are."""
        return self._cast(torch.float64)

    # ---- copies ------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """All but the tensor itself. The module is not part of it: it takes its weight back when it is restored."""
        return {**self.__dict__, "_module": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what `__getstate__` gave."""
        self.__dict__.update(state)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Rebuild from plain tensors and plain values, so that `torch.load(weights_only=True)` can."""
        return _rebuild, (portable(type(self)), self.data, self.requires_grad), self.__getstate__()

    def __copy__(self) -> Params4bit:
        """A parameter that shares memory and state with this one."""
        new = _rebuild(type(self), self.data, self.requires_grad)
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        """A parameter of its own, of the copied module if that is copied too, else of none."""
        if id(self) in memo:
            known: Params4bit = memo[id(self)]
            return known
        new = _rebuild(type(self), self.data.clone(memory_format=torch.preserve_format), self.requires_grad)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        new.module = memo.get(id(self.module)) if self.module is not None else None
        return new

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Results are plain tensors, but for shards, which stay parameters with the state of the whole."""
        with DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if func in _SPLITTERS and isinstance(args[0], Params4bit):
            return tuple(args[0]._like(part, args[0].quant_state) for part in result)
        return result


def _rebuild(cls: type[Params4bit], data: Tensor, requires_grad: bool) -> Params4bit:
    """A parameter without attributes; of the joint class where there is one."""
    new: Params4bit = make_subclass(JOINT.get(cls, cls), data, requires_grad)
    return new


PLAIN_TYPES.add(Params4bit)
torch.serialization.add_safe_globals([Params4bit, _rebuild])
