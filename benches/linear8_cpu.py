"""The 8-bit linear layer on the CPU: halfbyte, bitsandbytes, and a dense `nn.Linear`, in one run.

    python benches/linear8_cpu.py [--rows 1 16 128 512] [--threads 2] [--seconds 2] [--only products]

Products: `[rows, in] x [out, in]` for the two shapes of an 8-billion-parameter Llama that take most of its time, with
bfloat16 inputs: with threshold 0, and with threshold 6 where 1 % of the input's columns have outliers. "forward" runs in
inference mode, "backward" is the gradient to the input alone, after a forward pass that is not timed. The dense layers
are bfloat16 and float32, the latter with float32 inputs.

Every contender rotates through several layers of each shape, at least 256 MiB together, so that no weight is in a cache
when it is used. Calls of the contenders alternate, so that other load on the machine affects all of them. The best call
of each counts.

"floor" is the time to read the codes and scales at the speed at which this run reads memory (the sum of a large array);
"Gop/s" are the multiplications and additions of halfbyte's product. Ratios under 1 mean that halfbyte is faster.

Then the cost of a call: a module at 64x64, where the product itself takes next to nothing, beside the call of the
compiled core alone. `HALFBYTE_SIMD=avx2` measures those instructions where there are better ones.

Nothing is asserted here; results with their commands are in benches/RESULTS.md.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from _table import machine_line, print_table, versions_line
from linear_cpu import SHAPES, as_many, read_speed, take_turns, timed

CONTENDERS = ("halfbyte", "bitsandbytes", "bfloat16", "float32")
THRESHOLD = 6.0


def layers(contender: str, out_features: int, in_features: int) -> list[Any]:
    """The contender's layers."""
    import torch
    from halfbyte.ops.matmul_8bit import quantize_float

    weight = torch.randn(out_features, in_features) * 0.02
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(contender)
    if dtype is not None:

        def dense() -> torch.nn.Module:
            layer = torch.nn.Linear(in_features, out_features, bias=False, device="meta", dtype=dtype)
            layer.weight = torch.nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
            return layer.eval()

        return as_many(dense, weight.numel() * dtype.itemsize)

    codes, scales = quantize_float(weight)  # the same for both
    nn: Any
    if contender == "halfbyte":
        from halfbyte import nn
    else:
        from bitsandbytes import nn

    def quantized() -> torch.nn.Module:
        with torch.device("meta"):
            layer = nn.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False)
        own, statistics = codes.clone(), scales.clone()
        layer.weight = nn.Int8Params(own, requires_grad=False, has_fp16_weights=False, CB=own, SCB=statistics)
        result: torch.nn.Module = layer.eval()
        return result

    return as_many(quantized, codes.nbytes)


def inputs(rows: int, in_features: int, outliers: bool, contender: str) -> Any:
    """Inputs of the contender's dtype; of 100 columns one has outliers."""
    import torch

    x = torch.randn(rows, in_features).clamp_(-5, 5)
    if outliers:
        x[:, 7::100] = 20.0
    return x.to(torch.float32 if contender == "float32" else torch.bfloat16)


def forward(rotated: Sequence[Any], x: Any) -> Callable[[], float]:
    """One forward pass through the next layer."""
    import torch

    turn = itertools.cycle(rotated)

    def call() -> float:
        layer = next(turn)
        with torch.inference_mode():
            return timed(lambda: layer(x))

    return call


def backward(rotated: Sequence[Any], x: Any) -> Callable[[], float]:
    """One gradient to the input through the next layer."""
    import torch

    turn = itertools.cycle(rotated)
    x = x.requires_grad_()

    def call() -> float:
        y = next(turn)(x)
        grad = torch.ones_like(y)
        return timed(lambda: torch.autograd.grad(y, x, grad))

    return call


