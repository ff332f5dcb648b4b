"""QLoRA steps: halfbyte and bitsandbytes with the same seeds and data, beside LoRA on the model that is not quantized.

    python benches/qlora.py                       a small Llama on the CPU
    python benches/qlora.py --device cuda         the geometry of Llama-3.2-3B, batches of 4 x 1024, checkpointed
    python benches/qlora.py --device cuda --geometry layers-16 --batch 2 --length 512
    python benches/qlora.py --device cuda --profile --only halfbyte halfbyte-unfused

PEFT's LoRA of rank 16 on all linear layers, NF4 with double quantization, AdamW; every contender runs in a process of
its own, alternating. "halfbyte-unfused" is halfbyte after `halfbyte.integrations.peft.unfuse`. On a GPU the model is
bfloat16 and runs under autocast. On the CPU everything is float32, because torch's own bfloat16 products are up to a
hundred times slower on processors without instructions for them.

Weights are random. The data are eight repeated batches in which the next token mostly follows from the previous one, so
that losses fall.

A step is forward, backward and optimizer, synchronized. The first --warmup steps are not timed. Peak memory is measured
during the steps: anonymous memory (RssAnon) on the CPU, what torch allocated on a GPU.

With --profile, one more step is profiled on a GPU: how many kernels it launches, how long the GPU computes, and which
kinds of kernels it spends most of that with.

Asserted is that PEFT took every linear layer for one of bitsandbytes' 4-bit layers (`peft.tuners.lora.bnb.Linear4bit`)
over a layer of the contender, and that losses are finite; results with their commands are in benches/RESULTS.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from _generated import checkpoint, geometry, warm
from _table import machine_line, print_table
from _worker import mib, peer_versions, report, run_worker

CONTENDERS = ("halfbyte", "halfbyte-unfused", "bitsandbytes", "dense")

# What the names of kernels say of their kind; the first that is found counts.
KINDS = {
    "4 bits": ("dequantize", "gemm_4bit_small_m"),
    "products": ("gemm", "nvjet", "xmma", "cutlass", "gemv", "splitKreduce"),
    "attention": ("flash", "fmha", "cudnn"),
    "optimizer": ("multi_tensor",),
    "copies and casts": ("copy", "Memcpy", "Memset", "FillFunctor"),
    "sums and norms": ("reduce", "softmax", "SoftMax", "norm"),
    "elementwise": ("elementwise",),
}


def model_with_adapters(contender: str, source: str, options: argparse.Namespace) -> Any:
    """The model with LoRA layers, ready to be trained."""
    ours = contender.startswith("halfbyte")
    if ours:
        import halfbyte
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    dtype = getattr(torch, options.dtype)
    how = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": not options.single_scales,
        "bnb_4bit_compute_dtype": dtype,
    }
    more: dict[str, Any] = {}
    if ours:
        more["quantization_config"] = halfbyte.BitsAndBytesConfig(**how)
    elif contender == "bitsandbytes":
        more["quantization_config"] = transformers.BitsAndBytesConfig(**how)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, device_map=options.device, **more
    )
    model.config.use_cache = False
    keywords = {"use_reentrant": False}
    if more:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=options.checkpointing, gradient_checkpointing_kwargs=keywords
        )
    elif options.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)
        model.enable_input_require_grads()
    torch.manual_seed(20)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model.train()

    if more:
        from peft.tuners.lora.bnb import Linear4bit

        owners = [
            type(module.base_layer).__module__.partition(".")[0]
            for module in model.modules()
            if isinstance(module, Linear4bit)
        ]
        count = 7 * model.config.num_hidden_layers
        if owners != ["halfbyte" if ours else contender] * count:
            raise SystemExit(f"expected {count} peft Linear4bit layers over {contender}'s, got {owners}")
    if ours:
        from halfbyte.integrations.peft import fuse, unfuse

        fused = fuse(model)
        if fused.fused != count or fused.left:
            raise SystemExit(f"expected {count} fused layers, got {fused}")
        if contender == "halfbyte-unfused":
            unfuse(model)
    return model


def batches(vocabulary: int, batch: int, length: int) -> list[Any]:
    """Eight batches of tokens; in nine of ten places the next token is a function of the one before."""
    import torch

    generator = torch.Generator().manual_seed(20)
    used = min(vocabulary, 1024)
    made = []
    for _ in range(8):
        tokens = torch.randint(used, (batch, length), generator=generator)
        kept = torch.rand(batch, length, generator=generator) < 0.9
        for at in range(1, length):
            tokens[:, at] = torch.where(kept[:, at], (5 * tokens[:, at - 1] + 17) % used, tokens[:, at])
        made.append(tokens)
    return made


def worker(contender: str, source: str, options: argparse.Namespace) -> None:
    """One run, measured; in a process of its own."""
    import torch

    gpu = options.device != "cpu"
    model = model_with_adapters(contender, source, options)
    data = [tokens.to(options.device) for tokens in batches(model.config.vocab_size, options.batch, options.length)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.rate)
    report("ready", trained=sum(parameter.numel() for parameter in trained))

    def step(tokens: Any) -> float:
        with torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    if gpu:
        torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], []
    for number in range(options.steps):
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        losses.append(step(data[number % len(data)]))
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    if not all(map(math.isfinite, losses)):
        raise SystemExit(f"losses must be finite, got {losses}")
    more = {"gpu_peak": torch.cuda.max_memory_allocated()} if gpu else {}
    report("steps", losses=losses, step_seconds=seconds, **more)
    if options.profile:
        report("profile", kernels=kernels_of(lambda: step(data[0])))


def kernels_of(step: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """Launches of a step by kind of kernel, and the milliseconds that the GPU computes them."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
    found: dict[str, tuple[int, float]] = {}
    for event in profiled.events():
        if event.device_type != DeviceType.CUDA:
            continue
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.name for part in parts)), "others")
        count, time_ms = found.get(kind, (0, 0.0))
        found[kind] = count + 1, time_ms + event.time_range.elapsed_us() / 1e3
    return found


