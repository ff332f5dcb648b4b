"""What the first calls of a process cost on a GPU: a kernel is loaded, or compiled from PTX, when it is first used.

CUDA_CACHE_DISABLE=1 python benches/cuda_first_use.py
CUDA_CACHE_DISABLE=1 HALFBYTE_KERNELS=ptx python benches/cuda_first_use.py
python benches/cuda_first_use.py                         twice: the second finds what the first has left on disk
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from _cuda import device_line
from _table import print_table
from halfbyte import functional

T = TypeVar("T")


def main() -> None:
    """Print the table."""
    print(device_line())
    print(f"the driver's cache is {'off' if os.environ.get('CUDA_CACHE_DISABLE') == '1' else 'on'}; milliseconds\n")
    rows: list[list[str]] = []

    def measured(name: str, call: Callable[[], T]) -> T:
        times = []
        for _ in range(2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            result = call()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        rows.append([name, *(f"{seconds * 1e3:.2f}" for seconds in times)])
        return result

    weight = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(1, 4096, dtype=torch.bfloat16, device="cuda")
    packed, state = measured("quantize_4bit", lambda: functional.quantize_4bit(weight, quant_type="nf4"))
    measured("nested", lambda: functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
    measured("dequantize_4bit", lambda: functional.dequantize_4bit(packed, state))
    measured("matmul_4bit, 1 row", lambda: functional.matmul_4bit(x, packed, state))
    measured("quantize_blockwise", lambda: functional.quantize_blockwise(weight))
    print_table(["4096x4096", "first call", "second call"], rows)


if __name__ == "__main__":
    main()
