"""Where the layer and the compiled core are."""

from __future__ import annotations

from pathlib import Path

from halfbyte import _native

from ._missing import missing_attribute

PACKAGE_DIR = Path(_native.__file__).parent
DYNAMIC_LIBRARY_SUFFIX = Path(_native.__file__).suffix
PACKAGE_GITHUB_URL = "https://github.com/bitsandbytes-foundation/bitsandbytes"

NONPYTORCH_DOC_URL = f"{PACKAGE_GITHUB_URL}/blob/main/docs/source/nonpytorchcuda.mdx"

__getattr__ = missing_attribute(__name__)
