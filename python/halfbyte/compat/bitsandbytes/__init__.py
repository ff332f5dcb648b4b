"""The names of bitsandbytes, served by halfbyte: `halfbyte.compat` says when.

As the first line of a script, `import halfbyte.compat.bitsandbytes` has `import bitsandbytes` mean halfbyte.
"""

from __future__ import annotations

import sys

if __name__ != "bitsandbytes":
    import importlib

    from halfbyte.compat import install

    install()
    sys.modules[__name__] = importlib.import_module("bitsandbytes")
else:
    from halfbyte.compat import version as _version

    from . import _ops, autograd, cextension, consts, cuda_specs, functional, nn, optim, utils
    from ._missing import missing_attribute
    from .autograd._functions import MatmulLtState, matmul, matmul_4bit
    from .nn import modules
    from .optim import adam

    # accelerate trains on a CPU, and transformers loads on one, only where these say that it can be done.
    features = {"multi_backend"}
    supported_torch_devices = {"cpu", "cuda"}

    __halfbyte__ = True
    __version__ = _version()

    __all__ = [
        "MatmulLtState",
        "_ops",
        "adam",
        "autograd",
        "cextension",
        "consts",
        "cuda_specs",
        "features",
        "functional",
        "matmul",
        "matmul_4bit",
        "modules",
        "nn",
        "optim",
        "supported_torch_devices",
        "utils",
    ]

    __getattr__ = missing_attribute(__name__)
