"""Products with a 4-bit weight on a GPU: halfbyte, bitsandbytes, cuBLAS with a 16-bit weight, and reading the weight.

    python benches/cuda_linear.py [--quick] [--m 1,4,16] [--shapes 14336x4096]

Weights are rotated through more memory than the second-level cache holds; each figure is one call inside a replayed
CUDA graph. The floor reads codes and float32 scales, and does nothing with them.
"""

from __future__ import annotations

import argparse
import functools

import torch
from _cuda import SHAPES, Floor, copies, device_line, graph_seconds, here, host_seconds, raw, rotation
from _table import print_table
from halfbyte import _native
from halfbyte.backends import cuda
from halfbyte.ops.packed import Memo, PackedWeight, Packing

BLOCKSIZE = 64
FEW_ROWS = 32


class Weight:
    """Copies of one weight, made once for all numbers of rows."""

    def __init__(self, n: int, k: int, kernel: str) -> None:
        self.n, self.k, self.kernel = n, k, kernel
        bytes_each = n * k // 2 + n * k // BLOCKSIZE * 4
        self.count = rotation(bytes_each)
        blocks = n * k // BLOCKSIZE
        # Codes and scales side by side, so that the floor kernel reads them as one buffer.
        self.memory = copies(self.count, lambda: torch.randint(256, (bytes_each,), dtype=torch.uint8, device="cuda"))
        self.packed = [m[: n * k // 2] for m in self.memory]
        self.absmax = [m[n * k // 2 :].view(torch.float32) for m in self.memory]
        for absmax in self.absmax:
            absmax.uniform_(0.01, 0.1)
        self.codes = copies(self.count, lambda: torch.randint(256, (blocks,), dtype=torch.uint8, device="cuda"))
        self.absmax2 = torch.rand(-(-blocks // 256), device="cuda")
        self.offset = torch.rand(1, device="cuda")
        scales = (
            [(absmax, None, None) for absmax in self.absmax],
            [(c, self.absmax2, self.offset) for c in self.codes],
        )
        # As a layer keeps them: what is found out at the first call is remembered.
        self.weights = [
            [
                PackedWeight(packed, Packing(*of_copy, (n, k), BLOCKSIZE, "nf4", Memo()))
                for packed, of_copy in zip(self.packed, of_kind, strict=True)
            ]
            for of_kind in scales
        ]

    def calls(self, method: object) -> list[functools.partial[None]]:
        """One call for each copy."""
        return [functools.partial(method, i) for i in range(self.count)]  # type: ignore[arg-type]

    def product(self, i: int, x: torch.Tensor, y: torch.Tensor, nested: bool) -> None:
        """Ours: the kernel of few rows by itself, or for more rows what torch calls, which chooses the way."""
        if self.kernel == "best" and len(x) > FEW_ROWS:
            cuda.linear_4bit(x, self.weights[nested][i], None)
            return
        scales = (self.codes[i], self.absmax2, self.offset) if nested else (self.absmax[i], None, None)
        parts = (x, self.packed[i], *scales, None, y)
        # More than any launch wants.
        workspace = raw(torch.empty(1 << 25, dtype=torch.uint8, device="cuda")) if len(x) > FEW_ROWS else None
        shape = len(x), self.n, self.k
        _native.cuda_matmul_4bit(*here(), *map(raw, parts), *shape, "nf4", BLOCKSIZE, self.kernel, workspace)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, and no peers")
    parser.add_argument("--m", default="1,2,4,8,12,16", help="rows of x, with commas")
    parser.add_argument("--shapes", default="", help="NxK,... instead of the usual ones")
    parser.add_argument("--no-peers", action="store_true", help="neither bitsandbytes nor cuBLAS")
    parser.add_argument("--kernel", default="best", help="best, small_m_sm90, small_m_sm80, tile_sm90a, tile_sm80 or simt")
    arguments = parser.parse_args()
    print(device_line())
    print(f"NF4, blocks of {BLOCKSIZE}, bfloat16, microseconds\n")
    floor = Floor()
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",") if shape] or list(SHAPES)
    if arguments.quick:
        shapes = shapes[1:2]
    peer = None
    if not arguments.quick and not arguments.no_peers:
        try:
            import bitsandbytes as peer
        except ImportError:
            print("bitsandbytes is not installed")
    rows = []
    for n, k in shapes:
        weight = Weight(n, k, arguments.kernel)
        least = graph_seconds(weight.calls(lambda i, w=weight: floor.read(w.memory[i])))
        dense = None
        if not arguments.quick and not arguments.no_peers:
            dense = copies(rotation(n * k * 2), lambda n=n, k=k: torch.randn(n, k, dtype=torch.bfloat16, device="cuda"))
        state = None
        if peer is not None:
            small = torch.randn(n, k, dtype=torch.bfloat16, device="cuda")
            state = peer.functional.quantize_4bit(small, quant_type="nf4", blocksize=BLOCKSIZE)[1]
            packed = [p.view(-1, 1) for p in weight.packed]
        for m in map(int, arguments.m.split(",")):
            x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
            y = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
            times = []
            for nested in (False, True):
                times.append(graph_seconds(weight.calls(lambda i, a=nested, w=weight, x=x, y=y: w.product(i, x, y, a))))
            theirs = cublas = float("nan")
            if state is not None:
                call = lambda i, x=x, p=packed, s=state: peer.matmul_4bit(x, p[i].t(), s)  # noqa: E731
                with torch.no_grad():
                    theirs = graph_seconds(weight.calls(call))
            if dense is not None:
                calls = [functools.partial(torch.nn.functional.linear, x, w) for w in dense]
                cublas = graph_seconds(calls)
            host = host_seconds(weight.calls(lambda i, w=weight, x=x, y=y: w.product(i, x, y, False)))
            rows.append(
                [
                    f"{n}x{k} M={m}",
                    *(f"{seconds * 1e6:.1f}" for seconds in (least, *times, theirs, cublas)),
                    f"{times[0] / least:.2f}",
                    f"{theirs / times[0]:.2f}",
                    f"{cublas / times[0]:.2f}",
                    f"{host * 1e6:.1f}",
                ]
            )
        del weight, dense, state
        torch.cuda.empty_cache()
    header = [
        "",
        "floor",
        "halfbyte",
        "nested",
        "bitsandbytes",
        "cuBLAS",
        "of floor",
        "bnb / hb",
        "cuBLAS / hb",
        "host",
    ]
    print_table(header, rows)


if __name__ == "__main__":
    main()
