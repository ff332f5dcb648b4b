"""Every kernel once or a few times, with ends that are not whole: what compute-sanitizer watches.

python tests/cuda/exercise.py past-the-end    one kernel, of more memory than there is: that the tool would say so
"""

from __future__ import annotations

import sys

import halfbyte.functional as F
import torch
from halfbyte import _native
from halfbyte.backends import cuda as _cuda

from kernels import here, raw


def main() -> None:
    """Run them; what they give is tested elsewhere."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for n, k in ((37, 192), (50, 65)):
            values = torch.randn(n, k, dtype=dtype, device="cuda")
            for quant_type, nested, blocksize in (("nf4", False, 64), ("fp4", True, 64), ("nf4", True, 512)):
                how = {"quant_type": quant_type, "compress_statistics": nested, "blocksize": blocksize}
                packed, state = F.quantize_4bit(values, **how)
                F.dequantize_4bit(packed, state)
                for m in (1, 9, 30):
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
    # More scales than one group of groups.
    F.quantize_4bit(torch.randn(2**21 + 3, device="cuda"), quant_type="nf4", blocksize=32, compress_statistics=True)
    torch.cuda.synchronize()


def past_the_end() -> None:
    """Dequantize twice as many codes as there are."""
    packed = torch.zeros(2**20, dtype=torch.uint8, device="cuda")
    absmax, out = torch.ones(2**16, device="cuda"), torch.empty(2**22, device="cuda")
    too_long = packed.data_ptr(), 2 * packed.numel(), "uint8"
    _native.cuda_dequantize_4bit(*here(), too_long, raw(absmax), None, None, raw(out), "nf4", 64, False)
    torch.cuda.synchronize()


if __name__ == "__main__":
    past_the_end() if sys.argv[1:] == ["past-the-end"] else main()
