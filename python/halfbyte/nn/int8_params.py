"""`Int8Params`: a parameter whose rows are quantized to 8 bits when it is first moved to a device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from halfbyte.nn._joint import JOINT, portable
from halfbyte.nn._requantized import watching
from halfbyte.ops._torch_internals import make_subclass, parse_to
from halfbyte.ops.checks import FLOAT_DTYPES, DTypeError, names
from halfbyte.ops.checks_8bit import check_columns, check_statistics
from halfbyte.ops.dispatch import PLAIN_TYPES
from halfbyte.ops.matmul_8bit import quantize_float


def quantize_weight(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Codes and scales of a float weight, which is rounded to float16 first, and is called `name` in messages.

    Raises:
        DTypeError: A weight of another dtype than float16, bfloat16 and float32.
        ValueError: One that is no matrix, is too wide, or contains NaN, Inf or what float16 cannot hold.
    """
    return quantize_float(check_weight(weight, name))


def check_weight(weight: Tensor, name: str) -> Tensor:
    """The weight in float16, which `quantize_weight` can quantize; raises what that does."""
    if weight.dtype not in FLOAT_DTYPES:
        raise DTypeError(f"{name}: dtype {weight.dtype} is not one of {names(FLOAT_DTYPES)}")
    if weight.dim() != 2:
        raise ValueError(f"{name}: shape {list(weight.shape)} is not [out_features, in_features]")
    check_columns(name, weight.shape[1])
    weight = weight.detach()
    half = weight.to(torch.float16)
    finite = half.isfinite()
    if not bool(finite.all()):
        row, column = (int(i) for i in (~finite).nonzero()[0])
        raise ValueError(
            f"{name}: contains {float(weight[row, column])} at [{row}, {column}]; legal are finite values of a "
            "magnitude of at most 65504, float16's largest"
        )
    return half


