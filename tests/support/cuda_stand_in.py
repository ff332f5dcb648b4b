"""The compiled core's CUDA functions, done by its CPU functions: so `halfbyte.backends.cuda` runs on CPU tensors.

What is tested so is what Python does around kernels: which one it takes, parts of weights and of batches, addresses,
lengths, memory. The kernels themselves are tested in tests/emulator and tests/cuda.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from halfbyte import _native
from halfbyte.backends import cpu as _cpu

Raw = tuple[int, int, str]


def tensor(raw: Raw | None) -> torch.Tensor | None:
    """The memory that a raw value names, as a tensor."""
    if raw is None:
        return None
    address, count, name = raw
    dtype = getattr(torch, name)
    if count == 0:
        return torch.empty(0, dtype=dtype)
    assert address % dtype.itemsize == 0
    return torch.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype=dtype)


def blocks(n: int, blocksize: int) -> int:
    """How many scales `n` values have."""
    return -(-n // blocksize)


class StandIn:
    """Functions by the names of the compiled core's; `calls` lists those that were called, and `rows` of products.

    `paying` are the numbers of rows for which a product is said to be faster than a dense copy.
    """

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        self.capability = capability
        self.calls: list[str] = []
        self.rows: list[int] = []
        self.paying: set[int] = set()

    def cuda_device(self, device: int) -> tuple[str, tuple[int, int], int, int]:
        """A device of the capability asked for."""
        return "stand-in", self.capability, 132, 232_448

    def cuda_quantize_4bit(
        self, device: int, stream: int, input: Raw, packed: Raw, absmax: Raw, quant_type: str, blocksize: int
    ) -> None:
        """As the kernel."""
        self.calls.append("quantize")
        _native.quantize_4bit(input, packed, absmax, quant_type, blocksize)

    def cuda_compress_workspace(self, n: int) -> int:
        """As the core."""
        return _native.cuda_compress_workspace(n)

    def cuda_compress_absmax(
        self, device: int, stream: int, absmax: Raw, codes: Raw, absmax2: Raw, offset: Raw, workspace: Raw
    ) -> None:
        """As the kernels."""
        self.calls.append("compress")
        assert workspace[1:] == (_native.cuda_compress_workspace(absmax[1]), "float64")
        value = _native.compress_absmax(absmax, codes, absmax2)
        ctypes.c_float.from_address(offset[0]).value = value

    def cuda_quantize_4bit_nested(
        self,
        device: int,
        stream: int,
        input: Raw,
        packed: Raw,
        absmax_scratch: Raw,
        codes: Raw,
        absmax2: Raw,
        offset: Raw,
        workspace: Raw,
        quant_type: str,
        blocksize: int,
    ) -> None:
        """As the kernels."""
        self.cuda_quantize_4bit(device, stream, input, packed, absmax_scratch, quant_type, blocksize)
        self.cuda_compress_absmax(device, stream, absmax_scratch, codes, absmax2, offset, workspace)

    def cuda_expand_absmax(self, device: int, stream: int, codes: Raw, absmax2: Raw, offset: Raw, out: Raw) -> None:
        """As the kernel."""
        self.calls.append("expand")
        assert offset[1:] == (1, "float32")
        _native.expand_absmax(codes, absmax2, ctypes.c_float.from_address(offset[0]).value, out)

    def _scales(self, absmax: Raw, absmax2: Raw | None, offset: Raw | None, n: int, blocksize: int) -> torch.Tensor:
        count = blocks(n, blocksize)
        assert absmax[1] == count
        if absmax2 is None or offset is None:
            assert absmax2 is offset
            assert absmax[2] == "float32"
            plain = tensor(absmax)
            assert plain is not None
            return plain
        assert absmax[2] == "uint8"
        assert absmax2[1:] == (blocks(count, 256), "float32")
        assert offset[1:] == (1, "float32")
        plain = torch.empty(count)
        value = ctypes.c_float.from_address(offset[0]).value
        _native.expand_absmax(absmax, absmax2, value, (plain.data_ptr(), count, "float32"))
        return plain

    def cuda_dequantize_4bit(
        self,
        device: int,
        stream: int,
        packed: Raw,
        absmax: Raw,
        absmax2: Raw | None,
        offset: Raw | None,
        out: Raw,
        quant_type: str,
        blocksize: int,
    ) -> None:
        """As the kernel."""
        self.calls.append("dequantize")
        scales = self._scales(absmax, absmax2, offset, out[1], blocksize)
        _native.dequantize_4bit(packed, (scales.data_ptr(), scales.numel(), "float32"), out, quant_type, blocksize)

    def CudaLinear(
        self, device: int, dtype: str, n: int, k: int, quant_type: str, blocksize: int, nested: bool
    ) -> Linear:
        """As the core's class."""
        return Linear(self, dtype, n, k, quant_type, blocksize, nested)

    def cuda_embedding_4bit(
        self,
        device: int,
        stream: int,
        indices: Raw,
        packed: Raw,
        absmax: Raw,
        absmax2: Raw | None,
        offset: Raw | None,
        out: Raw,
        rows: int,
        columns: int,
        quant_type: str,
        blocksize: int,
    ) -> None:
        """As the kernel."""
        self.calls.append("embedding")
        assert out[1] == indices[1] * columns
        scales = self._scales(absmax, absmax2, offset, rows * columns, blocksize)
        table = torch.empty(rows, columns, dtype=getattr(torch, out[2]))
        _native.dequantize_4bit(
            packed, (scales.data_ptr(), scales.numel(), "float32"), (table.data_ptr(), rows * columns, out[2]),
            quant_type, blocksize,
        )  # fmt: skip
        wanted, result = tensor(indices), tensor(out)
        assert wanted is not None
        assert result is not None
        there = (wanted >= 0) & (wanted < rows)
        found = table[torch.where(there, wanted, 0).long()] if rows else table.new_empty(len(wanted), columns)
        result.view(-1, columns).copy_(torch.where(there[:, None], found, torch.nan))

    def cuda_quantize_8bit(
        self, device: int, stream: int, input: Raw, code: Raw, codes: Raw, absmax: Raw, blocksize: int
    ) -> None:
        """As the kernel, for the block sizes that the core knows."""
        self.calls.append("quantize 8")
        values = tensor(input)
        assert values is not None
        values = values.float()
        _native.quantize_8bit((values.data_ptr(), values.numel(), "float32"), code, codes, absmax, blocksize)

    def cuda_dequantize_8bit(
        self, device: int, stream: int, codes: Raw, absmax: Raw, code: Raw, out: Raw, blocksize: int
    ) -> None:
        """As the kernel, for the block sizes that the core knows."""
        self.calls.append("dequantize 8")
        values, result = torch.empty(codes[1]), tensor(out)
        _native.dequantize_8bit(codes, absmax, code, (values.data_ptr(), codes[1], "float32"), blocksize)
        assert result is not None
        result.copy_(values)

    def cuda_quantize_rows(
        self, device: int, stream: int, input: Raw, codes: Raw, scales: Raw, rows: int, columns: int
    ) -> None:
        """As the kernel."""
        self.calls.append("quantize rows")
        _native.quantize_rows(input, codes, scales, rows, columns)

    def cuda_dequantize_rows(
        self, device: int, stream: int, codes: Raw, scales: Raw, out: Raw, rows: int, columns: int
    ) -> None:
        """As the kernel."""
        self.calls.append("dequantize rows")
        _native.dequantize_rows(codes, scales, out, rows, columns)

    def cuda_int8_workspace(self, device: int, rows: int, columns: int) -> int:
        """No less than there are codes."""
        return (rows * -(-columns // 16) * 16 + 511) // 256 * 256

    def cuda_quantize_rows_outliers(
        self,
        device: int,
        stream: int,
        input: Raw,
        codes: Raw,
        scales: Raw,
        outliers: Raw,
        workspace: Raw,
        rows: int,
        columns: int,
        threshold: float,
    ) -> None:
        """As the kernels."""
        self.calls.append("outliers")
        assert workspace[1:] == (self.cuda_int8_workspace(device, rows, columns), "uint8")
        x = tensor(input)
        assert x is not None
        for raw, found in zip(
            (codes, scales, outliers), _cpu.quantize_rows_outliers(x.view(rows, columns), threshold), strict=True
        ):
            to = tensor(raw)
            assert to is not None
            to.copy_(found.reshape(-1))

    def cuda_int8_matmul(
        self,
        device: int,
        stream: int,
        a: Raw,
        b: Raw,
        row_scales: Raw | None,
        column_scales: Raw | None,
        bias: Raw | None,
        y: Raw,
        m: int,
        n: int,
        k: int,
    ) -> str:
        """As the kernels."""
        self.calls.append("int8 product")
        assert a[0] % 16 == 0
        assert b[0] % 16 == 0
        of_a, of_b, out = tensor(a), tensor(b), tensor(y)
        assert of_a is not None
        assert of_b is not None
        assert out is not None
        of_a, of_b = of_a.view(m, k), of_b.view(n, k)
        rows, columns = tensor(row_scales), tensor(column_scales)
        if rows is None or columns is None:
            assert bias is None
            out.copy_(_cpu.int8_matmul(of_a, of_b).view(-1))
        else:
            out.copy_(_cpu.int8_scaled_mm(of_a, of_b, rows, columns, tensor(bias), out.dtype).view(-1))
        return "int8_stand_in"

    def CudaLinear8(self, device: int, n: int, k: int) -> Linear8:
        """As the core's class."""
        return Linear8(self, n, k)


@dataclass
class Linear8:
    """Products with 8-bit weights as the processor makes them."""

    native: StandIn
    n: int
    k: int

    def workspace(self, m: int) -> int:
        """As the function of this name says."""
        return self.native.cuda_int8_workspace(0, m, self.k)

    def launch(
        self,
        stream: int,
        m: int,
        dtype: str,
        x: int,
        codes: int,
        scales: int,
        bias: int,
        bias_dtype: str,
        threshold: float,
        workspace: int,
        y: int,
    ) -> str:
        """One product."""
        self.native.calls.append("linear 8")
        self.native.rows.append(m)
        n, k = self.n, self.k
        assert codes % 16 == 0
        # All of it can be written.
        ctypes.memset(workspace, 0xEE, self.workspace(m))
        rows, weight = tensor((x, m * k, dtype)), tensor((codes, n * k, "int8"))
        of_weight, shift = tensor((scales, n, "float32")), tensor((bias, n, bias_dtype) if bias else None)
        out = tensor((y, m * n, dtype))
        assert rows is not None
        assert weight is not None
        assert of_weight is not None
        assert out is not None
        found = _cpu.linear_8bit(rows.view(m, k), weight.view(n, k), of_weight, shift, threshold)
        out.copy_(found.view(-1))
        return "int8_stand_in"


@dataclass
class Linear:
    """Products as the kernels make them, in float64, rounded once."""

    native: StandIn
    dtype: str
    n: int
    k: int
    quant_type: str
    blocksize: int
    nested: bool
    rows_at_once = 32
    rows_without_workspace = 1 << 40

    def workspace(self, m: int) -> int | None:
        """Where a kernel for more rows is faster than a dense copy, as many bytes as it has rows."""
        return m if m in self.native.paying else None

    def launch(
        self, stream: int, m: int, x: int, packed: int, absmax: int, absmax2: int, offset: int, bias: int, y: int,
        workspace: int,
    ) -> None:  # fmt: skip
        """One product."""
        assert workspace == 0 or m in self.native.paying
        self.native.calls.append("product")
        self.native.rows.append(m)
        n, k, dtype = self.n, self.k, self.dtype
        dense = self._dense(packed, absmax, absmax2, offset)
        rows, shift, out = (
            tensor((x, m * k, dtype)),
            tensor((bias, n, dtype) if bias else None),
            tensor((y, m * n, dtype)),
        )
        assert rows is not None
        assert out is not None
        exact = rows.view(m, k).double() @ dense.T
        out.view(m, n).copy_(exact if shift is None else exact + shift.double())

    def dgrad_workspace(self, m: int) -> int | None:
        """Where the kernel is faster than a dense copy, as many bytes as it has rows."""
        return self.workspace(m)

    def dgrad(
        self, stream: int, m: int, dy: int, packed: int, absmax: int, absmax2: int, offset: int, dx: int, workspace: int
    ) -> None:
        """The gradient of one product's `x`."""
        assert m in self.native.paying
        assert workspace
        assert dy % 16 == packed % 16 == 0
        self.native.calls.append("dgrad")
        self.native.rows.append(m)
        rows, out = tensor((dy, m * self.n, self.dtype)), tensor((dx, m * self.k, self.dtype))
        assert rows is not None
        assert out is not None
        dense = self._dense(packed, absmax, absmax2, offset)
        out.view(m, self.k).copy_(rows.view(m, self.n).double() @ dense)

    def _dense(self, packed: int, absmax: int, absmax2: int, offset: int) -> torch.Tensor:
        """The weight in float64."""
        n, k = self.n, self.k
        count = blocks(n * k, self.blocksize)
        assert self.nested == (absmax2 != 0) == (offset != 0)
        if self.nested:
            raw = (absmax, count, "uint8"), (absmax2, blocks(count, 256), "float32"), (offset, 1, "float32")
        else:
            raw = (absmax, count, "float32"), None, None
        scales = self.native._scales(*raw, n * k, self.blocksize)
        dense = torch.empty(n * k)
        _native.dequantize_4bit(
            (packed, (n * k + 1) // 2, "uint8"), (scales.data_ptr(), count, "float32"),
            (dense.data_ptr(), n * k, "float32"), self.quant_type, self.blocksize,
        )  # fmt: skip
        return dense.view(n, k).double()
