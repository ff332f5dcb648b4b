"""Blockwise quantize and dequantize on the CPU: halfbyte, bitsandbytes, and what the memory can do.

    python benches/blockwise_cpu.py [--megabytes 512] [--type nf4] [--threads 1 2]

Weights are bfloat16, normal, blocks of 64, scales in float32, in arrays much larger than the caches; outputs are
allocated and touched before anything is timed. Every contender runs in a process of its own, with its number of
threads and its SIMD path set from outside, and reports the best of many calls.

GB/s counts bytes of bfloat16: input of quantize, output of dequantize. The memcpy rows copy that many bytes from one
array to another in as many threads; that is the speed of memory, though no exact floor: quantizing reads those bytes
and writes a quarter of them, so it moves less than a copy does.

Nothing is asserted here; results with their commands are in benches/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from _table import best_seconds, machine_line, print_table, versions_line

if TYPE_CHECKING:
    import numpy as np

BLOCKSIZE = 64
SIMD_PATHS = ("scalar", "avx2", "avx512")


def weights(megabytes: int) -> np.ndarray:
    """`megabytes` * 10^6 bytes of normal bfloat16 numbers (standard deviation 0.02), as uint16."""
    import numpy as np

    pool = np.random.default_rng(20).standard_normal(1 << 24, dtype=np.float32) * np.float32(0.02)
    bits = ((pool.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)
    return np.resize(bits, megabytes * 500_000)


def work_of_ours(megabytes: int, threads: int, quant_type: str) -> dict[str, Callable[[], object]]:
    """halfbyte: the extension module, on the memory of numpy arrays."""
    import numpy as np
    from halfbyte import _native

    _native.set_threads(threads)
    x = weights(megabytes)
    packed, absmax = np.zeros(x.size // 2, np.uint8), np.zeros(-(-x.size // BLOCKSIZE), np.float32)
    out = np.zeros_like(x)
    values = (x.ctypes.data, x.size, "bfloat16")
    codes = (packed.ctypes.data, packed.size, "uint8")
    scales = (absmax.ctypes.data, absmax.size, "float32")
    result = (out.ctypes.data, out.size, "bfloat16")

    def quantize(x: object = x, packed: object = packed, absmax: object = absmax) -> None:
        # The defaults keep the arrays alive, of which the extension sees only addresses.
        _native.quantize_4bit(values, codes, scales, quant_type, BLOCKSIZE)

    def dequantize(out: object = out) -> None:
        _native.dequantize_4bit(codes, scales, result, quant_type, BLOCKSIZE)

    quantize()
    return {"quantize": quantize, "dequantize": dequantize}


def work_of_bitsandbytes(megabytes: int, threads: int, quant_type: str) -> dict[str, Callable[[], object]]:
    """bitsandbytes: its public functions on CPU tensors."""
    import torch
    from bitsandbytes import functional

    torch.set_num_threads(threads)
    x = torch.from_numpy(weights(megabytes).view("int16")).view(torch.bfloat16)
    packed, state = functional.quantize_4bit(x, blocksize=BLOCKSIZE, quant_type=quant_type)
    return {
        "quantize": lambda: functional.quantize_4bit(x, blocksize=BLOCKSIZE, quant_type=quant_type),
        "dequantize": lambda: functional.dequantize_4bit(packed, state),
    }


def work_of_memcpy(megabytes: int, threads: int, quant_type: str) -> dict[str, Callable[[], object]]:
    """Copy the bytes of the weights, one contiguous part per thread."""
    import numpy as np

    source = weights(megabytes)
    target = np.zeros_like(source)
    parts = [slice(i * source.size // threads, (i + 1) * source.size // threads) for i in range(threads)]
    pool = ThreadPoolExecutor(threads)

    def copy() -> None:
        # numpy lets go of the interpreter's lock while it copies.
        list(pool.map(lambda part: np.copyto(target[part], source[part]), parts))

    return {"quantize": copy, "dequantize": copy}


CONTENDERS = {"ours": work_of_ours, "bitsandbytes": work_of_bitsandbytes, "memcpy": work_of_memcpy}


def worker(contender: str, megabytes: int, threads: int, quant_type: str, seconds: float) -> None:
    """The body of one process: print the seconds of each operation as JSON."""
    work = CONTENDERS[contender](megabytes, threads, quant_type)
    at_least = 2 if contender == "bitsandbytes" else 9  # bitsandbytes takes seconds per call
    print(json.dumps({name: best_seconds(call, at_least=at_least, seconds=seconds) for name, call in work.items()}))


def measure(contender: str, options: argparse.Namespace, threads: int, simd: str | None = None) -> dict[str, float]:
    """Start one process and read what it found."""
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    environment.pop("HALFBYTE_SIMD", None)
    if simd is not None:
        environment["HALFBYTE_SIMD"] = simd
    command = [sys.executable, __file__, "--worker", contender, "--megabytes", str(options.megabytes)]
    command += ["--type", options.type, "--threads", str(threads), "--seconds", str(options.seconds)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"error: {contender} {simd or ''}: {result.stderr.strip()}")
    seconds: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return seconds


def available_paths() -> list[str]:
    """The SIMD paths that this processor has, slowest first."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    needed = {"scalar": set(), "avx2": {"avx2", "fma", "f16c"}, "avx512": {"avx512f", "avx512bw", "avx512vl"}}
    return [path for path in SIMD_PATHS if needed[path] <= flags]


def main() -> None:
    """Read the arguments, measure every contender, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512, help="bytes of bfloat16 weights, in MB (default: 512)")
    parser.add_argument("--type", choices=("nf4", "fp4"), default="nf4")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each measurement (default: 2)")
    parser.add_argument("--worker", choices=tuple(CONTENDERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.megabytes, options.threads[0], options.type, options.seconds)
        return

    print(machine_line())
    print(versions_line("halfbyte", "bitsandbytes", "torch", "numpy"))
    print(f"{options.type}, {options.megabytes} MB of bfloat16, blocks of {BLOCKSIZE}; best of many\n", flush=True)
    rows = []
    for threads in options.threads:
        contenders: list[tuple[str, str | None]] = [("memcpy", None), ("bitsandbytes", None)]
        contenders += [("ours", path) for path in available_paths()]
        results = {(name, path): measure(name, options, threads, path) for name, path in contenders}
        peer = results["bitsandbytes", None]
        for (name, path), seconds in results.items():
            row = [f"halfbyte, {path}" if path else name, str(threads)]
            for operation in ("quantize", "dequantize"):
                row.append(f"{options.megabytes / 1e3 / seconds[operation]:.2f}")
                row.append(f"{peer[operation] / seconds[operation]:.1f}x")
            rows.append(row)
    print_table(["", "threads", "quantize GB/s", "x peer", "dequantize GB/s", "x peer"], rows)


if __name__ == "__main__":
    main()
