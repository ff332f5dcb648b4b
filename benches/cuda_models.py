"""Whole models: prefill, and tokens a second, of bfloat16, bitsandbytes and halfbyte in one run.

    python benches/cuda_models.py                      the geometry of Llama-3.2-3B on a GPU
    python benches/cuda_models.py --layers 4 --compile     shorter, and torch.compile too
    python benches/cuda_models.py --device cpu --geometry small --prefill 1x16 --batches 1,2 --context 8 --tokens 4

All contenders have the same random weights, made on the device: those of bfloat16 are quantized by each library, NF4 in
blocks of 64, and 4-bit layers have the forward of their library. They take turns in one process, and only one of them
is in memory. The output layer stays in 16 bits; it is the embedding too.

Prefill is one forward pass over a prompt that fills a new cache, the logits of its last token included. A step of
decoding takes the token of before and gives the one that follows, with a static cache in which --context tokens lie.
Both are measured launched one by one ("eager"), replayed as a CUDA graph ("graph"), and with --compile a graph of what
torch.compile makes. Where a contender cannot be captured it says why, and has no figure. The first token of a graph
must be that of the eager step. Times are the median of --repeats; memory is what torch allocated at most, weights
included.

The floor of a step is the time to move the bytes of the weights that it reads at the rate of a large copy; that of a
prefill the time of 2 x weights x tokens operations at the rate that cuBLAS reached for a large product in this run,
or that of moving the weights where it is longer.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _generated import Geometry, geometry
from _table import MIB, machine_line, print_table, versions_line

CONTENDERS = ("bf16", "bitsandbytes", "halfbyte")
BLOCKSIZE = 64


@dataclass(frozen=True)
class Clock:
    """Times of work on a device."""

    gpu: bool
    repeats: int

    def seconds(self, work: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
        """The median of some calls of `work`, each after one of `before` that is not timed."""
        before()
        work()
        times = []
        for _ in range(self.repeats):
            before()
            if not self.gpu:
                start = time.perf_counter()
                work()
                times.append(time.perf_counter() - start)
                continue
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)


# ---- models ----------------------------------------------------------------------------------------------------------


def dense_model(shape: Geometry, device: str) -> Any:
    """The model in bfloat16 with random weights, the same each time."""
    import transformers

    config = transformers.LlamaConfig(**{k: v for k, v in shape.config().items() if k not in ("architectures",)})
    torch.manual_seed(20)
    with torch.device(device):
        model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    # Buffers that were made elsewhere too: a graph cannot copy from the CPU.
    return model.to(device).eval().requires_grad_(False)


def with_bitsandbytes(model: Any, nested: bool) -> Any:
    """The linear layers but the last replaced by those of bitsandbytes."""
    import bitsandbytes

    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not torch.nn.Linear:
                continue
            with torch.device("meta"):
                layer = bitsandbytes.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
            # They are quantized when they are moved to a device, also to the one where they are.
            weight = child.weight
            how = {"quant_type": "nf4", "blocksize": BLOCKSIZE, "compress_statistics": nested}
            layer.weight = bitsandbytes.nn.Params4bit(weight.data, requires_grad=False, module=layer, **how)
            layer.weight = layer.weight.to(weight.device)
            setattr(parent, name, layer)
    return model


def with_halfbyte(model: Any, nested: bool) -> Any:
    """The linear layers but the last replaced by those of halfbyte."""
    import halfbyte

    config = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    return halfbyte.quantize_model(model, config, blocksize=BLOCKSIZE, progress=False)


def model_of(contender: str, shape: Geometry, options: argparse.Namespace) -> Any:
    """The model of a contender, whose 4-bit layers are its own."""
    model = dense_model(shape, options.device)
    if contender == "bitsandbytes":
        model = with_bitsandbytes(model, options.nested)
    elif contender == "halfbyte":
        model = with_halfbyte(model, options.nested)
    owners = [
        type(module).__module__.partition(".")[0] for module in model.modules() if type(module).__name__ == "Linear4bit"
    ]
    expected = [] if contender == "bf16" else [contender] * (7 * shape.layers)
    if owners != expected:
        raise RuntimeError(f"expected {len(expected)} 4-bit layers of {contender}, got {owners}")
    return model


def weight_bytes(model: Any) -> int:
    """Bytes that a step of one token reads: all parameters once (the embedding as output layer), and their scales."""
    total = 0
    for parameter in {id(parameter): parameter for parameter in model.parameters()}.values():
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            total += state.absmax.numel() * state.absmax.element_size()
            state = getattr(state, "state2", None)
    return total


# ---- what is measured ------------------------------------------------------------------------------------------------


class Decoding:
    """Steps of one token behind a prompt, with a static cache; all that changes is in tensors on the device."""

    def __init__(self, model: Any, batch: int, context: int, steps: int, forward: Any = None) -> None:
        from transformers import StaticCache

        self.forward = forward or model
        device = model.device
        self.cache = StaticCache(config=model.config, max_cache_len=context + steps)
        generator = torch.Generator().manual_seed(batch)
        prompt = torch.randint(model.config.vocab_size, (batch, context), generator=generator).to(device)
        logits = model(input_ids=prompt, past_key_values=self.cache, logits_to_keep=1).logits
        self.first = logits.argmax(-1)
        self.tokens = self.first.clone()
        self.counts = [layer.cumulative_length for layer in self.cache.layers]
        self.context = context

    def rewind(self) -> None:
        """Back to the end of the prompt."""
        self.tokens.copy_(self.first)
        for count in self.counts:
            count.fill_(self.context)

    def step(self) -> None:
        """The next token in place of the one of before."""
        logits = self.forward(input_ids=self.tokens, past_key_values=self.cache, logits_to_keep=1).logits
        self.tokens.copy_(logits.argmax(-1))

    def text(self, step: Callable[[], object], steps: int) -> list[list[int]]:
        """The tokens of some steps."""
        self.rewind()
        found = []
        for _ in range(steps):
            step()
            found.append(self.tokens.flatten().tolist())
        return found


def captured(work: Callable[[], object]) -> Callable[[], object]:
    """The work as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def tried(what: str, work: Callable[[], float]) -> float:
    """NaN where it fails, after saying why."""
    try:
        return work()
    except Exception as error:
        print(f"{what}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}", flush=True)
        return math.nan


