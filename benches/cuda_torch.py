"""Linear layers on a GPU as a model calls them: halfbyte's, bitsandbytes', and torch's dense one in bfloat16.

    python benches/cuda_torch.py [--shapes 14336x4096] [--m 1,16,64] [--backward] [--no-peers]

Layers are rotated through more memory than the second-level cache holds. "graph" is the GPU's time of one call inside
a replayed CUDA graph, "eager" the same launched one by one, "host" what a call costs the host, without waiting for the
GPU (of a layer so small that no queue of launches is ever full). NF4, blocks of 64, plain scales; forward without
gradients, or with --backward the gradient of the input alone.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from _cuda import SHAPES, device_line, eager_seconds, graph_seconds, host_seconds, rotation
from _table import print_table
from halfbyte.nn import LinearNF4

ROWS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def contenders(n: int, k: int, peer: object, count: int | None = None) -> dict[str, list[torch.nn.Module]]:
    """Layers by the names of their makers: `count`, or as many as are rotated."""
    dtype = torch.bfloat16

    def layers(make: Callable[[], torch.nn.Module], bytes_each: int) -> list[torch.nn.Module]:
        return [make().requires_grad_(False) for _ in range(count or rotation(bytes_each))]

    found = {
        "dense": layers(lambda: torch.nn.Linear(k, n, bias=False, dtype=dtype, device="cuda"), n * k * 2),
        "halfbyte": layers(
            lambda: LinearNF4(k, n, bias=False, compress_statistics=False).to(dtype).to("cuda"), n * k * 9 // 16
        ),
    }
    if peer is not None:
        make = lambda: peer.nn.LinearNF4(  # noqa: E731
            k, n, bias=False, compute_dtype=dtype, compress_statistics=False
        ).to(dtype)
        found["bitsandbytes"] = layers(lambda: make().to("cuda"), n * k * 9 // 16)
    return found


def calls(modules: list[torch.nn.Module], m: int, k: int, backward: bool) -> list[Callable[[], object]]:
    """One call for each layer."""
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda", requires_grad=backward)
    if not backward:
        return [functools.partial(module, x) for module in modules]
    grad = torch.randn(m, modules[0].out_features, dtype=torch.bfloat16, device="cuda")
    outputs = [module(x) for module in modules]
    return [functools.partial(torch.autograd.grad, y, x, grad, retain_graph=True) for y in outputs]


def import_peer() -> object:
    """bitsandbytes, or None."""
    try:
        import bitsandbytes as peer
    except ImportError:
        print("bitsandbytes is not installed")
        return None
    return peer


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="", help="NxK,... instead of the usual ones")
    parser.add_argument("--m", default=",".join(map(str, ROWS)), help="rows of x, with commas")
    parser.add_argument("--backward", action="store_true", help="time the gradient of the input")
    parser.add_argument("--no-peers", action="store_true", help="no bitsandbytes")
    arguments = parser.parse_args()
    print(device_line())
    peer = None if arguments.no_peers else import_peer()
    rows = [int(m) for m in arguments.m.split(",")]
    host(peer, rows, arguments.backward)
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",") if shape] or list(SHAPES)
    print(f"\n{'gradient of the input' if arguments.backward else 'forward'}, bfloat16, microseconds\n")
    # A backward pass runs on threads of its own, which no capture follows.
    clocks = {"eager": eager_seconds} if arguments.backward else {"graph": graph_seconds, "eager": eager_seconds}
    table = []
    with torch.set_grad_enabled(arguments.backward):
        for n, k in shapes:
            modules = contenders(n, k, peer)
            for m in rows:
                times = {}
                for name, each in modules.items():
                    work = calls(each, m, k, arguments.backward)
                    times[name] = [clock(work) for clock in clocks.values()]
                cells = [f"{seconds * 1e6:.1f}" for each in times.values() for seconds in each]
                ours = times["halfbyte"][0]
                ratios = [f"{times[name][0] / ours:.2f}" for name in times if name != "halfbyte"]
                table.append([f"{n}x{k} M={m}", *cells, *ratios])
            del modules
            torch.cuda.empty_cache()
    columns = [f"{name} {how}" for name in times for how in clocks]
    print_table(["", *columns, *(f"{name} / halfbyte" for name in times if name != "halfbyte")], table)


def host(peer: object, rows: list[int], backward: bool) -> None:
    """The host's time of a call."""
    modules = contenders(64, 64, peer, count=1)
    table = []
    with torch.set_grad_enabled(backward):
        for m in (m for m in rows if m <= 64):
            times = {name: host_seconds(calls(each, m, 64, backward)) for name, each in modules.items()}
            cells = [f"{seconds * 1e6:.1f}" for seconds in times.values()]
            table.append([f"M={m}", *cells, f"{times['halfbyte'] / times['dense']:.2f}"])
    print("\nhost, microseconds\n")
    print_table(["", *times, "halfbyte / dense"], table)


if __name__ == "__main__":
    main()