class Int8Params(torch.nn.Parameter):
    """A weight whose rows are, or are to be, of 8 bits a value: LLM.int8()'s.

    Made from a float tensor it holds that tensor, until `.to(device)`, `.cuda()` or `.cpu()` quantizes it, in place, on
    that device; from then on it holds codes, which only move. Casts leave codes as they are.

    Args:
        data: A float matrix `[out_features, in_features]`; or its codes, int8.
        requires_grad: Of a float matrix. Codes have no gradient.
        has_fp16_weights: Never quantize: the weight is trained, and each forward pass works with codes made for it.
        CB: Accepted for its callers' sake: codes are `data`.
        SCB: The scales of the codes, float32 `[out_features]`. They may be set later, as an attribute.
        kwargs: Whatever else was found in another parameter's `__dict__`; ignored.

    >>> import torch
    >>> from halfbyte.nn import Int8Params
    >>> weight = Int8Params(torch.randn(32, 64), requires_grad=False).to("cpu")
    >>> weight.shape, weight.dtype, weight.SCB.shape
    (torch.Size([32, 64]), torch.int8, torch.Size([32]))
    """

    # Where an attribute was taken away, as transformers does.
    has_fp16_weights: bool = False
    SCB: Tensor | None = None

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: Tensor | None = None,
        SCB: Tensor | None = None,
        **kwargs: Any,
    ) -> Int8Params:
        """Wrap a tensor; see the class."""
        if data is None:
            data = torch.empty(0)
        if not isinstance(data, Tensor):
            raise TypeError(f"data: {type(data).__name__} is not a torch.Tensor")
        quantized = data.dtype is torch.int8
        if not quantized and not data.is_floating_point():
            raise DTypeError(f"data: dtype {data.dtype} is not torch.int8 (codes), or one of {names(FLOAT_DTYPES)}")
        if quantized and has_fp16_weights:
            raise ValueError(
                "has_fp16_weights: True, but data is torch.int8, quantized already; a weight that is trained is one of "
                f"{names(FLOAT_DTYPES)}"
            )
        if quantized and SCB is not None:
            check_statistics("SCB", SCB, data.shape[0] if data.dim() else 1, "data", SCB.device)
        self: Int8Params = make_subclass(cls, data.detach(), requires_grad and not quantized)
        self.has_fp16_weights = has_fp16_weights
        self.SCB = SCB if quantized else None
        return self

    @classmethod
    def adopt(cls, param: Any) -> Int8Params:
        """Make a parameter of this class from one of bitsandbytes, whose bytes it shares."""
        return cls(param.data, param.requires_grad, param.has_fp16_weights, SCB=param.SCB)

    @property
    def CB(self) -> Tensor | None:
        """The codes, None before there are any."""
        return self.data if self.dtype is torch.int8 else None

    @CB.setter
    def CB(self, codes: Tensor | None) -> None:
        # Codes are the parameter's data; others set both.
        pass

    @property
    def bnb_quantized(self) -> bool:
        """Whether this holds codes."""
        return self.dtype is torch.int8

    # ---- quantize and move -------------------------------------------------------------------------------------------

    def _quantize(self, device: torch.device) -> Int8Params:
        """Quantize the float tensor held, on `device`, in place."""
        data = self.data.to(device)
        self._hold(*quantize_weight(data))
        watch = watching()
        if watch is not None:
            watch.quantized(self, data)
        return self

    def _hold(self, codes: Tensor, scales: Tensor) -> None:
        """Hold these codes from now on."""
        self.requires_grad_(False)
        self.grad = None
        self.data = codes
        self.SCB = scales

    def _like(self, data: Tensor, scales: Tensor | None) -> Int8Params:
        """A parameter of the same kind with other data."""
        return type(self)(data, self.requires_grad, self.has_fp16_weights, SCB=scales)

    def to(self, *args: Any, **kwargs: Any) -> Int8Params:
        """Quantize, in place, if there is a device and this is to be quantized; else as `torch.Tensor.to`.

        Codes are never cast. On the meta device, where there is nothing to read, nothing is quantized.
        """
        device, dtype, non_blocking, _ = parse_to(*args, **kwargs)
        if not self.bnb_quantized:
            if device is not None and device.type != "meta" and not self.has_fp16_weights and not self.is_meta:
                return self._quantize(device)
            return self._like(self.data.to(device=device, dtype=dtype, non_blocking=non_blocking), None)
        if device is None or device == self.device:
            return self
        scales = self.SCB
        if scales is not None and not scales.is_meta:
            scales = scales.to(device, non_blocking=non_blocking)
        return self._like(self.data.to(device=device, non_blocking=non_blocking), scales)

    def cpu(self, *args: Any, **kwargs: Any) -> Int8Params:
        """`.to("cpu")`."""
        return self.to("cpu")

    def cuda(  # type: ignore[override]
        self, device: torch.device | str | int | None = None, non_blocking: bool = False, **kwargs: Any
    ) -> Int8Params:
        """`.to("cuda")`."""
        if isinstance(device, int):
            device = torch.device("cuda", device)
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def xpu(  # type: ignore[override]
        self, device: torch.device | str | int | None = None, non_blocking: bool = False, **kwargs: Any
    ) -> Int8Params:
        """`.to("xpu")`."""
        if isinstance(device, int):
            device = torch.device("xpu", device)
        return self.to("xpu" if device is None else device, non_blocking=non_blocking)

    def _cast(self, dtype: torch.dtype) -> Int8Params:
        return self if self.bnb_quantized else self._like(self.data.to(dtype), None)

    def half(self, *args: Any, **kwargs: Any) -> Int8Params:
        """`.to(torch.float16)`; codes stay what they are."""
        return self._cast(torch.float16)

    def bfloat16(self, *args: Any, **kwargs: Any) -> Int8Params:
        """`.to(torch.bfloat16)`; codes stay what they are."""
        return self._cast(torch.bfloat16)

    def float(self, *args: Any, **kwargs: Any) -> Int8Params:
        """`.to(torch.float32)`; codes stay what they are."""
        return self._cast(torch.float32)

    def double(self, *args: Any, **kwargs: Any) -> Int8Params:
        """`.to(torch.float64)`; codes stay what they are."""
        return self._cast(torch.float64)

    # ---- copies ------------------------------------------------------------------------------------------------------

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Rebuild from plain tensors and plain values, so that `torch.load(weights_only=True)` can."""
        return _rebuild, (portable(type(self)), self.data, self.requires_grad), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over another's attributes."""
        self.__dict__.update(state)

    def __copy__(self) -> Int8Params:
        """A parameter that shares memory with this one."""
        new = _rebuild(type(self), self.data, self.requires_grad)
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Params:
        """A parameter of its own."""
        if id(self) in memo:
            known: Int8Params = memo[id(self)]
            return known
        # Whatever else shares the memory shares the copy, as the codes in a layer's state do.
        new = _rebuild(type(self), copy.deepcopy(self.data, memo), self.requires_grad)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


def _rebuild(cls: type[Int8Params], data: Tensor, requires_grad: bool) -> Int8Params:
    """A parameter without attributes; of the joint class where there is one."""
    new: Int8Params = make_subclass(JOINT.get(cls, cls), data, requires_grad)
    return new


PLAIN_TYPES.add(Int8Params)
torch.serialization.add_safe_globals([Int8Params, _rebuild])
