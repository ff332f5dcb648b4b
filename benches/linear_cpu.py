"""The 4-bit linear layer on the CPU: halfbyte, bitsandbytes, and a dense bfloat16 `nn.Linear`, in one run.

    python benches/linear_cpu.py [--rows 1 4 16 128 512] [--threads 2] [--seconds 2] [--single-scales]

Products: `[rows, in] x [out, in]` for the two shapes of an 8-billion-parameter Llama that take most of its time, in
bfloat16, NF4 in blocks of 64 with scales quantized too (or float32 with --single-scales). "forward" runs in inference
mode, "backward" is the gradient to the input alone, after a forward pass that is not timed.

Every contender rotates through several layers of each shape, at least 256 MiB together, so that no weight is in a cache
when it is used. Calls of the contenders alternate, so that other load on the machine affects all of them. The best call
of each counts.

"floor" is the larger of two times: reading the packed bytes and scales at the speed at which this run reads memory (the
sum of a large array), and the arithmetic at the best speed that this run sees torch's own bfloat16 product reach (2048
cubed, in cache). Ratios under 1 mean that halfbyte is faster.

Then the cost of a call: modules and functions at 64x64, where the product itself takes next to nothing, beside the call
of the compiled core alone; and quantize_4bit and dequantize_4bit through torch beside the core on buffers that are
there already.

Nothing is asserted here; results with their commands are in benches/RESULTS.md.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from _table import machine_line, print_table, versions_line

SHAPES = ((4096, 4096), (14336, 4096))
BLOCKSIZE = 64
ROTATED_BYTES = 256 * 2**20
CONTENDERS = ("halfbyte", "bitsandbytes", "dense")


def as_many(make: Callable[[], Any], size: int) -> list[Any]:
    """As many layers of this size as no cache holds."""
    return [make() for _ in range(max(2, -(-ROTATED_BYTES // size)))]


def layers(contender: str, out_features: int, in_features: int, nested: bool) -> tuple[list[Any], int]:
    """The contender's layers, and the bytes that one of them reads."""
    import torch
    from halfbyte.functional import quantize_4bit

    weight = torch.randn(out_features, in_features, dtype=torch.bfloat16) * 0.02
    if contender == "dense":

        def dense() -> torch.nn.Module:
            layer = torch.nn.Linear(in_features, out_features, bias=False, device="meta", dtype=torch.bfloat16)
            layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
            return layer.eval()

        return as_many(dense, weight.nbytes), weight.nbytes

    # The bytes are the same for both: bitsandbytes itself would take seconds for each.
    packed, state = quantize_4bit(weight, blocksize=BLOCKSIZE, quant_type="nf4", compress_statistics=nested)
    size = packed.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if state.state2 is not None else 0)
    nn: Any
    if contender == "halfbyte":
        from halfbyte import nn
    else:
        from bitsandbytes import nn

    def quantized() -> torch.nn.Module:
        with torch.device("meta"):
            layer = nn.Linear4bit(in_features, out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        stats = {key: value.clone() for key, value in state.as_dict(packed=True).items()}
        layer.weight = nn.Params4bit.from_prequantized(packed.clone(), stats, device="cpu", module=layer)
        result: torch.nn.Module = layer.eval()
        return result

    return as_many(quantized, size), size


def take_turns(work: dict[str, Callable[[], float]], seconds: float) -> dict[str, float]:
    """The best of the seconds that each call returns, after one that does not count.

    One call of each in turn, at least three, and until `seconds` have passed for each on average.
    """
    best = dict.fromkeys(work, float("inf"))
    for call in work.values():
        call()
    begin = time.perf_counter()
    for turn in itertools.count(1):
        for name, call in work.items():
            best[name] = min(best[name], call())
        if turn >= 3 and time.perf_counter() - begin >= seconds * len(work):
            return best
    raise AssertionError


def timed(work: Callable[[], object]) -> float:
    """The seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def forward(rotated: Sequence[Any], rows: int, in_features: int) -> Callable[[], float]:
    """One forward pass through the next layer."""
    import torch

    turn = itertools.cycle(rotated)
    x = torch.randn(rows, in_features, dtype=torch.bfloat16)

    def call() -> float:
        layer = next(turn)
        with torch.inference_mode():
            return timed(lambda: layer(x))

    return call


def backward(rotated: Sequence[Any], rows: int, in_features: int) -> Callable[[], float]:
    """One gradient to the input through the next layer."""
    import torch

    turn = itertools.cycle(rotated)
    x = torch.randn(rows, in_features, dtype=torch.bfloat16, requires_grad=True)

    def call() -> float:
        y = next(turn)(x)
        grad = torch.ones_like(y)
        return timed(lambda: torch.autograd.grad(y, x, grad))

    return call


def read_speed() -> float:
    """Bytes a second that torch reads from memory with all of its threads."""
    import torch

    array = torch.ones(2**27, dtype=torch.float32)
    return array.nbytes / min(timed(array.sum) for _ in range(10))


def product_speed() -> float:
    """Operations a second of torch's bfloat16 product, from cache."""
    import torch

    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in "ab")
    return 2 * 2048**3 / min(timed(lambda: a @ b) for _ in range(10))


