"""A block of experts on a GPU: 4-bit weights by halfbyte, 16-bit ones by transformers' ways, and reading the weights.

    python benches/cuda_moe.py [--tokens 1,8,32] [--shape 128x2048x768] [--top-k 8] [--nested] [--no-peers] [--offload]

Experts are drawn anew for each call, and two layers taken in turn, so that no call finds its weights in the
second-level cache; each figure is one call inside a replayed CUDA graph, sorting and the weighted sum included. The
floor reads the codes and scales of the experts that a call's tokens have, once.

With `--offload` experts are in pinned host memory, all of them and half of them. The floor takes the bytes of the
experts that a call's tokens have over the bus, once, at the rate of a large copy from pinned memory. The peer is
accelerate's `cpu_offload` of transformers' experts in bfloat16, which moves all of them to the GPU for each call.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from _cuda import Floor, device_line, eager_seconds, graph_seconds
from _table import print_table
from halfbyte import _native
from halfbyte.backends.cuda_experts import tensor_maps
from halfbyte.nn import Expert, Experts4bit, Linear4bit

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
LAYERS = 2
ROUTINGS = 16
BLOCK = 64


class Layer:
    """Random codes and scales of all experts, and their table of addresses."""

    def __init__(self, experts: int, hidden: int, intermediate: int, *, nested: bool) -> None:
        blocks = hidden * intermediate // BLOCK
        shape = (3, experts)
        self.codes = torch.randint(0, 256, (*shape, blocks * BLOCK // 2), dtype=torch.uint8, device="cuda")
        parts = [self.codes]
        if nested:
            parts.append(torch.randint(0, 256, (*shape, blocks), dtype=torch.uint8, device="cuda"))
            parts.append(torch.rand((*shape, -(-blocks // 256)), device="cuda") * 0.01)
            parts.append(torch.rand((*shape, 1), device="cuda") * 0.02 + 0.02)
        else:
            parts.append(torch.rand((*shape, blocks), device="cuda") * 0.03 + 0.01)
        self.parts = parts
        rows = [
            [*(part[p, e].data_ptr() for part in parts), *[0] * (4 - len(parts))]
            for p in range(3)
            for e in range(experts)
        ]
        self.table = torch.tensor(rows, dtype=torch.int64, device="cuda")
        # None where the kernel for many tokens does not run.
        wide, tall = (intermediate, hidden), (hidden, intermediate)
        codes, scales = ([[part[p, e].data_ptr() for e in range(experts)] for p in range(3)] for part in parts[:2])
        self.maps = tensor_maps(torch.cuda.current_device(), codes, None if nested else scales, (wide, wide, tall))

    @property
    def bytes_of_expert(self) -> int:
        """Codes and scales."""
        return sum(part[:, 0].numel() * part.element_size() for part in self.parts)


class Block:
    """Calls of the kernels for so many tokens."""

    def __init__(self, native: _native.CudaExperts, tokens: int, top_k: int, experts: int, hidden: int) -> None:
        self.native, self.tokens, self.top_k = native, tokens, top_k
        self.x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device="cuda")
        self.y = torch.empty_like(self.x)
        self.weights = torch.rand(tokens, top_k, device="cuda")
        self.workspace = torch.empty(native.workspace(tokens, top_k), dtype=torch.uint8, device="cuda")
        draw = functools.partial(torch.rand, tokens, experts, device="cuda")
        self.ids = [draw().argsort(-1)[:, :top_k].contiguous() for _ in range(ROUTINGS)]

    def ours(self, layer: Layer, ids: torch.Tensor) -> str:
        """One call."""
        maps = 0 if layer.maps is None else layer.maps.data_ptr()
        return self.native.launch(
            torch.cuda.current_stream().cuda_stream, self.tokens, self.top_k, self.x.data_ptr(), ids.data_ptr(),
            self.weights.data_ptr(), "float32", layer.table.data_ptr(), maps, 0, 0, "silu",
            self.workspace.data_ptr(), self.y.data_ptr(),
        )  # fmt: skip


def dense_calls(way: str, block: Block, experts: int, hidden: int, intermediate: int) -> list[Callable[[], object]]:
    """The same with 16-bit weights, by one of transformers' ways."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=experts, num_experts_per_tok=block.top_k
    )
    config._experts_implementation = way
    made = []
    for _ in range(LAYERS):
        with torch.device("cuda"):
            layer = Qwen3MoeExperts(config).to(torch.bfloat16).requires_grad_(False)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        made.append(layer)
    weights = block.weights.bfloat16()
    return [functools.partial(made[i % LAYERS], block.x, ids, weights) for i, ids in enumerate(block.ids)]


def dense_seconds(way: str, block: Block, experts: int, hidden: int, intermediate: int) -> float:
    """NaN where there is no memory, or a way does not capture."""
    try:
        return graph_seconds(dense_calls(way, block, experts, hidden, intermediate), replays=3)
    except (ImportError, RuntimeError) as error:
        print(f"{way}: {str(error).splitlines()[0]}")
        return float("nan")
    finally:
        torch.cuda.empty_cache()


