"""Every kernel once or a few times, with ends that are not whole: what compute-sanitizer watches.

python tests/cuda/exercise.py written         but for those that read ahead of what was written, and may not use it
python tests/cuda/exercise.py without-tiles   but for products of 4-bit weights by warpgroups
python tests/cuda/exercise.py past-the-end    one kernel, of more memory than there is: that the tool would say so
"""

from __future__ import annotations

import sys

import halfbyte.functional as F
import torch
from halfbyte import _native
from halfbyte.backends import cuda as _cuda
from halfbyte.backends import cuda_lora
from test_experts_cuda import Experts, choices

from kernels import dgrad, here, product, quantize, quantize_nested, raw


def main(*, reads_ahead: bool, tiles: bool) -> None:
    """Run them; what they give is tested elsewhere.

    `reads_ahead`: also what reads memory that it then may not need. `tiles`: also products by warpgroups.
    """
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for n, k in ((37, 192), (50, 65)):
            values = torch.randn(n, k, dtype=dtype, device="cuda")
            for quant_type, nested, blocksize in (("nf4", False, 64), ("fp4", True, 64), ("nf4", True, 512)):
                how = {"quant_type": quant_type, "compress_statistics": nested, "blocksize": blocksize}
                packed, state = F.quantize_4bit(values, **how)
                F.dequantize_4bit(packed, state)
                for m in (1, 9, 30 if tiles else 16):
                    F.matmul_4bit(torch.randn(m, k, dtype=dtype, device="cuda"), packed, state)
                indices = torch.tensor([0, n - 1, n, -1], device="cuda")
                arguments = state.packed(packed), dtype
                _cuda.embedding_4bit(indices, *arguments)
                _cuda.embedding_4bit(indices.int(), *arguments)
            for blocksize in (64, 100, 4096):
                codes, state = F.quantize_blockwise(values, blocksize=blocksize)
                F.dequantize_blockwise(codes, state)
            codes, scales = _cuda.quantize_rows(values)
            _cuda.dequantize_rows(codes, scales, dtype)
    # Several steps for each block of threads of the product of few rows, and several passes.
    values = torch.randn(40 * 132, 4096, dtype=torch.bfloat16, device="cuda")
    for nested in (False, True):
        packed, state = F.quantize_4bit(values, quant_type="nf4", compress_statistics=nested)
        for m in (2, 8, 16):
            F.matmul_4bit(torch.randn(m, 4096, dtype=torch.bfloat16, device="cuda"), packed, state)
    few_rows()
    if tiles:
        several_rows()
    int8(reads_ahead)
    experts(tiles=tiles)
    adapters()
    # More scales than one group of groups.
    F.quantize_4bit(torch.randn(2**21 + 3, device="cuda"), quant_type="nf4", blocksize=32, compress_statistics=True)
    torch.cuda.synchronize()


def few_rows() -> None:
    """As many rows as the kernels for few of them take, by these themselves."""
    major, _ = torch.cuda.get_device_capability()
    values = torch.randn(80, 320, dtype=torch.bfloat16, device="cuda")
    for make in (quantize, quantize_nested):
        for kernel in ("small_m_sm75", "tile_sm75"):
            x = torch.randn(30, 320, dtype=torch.float16, device="cuda")
            product(x, make(values.view(-1), "nf4", 64), 80, "nf4", 64, kernel=kernel)
        for kernel in [*(["small_m_sm80"] if major >= 8 else []), *(["small_m_sm90"] if major in (9, 10) else [])]:
            x = torch.randn(30, 320, dtype=torch.bfloat16, device="cuda")
            product(x, make(values.view(-1), "nf4", 64), 80, "nf4", 64, kernel=kernel)


