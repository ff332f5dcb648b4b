"""`python -m bitsandbytes`: what is installed, and whether it computes."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from .. import __version__ as bnb_version
from .._missing import missing_attribute
from ..cuda_specs import get_cuda_specs
from .cuda import print_diagnostics
from .utils import print_header

_RELATED_PACKAGES = ("accelerate", "diffusers", "halfbyte", "numpy", "peft", "safetensors", "transformers", "trl")


def sanity_check() -> None:
    """Take a step of Adam, and multiply with a weight of 4 bits, on the GPU where there is one.

    Raises:
        RuntimeError: A result is wrong.
    """
    from ..autograd._functions import matmul_4bit
    from ..functional import dequantize_4bit, quantize_4bit
    from ..optim import Adam

    device = "cuda" if torch.cuda.is_available() else "cpu"
    p = torch.nn.Parameter(torch.rand(64, 64, device=device))
    before = p.detach().clone()
    optimizer = Adam([p])
    p.grad = torch.rand(64, 64, device=device)
    optimizer.step()
    if torch.equal(before, p):
        raise RuntimeError("a step of Adam changed nothing")
    x = torch.rand(4, 64, device=device)
    packed, state = quantize_4bit(before, quant_type="nf4")
    if not torch.allclose(matmul_4bit(x, packed, state), x @ dequantize_4bit(packed, state).t(), atol=1e-3):
        raise RuntimeError("a product with a weight of 4 bits is wrong")


def get_package_version(name: str) -> str:
    """The version of an installed package, or "not found"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not found"


def show_environment() -> None:
    """Print the versions of what matters."""
    print(f"Platform: {platform.platform()}")
    if platform.system() == "Linux":
        print(f"  libc: {'-'.join(platform.libc_ver())}")
    print(f"Python: {platform.python_version()}")
    print(f"PyTorch: {torch.__version__}")
    print(f"  CUDA: {torch.version.cuda or 'N/A'}")
    print("Related packages:")
    for package in _RELATED_PACKAGES:
        print(f"  {package}: {get_package_version(package)}")


def main() -> None:
    """Print the report; exit with status 1 where the computation fails."""
    print_header(f"bitsandbytes v{bnb_version}")
    print("halfbyte stands in for bitsandbytes here; `halfbyte doctor` says more of it.")
    show_environment()
    print_header("")
    cuda_specs = get_cuda_specs()
    if cuda_specs is None:
        print("No CUDA device: everything is computed on the CPU.")
    else:
        print_diagnostics(cuda_specs)
    print("Checking that the library is importable and callable...")
    try:
        sanity_check()
    except Exception as error:
        print(f"FAILED: {type(error).__name__}: {error}")
        sys.exit(1)
    print("SUCCESS!")


__getattr__ = missing_attribute(__name__)
