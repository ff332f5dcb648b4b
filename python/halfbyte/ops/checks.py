"""What the tensor operations accept: every check of their arguments, in one place.

Each function raises `TypeError` for a wrong type, `DTypeError` for a wrong dtype and `ValueError` for a wrong value:
the message names the argument, what it is, and what is legal. Kernels and fake kernels call the same functions, so that
an eager call, a traced one and a call on the meta device refuse the same things. What passes here is safe to hand to
native code as addresses.

The functions that small products wait for first ask, in one expression, whether all is well; what is wrong is only then
looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from halfbyte.geometry import BLOCK_SIZES as BLOCK_SIZES
from halfbyte.geometry import NESTED_BLOCKSIZE as NESTED_BLOCKSIZE
from halfbyte.geometry import QUANT_TYPES as QUANT_TYPES
from halfbyte.geometry import blocks_of as blocks_of
from halfbyte.geometry import packed_bytes as packed_bytes
from halfbyte.ops.packed import PackedWeight

_BLOCK_SIZES = frozenset(BLOCK_SIZES)
_STRIDED = torch.strided

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What can be quantized, computed with, and dequantized to."""

STORAGE_DTYPES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""As what packed bytes may be viewed."""

INDEX_DTYPES = (torch.int64, torch.int32)
"""What `embedding` takes as indices."""


class DTypeError(TypeError, ValueError):
    """A tensor or a state of a dtype that an operation does not take, or none at all.

    A TypeError by its nature, and a ValueError too, because that is what bitsandbytes raises for it.
    """


def names(dtypes: Sequence[torch.dtype]) -> str:
    """Dtypes as a user writes them: `torch.float16, torch.bfloat16`."""
    return ", ".join(map(str, dtypes))


def check_quant_type(quant_type: object) -> None:
    """`quant_type` is "nf4" or "fp4"."""
    if quant_type not in QUANT_TYPES:
        kind = ValueError if isinstance(quant_type, str) else TypeError
        raise kind(f"quant_type: {quant_type!r} is not one of {', '.join(map(repr, QUANT_TYPES))}")


def check_blocksize(blocksize: object) -> None:
    """`blocksize` is a power of two from 32 to 4096."""
    if blocksize not in BLOCK_SIZES or isinstance(blocksize, (bool, float)):
        kind = ValueError if isinstance(blocksize, int) and not isinstance(blocksize, bool) else TypeError
        raise kind(f"blocksize: {blocksize!r} is not one of {', '.join(map(str, BLOCK_SIZES))}")


def check_storage(quant_storage: object) -> None:
    """`quant_storage` is a dtype as which bytes may be viewed."""
    if quant_storage not in STORAGE_DTYPES:
        kind = ValueError if isinstance(quant_storage, torch.dtype) else TypeError
        raise kind(f"quant_storage: {quant_storage!r} is not one of {names(STORAGE_DTYPES)}")


def check_float(argument: str, dtype: torch.dtype) -> None:
    """`dtype` is one that the arithmetic knows."""
    if dtype not in FLOAT_DTYPES:
        raise DTypeError(f"{argument}: dtype {dtype} is not one of {names(FLOAT_DTYPES)}")


def check_tensor(argument: str, tensor: object) -> None:
    """`tensor` is a dense tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument}: {type(tensor).__name__} is not a torch.Tensor")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{argument}: layout {tensor.layout} is not torch.strided; call .to_dense() first")


def check_shape(argument: str, shape: object, dims: int | None = None) -> None:
    """`shape` is a sequence of non-negative integers, of `dims` dimensions where given."""
    legal = "a shape" if dims is None else f"a shape of {dims} dimensions"
    if shape is None or not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"{argument}: {shape!r} is not {legal}")
    if (dims is not None and len(shape) != dims) or any(n < 0 for n in shape):
        raise ValueError(f"{argument}: {list(shape)} is not {legal}")


def same_device(argument: str, tensor: Tensor, other: str, device: torch.device) -> None:
    """`tensor` is on `device`, which is that of the argument `other`."""
    if tensor.device != device:
        raise ValueError(f"{argument}: is on {tensor.device}, but {other} is on {device}; move them to one device")


def check_quantize(input: Tensor, blocksize: int, quant_type: str) -> None:
    """The arguments of `quantize_4bit`."""
    if (
        type(input) is Tensor
        and input.dtype in FLOAT_DTYPES
        and input.layout is torch.strided
        and type(blocksize) is int
        and blocksize in _BLOCK_SIZES
        and quant_type in QUANT_TYPES
    ):
        return
    check_tensor("input", input)
    check_float("input", input.dtype)
    check_blocksize(blocksize)
    check_quant_type(quant_type)


