"""LLM.int8() on a GPU: halfbyte, bitsandbytes, cuBLAS with a 16-bit weight, and reading the weight.

    python benches/cuda_linear8.py [--m 1,4,16] [--shapes 14336x4096] [--outliers 0.01] [--no-peers]

Weights are rotated through more memory than the second-level cache holds; each figure is one call inside a replayed
CUDA graph, activations included. With a threshold a part of the columns of x has outliers. There bitsandbytes waits for
the GPU, so that it cannot be captured: with a threshold its figure is that of calls launched one by one.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

import torch
from _cuda import SHAPES, Floor, copies, device_line, eager_seconds, graph_seconds, host_seconds, rotation
from _table import print_table
from halfbyte.backends import cuda

THRESHOLD = 6.0


class Weight:
    """Copies of one weight, and activations for it."""

    def __init__(self, n: int, k: int) -> None:
        self.n, self.k = n, k
        self.count = rotation(n * k)
        self.codes = copies(self.count, lambda: torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda"))
        self.scales = torch.rand(n, device="cuda") + 0.1

    def ours(self, x: torch.Tensor, threshold: float) -> list[functools.partial[torch.Tensor]]:
        """A call for each copy."""
        return [functools.partial(cuda.linear_8bit, x, codes, self.scales, None, threshold) for codes in self.codes]

    def theirs(self, peer: object, x: torch.Tensor, threshold: float) -> list[functools.partial[torch.Tensor]]:
        """The same of bitsandbytes, with the state that its layer keeps."""
        calls = []
        for codes in self.codes:
            state = peer.MatmulLtState()  # type: ignore[attr-defined]
            state.CB, state.SCB, state.threshold, state.has_fp16_weights = codes, self.scales, threshold, False
            state.is_training = False
            calls.append(functools.partial(peer.matmul, x, codes, state=state))  # type: ignore[attr-defined]
        return calls


def activations(m: int, k: int, part: float) -> torch.Tensor:
    """Normal values, of which a part of the columns has some beyond the threshold."""
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda").clamp_(-4, 4)
    columns = torch.randperm(k, device="cuda")[: round(k * part)]
    x[0, columns] = 20.0
    return x


def peer_seconds(calls: Sequence[functools.partial[torch.Tensor]], threshold: float) -> float:
    """Of bitsandbytes, captured where that can be."""
    with torch.no_grad():
        return eager_seconds(calls) if threshold > 0 else graph_seconds(calls)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", default="1,8,16,32,64,128,256,512,1024,2048,4096", help="rows of x, with commas")
    parser.add_argument("--shapes", default="", help="NxK,... instead of the usual ones")
    parser.add_argument("--outliers", type=float, default=0.01, help="columns with outliers, of all")
    parser.add_argument("--no-peers", action="store_true", help="neither bitsandbytes nor cuBLAS")
    arguments = parser.parse_args()
    print(device_line())
    print(f"bfloat16, {arguments.outliers:.1%} of the columns with outliers, microseconds\n")
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",") if shape] or list(SHAPES)
    peer = None
    if not arguments.no_peers:
        try:
            import bitsandbytes as peer
        except ImportError:
            print("bitsandbytes is not installed")
    floor, rows = Floor(), []
    for n, k in shapes:
        weight = Weight(n, k)
        least = graph_seconds([functools.partial(floor.read, codes) for codes in weight.codes])
        dense = []
        if not arguments.no_peers:
            dense = copies(rotation(n * k * 2), lambda n=n, k=k: torch.randn(n, k, dtype=torch.bfloat16, device="cuda"))
        for m in map(int, arguments.m.split(",")):
            x = activations(m, k, arguments.outliers)
            ours = [graph_seconds(weight.ours(x, threshold)) for threshold in (0.0, THRESHOLD)]
            theirs = [float("nan")] * 2
            if peer is not None:
                theirs = [peer_seconds(weight.theirs(peer, x, t), t) for t in (0.0, THRESHOLD)]
            cublas = float("nan")
            if dense:
                cublas = graph_seconds([functools.partial(torch.nn.functional.linear, x, w) for w in dense])
            times = (least, *ours, *theirs, cublas)
            row = [f"{n}x{k} M={m}", *(f"{seconds * 1e6:.1f}" for seconds in times)]
            row += [f"{cublas / time:.2f}" for time in ours]
            rows.append([*row, f"{host_seconds(weight.ours(x, THRESHOLD)) * 1e6:.1f}"])
        del weight, dense
        torch.cuda.empty_cache()
    header = ["", "floor", "halfbyte", "with outliers", "bitsandbytes", "with outliers", "cuBLAS"]
    print_table([*header, "cuBLAS / hb", "with outliers", "host"], rows)


if __name__ == "__main__":
    main()