class Measurement:
    """All figures of one contender: seconds by (case, how), and bytes of memory by case."""

    def __init__(self, contender: str, model: Any, options: argparse.Namespace) -> None:
        self.contender, self.model, self.options = contender, model, options
        self.clock = Clock(options.device != "cpu", options.repeats)
        self.ways = ["eager", *(["graph"] if self.clock.gpu else []), *(["compiled"] if options.compile else [])]
        self.seconds: dict[tuple[str, str], float] = {}
        self.peak: dict[str, int] = {}

    def _peak(self, case: str, work: Callable[[], object]) -> None:
        """Memory of the case, as it is without a graph."""
        if self.clock.gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            work()
            self.peak[case] = torch.cuda.max_memory_allocated()

    def _compiled(self) -> Any:
        torch._dynamo.reset()
        return torch.compile(self.model, fullgraph=True, dynamic=False)

    def _compare(self, name: str, replayed: list[list[int]], eager: list[list[int]]) -> None:
        """The same tokens; a tie of two logits may be broken otherwise later on, but not at once."""
        same = next((i for i, (a, b) in enumerate(zip(replayed, eager, strict=True)) if a != b), len(eager))
        if same == 0:
            raise RuntimeError("the first token of the graph is not that of the eager step")
        if same < len(eager):
            print(f"{self.contender}, {name}: graph and eager steps give the same {same} tokens, then others")

    def prefill(self, case: str) -> None:
        """A prompt."""
        batch, length = map(int, case.split("x"))
        generator = torch.Generator().manual_seed(20)
        tokens = torch.randint(self.model.config.vocab_size, (batch, length), generator=generator)
        tokens = tokens.to(self.model.device)

        def work(forward: Any = self.model) -> Any:
            return forward(input_ids=tokens, use_cache=True, logits_to_keep=1).logits

        logits = work()
        if not bool(logits.isfinite().all()):
            raise SystemExit(f"logits of {self.contender} must be finite")
        self.logits = logits.float().cpu()
        del logits
        name = f"prefill {case}"
        self._peak(name, work)
        for way in self.ways:

            def timed(way: str = way) -> float:
                call = work
                if way == "compiled":
                    compiled = self._compiled()
                    call = lambda: work(compiled)  # noqa: E731
                    call()
                if way != "eager" and self.clock.gpu:
                    call = captured(call)
                return self.clock.seconds(call)

            self.seconds[name, way] = tried(f"{self.contender}, {name}, {way}", timed)

    def decode(self, batch: int) -> None:
        """Steps of one token."""
        name, steps = f"decode {batch}", self.options.tokens
        # Two steps more for the warming up of a graph.
        decoding = Decoding(self.model, batch, self.options.context, steps + 2)
        eager = decoding.text(decoding.step, steps)
        self._peak(name, decoding.step)
        for way in self.ways:

            def timed(way: str = way) -> float:
                step = decoding.step
                if way == "compiled":
                    decoding.forward = self._compiled()
                    decoding.rewind()
                    step()
                if way != "eager" and self.clock.gpu:
                    decoding.rewind()
                    step = captured(step)
                    if way == "graph":
                        self._compare(name, decoding.text(step, steps), eager)

                def work() -> None:
                    for _ in range(steps):
                        step()

                return self.clock.seconds(work, decoding.rewind) / steps

            self.seconds[name, way] = tried(f"{self.contender}, {name}, {way}", timed)
            decoding.forward = self.model