def check_scales(
    absmax: Tensor,
    absmax2: Tensor | None,
    offset: Tensor | None,
    blocks: int,
    device: torch.device,
    arguments: tuple[str, str] = ("absmax2", "offset"),
) -> None:
    """Scales of `blocks` blocks: float32, or 8-bit codes with scales and an offset of their own.

    Args:
        absmax: The scales.
        absmax2: The scales of the scales.
        offset: Their offset.
        blocks: How many there are.
        device: Where all of them must be.
        arguments: What the caller calls `absmax2` and `offset`.
    """
    second, mean = arguments
    check_tensor("absmax", absmax)
    same_device("absmax", absmax, "packed", device)
    if absmax.numel() != blocks:
        raise ValueError(f"absmax: {absmax.numel()} scales do not fit; shape and blocksize make {blocks} blocks")
    if absmax2 is None or offset is None:
        if absmax2 is not None or offset is not None:
            missing, given = (second, mean) if absmax2 is None else (mean, second)
            raise ValueError(f"{missing}: None, but {given} is given; nested scales have both, plain scales neither")
        if absmax.dtype is not torch.float32:
            raise DTypeError(f"absmax: dtype {absmax.dtype} is not torch.float32 (or torch.uint8 for nested scales)")
        return
    if absmax.dtype is not torch.uint8:
        raise DTypeError(f"absmax: dtype {absmax.dtype} is not torch.uint8, which nested scales are")
    for argument, tensor, count in (
        (second, absmax2, blocks_of(blocks, NESTED_BLOCKSIZE)),
        (mean, offset, 1),
    ):
        check_tensor(argument, tensor)
        same_device(argument, tensor, "packed", device)
        if tensor.dtype is not torch.float32:
            raise DTypeError(f"{argument}: dtype {tensor.dtype} is not torch.float32")
        if tensor.numel() != count:
            raise ValueError(f"{argument}: {tensor.numel()} elements, expected {count} for {blocks} nested scales")


def check_compress(absmax: Tensor) -> None:
    """The argument of `compress_absmax`."""
    check_tensor("absmax", absmax)
    if absmax.dtype is not torch.float32:
        raise DTypeError(f"absmax: dtype {absmax.dtype} is not torch.float32")


def check_expand(codes: Tensor, absmax2: Tensor, offset: Tensor) -> None:
    """The arguments of `expand_absmax`."""
    check_tensor("codes", codes)
    check_scales(codes, absmax2, offset, codes.numel(), codes.device)


def check_packed_length(argument: str, packed: Tensor, n: int) -> None:
    """`packed` holds the codes of `n` values, rounded up to whole elements of its storage dtype."""
    if packed.dtype not in STORAGE_DTYPES:
        raise DTypeError(f"{argument}: dtype {packed.dtype} is not one of {names(STORAGE_DTYPES)}")
    size = packed.element_size()
    if packed.numel() != (packed_bytes(n) + size - 1) // size:
        raise ValueError(
            f"{argument}: {packed.numel()} elements of {packed.dtype} do not hold {n} values; "
            f"expected {(packed_bytes(n) + size - 1) // size}"
        )