def print_kernels(profiles: dict[str, dict[str, tuple[int, float]]], medians: dict[str, float]) -> None:
    """Launches and milliseconds by kind, and the share of a step in which the GPU computes."""
    rows = []
    for kind in (*KINDS, "others"):
        cells = [found.get(kind, (0, 0.0)) for found in profiles.values()]
        if any(count for count, _ in cells):
            rows.append([kind, *(f"{count}, {time_ms:.1f} ms" for count, time_ms in cells)])
    sums = [tuple(map(sum, zip(*found.values(), strict=True))) for found in profiles.values()]
    rows.append(["all", *(f"{count}, {time_ms:.1f} ms" for count, time_ms in sums)])
    shares = [time_ms / (1e3 * medians[name]) for name, (_, time_ms) in zip(profiles, sums, strict=True)]
    rows.append(["GPU busy", *(f"{share:.0%}" for share in shares)])
    print_table(["kernels of a step", *profiles], rows)


def print_losses(losses: dict[str, list[float]]) -> None:
    """The losses of some steps side by side, and the largest difference to bitsandbytes' of all steps."""
    steps = len(next(iter(losses.values())))
    shown = sorted({0, steps - 1, *range(9, steps, 10)})
    print_table(
        ["loss at step", *losses],
        [[str(step + 1), *(f"{values[step]:.4f}" for values in losses.values())] for step in shown],
    )
    for one, other in (
        ("halfbyte", "bitsandbytes"),
        ("halfbyte-unfused", "halfbyte"),
    ):
        if one in losses and other in losses:
            differences = [abs(a - b) for a, b in zip(losses[one], losses[other], strict=True)]
            worst = max(range(steps), key=differences.__getitem__)
            print(
                f"\n{one} and {other} differ by at most {differences[worst]:.1e} (step {worst + 1}), "
                f"by {statistics.mean(differences):.1e} on average."
            )


