"""`Linear4bit`: a linear layer whose weight is packed to 4 bits."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from halfbyte.functional import dequantize_4bit
from halfbyte.nn._quantized import Quantized
from halfbyte.ops.autograd import autocast_dtype, linear_4bit
from halfbyte.ops.checks import FLOAT_DTYPES, DTypeError, names
from halfbyte.state import QuantState

_logger = logging.getLogger(__name__)
_said: set[tuple[torch.dtype, torch.dtype]] = set()


class Linear4bit(Quantized, torch.nn.Linear):
    """`torch.nn.Linear` with a weight of 4 bits a value, quantized when the module is first moved to a device.

    Args:
        input_features: Of each input; any number.
        output_features: Of each output; any number.
        bias: Whether there is one; it stays a float parameter, of any of the three dtypes.
        compute_dtype: float16, bfloat16 or float32, in which the product is computed; by default the input's. Where
            `torch.autocast` is enabled, its dtype goes before either.
        compress_statistics: Quantize the scales too, 0.37 bits per weight less.
        quant_type: "nf4" or "fp4".
        quant_storage: The dtype as which the packed bytes are viewed: uint8, int8, float16, bfloat16, float32 or
            float64.
        device: Where the float weight is made that is to be quantized.
        blocksize: How many consecutive values share an absmax: 32, 64, 128, 256, 512, 1024, 2048 or 4096. bitsandbytes'
            class has no such argument, and 64.

    The output has the input's dtype, under `torch.autocast` too: there `torch.nn.Linear` gives the autocast dtype, in
    which the small contributions of adapters to a float32 stream would be rounded away. Gradients go to the input and
    the bias; the weight has none. `load_state_dict` takes a float weight, which it quantizes, and a packed one as
    `state_dict` gives it.

    >>> import torch
    >>> from halfbyte.nn import Linear4bit
    >>> dense = torch.nn.Linear(96, 48)
    >>> layer = Linear4bit(96, 48, quant_type="nf4")
    >>> _ = layer.load_state_dict(dense.state_dict())
    >>> x = torch.randn(2, 3, 96)
    >>> y = layer(x)
    >>> y.shape, y.dtype
    (torch.Size([2, 3, 48]), torch.float32)
    >>> torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.dequantize(), layer.bias))
    """

    compute_dtype: torch.dtype | None
    compute_type_is_set: bool = False
    support_avx512bf16_for_cpu: bool = False
    # Whether a forward casts the bias itself to the dtype of the product, as bitsandbytes does: set by the layer that
    # stands in for it, for code that relies on the bias having the dtype of the activations.
    _casts_bias: bool = False

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        *,
        blocksize: int = 64,
    ) -> None:
        """Make a layer with random weights that are to be quantized; see the class."""
        if compute_dtype is not None and compute_dtype not in FLOAT_DTYPES:
            raise ValueError(f"compute_dtype: {compute_dtype!r} is not one of {names(FLOAT_DTYPES)}, or None")
        super().__init__(input_features, output_features, bias, device)
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self._pack(self.weight, compress_statistics, quant_type, quant_storage, blocksize)

    def reset_parameters(self) -> None:
        """Draw random weights; not on the meta device, where there is nothing to fill and it takes a while."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def _weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def set_compute_type(self, x: Tensor) -> None:
        """Compute in the dtype of `x` from now on, if that is float32 or bfloat16.

        Nothing here calls it, as a layer without a compute dtype follows each input; code that replaces `forward` does.
        """
        if x.dtype in (torch.float32, torch.bfloat16):
            self.compute_dtype = x.dtype

    def forward(self, x: Tensor) -> Tensor:
        """`x @ weight.T + bias`: `[..., in_features]` to `[..., out_features]`, in the dtype of `x`."""
        # Looked up where parameters usually are: as attributes they take `torch.nn.Module` a while to find.
        weight: Any
        bias: Tensor | None
        parameters = self._parameters
        try:
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:
            weight, bias = self.weight, self.bias
        state = getattr(weight, "quant_state", None) or self._state(weight)
        dtype = x.dtype
        compute = autocast_dtype(x) or self.compute_dtype or dtype
        if bias is not None and self._casts_bias:
            cast_bias(bias, self.compute_dtype or dtype)
        if dtype is compute and dtype is not torch.float64:
            return linear_4bit(x, weight, state, bias)
        return self._converting(x, weight, state, bias, compute)

    def _converting(
        self, x: Tensor, weight: Tensor, state: QuantState, bias: Tensor | None, compute: torch.dtype
    ) -> Tensor:
        """The product in another dtype than that of `x`, or in float64, for which there are no kernels."""
        dtype = x.dtype
        if not dtype.is_floating_point:
            raise DTypeError(f"x: dtype {dtype} is not one of {names(FLOAT_DTYPES)}, or torch.float64")
        if compute is torch.float64:
            dense = dequantize_4bit(weight.data, state).to(compute)
            return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(compute))
        if compute is torch.float32 and dtype.itemsize == 2 and not torch.compiler.is_compiling():
            say_slow(dtype, compute)
        return linear_4bit(x.to(compute), weight, state, bias).to(dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        state = self.quant_state
        weight = self.weight
        quant_type = state.quant_type if state is not None else getattr(weight, "quant_type", None)
        packed = "" if state is not None else ", not quantized yet"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"quant_type={quant_type!r}, compute_dtype={self.compute_dtype}{packed}"
        )


def cast_bias(bias: Tensor, dtype: torch.dtype) -> None:
    """Give the bias, in place, the dtype of the product. Not within a compiler, which would have to guard it."""
    if bias.dtype is not dtype and dtype in FLOAT_DTYPES and not torch.compiler.is_compiling():
        bias.data = bias.data.to(dtype)


def say_slow(dtype: torch.dtype, compute: torch.dtype) -> None:
    """Once: inputs are of 16 bits, and a compute dtype of 32 was chosen or left in place."""
    if (dtype, compute) not in _said:
        _said.add((dtype, compute))
        _logger.warning(
            "Linear4bit: inputs are %s, but compute_dtype is %s, which is slower; "
            "give compute_dtype=%s (bnb_4bit_compute_dtype) or None to compute in the dtype of the input",
            dtype, compute, dtype,
        )  # fmt: skip


class LinearNF4(Linear4bit):
    """`Linear4bit` with quantiles of the normal distribution: `quant_type="nf4"`."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        """Make a layer; see `Linear4bit`."""
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "nf4", quant_storage, device
        )


class LinearFP4(Linear4bit):
    """`Linear4bit` with 4-bit floating-point values: `quant_type="fp4"`."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        """Make a layer; see `Linear4bit`."""
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "fp4", quant_storage, device
        )
