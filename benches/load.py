"""`from_pretrained` to 4 bits: halfbyte beside transformers + bitsandbytes and the plain bfloat16 load.

    python benches/load.py                        Llama-3.2-1B geometry on the CPU
    python benches/load.py --device cuda          the same on a GPU
    python benches/load.py --small                a model of 17 million weights, to try the bench
    python benches/load.py --profile halfbyte     where the time of one load goes, function by function

NF4 with double quantization, "on the fly" from the bfloat16 checkpoint and from a 4-bit one that `halfbyte quantize`
wrote. Both checkpoints are in the page cache. Each load is a process of its own, and contenders alternate.

Seconds run from the moment when torch, transformers, accelerate and the contender are imported until `from_pretrained`
returns; "first forward" is then one pass of 16 tokens, which includes whatever a library put off: pages of a mapped
file are read then, and bitsandbytes repacks its weights for the CPU.

Memory is anonymous memory (RssAnon), sampled every 2 milliseconds from outside: what the imports took, then the peak
and the end of the load with what the imports took subtracted. On a GPU it is what torch allocated there.

Nothing is asserted but that layers are 4-bit; results with their commands are in benches/RESULTS.md.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _generated import CACHE, checkpoint, geometry, total_bytes, warm
from _table import MIB, machine_line, print_table
from _worker import mib, peer_versions, report, run_worker

# Name -> library that quantizes, whether the checkpoint is 4-bit.
CONTENDERS = {
    "halfbyte": ("halfbyte", False),
    "bitsandbytes": ("bitsandbytes", False),
    "halfbyte, 4-bit checkpoint": ("halfbyte", True),
    "bitsandbytes, 4-bit checkpoint": ("bitsandbytes", True),
    "bfloat16": ("", False),
}


def worker(contender: str, source: str, device: str, profile: bool) -> None:
    """One load, measured; runs in a process of its own."""
    library, packed = CONTENDERS[contender]
    if library == "halfbyte":
        import halfbyte
    import accelerate  # noqa: F401
    import torch
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401

    config: Any = None
    how = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    if library == "halfbyte":
        from halfbyte.integrations.transformers import quantizer  # noqa: F401

        halfbyte.enable()  # serves the 4-bit checkpoint, whose config names no library
        config = halfbyte.BitsAndBytesConfig(**how)
    elif library == "bitsandbytes":
        import bitsandbytes  # noqa: F401
        from transformers.integrations import bitsandbytes as integration  # noqa: F401

        config = transformers.BitsAndBytesConfig(**how)
    more = {} if packed or config is None else {"quantization_config": config}
    gpu = device != "cpu"
    if gpu:
        torch.cuda.init()
        torch.empty(1, device=device)
        torch.cuda.synchronize()
    # Imports leave a full garbage collection due, of some tenths of a second: it would hit one load and not another.
    gc.collect()
    report("imports")

    def load() -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.bfloat16, device_map=device, **more
        )
        if gpu:
            torch.cuda.synchronize()
        return model

    if profile:
        import cProfile
        import pstats

        profiler = cProfile.Profile()
        model = profiler.runcall(load)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25).sort_stats("cumulative").print_stats(45)
        return
    start = time.perf_counter()
    model = load()
    seconds = time.perf_counter() - start
    measured: dict[str, Any] = {"seconds": seconds}
    if gpu:
        measured |= {"gpu_peak": torch.cuda.max_memory_allocated(), "gpu": torch.cuda.memory_allocated()}
    report("load", **measured)

    names = [type(module).__module__.partition(".")[0] for module in model.modules() if _is_4bit(module)]
    expected = [library] * (7 * model.config.num_hidden_layers) if library else []
    if names != expected:
        raise SystemExit(f"expected {len(expected)} 4-bit layers of {library or 'nobody'}, got {names}")
    tokens = torch.arange(16, device=device)[None]
    start = time.perf_counter()
    with torch.inference_mode():
        finite = bool(model(tokens).logits.isfinite().all())
    report("forward", seconds=time.perf_counter() - start)
    if not finite:
        raise SystemExit("logits are not finite")


def _is_4bit(module: Any) -> bool:
    return type(module).__name__ == "Linear4bit"


def quantized(source: Path) -> Path:
    """The 4-bit form of a checkpoint, written by the command."""
    folder = CACHE / f"{source.name}-nf4"
    shutil.rmtree(folder, ignore_errors=True)
    arguments = ["quantize", str(source), str(folder), "--type", "nf4", "--double-quant", "--quiet"]
    subprocess.run([sys.executable, "-m", "halfbyte", *arguments], check=True)
    return folder


def main() -> None:
    """Read the arguments, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--geometry", default="layers-16", help='"layers-16" (Llama-3.2-1B, default), "llama-3b"')
    parser.add_argument("--small", action="store_true", help="--geometry small, a model of 17 million weights")
    parser.add_argument("--runs", type=int, default=3, help="processes of each contender (default: 3)")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--bitsandbytes", metavar="FOLDER", help="where its processes find bitsandbytes")
    parser.add_argument("--profile", choices=CONTENDERS, metavar="NAME", help="profile one load instead")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker, profile=bool(options.profile))
        return

    name = "small" if options.small else options.geometry
    source = checkpoint(name)
    packed = quantized(source)
    for folder in (source, packed):
        warm(folder)

    def command(contender: str) -> list[str]:
        folder = packed if CONTENDERS[contender][1] else source
        return [sys.executable, __file__, "--worker", contender, str(folder), options.device]

    def path(contender: str) -> str | None:
        return options.bitsandbytes if CONTENDERS[contender][0] == "bitsandbytes" else None

    if options.profile:
        run_worker([*command(options.profile), "--profile", options.profile], path(options.profile))
        return
    print(machine_line())
    print(peer_versions(options.bitsandbytes), flush=True)
    measured: dict[str, list[dict[str, dict[str, Any]]]] = {contender: [] for contender in options.only}
    for turn in range(options.runs):
        for contender, runs in measured.items():
            runs.append(run_worker(command(contender), path(contender)))
            print(f"  {turn + 1}: {contender} {runs[-1]['load']['seconds']:.2f} s", file=sys.stderr, flush=True)

    gpu = options.device != "cpu"
    if gpu:
        import torch

        print(torch.cuda.get_device_name())
    largest = 2 * max(rows * rest[0] for rows, *rest in geometry(name).shapes().values() if rest)
    print(
        f"\n{name}: {geometry(name).weights() / 1e9:.2f}e9 weights, {mib(total_bytes(source))} MiB in bfloat16, "
        f"{mib(total_bytes(packed))} MiB in 4 bits (its largest 16-bit tensor: {largest / MIB:.0f}); "
        f"to {options.device}; best of {options.runs}\n"
    )
    rows = []
    for contender, runs in measured.items():
        seconds = sorted(run["load"]["seconds"] for run in runs)
        row = [contender, f"{seconds[0]:.2f}", f"{seconds[len(seconds) // 2]:.2f}"]
        row.append(f"{min(run['forward']['seconds'] for run in runs):.2f}")
        row.append(mib(max(run["imports"]["anonymous"] for run in runs)))
        row += [
            mib(max(run["load"][key] - run["imports"]["anonymous"] for run in runs)) for key in ("peak", "anonymous")
        ]
        if gpu:
            row += [mib(max(run["load"][key] for run in runs)) for key in ("gpu_peak", "gpu")]
        rows.append(row)
    header = ["load", "s", "median s", "first forward s", "imports MiB", "peak MiB", "after MiB"]
    print_table([*header, *(["GPU peak MiB", "GPU after MiB"] if gpu else [])], rows)


if __name__ == "__main__":
    main()