def products(rows: Sequence[int], seconds: float, kinds: Sequence[str], contenders: Sequence[str]) -> None:
    """Measure and print the table of the products."""
    measured: list[tuple[int, int, str, int, dict[str, float]]] = []
    bytes_a_second = 0.0
    for out_features, in_features in SHAPES:
        rotated = {name: layers(name, out_features, in_features) for name in contenders}
        for kind in kinds:
            bytes_a_second = max(bytes_a_second, read_speed())
            outliers, make = kind == "outliers", backward if kind == "backward" else forward
            for name in contenders:
                for layer in rotated[name] if name in ("halfbyte", "bitsandbytes") else ():
                    layer.state.threshold = THRESHOLD if outliers else 0.0
            for m in rows:
                work = {name: make(rotated[name], inputs(m, in_features, outliers, name)) for name in contenders}
                measured.append((out_features, in_features, kind, m, take_turns(work, seconds)))
                print(f"  {out_features}x{in_features} {kind}, {m} rows", file=sys.stderr, flush=True)
        del rotated
    table = []
    for out_features, in_features, kind, m, best in measured:
        ours = best["halfbyte"]
        floor = (out_features * in_features + 4 * out_features) / bytes_a_second
        cells = [f"{out_features}x{in_features} {kind}", str(m)]
        cells += [f"{1e3 * value:.3f}" for value in (*(best[name] for name in contenders), floor)]
        cells += [f"{ours / value:.2f}" for value in (*(best[name] for name in contenders[1:]), floor)]
        cells.append(f"{2e-9 * m * out_features * in_features / ours:.0f}")
        table.append(cells)
    print(f"memory read at {bytes_a_second / 1e9:.1f} GB/s; milliseconds, best of many\n")
    head = ["", "rows", *contenders, "floor", *(f"x {name}" for name in (*contenders[1:], "floor")), "Gop/s"]
    print_table(head, table)


def overhead() -> None:
    """Measure and print what a call costs where the work is nothing."""
    import torch
    from halfbyte import _native, nn
    from halfbyte.ops.matmul_8bit import quantize_float

    n, k, calls = 64, 64, 200
    codes, scales = quantize_float(torch.randn(n, k))
    x, out = torch.randn(1, k, dtype=torch.bfloat16), torch.empty(1, n, dtype=torch.bfloat16)
    layer = nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False)
    layer.weight = nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    layer.eval()
    plain = torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    threads = torch.get_num_threads()
    _native.set_threads(threads)
    core = _native.CpuLinear8bit("bfloat16", n, k).forward
    addresses = x.data_ptr(), codes.data_ptr(), scales.data_ptr()
    work: dict[str, Callable[[], object]] = {
        "Linear8bitLt, 1 row": lambda: layer(x),
        "core": lambda: core(1, *addresses, 0, 0.0, out.data_ptr(), threads),
        "nn.Linear, 1 row": lambda: plain(x),
    }

    def many(call: Callable[[], object]) -> Callable[[], float]:
        return lambda: timed(lambda: [call() for _ in range(calls)]) / calls

    with torch.inference_mode():
        best = take_turns({name: many(call) for name, call in work.items()}, 0.5)
    ours, core_alone = best["Linear8bitLt, 1 row"], best["core"]
    rows = [["Linear8bitLt, 1 row", f"{1e6 * ours:.1f}", f"{1e6 * core_alone:.1f}", f"{1e6 * (ours - core_alone):.1f}"]]
    rows.append(["nn.Linear, 1 row", f"{1e6 * best['nn.Linear, 1 row']:.1f}", "", ""])
    print_table(["64x64, microseconds", "through torch", "core alone", "difference"], rows)


def main() -> None:
    """Read the arguments, measure, print the tables."""
    kinds = ("forward", "outliers", "backward")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128, 512])
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--seconds", type=float, default=2.0, help="per cell and contender (default: 2)")
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=list(kinds))
    parser.add_argument("--without", nargs="+", choices=CONTENDERS[1:], default=[], help="contenders to leave out")
    parser.add_argument("--only", choices=("products", "overhead"))
    options = parser.parse_args()

    import torch
    from halfbyte import _native

    logging.disable(logging.WARNING)  # bitsandbytes says at each import what it lacks
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(20)
    print(machine_line())
    print(versions_line("halfbyte", "bitsandbytes", "torch"))
    print(f"{torch.get_num_threads()} threads; products of codes by {_native.int8_path()}", flush=True)
    if options.only in (None, "products"):
        contenders = [name for name in CONTENDERS if name not in options.without]
        products(options.rows, options.seconds, options.kinds, contenders)
    if options.only in (None, "overhead"):
        print()
        overhead()


if __name__ == "__main__":
    main()