def check_weight(weight: PackedWeight) -> None:
    """A packed tensor and its scales.

    A packing that remembers is known again when it has passed: what is asked then is whether it is still the same.
    """
    codes, packing = weight
    memo = packing.memo
    if memo is not None and memo.addresses is not None and type(codes) is Tensor:
        absmax, absmax2, offset = packing.absmax, packing.absmax2, packing.offset
        if (
            codes.numel() == memo.codes[0]
            and codes.dtype is memo.codes[1]
            and (codes.is_cpu if memo.codes[2] is None else codes.device == memo.codes[2])
            and absmax.data_ptr() == memo.addresses[0]
            and absmax.numel() == memo.sizes[0]
            and (
                absmax2 is None
                or offset is None
                or (
                    absmax2.data_ptr() == memo.addresses[1]
                    and absmax2.numel() == memo.sizes[1]
                    and offset.data_ptr() == memo.addresses[2]
                    and offset.numel() == memo.sizes[2]
                )
            )
        ):
            return
    check_blocksize(packing.blocksize)
    check_quant_type(packing.quant_type)
    check_tensor("packed", codes)
    check_shape("shape", packing.shape)
    n = prod(packing.shape)
    check_packed_length("packed", codes, n)
    blocks = blocks_of(n, packing.blocksize)
    check_scales(packing.absmax, packing.absmax2, packing.offset, blocks, codes.device)
    if memo is not None:
        absmax, absmax2, offset, *_ = packing
        memo.addresses = absmax.data_ptr(), _address(absmax2), _address(offset)
        memo.sizes = absmax.numel(), _size(absmax2), _size(offset)
        memo.codes = codes.numel(), codes.dtype, None if codes.is_cpu else codes.device


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _size(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel()


def check_product(x: Tensor, argument: str, bias: Tensor | None, weight: PackedWeight, dim: int) -> None:
    """A factor of a product with a packed matrix, whose dimension `dim` it meets."""
    shape, sizes = weight.packing.shape, x.shape
    if (
        type(x) is Tensor
        and len(shape) == 2
        and len(sizes) > 0
        and sizes[-1] == shape[dim]
        and x.dtype in FLOAT_DTYPES
        and x.layout is _STRIDED
        and ((x.is_cpu and weight.codes.is_cpu) or x.device == weight.codes.device)
        and (
            bias is None
            or (
                bias.dtype in FLOAT_DTYPES
                and bias.shape == shape[1 - dim : 2 - dim]
                and bias.layout is _STRIDED
                and ((bias.is_cpu and x.is_cpu) or bias.device == x.device)
            )
        )
    ):
        return
    check_tensor(argument, x)
    check_float(argument, x.dtype)
    check_shape("shape", shape, 2)
    same_device("packed", weight.codes, argument, x.device)
    if x.dim() == 0 or x.shape[-1] != shape[dim]:
        name = "in_features" if dim == 1 else "out_features"
        raise ValueError(f"{argument}: shape {list(x.shape)} does not end with {name}, {shape[dim]}")
    if bias is not None:
        check_tensor("bias", bias)
        same_device("bias", bias, argument, x.device)
        check_float("bias", bias.dtype)
        if bias.dim() != 1 or bias.shape[0] != shape[1 - dim]:
            raise ValueError(f"bias: shape {list(bias.shape)} is not [{shape[1 - dim]}]")


def check_embedding(indices: Tensor, weight: PackedWeight, dtype: torch.dtype) -> None:
    """The arguments of `embedding_4bit` beside the weight."""
    check_tensor("indices", indices)
    if indices.dtype not in INDEX_DTYPES:
        raise DTypeError(f"indices: dtype {indices.dtype} is not one of {names(INDEX_DTYPES)}")
    same_device("indices", indices, "packed", weight.codes.device)
    check_shape("shape", weight.packing.shape, 2)
    check_float("dtype", dtype)


def check_code(code: Tensor, device: torch.device) -> None:
    """An 8-bit map: float32 [256]."""
    check_tensor("code", code)
    same_device("code", code, "the input", device)
    if code.dtype is not torch.float32:
        raise DTypeError(f"code: dtype {code.dtype} is not torch.float32")
    if code.numel() != 256:
        raise ValueError(f"code: {code.numel()} elements, expected 256")


def check_blocksize_8bit(blocksize: object) -> None:
    """`blocksize` of the 8-bit functions: any positive number of values."""
    if not isinstance(blocksize, int) or isinstance(blocksize, bool):
        raise TypeError(f"blocksize: {blocksize!r} is not a positive integer")
    if blocksize <= 0:
        raise ValueError(f"blocksize: {blocksize} is not a positive integer")


def check_quantize_blockwise(input: Tensor, code: Tensor, blocksize: int) -> None:
    """The arguments of `quantize_blockwise`."""
    check_tensor("input", input)
    check_float("input", input.dtype)
    check_code(code, input.device)
    check_blocksize_8bit(blocksize)


def check_dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> None:
    """The arguments of `dequantize_blockwise`."""
    check_tensor("codes", codes)
    if codes.dtype is not torch.uint8:
        raise DTypeError(f"codes: dtype {codes.dtype} is not torch.uint8")
    check_float("dtype", dtype)
    check_code(code, codes.device)
    check_blocksize_8bit(blocksize)
    check_tensor("absmax", absmax)
    same_device("absmax", absmax, "codes", codes.device)
    if absmax.dtype is not torch.float32:
        raise DTypeError(f"absmax: dtype {absmax.dtype} is not torch.float32")
    blocks = blocks_of(codes.numel(), blocksize)
    if absmax.numel() != blocks:
        raise ValueError(f"absmax: {absmax.numel()} scales do not fit; {codes.numel()} codes make {blocks} blocks")


def check_quantize_rows(input: Tensor, argument: str = "input") -> None:
    """The argument of `quantize_rows`, by the name that its caller has for it."""
    check_tensor(argument, input)
    check_float(argument, input.dtype)
    if input.dim() == 0:
        raise ValueError(f"{argument}: shape [] has no rows; expected [..., columns]")


def check_dequantize_rows(
    codes: Tensor, scales: Tensor, dtype: torch.dtype, arguments: tuple[str, str] = ("codes", "scales")
) -> None:
    """The arguments of `dequantize_rows`, the tensors by the names that the caller has for them."""
    first, second = arguments
    check_tensor(first, codes)
    if codes.dtype is not torch.int8:
        raise DTypeError(f"{first}: dtype {codes.dtype} is not torch.int8")
    if codes.dim() == 0:
        raise ValueError(f"{first}: shape [] has no rows; expected [..., columns]")
    check_float("dtype", dtype)
    check_tensor(second, scales)
    same_device(second, scales, first, codes.device)
    if scales.dtype is not torch.float32:
        raise DTypeError(f"{second}: dtype {scales.dtype} is not torch.float32")
    rows = prod(codes.shape[:-1])
    if scales.numel() != rows:
        raise ValueError(f"{second}: {scales.numel()} scales do not fit; {first} {list(codes.shape)} has {rows} rows")


def check_out(out: object, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """`out`, an argument that a result is written to."""
    check_tensor("out", out)
    assert isinstance(out, Tensor)
    if out.dtype != dtype:
        raise DTypeError(f"out: dtype {out.dtype} is not {dtype}")
    if list(out.shape) != list(shape):
        raise ValueError(f"out: shape {list(out.shape)} is not {list(shape)}")
    same_device("out", out, "the input", device)
    if out.is_neg():
        raise ValueError("out: is a lazily negated view; pass memory of its own")
