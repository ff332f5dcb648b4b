"""4-bit model weights for PyTorch.

Names are imported when first used: `import halfbyte` by itself imports neither torch, transformers nor numpy. It does
arrange that transformers and diffusers, once they are imported, find this package's quantizer
(`halfbyte.integrations.register`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halfbyte import arrays as arrays
    from halfbyte import functional as functional
    from halfbyte import nn as nn
    from halfbyte._native import CheckpointError as CheckpointError
    from halfbyte._native import __version__ as __version__
    from halfbyte.config import BitsAndBytesConfig as BitsAndBytesConfig
    from halfbyte.integrations.register import enable as enable
    from halfbyte.models.load import load_quantized as load_quantized
    from halfbyte.models.offload import count_experts as count_experts
    from halfbyte.models.offload import offload_experts as offload_experts
    from halfbyte.models.quantize import dequantize_model as dequantize_model
    from halfbyte.models.quantize import quantize_model as quantize_model
    from halfbyte.offline.dequantize import dequantize_checkpoint as dequantize_checkpoint
    from halfbyte.offline.inspect import inspect_checkpoint as inspect_checkpoint
    from halfbyte.offline.quantize import plan_checkpoint as plan_checkpoint
    from halfbyte.offline.quantize import quantize_checkpoint as quantize_checkpoint
    from halfbyte.offline.verify import verify_checkpoint as verify_checkpoint
    from halfbyte.ops.autograd import matmul_4bit as matmul_4bit
    from halfbyte.ops.matmul_8bit import MatmulLtState as MatmulLtState
    from halfbyte.ops.matmul_8bit import matmul as matmul

# Public name -> the module that it is imported from: `halfbyte` for what is a module itself.
_HOME = {
    "BitsAndBytesConfig": "halfbyte.config",
    "CheckpointError": "halfbyte._native",
    "MatmulLtState": "halfbyte.ops.matmul_8bit",
    "__version__": "halfbyte._native",
    "arrays": "halfbyte",
    "count_experts": "halfbyte.models.offload",
    "dequantize_checkpoint": "halfbyte.offline.dequantize",
    "dequantize_model": "halfbyte.models.quantize",
    "enable": "halfbyte.integrations.register",
    "functional": "halfbyte",
    "inspect_checkpoint": "halfbyte.offline.inspect",
    "load_quantized": "halfbyte.models.load",
    "matmul": "halfbyte.ops.matmul_8bit",
    "matmul_4bit": "halfbyte.ops.autograd",
    "nn": "halfbyte",
    "offload_experts": "halfbyte.models.offload",
    "plan_checkpoint": "halfbyte.offline.quantize",
    "quantize_checkpoint": "halfbyte.offline.quantize",
    "quantize_model": "halfbyte.models.quantize",
    "verify_checkpoint": "halfbyte.offline.verify",
}

_NEEDS_TORCH = {"MatmulLtState", "functional", "matmul", "matmul_4bit", "nn"}

__all__ = [
    "BitsAndBytesConfig",
    "CheckpointError",
    "MatmulLtState",
    "__version__",
    "arrays",
    "count_experts",
    "dequantize_checkpoint",
    "dequantize_model",
    "enable",
    "functional",
    "inspect_checkpoint",
    "load_quantized",
    "matmul",
    "matmul_4bit",
    "nn",
    "offload_experts",
    "plan_checkpoint",
    "quantize_checkpoint",
    "quantize_model",
    "verify_checkpoint",
]


def __getattr__(name: str) -> object:
    """Import a public name from its module on first use, and keep it."""
    try:
        home = _HOME[name]
    except KeyError:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}; it has {', '.join(__all__)}") from None
    import importlib

    if name in _NEEDS_TORCH:
        from halfbyte._extras import require

        require("torch", "torch", f"halfbyte.{name}")
    if home == __name__:
        value: object = importlib.import_module(f"{home}.{name}")
    else:
        value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names too that have not been imported yet."""
    return sorted({*globals(), *__all__})


def _register() -> None:
    """Let transformers and diffusers find this package, whenever they are imported."""
    from halfbyte.integrations.register import register

    register()


_register()