@dataclass(frozen=True)
class Rates:
    """What the device reached in this run."""

    copied: float
    multiplied: float


def measure_rates(clock: Clock, size: int, device: str) -> Rates:
    """Bytes a second of a large copy, read and written; operations a second of a large product in bfloat16."""
    source = torch.empty(size**2 * 16 if clock.gpu else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / clock.seconds(lambda: target.copy_(source))
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return Rates(copied, 2 * size**3 / clock.seconds(lambda: torch.mm(a, b)))


# ---- tables ----------------------------------------------------------------------------------------------------------


def floor_seconds(case: str, rates: Rates, weights: int, read: int) -> float:
    """The least that a case can take with so many weights in layers, and so many bytes of weights."""
    kind, size = case.split()
    moved = read / rates.copied
    if kind == "decode":
        return moved
    batch, length = map(int, size.split("x"))
    return max(moved, 2 * weights * batch * length / rates.multiplied)


def print_results(found: dict[str, Measurement], read: dict[str, int], rates: Rates, shape: Geometry) -> None:
    """Milliseconds, tokens a second, ratios, memory."""
    first = next(iter(found.values()))
    inside = shape.weights() - shape.vocabulary * shape.hidden
    ours = "halfbyte" if "halfbyte" in found else list(found)[-1]
    others = [name for name in found if name != ours]
    cases = list(dict.fromkeys(case for case, _ in first.seconds))
    for kind, unit in (("prefill", "milliseconds"), ("decode", "milliseconds a step")):
        rows = []
        for case in (case for case in cases if case.startswith(kind)):
            floors = {name: floor_seconds(case, rates, inside, read[name]) for name in found}
            for way in first.ways:
                times = {name: one.seconds[case, way] for name, one in found.items()}
                row = [f"{case}, {way}", *(f"{1e3 * seconds:.2f}" for seconds in times.values())]
                row += [f"{times[name] / times[ours]:.2f}" for name in others]
                row += [f"{1e3 * floors[ours]:.2f}", f"{times[ours] / floors[ours]:.2f}"]
                if kind == "decode":
                    row += [f"{int(case.split()[1]) / seconds:.0f}" for seconds in times.values()]
                rows.append(row)
        header = ["", *found, *(f"{name} / {ours}" for name in others), f"floor of {ours}", "of floor"]
        if kind == "decode":
            header += [f"{name} tok/s" for name in found]
        print(f"\n{kind}, {unit}\n")
        print_table(header, rows)
    if first.peak:
        print("\nmemory at most, MiB\n")
        print_table(
            ["", *found], [[case, *(f"{one.peak[case] / MIB:.0f}" for one in found.values())] for case in cases]
        )


def main() -> None:
    """Read the arguments, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    parser.add_argument("--geometry", default="llama-3b", help='"llama-3b" (default), "small", or "layers-N"')
    parser.add_argument("--layers", type=int, help="so many layers instead of all")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--prefill", default="1x256,1x1024,4x1024", help="batch x length, with commas")
    parser.add_argument("--batches", default="1,4,16", help="of decoding, with commas")
    parser.add_argument("--context", type=int, default=256, help="tokens before the first step (default: 256)")
    parser.add_argument("--tokens", type=int, default=16, help="steps of decoding (default: 16)")
    parser.add_argument("--nested", action="store_true", help="scales that are quantized themselves")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile too, a minute for each contender and case"
    )
    parser.add_argument("--repeats", type=int, default=5, help="of each figure (default: 5)")
    parser.add_argument("--product", type=int, default=8192, help="size of the product that gives the rate (8192)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    options = parser.parse_args()
    gpu = options.device != "cpu"
    shape = geometry(options.geometry)
    if options.layers is not None:
        shape = replace(shape, layers=options.layers)

    print(machine_line())
    print(versions_line("halfbyte", "torch", "transformers", "bitsandbytes"))
    if gpu:
        print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    rates = measure_rates(Clock(gpu, options.repeats), options.product, options.device)
    print(f"copies {rates.copied / 1e12:.3f} TB/s; product of {options.product}: {rates.multiplied / 1e12:.2f} TFLOP/s")
    scales = "nested" if options.nested else "plain"
    weights = f"{options.geometry}, {shape.layers} layers, {shape.weights() / 1e9:.2f}e9 weights"
    print(f"{weights}; NF4, blocks of {BLOCKSIZE}, {scales} scales; bfloat16", flush=True)

    found: dict[str, Measurement] = {}
    read: dict[str, int] = {}
    with torch.no_grad():
        for contender in options.only:
            start = time.perf_counter()
            try:
                model = model_of(contender, shape, options)
            except (ImportError, RuntimeError) as error:
                print(f"{contender}: {error}", flush=True)
                continue
            read[contender] = weight_bytes(model)
            found[contender] = one = Measurement(contender, model, options)
            for case in filter(None, options.prefill.split(",")):
                one.prefill(case)
            for batch in filter(None, options.batches.split(",")):
                one.decode(int(batch))
            print(
                f"  {contender}: {read[contender] / MIB:.0f} MiB of weights, {time.perf_counter() - start:.1f} s",
                flush=True,
            )
            del model, one.model
            gc.collect()
            if gpu:
                torch.cuda.empty_cache()
    if not found:
        raise SystemExit("nothing could be measured")
    if {"bitsandbytes", "halfbyte"} <= found.keys() and hasattr(found["halfbyte"], "logits"):
        a, b = (found[name].logits for name in ("halfbyte", "bitsandbytes"))
        print(f"logits of halfbyte and bitsandbytes differ by {float((a - b).norm() / b.norm()):.1e} of their norm")
    print_results(found, read, rates, shape)
    if options.json:
        figures = {
            name: {
                "bytes": read[name],
                "seconds": {f"{case}, {way}": value for (case, way), value in one.seconds.items()},
                "peak": one.peak,
            }
            for name, one in found.items()
        }
        about = {"copied": rates.copied, "multiplied": rates.multiplied, "weights": shape.weights()}
        options.json.write_text(json.dumps({**about, "contenders": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