def offloaded_layer(experts: int, hidden: int, intermediate: int, *, nested: bool, resident: range) -> Experts4bit:
    """A layer whose experts are in host memory, but for some."""
    made = []
    for _ in range(experts):
        expert = Expert()
        for name in PROJECTIONS:
            columns, rows = (intermediate, hidden) if name == "down_proj" else (hidden, intermediate)
            linear = Linear4bit(columns, rows, bias=False, quant_type="nf4", compress_statistics=nested, device="cuda")
            torch.nn.init.normal_(linear.weight.data, std=0.02)
            expert.add_module(name, linear.to("cuda"))
        made.append(expert)
    layer = Experts4bit(made, PROJECTIONS)
    layer.act_fn = torch.nn.SiLU()
    return layer.requires_grad_(False).offload("cuda", resident=resident)


def bytes_a_second() -> float:
    """The rate of a large copy from pinned memory of the host."""
    source = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    return source.numel() / eager_seconds([lambda: target.copy_(source, non_blocking=True)], count=8)


def accelerate_seconds(block: Block, experts: int, hidden: int, intermediate: int) -> float:
    """16-bit experts that accelerate moves to the GPU for each call."""
    from accelerate import cpu_offload
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=experts, num_experts_per_tok=block.top_k
    )
    config._experts_implementation = "eager"
    layer = Qwen3MoeExperts(config).to(torch.bfloat16).requires_grad_(False)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    layer = cpu_offload(layer, execution_device=torch.device("cuda", torch.cuda.current_device()))
    weights = block.weights.bfloat16()
    calls = [functools.partial(layer, block.x, ids, weights) for ids in block.ids]
    return eager_seconds(calls, count=2, repeats=3)


def offload_table(arguments: argparse.Namespace) -> None:
    """Experts in host memory."""
    experts, hidden, intermediate = map(int, arguments.shape.split("x"))
    native = _native.CudaExperts(
        torch.cuda.current_device(), "bfloat16", experts, hidden, intermediate, True, "nf4", BLOCK, arguments.nested
    )
    rate = bytes_a_second()
    print(f"a copy from pinned memory: {rate / 1e9:.1f} GB/s\n")
    shape = {"nested": arguments.nested}
    columns: dict[str, list[Experts4bit]] = {}
    for title, resident in (("halfbyte", range(0)), ("half resident", range(experts // 2))):
        columns[title] = [
            offloaded_layer(experts, hidden, intermediate, resident=resident, **shape) for _ in range(LAYERS)
        ]
    size = Layer(1, hidden, intermediate, nested=arguments.nested).bytes_of_expert
    rows = []
    for tokens in map(int, arguments.tokens.split(",")):
        block = Block(native, tokens, arguments.top_k, experts, hidden)
        active = sum(len(ids.unique()) for ids in block.ids) / len(block.ids)
        row = [str(tokens), f"{active:.0f}", f"{active * size / rate * 1e6:.0f}"]
        for layers in columns.values():
            calls = [
                functools.partial(layers[i % LAYERS], block.x, ids, block.weights) for i, ids in enumerate(block.ids)
            ]
            for call in calls[:LAYERS]:
                call()
            row.append(f"{graph_seconds(calls, replays=3) * 1e6:.0f}")
        if not arguments.no_peers:
            row.append(f"{accelerate_seconds(block, experts, hidden, intermediate) * 1e6:.0f}")
        rows.append(row)
    print_table(["tokens", "experts", "floor", *columns, *([] if arguments.no_peers else ["bf16 cpu_offload"])], rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,8,32,256,2048", help="with commas")
    parser.add_argument("--shape", default="128x2048x768", help="experts x hidden x intermediate")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--nested", action="store_true", help="scales that are quantized themselves")
    parser.add_argument("--no-peers", action="store_true", help="without 16-bit weights")
    parser.add_argument("--offload", action="store_true", help="experts in pinned host memory")
    arguments = parser.parse_args()
    experts, hidden, intermediate = map(int, arguments.shape.split("x"))
    print(device_line())
    kind = "nested" if arguments.nested else "plain"
    print(f"{arguments.shape}, {arguments.top_k} of them for each token, {kind} NF4, microseconds\n")
    if arguments.offload:
        offload_table(arguments)
        return
    native = _native.CudaExperts(
        torch.cuda.current_device(), "bfloat16", experts, hidden, intermediate, True, "nf4", BLOCK, arguments.nested
    )
    layers = [Layer(experts, hidden, intermediate, nested=arguments.nested) for _ in range(LAYERS)]
    floor, rows = Floor(), []
    for tokens in map(int, arguments.tokens.split(",")):
        block = Block(native, tokens, arguments.top_k, experts, hidden)
        calls = [functools.partial(block.ours, layers[i % LAYERS], ids) for i, ids in enumerate(block.ids)]
        ours = graph_seconds(calls)
        active = sum(len(ids.unique()) for ids in block.ids) / len(block.ids)
        size = round(active * layers[0].bytes_of_expert) // 4096 * 4096
        read = [torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda") for _ in range(-(-(2**28) // size))]
        least = graph_seconds([functools.partial(floor.read, part) for part in read])
        del read
        row = [str(tokens), f"{active:.0f}", f"{least * 1e6:.1f}", f"{ours * 1e6:.1f}"]
        for way in () if arguments.no_peers else ("batched_mm", "grouped_mm"):
            # A copy of every chosen expert's weights for each token.
            if way == "batched_mm" and tokens * arguments.top_k > 1024:
                row.append("")
                continue
            row.append(f"{dense_seconds(way, block, experts, hidden, intermediate) * 1e6:.0f}")
        rows.append(row)
    peers = [] if arguments.no_peers else ["bf16 batched_mm", "bf16 grouped_mm"]
    print_table(["tokens", "experts", "floor", "halfbyte", *peers], rows)


if __name__ == "__main__":
    main()