def products(rows: Sequence[int], nested: bool, seconds: float) -> None:
    """Measure and print the table of the products."""
    measured: list[tuple[int, int, str, int, int, dict[str, float]]] = []
    bytes_a_second = operations_a_second = 0.0
    for out_features, in_features in SHAPES:
        for direction, make in (("forward", forward), ("backward", backward)):
            # Several times, as the machine may be busy with something else at any one of them.
            bytes_a_second = max(bytes_a_second, read_speed())
            operations_a_second = max(operations_a_second, product_speed())
            # Anew for each direction: an eval forward leaves bitsandbytes' weights in another order.
            rotated = {name: layers(name, out_features, in_features, nested) for name in CONTENDERS}
            # Each layer's first call does not count: bitsandbytes repacks its weight then, which takes long.
            for contender, _ in rotated.values():
                call = make(contender, 1, in_features)
                for _ in contender:
                    call()
            for m in rows:
                best = take_turns({name: make(rotated[name][0], m, in_features) for name in CONTENDERS}, seconds)
                measured.append((out_features, in_features, direction, m, rotated["halfbyte"][1], best))
                print(f"  {out_features}x{in_features} {direction}, {m} rows", file=sys.stderr, flush=True)
            del rotated
    table = []
    for out_features, in_features, direction, m, size, best in measured:
        ours = best["halfbyte"]
        floor = max(size / bytes_a_second, 2 * m * out_features * in_features / operations_a_second)
        cells = [f"{out_features}x{in_features} {direction}", str(m)]
        cells += [f"{1e3 * value:.3f}" for value in (*(best[name] for name in CONTENDERS), floor)]
        cells += [f"{ours / value:.2f}" for value in (best["dense"], best["bitsandbytes"], floor)]
        table.append(cells)
    speeds = f"{bytes_a_second / 1e9:.1f} GB/s, bfloat16 products at {operations_a_second / 1e9:.0f} GFLOP/s"
    print(f"memory read at {speeds}; milliseconds, best of many\n")
    print_table(["", "rows", *CONTENDERS, "floor", "x dense", "x bitsandbytes", "x floor"], table)


