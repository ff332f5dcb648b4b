"""Gradients of x through a 4-bit weight on a GPU: halfbyte, a dense copy, bitsandbytes, cuBLAS with a 16-bit weight.

    python benches/cuda_dgrad.py [--m 64,256,1024] [--shapes 14336x4096]

`dx = dy @ W`, W [N, K] in NF4. Weights are rotated through more memory than the second-level cache holds; each figure
is one call inside a replayed CUDA graph. The floor reads codes and float32 scales, and does nothing with them. "dense
copy" dequantizes the weight into memory and has cuBLAS multiply with that: what halfbyte does where it is faster.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
from collections.abc import Callable

import torch
from _cuda import Floor, copies, device_line, graph_seconds, rotation
from _table import print_table
from cuda_linear import BLOCKSIZE, Weight
from halfbyte.backends import cuda

ROWS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096)
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))


def bitsandbytes_calls(weight: Weight, dy: torch.Tensor) -> list[Callable[[], object]]:
    """What its autograd function does: the weight dequantized, and a product."""
    from bitsandbytes import functional

    small = torch.randn(weight.n, weight.k, dtype=torch.bfloat16, device="cuda")
    state = functional.quantize_4bit(small, quant_type="nf4", blocksize=BLOCKSIZE)[1]
    packed = [codes.view(-1, 1) for codes in weight.packed]
    return weight.calls(lambda i: torch.matmul(dy, functional.dequantize_4bit(packed[i], state).to(dy.dtype)))


def dense_copy(weight: Weight, i: int, dy: torch.Tensor) -> torch.Tensor:
    """The way that is taken where the kernel does not pay."""
    return dy @ cuda.dequantize_4bit(weight.weights[0][i], dy.dtype)


def measure(n: int, k: int, rows: list[int], floor: Floor) -> list[list[str]]:
    """Rows of the table."""
    weight = Weight(n, k, "best")
    least = graph_seconds(weight.calls(lambda i: floor.read(weight.memory[i])))
    dense = copies(rotation(n * k * 2), lambda: torch.randn(n, k, dtype=torch.bfloat16, device="cuda"))
    table = []
    for m in rows:
        dy = torch.randn(m, n, dtype=torch.bfloat16, device="cuda")
        calls: dict[str, list[Callable[[], object]]] = {
            "halfbyte": weight.calls(lambda i, dy=dy: cuda.linear_4bit_backward(dy, weight.weights[0][i])),
            "nested": weight.calls(lambda i, dy=dy: cuda.linear_4bit_backward(dy, weight.weights[1][i])),
            "dense copy": weight.calls(lambda i, dy=dy: dense_copy(weight, i, dy)),
            "cuBLAS": [functools.partial(torch.matmul, dy, w) for w in dense],
        }
        if importlib.util.find_spec("bitsandbytes") is not None:
            calls["bitsandbytes"] = bitsandbytes_calls(weight, dy)
        found = {name: graph_seconds(of_name) * 1e6 for name, of_name in calls.items()}
        bnb, ours = found.get("bitsandbytes", float("nan")), found["halfbyte"]
        cells = [least * 1e6, ours, found["nested"], found["dense copy"], bnb, found["cuBLAS"]]
        ratios = [found["dense copy"] / ours, bnb / ours, found["cuBLAS"] / ours]
        table.append([f"{n}x{k} M={m}", *(f"{cell:.1f}" for cell in cells), *(f"{ratio:.2f}" for ratio in ratios)])
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", default="", help="rows of dy, with commas")
    parser.add_argument("--shapes", default="", help="NxK,... instead of the usual ones")
    arguments = parser.parse_args()
    print(device_line())
    print(f"NF4, blocks of {BLOCKSIZE}, bfloat16, microseconds\n", flush=True)
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",") if shape] or list(SHAPES)
    rows = [int(m) for m in arguments.m.split(",") if m] or list(ROWS)
    floor, table = Floor(), []
    with torch.no_grad():
        for n, k in shapes:
            table += measure(n, k, rows, floor)
            gc.collect()
            torch.cuda.empty_cache()
    headings = ["floor", "halfbyte", "nested", "dense copy", "bitsandbytes", "cuBLAS"]
    print_table(["", *headings, "copy / hb", "bnb / hb", "cuBLAS / hb"], table)


if __name__ == "__main__":
    main()
