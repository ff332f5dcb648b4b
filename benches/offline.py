"""The `halfbyte quantize` command beside transformers + bitsandbytes: time and peak memory of whole processes.

    python benches/offline.py                     Llama-3.2-1B geometry: ours, the peer, and the floor of the machine
    python benches/offline.py --scale             ours on 0.25, 0.5, 1 and 2 times the layers, and one huge tensor
    python benches/offline.py --moe               ours on the experts of one layer beside dense ones; a plan of many

The checkpoint is generated (bfloat16, random normal weights of standard deviation 0.02) and kept in
.cache/benches/; it is in the page cache before anything is timed, every run writes a fresh destination, and dirty
pages of one run are flushed before the next begins. Times are from process start to exit, the best of --runs.

The floor rows read every input byte and write every output byte once, in one thread through an 8 MiB buffer, with
nothing computed. They show the order of magnitude that the machine allows, and are no strict bound: several threads,
or writing out to disk while the work goes on, can be faster, above all where fsync is waited for at the end.

Nothing is asserted here; results with their commands are in benches/RESULTS.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from _generated import CACHE, LLAMA_1B, checkpoint, total_bytes, warm
from _table import MIB, Process, best_process, machine_line, median_wall, print_table, run_process, versions_line

LAYERS = LLAMA_1B.layers


def floor(source: Path, destination: Path, output_bytes: int, sync: bool) -> None:
    """Read all of `source`, write `output_bytes` bytes to a new file, both in pieces of 8 MiB."""
    buffer = memoryview(bytearray(8 * MIB))
    destination.mkdir()
    for file in source.iterdir():
        with open(file, "rb", buffering=0) as reader:
            while reader.readinto(buffer):
                pass
    with open(destination / "model.safetensors", "wb", buffering=0) as writer:
        left = output_bytes
        while left:
            left -= writer.write(buffer[: min(left, len(buffer))])
        if sync:
            os.fsync(writer.fileno())


def fresh_run(command: list[str], destination: Path) -> Process:
    """Measure one command that makes `destination`, on a machine with nothing left to write."""
    shutil.rmtree(destination, ignore_errors=True)
    os.sync()
    return run_process(command, environment={"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})


def halfbyte_command(*arguments: str) -> list[str]:
    """The `halfbyte` command beside this interpreter, or the module it stands for in a source tree."""
    beside = Path(sys.executable).with_name("halfbyte")
    return [*([str(beside)] if beside.exists() else [sys.executable, "-m", "halfbyte"]), *arguments]


def quantize_command(source: Path, destination: Path, *more: str) -> list[str]:
    """The measured command: NF4 with double quantization."""
    return halfbyte_command("quantize", str(source), str(destination), "--type", "nf4", "--double-quant", *more)


def compare(runs: int, peer_runs: int) -> None:
    """One table for the Llama-3.2-1B geometry: ours, the peer, the floor; durable and not."""
    source, destination = checkpoint(f"layers-{LAYERS}"), CACHE / "out"
    warm(source)
    fresh_run(quantize_command(source, destination, "--quiet"), destination)
    input_bytes, output_bytes = total_bytes(source), total_bytes(destination)

    script = [sys.executable, __file__, "--floor", str(source), str(destination), str(output_bytes)]
    commands = {
        "halfbyte quantize": quantize_command(source, destination, "--quiet"),
        "halfbyte quantize --no-fsync": quantize_command(source, destination, "--quiet", "--no-fsync"),
        "floor: read input, write output, fsync": [*script, "fsync"],
        "floor: read input, write output": [*script, "no-fsync"],
    }
    measured: dict[str, list[Process]] = {label: [] for label in commands}
    for _ in range(runs):  # in turns, so that a busy moment of the machine does not hit one of them alone
        for label, command in commands.items():
            measured[label].append(fresh_run(command, destination))
    nothing = run_process([sys.executable, "-c", "pass"])
    peer_script = str(Path(__file__).with_name("offline_peer.py"))
    peer_label = "transformers + bitsandbytes, load and save"
    measured[peer_label] = [
        fresh_run([sys.executable, peer_script, str(source), str(destination)], destination) for _ in range(peer_runs)
    ]
    shutil.rmtree(destination, ignore_errors=True)

    print(f"\nLlama-3.2-1B geometry, bfloat16 to NF4 + double quantization: {input_bytes / 1e9:.2f} GB in page cache")
    print(f"to {output_bytes / 1e9:.2f} GB; best of {runs} runs (peer: {peer_runs})\n")
    peer = best_process(measured[peer_label]).wall if peer_runs else None
    rows = []
    for label, processes in measured.items():
        if not processes:
            continue
        best = best_process(processes)
        rows.append(
            [
                label,
                f"{best.wall:.2f}",
                f"{median_wall(processes):.2f}",
                f"{best.cpu:.2f}",
                f"{input_bytes / best.wall / 1e9:.2f}",
                f"{peer / best.wall:.1f}x" if peer else "",
                f"{best.peak / MIB:.0f}",
            ]
        )
    print_table(["whole process", "s", "median s", "CPU s", "GB/s in", "peer / this", "peak MiB"], rows)
    print(f"\nAn empty Python process: {nothing.wall * 1000:.0f} ms, {nothing.peak / MIB:.0f} MiB.")


def scale(runs: int, keep: bool) -> None:
    """Ours on growing models, then on one huge tensor: time in proportion to bytes, memory not growing with them."""
    rows = []
    for name in [*(f"layers-{int(LAYERS * factor)}" for factor in (0.25, 0.5, 1, 2)), "huge"]:
        source, destination = checkpoint(name), CACHE / "out"
        warm(source)
        for label, more in (("", []), (", --no-fsync", ["--no-fsync"])):
            command = quantize_command(source, destination, "--quiet", *more)
            best = best_process([fresh_run(command, destination) for _ in range(runs)])
            size = total_bytes(source)
            rows.append(
                [
                    ("one 128,256 x 8,192 tensor" if name == "huge" else name.replace("-", " = ")) + label,
                    f"{size / 1e9:.2f}",
                    f"{total_bytes(destination) / 1e9:.2f}",
                    f"{best.wall:.2f}",
                    f"{size / best.wall / 1e9:.2f}",
                    f"{best.peak / MIB:.0f}",
                ]
            )
        shutil.rmtree(destination, ignore_errors=True)
        if not keep and name != f"layers-{LAYERS}":
            shutil.rmtree(source)
    print(f"\nhalfbyte quantize --type nf4 --double-quant, best of {runs} runs\n")
    print_table(["checkpoint", "GB in", "GB out", "s", "GB/s in", "peak MiB"], rows)


#: A checkpoint, and what it is called in the table. The dense one is the first.
EXPERTS = {
    "layers-8": "dense: 8 layers of Llama-3.2-1B",
    "moe": "Qwen3-30B-A3B, one layer: a tensor for each matrix",
    "moe-fused": "the same in fused tensors",
    "moe-gpt-oss": "gpt-oss-20b, one layer: fused, transposed, alternating",
}


def moe(runs: int, keep: bool) -> None:
    """Ours on experts beside dense layers, in turns; then the plan of a checkpoint of 70,272 matrices."""
    destination = CACHE / "out"
    measured: dict[str, list[Process]] = {name: [] for name in EXPERTS}
    for name in EXPERTS:
        warm(checkpoint(name))
    for _ in range(runs):
        for name, found in measured.items():
            command = quantize_command(CACHE / name, destination, "--quiet", "--no-fsync")
            found.append(fresh_run(command, destination))
    shutil.rmtree(destination, ignore_errors=True)
    speed = {name: total_bytes(CACHE / name) / best_process(found).wall / 1e9 for name, found in measured.items()}
    dense = next(iter(speed.values()))
    rows = []
    for name, found in measured.items():
        best, size = best_process(found), total_bytes(CACHE / name)
        rows.append(
            [
                EXPERTS[name],
                f"{size / 1e9:.2f}",
                f"{best.wall:.2f}",
                f"{best.cpu:.2f}",
                f"{speed[name]:.2f}",
                f"{speed[name] / dense:.2f}",
                f"{size / best.cpu / 1e9:.2f}",
                f"{best.peak / MIB:.0f}",
            ]
        )
    print(f"\nhalfbyte quantize --type nf4 --double-quant --no-fsync, from the page cache, best of {runs} runs\n")
    columns = ["checkpoint", "GB in", "s", "CPU s", "GB/s in", "of dense", "GB per CPU s", "peak MiB"]
    print_table(columns, rows)

    many = checkpoint("many-experts")
    plans = [run_process(halfbyte_command("quantize", str(many), "--plan")) for _ in range(runs)]
    best = best_process(plans)
    print("\nhalfbyte quantize --plan of 61 layers of 384 experts: 70,272 matrices, 421,937 tensors in the output\n")
    print_table(["s", "CPU s", "peak MiB"], [[f"{best.wall:.2f}", f"{best.cpu:.2f}", f"{best.peak / MIB:.0f}"]])
    if not keep:
        for name in [*EXPERTS, "many-experts"]:
            shutil.rmtree(CACHE / name)


def main() -> None:
    """Read the arguments, do one of the modes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="runs of each of our commands (default: 5)")
    parser.add_argument("--peer-runs", type=int, default=1, help="runs of the peer, some 30 s each; 0 leaves it out")
    parser.add_argument("--scale", action="store_true", help="time and memory against the size of the model")
    parser.add_argument("--moe", action="store_true", help="experts beside dense layers, and a plan of very many")
    parser.add_argument(
        "--keep", action="store_true", help="with --scale and --moe: keep all generated checkpoints (10 GB)"
    )
    parser.add_argument("--floor", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()

    if options.floor:
        source, destination, output_bytes, sync = options.floor
        floor(Path(source), Path(destination), int(output_bytes), sync == "fsync")
    else:
        print(machine_line())
        print(versions_line("halfbyte", "torch", "transformers", "bitsandbytes"), flush=True)
        if options.scale:
            scale(options.runs, options.keep)
        elif options.moe:
            moe(options.runs, options.keep)
        else:
            compare(options.runs, options.peer_runs)


if __name__ == "__main__":
    main()
