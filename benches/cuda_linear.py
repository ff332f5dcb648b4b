"""Products with a 4-bit weight on a GPU: halfbyte, bitsandbytes, humming, cuBLAS with a 16-bit one, reading the weight.

    python benches/cuda_linear.py [--quick] [--m 1,4,16] [--shapes 14336x4096]
    python benches/cuda_linear.py --sweep --json benches/data/linear.json      all shapes and rows, to be plotted

Weights are rotated through more memory than the second-level cache holds; each figure is one call inside a replayed
CUDA graph. The floor reads codes and float32 scales, and does nothing with them. humming takes part where it is
installed, and compiles its kernels, some seconds for each shape.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from _cuda import SHAPES, Floor, copies, device_line, graph_seconds, here, host_seconds, raw, rotation
from _humming import humming_calls
from _table import print_table, versions_line
from halfbyte import _native
from halfbyte.backends import cuda
from halfbyte.ops.packed import Memo, PackedWeight, Packing

BLOCKSIZE = 64
FEW_ROWS = 16
"""Up to so many rows the kernels for few rows are measured by themselves."""

SWEEP_ROWS = (1, 4, 16, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048)
SWEEP_SHAPES = (
    (4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (8192, 28672), (5120, 13824), (8192, 8192), (3072, 8192),
    (18944, 3584),
)  # fmt: skip

# Name of a row's field, heading of its column.
COLUMNS = {
    "floor": "floor",
    "halfbyte": "halfbyte",
    "nested": "nested",
    "bitsandbytes": "bitsandbytes",
    "humming": "humming",
    "cublas": "cuBLAS",
}
PEERS = {"bitsandbytes": "bnb", "humming": "humming", "cublas": "cuBLAS"}


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


class Contenders:
    """What multiplies with weights of one shape. One that fails says why, and is left out from then on."""

    def __init__(self, n: int, k: int, kernel: str, peers: list[str]) -> None:
        self.weight = weight = Weight(n, k, kernel)
        self.n, self.k, self.peers = n, k, peers
        self.made: dict[str, Callable[[torch.Tensor, torch.Tensor], list[Callable[[], object]]]] = {}
        for name in list(peers):
            self._tried(name, lambda name=name: self.made.update({name: getattr(self, f"_{name}")()}))
        self.made["halfbyte"] = lambda x, y: weight.calls(lambda i: weight.product(i, x, y, False))
        self.made["nested"] = lambda x, y: weight.calls(lambda i: weight.product(i, x, y, True))

    def _bitsandbytes(self) -> Callable[..., list[Callable[[], object]]]:
        from bitsandbytes import functional, matmul_4bit

        small = torch.randn(self.n, self.k, dtype=torch.bfloat16, device="cuda")
        state = functional.quantize_4bit(small, quant_type="nf4", blocksize=BLOCKSIZE)[1]
        packed = [codes.view(-1, 1) for codes in self.weight.packed]
        return lambda x, y: self.weight.calls(lambda i: matmul_4bit(x, packed[i].t(), state))

    def _humming(self) -> Callable[..., list[Callable[[], object]]]:
        return humming_calls(self.n, self.k, self.weight.count)

    def _cublas(self) -> Callable[..., list[Callable[[], object]]]:
        n, k = self.n, self.k
        dense = copies(rotation(n * k * 2), lambda: torch.randn(n, k, dtype=torch.bfloat16, device="cuda"))
        return lambda x, y: [functools.partial(torch.nn.functional.linear, x, w) for w in dense]

    def _tried(self, name: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:
            print(f"{name} at {self.n}x{self.k}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
            self.peers.remove(name)
            return None

    def measure(self, m: int) -> dict[str, float]:
        """Microseconds of all contenders, and what a call costs the host."""
        x = torch.randn(m, self.k, dtype=torch.bfloat16, device="cuda")
        y = torch.empty(m, self.n, dtype=torch.bfloat16, device="cuda")
        found = {name: graph_seconds(self.made[name](x, y)) for name in ("halfbyte", "nested")}
        for name in list(self.peers):
            seconds = self._tried(name, lambda name=name: graph_seconds(self.made[name](x, y)))
            if seconds is not None:
                found[name] = seconds
        found["host"] = host_seconds(self.made["halfbyte"](x, y))
        return {name: round(seconds * 1e6, 2) for name, seconds in found.items()}


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The table."""
    columns = {name: heading for name, heading in COLUMNS.items() if any(name in row for row in rows)}
    peers = {name: heading for name, heading in PEERS.items() if name in columns}

    def ratio(row: dict[str, Any], over: str, under: str) -> str:
        return f"{row.get(over, math.nan) / row[under]:.2f}"

    table = []
    for row in rows:
        ratios = [ratio(row, "halfbyte", "floor"), *(ratio(row, name, "halfbyte") for name in peers)]
        cells = [f"{row.get(name, math.nan):.1f}" for name in columns]
        table.append([f"{row['n']}x{row['k']} M={row['m']}", *cells, *ratios, f"{row['host']:.1f}"])
    print_table(["", *columns.values(), "of floor", *(f"{peer} / hb" for peer in peers.values()), "host"], table)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, and no peers")
    parser.add_argument("--sweep", action="store_true", help="13 numbers of rows of 8 shapes")
    parser.add_argument("--m", default="", help="rows of x, with commas (default: 1,2,4,8,12,16)")
    parser.add_argument("--shapes", default="", help="NxK,... instead of the usual ones")
    parser.add_argument("--no-peers", action="store_true", help="neither bitsandbytes nor humming nor cuBLAS")
    parser.add_argument(
        "--kernel",
        default="best",
        help="best, small_m_sm90, small_m_sm80, small_m_sm75, tile_sm90a, tile_sm80, tile_sm75 or simt",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows to a file, for benches/plot.py")
    arguments = parser.parse_args()
    line = device_line()
    print(line)
    print(f"NF4, blocks of {BLOCKSIZE}, bfloat16, microseconds\n", flush=True)
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",") if shape]
    shapes = shapes or list(SWEEP_SHAPES if arguments.sweep else SHAPES)
    if arguments.quick:
        shapes = shapes[1:2]
    counts = [int(m) for m in arguments.m.split(",") if m] or (SWEEP_ROWS if arguments.sweep else (1, 2, 4, 8, 12, 16))
    peers = [name for name in PEERS if name == "cublas" or importlib.util.find_spec(name) is not None]
    if arguments.quick or arguments.no_peers:
        peers = []
    about = {
        "command": " ".join(["python", "benches/cuda_linear.py", *sys.argv[1:]]),
        "device": line,
        "versions": versions_line("halfbyte", "torch", "bitsandbytes", "humming-kernels"),
        "date": date.today().isoformat(),
        "what": f"NF4, blocks of {BLOCKSIZE}, bfloat16, microseconds",
    }
    floor = Floor()
    rows: list[dict[str, Any]] = []
    for n, k in shapes:
        contenders = Contenders(n, k, arguments.kernel, peers)
        weight = contenders.weight
        least = graph_seconds(weight.calls(lambda i, w=weight: floor.read(w.memory[i])))
        with torch.no_grad():
            for m in counts:
                rows.append({"n": n, "k": k, "m": m, "floor": round(least * 1e6, 2), **contenders.measure(m)})
        if arguments.json:
            # After each shape: a run that is cut short leaves what it has measured.
            lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
            head = json.dumps(about, indent=2).removesuffix("\n}")
            arguments.json.write_text(f'{head},\n  "rows": [\n{lines}\n  ]\n}}\n')
        del weight, contenders
        gc.collect()
        torch.cuda.empty_cache()
    print_rows(rows)


if __name__ == "__main__":
    main()