def overhead() -> None:
    """Measure and print what a call costs where the work is nothing."""
    import torch
    from halfbyte import _native, functional, nn

    n, k, calls = 64, 64, 200
    weight = torch.randn(n, k, dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    x = torch.randn(1, k, dtype=torch.bfloat16)
    codes, scales = torch.empty(n * k // 2, 1, dtype=torch.uint8), torch.empty(n * k // BLOCKSIZE)
    dense, out = torch.empty(n, k, dtype=torch.bfloat16), torch.empty(1, n, dtype=torch.bfloat16)

    def raw(tensor: torch.Tensor, dtype: str = "bfloat16") -> tuple[int, int, str]:
        return tensor.data_ptr(), tensor.numel(), dtype

    weight_, x_, dense_, out_ = raw(weight), raw(x), raw(dense), raw(out)
    packed_, absmax_ = raw(packed, "uint8"), raw(state.absmax, "float32")
    codes_, scales_ = raw(codes, "uint8"), raw(scales, "float32")
    layer = nn.Linear4bit(k, n, bias=False, quant_type="nf4", compress_statistics=False)
    layer.weight = nn.Params4bit(packed, quant_state=state, quant_type="nf4", bnb_quantized=True)
    plain = torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    threads = torch.get_num_threads()
    _native.set_threads(threads)
    core = _native.CpuLinear("bfloat16", n, k, "nf4", BLOCKSIZE, False).forward
    work: dict[str, Callable[[], object]] = {
        "Linear4bit, 1 row": lambda: layer(x),
        "core: linear_4bit": lambda: core(1, x_[0], packed_[0], absmax_[0], 0, 0, 0, out_[0], threads),
        "nn.Linear, 1 row": lambda: plain(x),
        "quantize_4bit": lambda: functional.quantize_4bit(weight, quant_type="nf4"),
        "core: quantize_4bit": lambda: _native.quantize_4bit(weight_, codes_, scales_, "nf4", BLOCKSIZE),
        "dequantize_4bit": lambda: functional.dequantize_4bit(packed, state),
        "core: dequantize_4bit": lambda: _native.dequantize_4bit(packed_, absmax_, dense_, "nf4", BLOCKSIZE),
    }

    def many(call: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - start) / calls

        return run

    with torch.inference_mode():
        best = take_turns({name: many(call) for name, call in work.items()}, 0.5)
    rows = []
    for name in ("Linear4bit, 1 row", "quantize_4bit", "dequantize_4bit"):
        core = best["core: linear_4bit" if name.startswith("Linear") else f"core: {name}"]
        rows.append([name, f"{1e6 * best[name]:.1f}", f"{1e6 * core:.1f}", f"{1e6 * (best[name] - core):.1f}"])
    rows.append(["nn.Linear, 1 row", f"{1e6 * best['nn.Linear, 1 row']:.1f}", "", ""])
    print_table(["64x64, microseconds", "through torch", "core alone", "difference"], rows)


def throughput() -> None:
    """Measure and print quantizing and dequantizing through torch beside the core."""
    import torch
    from halfbyte import _native, functional

    x = torch.randn(64 * 2**20).mul_(0.02).to(torch.bfloat16)
    packed, state = functional.quantize_4bit(x, quant_type="nf4")
    out, codes, scales = torch.empty_like(x), torch.empty_like(packed), torch.empty_like(state.absmax)
    x_, out_ = ((t.data_ptr(), t.numel(), "bfloat16") for t in (x, out))
    packed_, codes_ = ((t.data_ptr(), t.numel(), "uint8") for t in (packed, codes))
    absmax_, scales_ = ((t.data_ptr(), t.numel(), "float32") for t in (state.absmax, scales))
    _native.set_threads(torch.get_num_threads())

    def core_into_new_memory() -> None:
        new = torch.empty_like(x)
        _native.dequantize_4bit(packed_, absmax_, (new.data_ptr(), new.numel(), "bfloat16"), "nf4", BLOCKSIZE)

    work: dict[str, Callable[[], object]] = {
        "quantize": lambda: functional.quantize_4bit(x, quant_type="nf4"),
        "quantize, out given": lambda: functional.quantize_4bit(x, out=codes, absmax=scales, quant_type="nf4"),
        "quantize core": lambda: _native.quantize_4bit(x_, codes_, scales_, "nf4", BLOCKSIZE),
        "dequantize": lambda: functional.dequantize_4bit(packed, state),
        "dequantize, out given": lambda: functional.dequantize_4bit(packed, state, out=out),
        # What the core, and any operation of torch, pays for memory that the process has not had before.
        "the core into new memory, for comparison": core_into_new_memory,
        "x.clone(), for comparison": x.clone,
        "dequantize core": lambda: _native.dequantize_4bit(packed_, absmax_, out_, "nf4", BLOCKSIZE),
    }
    best = take_turns({name: lambda call=call: timed(call) for name, call in work.items()}, 1.5)  # type: ignore[misc]
    rows = []
    for name in work:
        if not name.endswith("core"):
            speed = f"{x.nbytes / 1e9 / best[name]:.2f}"
            core = best.get(f"{name.partition(',')[0]} core")
            beside = ["", ""] if core is None else [f"{x.nbytes / 1e9 / core:.2f}", f"{core / best[name]:.0%}"]
            rows.append([name, speed, *beside])
    print_table([f"{x.nbytes / 1e6:.0f} MB of bfloat16, GB/s", "through torch", "core alone", "share"], rows)


def main() -> None:
    """Read the arguments, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 128, 512])
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--seconds", type=float, default=2.0, help="per cell and contender (default: 2)")
    parser.add_argument("--single-scales", action="store_true", help="float32 scales, not quantized themselves")
    parser.add_argument("--only", choices=("products", "overhead", "throughput"))
    options = parser.parse_args()

    import torch

    logging.disable(logging.WARNING)  # bitsandbytes says at each import what it lacks
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(20)
    print(machine_line())
    print(versions_line("halfbyte", "bitsandbytes", "torch"))
    print(f"{torch.get_num_threads()} threads", flush=True)
    if options.only in (None, "products"):
        products(options.rows, not options.single_scales, options.seconds)
    for name, part in (("overhead", overhead), ("throughput", throughput)):
        if options.only in (None, name):
            print()
            part()


if __name__ == "__main__":
    main()
