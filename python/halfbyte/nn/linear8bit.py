"""`Linear8bitLt`: the linear layer of LLM.int8()."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfbyte.nn._quantized_rows import QuantizedRows
from halfbyte.nn.int8_params import Int8Params
from halfbyte.nn.linear4bit import cast_bias
from halfbyte.ops.autograd_8bit import dense_product, product, trained_product
from halfbyte.ops.checks import FLOAT_DTYPES, DTypeError, names
from halfbyte.ops.checks_8bit import check_threshold
from halfbyte.ops.matmul_8bit import MatmulLtState, codes_of


class Linear8bitLt(QuantizedRows, torch.nn.Linear):
    """`torch.nn.Linear` with a weight of 8 bits a value: LLM.int8() (arXiv 2208.07339).

    Args:
        input_features: Of each input; any number up to 133144.
        output_features: Of each output; any number.
        bias: Whether there is one; it stays a float parameter, of any of the three dtypes.
        has_fp16_weights: Keep a float weight, which is trained: each forward pass works with codes that are made for
            it. Otherwise the weight is quantized when the module is first moved to a device.
        threshold: From which magnitude on inputs are outliers: their columns are multiplied in the input's precision,
            and not in 8 bits. 0 turns it off.
        index: Accepted for its callers' sake.
        device: Where the float weight is made that is to be quantized.

    The rows of the input are quantized too, so products are of integers, and exact; they are scaled in float32. The
    output has the input's dtype, under `torch.autocast` too. Gradients go to the input and the bias, and to the weight
    where that is a float one. `load_state_dict` takes a float weight, which it quantizes, and codes with their scales
    as `state_dict` gives them.

    >>> import torch
    >>> from halfbyte.nn import Linear8bitLt
    >>> dense = torch.nn.Linear(96, 48)
    >>> layer = Linear8bitLt(96, 48, has_fp16_weights=False, threshold=6.0)
    >>> _ = layer.load_state_dict(dense.state_dict())
    >>> x = torch.randn(2, 3, 96)
    >>> y = layer(x)
    >>> y.shape, y.dtype, layer.weight.dtype
    (torch.Size([2, 3, 48]), torch.float32, torch.int8)
    >>> torch.testing.assert_close(y, dense(x), atol=0.1, rtol=0.0)
    """

    # See `Linear4bit`.
    _casts_bias: bool = False
    # Whether inputs on a CPU are not quantized while training, as bitsandbytes does: likewise.
    _trains_dense_on_cpu: bool = False

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Tensor | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        """Make a layer with random weights; see the class."""
        check_threshold(threshold)
        super().__init__(input_features, output_features, bias, device)
        self.state = MatmulLtState()
        self.index = index
        self.state.threshold = float(threshold)
        self.state.has_fp16_weights = has_fp16_weights
        self.state.use_pool = threshold > 0 and not has_fp16_weights
        self.weight = Int8Params(
            self.weight.detach(), requires_grad=has_fp16_weights, has_fp16_weights=has_fp16_weights
        )

    def _weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def init_8bit_state(self) -> None:
        """Let `state` say what the weight does. A forward pass does so by itself."""
        self._follow(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`x @ weight.T + bias`: `[..., in_features]` to `[..., out_features]`, in the dtype of `x`."""
        # Looked up where parameters usually are: as attributes they take `torch.nn.Module` a while to find.
        weight: Any
        bias: Tensor | None
        try:
            weight, bias = self._parameters["weight"], self._parameters["bias"]
        except KeyError:
            weight, bias = self.weight, self.bias
        state = self.state
        state.is_training = self.training
        if self._casts_bias and bias is not None:
            cast_bias(bias, x.dtype)
        if x.dtype not in FLOAT_DTYPES:
            return self._converting(x)
        if weight.dtype is torch.int8:
            if self._trains_dense_on_cpu and self.training and x.is_cpu:
                return dense_product(x, weight, self._scales(weight), bias)
            return product(x, weight, self._scales(weight), bias, state.threshold)
        return self._with_float_weight(x, weight, bias)

    def _with_float_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        state = self.state
        if not isinstance(weight, Int8Params) and not state.has_fp16_weights:
            # Tied to a layer that is not quantized.
            return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        if not state.has_fp16_weights:
            raise self._not_quantized()
        codes, scales = codes_of(weight, state)
        if weight.requires_grad:
            return trained_product(x, weight, codes, scales, bias, state.threshold)
        return product(x, codes, scales, bias, state.threshold)

    def _converting(self, x: Tensor) -> Tensor:
        """The product with float64, for which there are no kernels."""
        if x.dtype is not torch.float64:
            raise DTypeError(f"x: dtype {x.dtype} is not one of {names(FLOAT_DTYPES)}, or torch.float64")
        return self(x.to(torch.float32)).to(torch.float64)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        weight = self.weight
        kind = "trained" if self.state.has_fp16_weights else "" if weight.dtype is torch.int8 else "not quantized yet"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"threshold={self.state.threshold}" + (f", {kind}" if kind else "")
        )
