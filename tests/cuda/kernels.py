"""The kernels on torch's tensors, beside the same arithmetic on the processor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from halfbyte import _native

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")


def raw(tensor: torch.Tensor) -> tuple[int, int, str]:
    """What the compiled core takes for a tensor."""
    return tensor.data_ptr(), tensor.numel(), str(tensor.dtype).removeprefix("torch.")


def here() -> tuple[int, int]:
    """The current device and stream."""
    return torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream


def poisoned(count: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """`count` elements of no meaning, `offset` elements behind an aligned address."""
    bytes_ = torch.full(((count + offset) * dtype.itemsize,), 0xEE, dtype=torch.uint8, device="cuda")
    return bytes_.view(dtype)[offset:]


@dataclass
class Quantized:
    """Codes and scales; `absmax2` and `offset` when the scales are quantized too."""

    packed: torch.Tensor
    absmax: torch.Tensor
    absmax2: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    def cpu(self) -> Quantized:
        """The same on the processor."""
        return Quantized(*(None if t is None else t.cpu() for t in self.parts))  # type: ignore[arg-type]

    @property
    def parts(self) -> tuple[torch.Tensor | None, ...]:
        """All of it."""
        return self.packed, self.absmax, self.absmax2, self.offset


def quantize(
    values: torch.Tensor, quant_type: str, blocksize: int, *, offset: int = 0, reference: bool = False
) -> Quantized:
    """Quantize on the GPU, the codes `offset` bytes behind an aligned address."""
    packed = poisoned(-(-values.numel() // 2), torch.uint8, offset)
    absmax = poisoned(-(-values.numel() // blocksize), torch.float32)
    _native.cuda_quantize_4bit(*here(), raw(values), raw(packed), raw(absmax), quant_type, blocksize, reference)
    return Quantized(packed, absmax)


def compress(plain: Quantized) -> Quantized:
    """Quantize the scales on the GPU."""
    n = plain.absmax.numel()
    codes, absmax2 = poisoned(n, torch.uint8), poisoned(-(-n // 256), torch.float32)
    offset = poisoned(1, torch.float32)
    workspace = poisoned(_native.cuda_compress_workspace(n), torch.float64)
    _native.cuda_compress_absmax(*here(), *map(raw, (plain.absmax, codes, absmax2, offset, workspace)))
    return Quantized(plain.packed, codes, absmax2, offset)


def quantize_nested(values: torch.Tensor, quant_type: str, blocksize: int, *, offset: int = 0) -> Quantized:
    """Quantize values and their scales on the GPU in one call, the codes `offset` bytes behind an aligned address."""
    n = -(-values.numel() // blocksize)
    packed, scratch = poisoned(-(-values.numel() // 2), torch.uint8, offset), poisoned(n, torch.float32)
    codes, absmax2 = poisoned(n, torch.uint8, offset), poisoned(-(-n // 256), torch.float32)
    mean = poisoned(1, torch.float32)
    workspace = poisoned(_native.cuda_compress_workspace(n), torch.float64)
    parts = (values, packed, scratch, codes, absmax2, mean, workspace)
    _native.cuda_quantize_4bit_nested(*here(), *map(raw, parts), quant_type, blocksize)
    return Quantized(packed, codes, absmax2, mean)


def dequantize(
    weight: Quantized,
    n: int,
    dtype: torch.dtype,
    quant_type: str,
    blocksize: int,
    *,
    offset: int = 0,
    reference: bool = False,
) -> torch.Tensor:
    """Dequantize on the GPU to memory `offset` elements behind an aligned address."""
    out = poisoned(n, dtype, offset)
    scales = [None if t is None else raw(t) for t in weight.parts[1:]]
    _native.cuda_dequantize_4bit(*here(), raw(weight.packed), *scales, raw(out), quant_type, blocksize, reference)
    return out


def product(
    x: torch.Tensor,
    weight: Quantized,
    n: int,
    quant_type: str,
    blocksize: int,
    *,
    bias: torch.Tensor | None = None,
    kernel: str = "best",
    workspace: torch.Tensor | None = None,
) -> tuple[torch.Tensor, str]:
    """`x [m, k]` times the transposed weight `[n, k]`; and the kernel's name."""
    m, k = x.shape
    y = poisoned(m * n, x.dtype).view(m, n)
    scales = [None if t is None else raw(t) for t in weight.parts[1:]]
    name = _native.cuda_matmul_4bit(
        *here(),
        raw(x),
        raw(weight.packed),
        *scales,
        None if bias is None else raw(bias),
        raw(y),
        m,
        n,
        k,
        quant_type,
        blocksize,
        kernel,
        None if workspace is None else raw(workspace),
    )
    return y, name


def dgrad(
    dy: torch.Tensor, weight: Quantized, columns: int, quant_type: str, blocksize: int, *, workspace: bool
) -> torch.Tensor:
    """`dy [m, n]` times the weight `[n, columns]`; `workspace`: with what the kernel wants, full of anything."""
    m, n = dy.shape
    dx, dtype = poisoned(m * columns, dy.dtype).view(m, columns), str(dy.dtype).removeprefix("torch.")
    nested = weight.absmax2 is not None
    core = _native.CudaLinear(dy.device.index, dtype, n, columns, quant_type, blocksize, nested)
    scratch = poisoned(core.dgrad_workspace(m) or 1, torch.uint8)
    scales = [0 if t is None else t.data_ptr() for t in weight.parts[1:]]
    core.dgrad(
        here()[1], m, dy.data_ptr(), weight.packed.data_ptr(), *scales, dx.data_ptr(),
        scratch.data_ptr() if workspace else 0,
    )  # fmt: skip
    return dx


def cpu_quantize(values: torch.Tensor, quant_type: str, blocksize: int) -> Quantized:
    """Quantize on the processor."""
    packed = torch.empty(-(-values.numel() // 2), dtype=torch.uint8)
    absmax = torch.empty(-(-values.numel() // blocksize))
    _native.quantize_4bit(raw(values), raw(packed), raw(absmax), quant_type, blocksize)
    return Quantized(packed, absmax)


def cpu_compress(plain: Quantized) -> Quantized:
    """Quantize the scales on the processor."""
    codes = torch.empty(plain.absmax.numel(), dtype=torch.uint8)
    absmax2 = torch.empty(-(-plain.absmax.numel() // 256))
    offset = _native.compress_absmax(raw(plain.absmax), raw(codes), raw(absmax2))
    return Quantized(plain.packed, codes, absmax2, torch.tensor([offset]))


def cpu_dequantize(weight: Quantized, n: int, dtype: torch.dtype, quant_type: str, blocksize: int) -> torch.Tensor:
    """Dequantize on the processor."""
    absmax = weight.absmax
    if weight.absmax2 is not None and weight.offset is not None:
        absmax = torch.empty(weight.absmax.numel())
        _native.expand_absmax(raw(weight.absmax), raw(weight.absmax2), weight.offset.item(), raw(absmax))
    out = torch.empty(n, dtype=dtype)
    _native.dequantize_4bit(raw(weight.packed), raw(absmax), raw(out), quant_type, blocksize)
    return out


def same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Equal as bits, wherever they are, NaN being equal to any NaN."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    b = b.to(a.device)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    equal = a.view(integers) == b.view(integers)
    if a.dtype.is_floating_point:
        equal |= a.isnan() & b.isnan()
    return bool(equal.all())


def same(a: Quantized, b: Quantized) -> bool:
    """Equal codes and scales."""
    return all(same_bits(x, y) for x, y in zip(a.parts, b.parts, strict=True))
