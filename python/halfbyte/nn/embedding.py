"""`Embedding4bit` and `Embedding8bit`: embeddings whose tables have 4 or 8 bits a value."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.nn._quantized import Quantized
from halfbyte.nn._quantized_rows import QuantizedRows
from halfbyte.nn.int8_params import Int8Params
from halfbyte.ops import dispatch
from halfbyte.ops.matmul_8bit import MatmulLtState


class Embedding4bit(Quantized, torch.nn.Embedding):
    """`torch.nn.Embedding` with a table of 4 bits a value, quantized when the module is first moved to a device.

    Args:
        num_embeddings: Rows of the table.
        embedding_dim: Values of a row; any number.
        dtype: Of the output; by default torch's default dtype.
        quant_type: "nf4" or "fp4".
        quant_storage: The dtype as which the packed bytes are viewed: uint8, int8, float16, bfloat16, float32 or
            float64.
        device: Where the float table is made that is to be quantized.
        blocksize: How many consecutive values share an absmax: 32, 64, 128, 256, 512, 1024, 2048 or 4096. bitsandbytes'
            class has no such argument, and 64.

    Only the rows asked for are dequantized. There is no gradient. Unlike bitsandbytes' it can be saved and loaded, with
    the keys that a linear layer has.

    >>> import torch
    >>> from halfbyte.nn import Embedding4bit
    >>> table = Embedding4bit(1000, 64, quant_type="nf4").to("cpu")
    >>> table(torch.tensor([[3, 1], [4, 1]])).shape
    torch.Size([2, 2, 64])
    """

    dtype: torch.dtype

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        *,
        blocksize: int = 64,
    ) -> None:
        """Make a table of random values that are to be quantized; see the class."""
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self._pack(self.weight, False, quant_type, quant_storage, blocksize)

    def _weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table: `[...]`, int64 or int32, to `[..., embedding_dim]`."""
        weight = self._state().packed(self.weight)
        rows: Tensor = dispatch.call("embedding_4bit", input, weight, self.dtype)
        return rows


class EmbeddingNF4(Embedding4bit):
    """`Embedding4bit` with quantiles of the normal distribution: `quant_type="nf4"`."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        """Make a table; see `Embedding4bit`."""
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


class EmbeddingFP4(Embedding4bit):
    """`Embedding4bit` with 4-bit floating-point values: `quant_type="fp4"`."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        """Make a table; see `Embedding4bit`."""
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class Embedding8bit(QuantizedRows, torch.nn.Embedding):
    """`torch.nn.Embedding` with a table of 8 bits a value, quantized when the module is first moved to a device.

    Args:
        num_embeddings: Rows of the table.
        embedding_dim: Values of a row; any number.
        device: Where the float table is made that is to be quantized.
        dtype: Of the output; by default torch's default dtype.

    Only the rows asked for are read. There is no gradient. Unlike bitsandbytes' it can be saved and loaded, with the
    keys that a linear layer has.

    >>> import torch
    >>> from halfbyte.nn import Embedding8bit
    >>> table = Embedding8bit(1000, 64).to("cpu")
    >>> table(torch.tensor([[3, 1], [4, 1]])).shape
    torch.Size([2, 2, 64])
    """

    dtype: torch.dtype

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a table of random values that are to be quantized; see the class."""
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.state = MatmulLtState()
        self.state.has_fp16_weights = False
        self.weight = Int8Params(self.weight.detach(), requires_grad=False)

    def _weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table: `[...]`, int64 or int32, to `[..., embedding_dim]`."""
        weight = self.weight
        if weight.dtype is not torch.int8:
            raise self._not_quantized()
        scales = self._scales(weight)
        codes = torch.nn.functional.embedding(input, weight)
        found = torch.nn.functional.embedding(input, scales.view(-1, 1))
        rows: Tensor = dispatch.call("dequantize_rows", codes, found.view(-1), self.dtype)
        return rows
