"""Codebooks: the values of 4-bit codes, and maps for 8-bit quantization."""

from __future__ import annotations

from itertools import product
from statistics import NormalDist

import torch
from torch import Tensor

from halfbyte import _native
from halfbyte.backends import cuda
from halfbyte.ops._torch_internals import disable_modes, dispatch_modes
from halfbyte.ops.checks import QUANT_TYPES
from halfbyte.ops.dispatch import transformed
from halfbyte.ops.registry import KERNELS

# AF4, for blocks of 64: "NF4 Isn't Information Theoretically Optimal (and that's Good)", arXiv 2306.06965, table 1.
_AF4 = (
    -1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0,
    0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0,
)  # fmt: skip


def _constant(values: list[float]) -> Tensor:
    """Float32 numbers as an ordinary CPU tensor, in whatever modes torch is at the moment."""
    with torch.inference_mode(False), disable_modes():
        return torch.tensor(values, dtype=torch.float32, device="cpu")


_CPU = torch.device("cpu")
_QUANT_MAPS = {quant_type: _constant(_native.quant_map(quant_type)) for quant_type in QUANT_TYPES}
_DYNAMIC_MAP = _constant(_native.dynamic_map())


def quant_map(quant_type: str, device: torch.device | str | None = None) -> Tensor:
    """The sixteen values of `quant_type`, float32 [16], as they are stored beside a weight. A copy."""
    target = _cuda_device(device)
    return _copy(_QUANT_MAPS[quant_type], device) if target is None else cuda.quant_map(quant_type, target)


def dynamic_map(device: torch.device | str | None = None) -> Tensor:
    """The 256 values of the signed 8-bit dynamic map, float32, ascending. A copy."""
    target = _cuda_device(device)
    return _copy(_DYNAMIC_MAP, device) if target is None else cuda.dynamic_map(target)


def _cuda_device(device: torch.device | str | None) -> torch.device | None:
    """The device, if a map is to be made there by kernels: a copy from the host would wait, and spoil a capture."""
    if device is None or device == _CPU or transformed() or KERNELS.get("cuda") is not cuda:
        return None
    device = torch.device(device)
    return device if device.type == "cuda" else None


def _copy(values: Tensor, device: torch.device | str | None) -> Tensor:
    if not torch.compiler.is_compiling() and dispatch_modes():
        # Modes that make tensors of their own kind want to see them made.
        with disable_modes():
            numbers = values.tolist()
        return torch.tensor(numbers, dtype=torch.float32, device=device or "cpu")
    # A clone costs half of what the general way does, and comes with every small tensor that is quantized.
    return values.clone() if device is None or device == _CPU else values.to(device, copy=True)


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> Tensor:
    """The sixteen values of a 4-bit type by their codes, float32 [16], scaled so that the largest magnitude is 1.

    `typename` is "nf4" or "fp4", or one of two that nothing here quantizes to: "int4", and "af4" for blocks of 64.
    `device` is the CPU unless given.

    >>> get_4bit_type("fp4")[:4]
    tensor([0.0000, 0.0052, 0.6667, 1.0000])
    """
    if typename in QUANT_TYPES:
        values = _native.codebook(typename)
    elif typename == "int4":
        values = [n / 7 for n in (*range(7, -1, -1), *range(0, -8, -1))]
    elif typename == "af4" and blocksize == 64:
        values = list(reversed(_AF4))
    elif typename == "af4":
        raise NotImplementedError(f"blocksize must be 64 for af4, got {blocksize}")
    else:
        raise NotImplementedError(f"typename must be one of 'nf4', 'fp4', 'int4', 'af4', got {typename!r}")
    return torch.tensor(values, dtype=torch.float32, device=device or "cpu")


def _padded(values: Tensor) -> Tensor:
    """Ascending float32 [256]; what is missing is filled with zeros."""
    return torch.cat([values.to(torch.float32), torch.zeros(256 - values.numel())]).sort().values


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """The dynamic map (arXiv 1511.04561): as the exponent grows by one, the fraction has a bit more.

    Args:
        signed: Whether there are negative values.
        max_exponent_bits: How many powers of ten there are.
        total_bits: How many bits a code has; the map has 256 entries anyway, those beyond 2**total_bits being zeros.

    Returns:
        float32 [256], ascending.
    """
    if signed and max_exponent_bits == 7 and total_bits == 8:
        return dynamic_map()
    fraction_bits = total_bits - 1 - max_exponent_bits + (not signed)
    counts = [(exponent, int(2.0 ** (exponent + fraction_bits))) for exponent in range(max_exponent_bits)]
    # With more bits than exponents need, what is left refines the largest.
    counts.append((max_exponent_bits - 1, int(2.0 ** (total_bits - 1 - max_exponent_bits)) - 1))
    parts = [torch.tensor([0.0, 1.0])]
    for exponent, count in counts:
        if count > 0:
            edges = torch.linspace(0.1, 1, count + 1)
            middles = 10.0 ** (exponent - max_exponent_bits + 1) * ((edges[:-1] + edges[1:]) / 2)
            parts += [middles, -middles] if signed else [middles]
    values = torch.cat(parts)
    if values.numel() != 2**total_bits:
        raise ValueError(
            f"max_exponent_bits must give {2**total_bits} values for total_bits={total_bits}, "
            f"got {max_exponent_bits}, which gives {values.numel()}"
        )
    return _padded(values)


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """Evenly spaced values from -1 (0 without `signed`) to 1: float32 [256], zeros in the middle for those missing.

    Without `signed` and with less than 8 bits it therefore does not ascend.
    """
    centred = signed and (add_zero or total_bits < 8)
    values = torch.linspace(-1.0 if signed else 0.0, 1.0, 2**total_bits - centred)
    half = values.numel() // 2
    return torch.cat([values[:half], torch.zeros(256 - values.numel()), values[half:]])


def create_fp8_map(signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8) -> Tensor:
    """Small floating-point numbers, subnormals included, scaled to at most 1: float32 [256], padded with zeros."""
    if exponent_bits + precision_bits + signed != total_bits:
        raise ValueError(
            f"total_bits must be exponent_bits + precision_bits + sign, "
            f"{exponent_bits} + {precision_bits} + {int(signed)}, got {total_bits}"
        )
    bias = 2 ** (exponent_bits - 1)
    values = []
    for exponent, fraction in product(range(2**exponent_bits), range(2**precision_bits)):
        mantissa = fraction / 2**precision_bits
        # The field's usual form, but for the sign of the bias: large codes are small numbers.
        value = mantissa * 2.0**-bias if exponent == 0 else (1 + mantissa) * 2.0 ** -(exponent - bias - 1)
        values += [value, -value] if signed else [value]
    code = _padded(torch.tensor(values))
    return code / code.max()


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """Quantiles of the normal distribution from which NF4 is made: float32 [256], the missing values being zeros.

    `offset` is the largest probability taken. With `use_extra_value` the positive side has one value more, which makes
    sixteen with zero; without, both sides have seven.
    """
    normal = NormalDist()

    def side(count: int) -> list[float]:
        return [normal.inv_cdf(float(p)) for p in torch.linspace(offset, 0.5, count + 1, dtype=torch.float64)[:-1]]

    values = side(8 if use_extra_value else 7) + [-v for v in side(7)]
    code = _padded(torch.tensor(values))
    return code / code.max()