def main() -> None:
    """Read the arguments, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--geometry", help='"small" (default on the CPU), "llama-3b" (default on a GPU), "layers-N"')
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: float32 on the CPU, else bfloat16")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=5, help="steps that are not timed (default: 5)")
    parser.add_argument("--batch", type=int, help="rows of a batch (default: 2 on the CPU, 4 on a GPU)")
    parser.add_argument("--length", type=int, help="tokens of a row (default: 128 on the CPU, 1024 on a GPU)")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate (default: 2e-4)")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false", help="keep activations")
    parser.add_argument("--single-scales", action="store_true", help="float32 scales, not quantized themselves")
    parser.add_argument("--profile", action="store_true", help="count and time the kernels of one more step (GPU)")
    parser.add_argument("--runs", type=int, default=1, help="processes of each contender (default: 1)")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--bitsandbytes", metavar="FOLDER", help="where its process finds bitsandbytes")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    gpu = options.device != "cpu"
    options.geometry = options.geometry or ("llama-3b" if gpu else "small")
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    options.batch = options.batch or (4 if gpu else 2)
    options.length = options.length or (1024 if gpu else 128)
    if not 0 <= options.warmup < options.steps:
        parser.error(f"--warmup must be at least 0 and less than --steps, got {options.warmup}")
    if options.profile and not gpu:
        parser.error("--profile must be used with a GPU, got --device cpu")
    if options.worker:
        worker(*options.worker, options)
        return

    source = checkpoint(options.geometry)
    warm(source)
    arguments = [f"--{key}={getattr(options, key)}" for key in ("device", "dtype", "steps", "batch", "length", "rate")]
    arguments += [f"--warmup={options.warmup}", *([] if options.checkpointing else ["--no-checkpointing"])]
    arguments += ["--single-scales"] if options.single_scales else []
    arguments += ["--profile"] if options.profile else []
    print(machine_line())
    print(peer_versions(options.bitsandbytes), flush=True)
    measured: dict[str, list[dict[str, dict[str, Any]]]] = {contender: [] for contender in options.only}
    for turn in range(options.runs):
        for contender, runs in measured.items():
            command = [sys.executable, __file__, *arguments, "--worker", contender, str(source)]
            runs.append(run_worker(command, options.bitsandbytes if contender == "bitsandbytes" else None))
            seconds = runs[-1]["steps"]["step_seconds"]
            median = 1e3 * statistics.median(seconds[options.warmup :])
            print(
                f"  {turn + 1}: {contender} {sum(seconds):.1f} s, {median:.1f} ms a step", file=sys.stderr, flush=True
            )

    if gpu:
        import torch

        print(torch.cuda.get_device_name())
    trained = next(iter(measured.values()))[0]["ready"]["trained"]
    print(
        f"\n{options.geometry}: {geometry(options.geometry).weights() / 1e9:.2f}e9 weights, {trained / 1e6:.1f}e6 of "
        f"adapters; {options.steps} steps of {options.batch} x {options.length} tokens, {options.dtype} on "
        f"{options.device}, "
        f"learning rate {options.rate:g}, {'with' if options.checkpointing else 'without'} gradient checkpointing, "
        f"{'scales not quantized' if options.single_scales else 'scales quantized too'}; best of {options.runs}\n"
    )
    times = {}
    for contender, runs in measured.items():
        timed = [run["steps"]["step_seconds"][options.warmup :] for run in runs]
        times[contender] = min(map(min, timed)), min(map(statistics.median, timed))
    rows = []
    for contender, runs in measured.items():
        best, median = times[contender]
        row = [contender, f"{1e3 * best:.1f}", f"{1e3 * median:.1f}"]
        for other in ("bitsandbytes", "dense"):
            row.append(f"{median / times[other][1]:.2f}" if other in times else "")
        row.append(mib(max(run["steps"]["gpu_peak" if gpu else "peak"] for run in runs)))
        rows.append(row)
    print_table(["step", "best ms", "median ms", "x bitsandbytes", "x dense", "peak MiB"], rows)
    print()
    if options.profile:
        medians = {contender: median for contender, (_, median) in times.items()}
        print_kernels({contender: runs[0]["profile"]["kernels"] for contender, runs in measured.items()}, medians)
        print()
    print_losses({contender: runs[0]["steps"]["losses"] for contender, runs in measured.items()})


if __name__ == "__main__":
    main()
