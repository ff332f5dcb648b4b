"""The experts of a Mixture-of-Experts layer on the CPU: one operation, layer by layer, and transformers in bfloat16.

    python benches/experts_cpu.py [--tokens 1 8 64] [--experts 128] [--hidden 2048] [--intermediate 768] [--top 8]
        [--threads 2] [--seconds 4] [--without-dense]

By default a layer of Qwen3-30B-A3B, in bfloat16, NF4 in blocks of 64 with scales quantized too. Each call routes its
tokens to other experts, at random, so that few of the weights that it reads are in a cache. Calls of the contenders
alternate, so that other load on the machine affects all of them; the best call of each counts.

"together" is `Experts4bit` as one operation, "one by one" the same module layer by layer, and "eager", "batched_mm" and
"grouped_mm" are transformers' ways with dense bfloat16 weights. "floor" is the time to read the packed bytes and scales
of the experts that were chosen, at the speed at which this run reads memory (the sum of a large array).

"check" is what one call takes to see that no layer has changed, in microseconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from _table import machine_line, print_table, versions_line
from halfbyte.functional import quantize_4bit
from halfbyte.nn import Expert, Experts4bit, Linear4bit, Params4bit

BLOCKSIZE = 64


def packed_layer(rows: int, columns: int) -> Linear4bit:
    """One matrix of random values, packed in memory of its own."""
    weight = torch.randn(64, columns, dtype=torch.bfloat16).repeat(-(-rows // 64), 1)[:rows] * 0.02
    packed, state = quantize_4bit(weight, blocksize=BLOCKSIZE, quant_type="nf4", compress_statistics=True)
    with torch.device("meta"):
        layer = Linear4bit(columns, rows, bias=False, quant_type="nf4")
    stats = state.as_dict(packed=True)
    layer.weight = Params4bit.from_prequantized(packed, stats, device="cpu", module=layer)
    return layer


def packed_experts(args: argparse.Namespace) -> Experts4bit:
    """The layer in 4 bits."""
    experts = []
    for _ in range(args.experts):
        expert = Expert()
        for name in ("gate_proj", "up_proj"):
            expert.add_module(name, packed_layer(args.intermediate, args.hidden))
        expert.add_module("down_proj", packed_layer(args.hidden, args.intermediate))
        experts.append(expert)
    module = Experts4bit(experts, ("gate_proj", "up_proj", "down_proj"))
    module.act_fn = torch.nn.SiLU()
    return module.eval()


def dense_experts(args: argparse.Namespace) -> Any:
    """The layer in bfloat16, as transformers has it."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=args.hidden, moe_intermediate_size=args.intermediate, num_experts=args.experts
    )  # fmt: skip
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module = module.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.data.fill_(0.01)
    return module.eval()


def read_speed() -> float:
    """Bytes a second of the sum of a large array."""
    array = torch.ones(2**26, dtype=torch.float32)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        array.sum()
        best = min(best, time.perf_counter() - start)
    return array.nbytes / best


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--top", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--without-dense", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(machine_line())
    print(versions_line("halfbyte", "torch", "transformers"), f"{args.threads} threads")
    module = packed_experts(args)
    matrix = args.hidden * args.intermediate
    per_expert = 3 * (matrix // 2 + matrix // BLOCKSIZE)
    ways: dict[str, Callable[..., Any]] = {"together": module, "one by one": module._one_by_one}
    if not args.without_dense:
        dense = dense_experts(args)

        def dense_way(name: str) -> Callable[..., Any]:
            def call(*inputs: Any) -> Any:
                dense.config._experts_implementation = name
                return dense(*inputs)

            return call

        ways |= {name: dense_way(name) for name in ("eager", "batched_mm", "grouped_mm")}
    rows = []
    for tokens in args.tokens:
        best = dict.fromkeys((*ways, "floor"), float("inf"))
        stop = time.perf_counter() + args.seconds * len(ways)
        while time.perf_counter() < stop:
            speed = read_speed()
            x = torch.randn(tokens, args.hidden).to(torch.bfloat16)
            ids = torch.rand(tokens, args.experts).topk(args.top).indices
            weights = torch.rand(tokens, args.top)
            chosen = len(ids.unique())
            best["floor"] = min(best["floor"], chosen * per_expert / speed)
            for name, way in ways.items():
                with torch.inference_mode():
                    start = time.perf_counter()
                    way(x, ids, weights)
                    best[name] = min(best[name], time.perf_counter() - start)
        times = [f"{best[name] * 1e3:.2f}" for name in best]
        rows.append([str(tokens), *times, f"{best['together'] / best['floor']:.2f}"])
    print_table(["tokens", *(f"{name} ms" for name in (*ways, "floor")), "together / floor"], rows)
    table = module._held.table
    assert table is not None
    check = min(_timed(table.holds) for _ in range(200))
    print(f"check: {check * 1e6:.1f} us")


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
