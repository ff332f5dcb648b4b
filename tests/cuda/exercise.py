"""Every kernel once or a few times, with ends that are not whole: what compute-sanitizer watches."""

from __future__ import annotations

import halfbyte.functional as F
import torch
from halfbyte import _cuda


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
                arguments = (packed, *state.scales(), (n, k), dtype, blocksize, quant_type)
                _cuda.embedding_4bit(indices, *arguments)
                _cuda.embedding_4bit(indices.int(), *arguments)
            for blocksize in (64, 100, 4096):
                codes, state = F.quantize_blockwise(values, blocksize=blocksize)
                F.dequantize_blockwise(codes, state)
            codes, scales = _cuda.quantize_rows(values)
            _cuda.dequantize_rows(codes, scales, dtype)
    # More scales than one group of groups.
    F.quantize_4bit(torch.randn(2**21 + 3, device="cuda"), quant_type="nf4", blocksize=32, compress_statistics=True)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