def several_rows() -> None:
    """Products for more rows: each form, parts of K, and tiles that blocks share."""
    if torch.cuda.get_device_capability() < (8, 0):
        return
    kernels = ["tile_sm80", *(["tile_sm90a"] if torch.cuda.get_device_capability() == (9, 0) else [])]
    for dtype in (torch.bfloat16, torch.float16):
        sizes = ((144, 576, (40, 20, 60, 90, 120, 180, 250)), (9000, 576, (1000,)), (17000, 512, (40, 90)))
        for n, columns, rows in sizes:
            values = torch.randn(n * columns, dtype=dtype, device="cuda")
            for make in (quantize, quantize_nested):
                weight = make(values, "nf4", 64)
                # Each form once: synccheck has memory for some hundred launches with barriers.
                for m in rows[::3] if len(kernels) > 1 else ():
                    dy = torch.randn(m, n, dtype=dtype, device="cuda")
                    dgrad(dy, weight, columns, "nf4", 64, workspace=make is quantize)
                for m in rows:
                    x = torch.randn(m, columns, dtype=dtype, device="cuda")
                    for kernel in kernels:
                        # As large as any wants; initcheck must not take it for written, but who waits for a signal
                        # reads it before.
                        make_workspace = torch.zeros if kernel == "tile_sm80" else torch.empty
                        workspace = make_workspace(1 << 25, dtype=torch.uint8, device="cuda")
                        product(x, weight, n, "nf4", 64, kernel=kernel, workspace=workspace)
                # What has ended leaves synccheck its memory.
                torch.cuda.synchronize()


def int8(reads_ahead: bool) -> None:
    """LLM.int8(): few rows and many, with outliers and without.

    The product of few rows fetches a list of columns with outliers before it knows how long the list is.
    """
    for n, columns in ((70, 272), (300, 1040), (33, 65)):
        codes = torch.randint(-127, 128, (n, columns), dtype=torch.int8, device="cuda")
        scales = torch.rand(n, device="cuda") + 0.1
        for m in (1, 9, 40, 130) if reads_ahead else (130,):
            x = torch.randn(m, columns, dtype=torch.float16, device="cuda")
            x[m // 2, :3] = 20.0
            for threshold in (0.0, 6.0):
                torch.ops.halfbyte.linear_8bit(x, codes, scales, None, threshold)


def experts(*, tiles: bool) -> None:
    """A block of experts: a slot for each, and many, for every width of the kernel for these."""
    for nested in (False, True):
        block = Experts.random(4, 256, 192, nested=nested, tiles=tiles)
        for tokens in (1, 9, 16, 40, 100, 200):
            x = torch.randn(tokens, 256, dtype=torch.bfloat16, device="cuda")
            block(x, *choices(tokens, 2, 4))


def adapters() -> None:
    """The products of LoRA adapters: every kernel."""
    for dtype in (torch.bfloat16, torch.float16):
        for rows, columns, rank in ((37, 264, 6), (37, 552, 24), (20, 264, 50), (2200, 40, 16)):
            for kind in (torch.float32, dtype):
                factor = torch.randn(rank, columns, device="cuda").to(kind)
                for x in (
                    torch.randn(rows, columns, device="cuda"),
                    torch.randn(rows, columns, device="cuda").to(dtype),
                ):
                    cast, h = cuda_lora.down(x, factor, dtype)
                    cuda_lora.up(
                        x, h, factor.t().contiguous(), True, 0.5, torch.float32, torch.empty_like(factor, dtype=dtype)
                    )
                    cuda_lora.up(cast, h, factor, False, 0.5, dtype)


def past_the_end() -> None:
    """Dequantize twice as many codes as there are."""
    packed = torch.zeros(2**20, dtype=torch.uint8, device="cuda")
    absmax, out = torch.ones(2**16, device="cuda"), torch.empty(2**22, device="cuda")
    too_long = packed.data_ptr(), 2 * packed.numel(), "uint8"
    _native.cuda_dequantize_4bit(*here(), too_long, raw(absmax), None, None, raw(out), "nf4", 64, False)
    torch.cuda.synchronize()


if __name__ == "__main__":
    if sys.argv[1:] == ["past-the-end"]:
        past_the_end()
    else:
        main(reads_ahead=sys.argv[1:] != ["written"], tiles=sys.argv[1:] != ["without-tiles"])
