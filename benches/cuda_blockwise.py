"""Quantize and dequantize on a GPU: halfbyte, bitsandbytes, and a kernel that moves the same bytes and does nothing.

    python benches/cuda_blockwise.py [--quick]

Arguments are rotated through more memory than the second-level cache holds. "graph" is one call inside a replayed CUDA
graph; bitsandbytes' quantize cannot be captured, and is timed with events around eager calls.
"""

from __future__ import annotations

import argparse
import functools

import torch
from _cuda import SHAPES, Floor, copies, device_line, eager_seconds, graph_seconds, here, raw, rotation
from _table import print_table
from halfbyte import _native

BLOCKSIZE = 64


def empty(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialized memory of the GPU."""
    return torch.empty(count, dtype=dtype, device="cuda")


class Case:
    """One shape: memory for every copy, and every way to call."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        self.n, self.dtype = n, dtype
        self.count = rotation(n * dtype.itemsize)
        blocks = n // BLOCKSIZE
        self.values = copies(self.count, lambda: torch.randn(n, device="cuda").to(dtype))
        self.packed = copies(self.count, lambda: empty(n // 2, torch.uint8))
        self.absmax = copies(self.count, lambda: empty(blocks, torch.float32))
        self.codes = copies(self.count, lambda: empty(blocks, torch.uint8))
        self.absmax2 = copies(self.count, lambda: empty(-(-blocks // 256), torch.float32))
        self.offset = empty(1, torch.float32)
        self.workspace = empty(_native.cuda_compress_workspace(blocks), torch.float64)
        self.small = copies(self.count, lambda: empty(n // 2 + 4 * blocks, torch.uint8))

    def quantize(self, i: int) -> None:
        """Values to codes and scales."""
        _native.cuda_quantize_4bit(
            *here(), raw(self.values[i]), raw(self.packed[i]), raw(self.absmax[i]), "nf4", BLOCKSIZE
        )

    def quantize_nested(self, i: int) -> None:
        """The same, and the scales to 8 bits."""
        parts = (self.values[i], self.packed[i], self.absmax[i], self.codes[i], self.absmax2[i], self.offset)
        _native.cuda_quantize_4bit_nested(*here(), *map(raw, parts), raw(self.workspace), "nf4", BLOCKSIZE)

    def dequantize(self, i: int) -> None:
        """Codes and scales to values."""
        _native.cuda_dequantize_4bit(
            *here(), raw(self.packed[i]), raw(self.absmax[i]), None, None, raw(self.values[i]), "nf4", BLOCKSIZE
        )

    def dequantize_nested(self, i: int) -> None:
        """Codes and 8-bit scales to values."""
        parts = (self.packed[i], self.codes[i], self.absmax2[i], self.offset, self.values[i])
        _native.cuda_dequantize_4bit(*here(), *map(raw, parts), "nf4", BLOCKSIZE)

    def calls(self, method: object) -> list[functools.partial[None]]:
        """One call for each copy."""
        return [functools.partial(method, i) for i in range(self.count)]  # type: ignore[arg-type]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    print(device_line())
    print(f"NF4, blocks of {BLOCKSIZE}, {arguments.dtype}, microseconds\n")
    floor = Floor()
    try:
        import bitsandbytes.functional as peer
    except ImportError:
        peer = None
    rows = []
    for n_rows, columns in SHAPES[1:2] if arguments.quick else SHAPES:
        case = Case(n_rows * columns, dtype)
        for i in range(case.count):
            case.quantize_nested(i)
        states, floors = {}, {}
        floors["dequantize"] = graph_seconds(case.calls(lambda i, c=case: floor.traffic(c.small[i], c.values[i])))
        for i in range(case.count):
            case.values[i].normal_()
        floors["quantize"] = graph_seconds(case.calls(lambda i, c=case: floor.traffic(c.values[i], c.small[i])))
        if peer is not None:
            weight = case.values[0].view(n_rows, columns)
            states = {
                nested: peer.quantize_4bit(weight, quant_type="nf4", blocksize=BLOCKSIZE, compress_statistics=nested)[1]
                for nested in (False, True)
            }
        for name, nested in (("quantize", False), ("quantize", True), ("dequantize", False), ("dequantize", True)):
            ours = getattr(case, name + "_nested" * nested)
            calls = case.calls(ours)
            graph, eager = graph_seconds(calls), eager_seconds(calls)
            theirs = float("nan")
            if peer is not None:
                if name == "quantize":
                    quantize = functools.partial(
                        peer.quantize_4bit, quant_type="nf4", blocksize=BLOCKSIZE, compress_statistics=nested
                    )
                    theirs = eager_seconds(case.calls(lambda i, q=quantize, c=case: q(c.values[i])))
                else:
                    state = states[nested]
                    out = [values.view(n_rows, columns) for values in case.values]
                    packed = [p.view(-1, 1) for p in case.packed]
                    call = lambda i, s=state, o=out, p=packed: peer.dequantize_4bit(p[i], s, out=o[i])  # noqa: E731
                    theirs = graph_seconds(case.calls(call))
            least = floors[name]
            rows.append(
                [
                    f"{name}{', nested' if nested else ''} {n_rows}x{columns}",
                    *(f"{seconds * 1e6:.1f}" for seconds in (least, graph, eager, theirs)),
                    f"{100 * least / graph:.0f} %",
                    f"{theirs / graph:.2f}",
                ]
            )
        del case, states
        torch.cuda.empty_cache()
    print_table(["", "floor", "graph", "eager", "bitsandbytes", "of the floor", "bnb / halfbyte"], rows)


if __name__ == "__main__":
    main()
