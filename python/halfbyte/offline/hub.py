"""Model names: from ``org/name`` to a local folder, through huggingface_hub when that is installed."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfbyte._native import CheckpointError

# What a quantized copy needs. No pickles (``.bin``, ``.pt``), no exports for other runtimes.
ALLOW = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "*.vocab",
    "*.py",
    "*.md",
    "LICENSE*",
    "NOTICE*",
)
# Second copies of the same weights: in subfolders, in the vendor's own layout, in other precisions. Numbered subfolders
# (``2_Dense``) are the further modules of a sentence-transformers model.
IGNORE = (
    "[!0-9]*/*.safetensors",
    "consolidated*.safetensors",
    "model.fp16*.safetensors",
    "model.bf16*.safetensors",
    "original/*",
    "onnx/*",
    "openvino/*",
    "coreml/*",
)

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_PART}(?:/{_PART})?", re.ASCII)
_FILE_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json", ".git")


def is_model_name(text: str) -> bool:
    """True for what can only be a name on the hub: ``org/name`` or ``name``, and nothing of that name on this disk.

    A text that starts like a path (``/``, ``./``, ``../``, ``~``), ends like a file, or leads into an existing
    folder is a path, whether or not it exists.
    """
    if os.path.lexists(text) or text.lower().endswith(_FILE_ENDINGS):
        return False
    if _NAME.fullmatch(text) is None or ".." in text or "--" in text:
        return False
    return "/" not in text or not os.path.exists(text.split("/")[0])


def resolve_source(source: str | os.PathLike[str], *, progress: bool = False) -> Path:
    """The local folder or file of a checkpoint, fetched from the hub when ``source`` is a model name.

    Parameters
    ----------
    source
        A folder, a ``.safetensors`` file, or a model name such as ``"org/name"``.
    progress
        Show huggingface_hub's progress bars while fetching.

    Raises
    ------
    CheckpointError
        Nothing has that name, here or on the hub, or the model's licence was not accepted.
    OSError
        The hub cannot be reached, and the model is not in the cache.
    """
    text = os.fspath(source)
    if not isinstance(text, str):
        raise ValueError(f"source is {text!r}: expected a str or a path")
    if isinstance(source, str) and is_model_name(text):
        return _fetch(text, progress=progress)
    path = Path(text).expanduser() if text.startswith("~") else Path(text)
    if not text or not path.exists():
        raise CheckpointError(f"{text or repr(text)}: no such file or folder")
    return path


def _fetch(name: str, *, progress: bool) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise CheckpointError(
            f"{name}: no such folder; to fetch it from the hub as a model name: pip install 'halfbyte[hub]'"
        ) from None
    try:
        with _progress_bars(progress):
            folder = huggingface_hub.snapshot_download(
                name, allow_patterns=list(ALLOW), ignore_patterns=list(IGNORE), library_name="halfbyte"
            )
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{name}: the hub asks for its licence to be accepted: do that on https://huggingface.co/{name}, "
            "then log in with: hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{name}: no such folder, and the hub has no model of that name (a private one needs: hf auth login)"
        ) from None
    except errors.HFValidationError as error:
        raise CheckpointError(f"{name}: no such folder, and no name for a model: {_first_line(error)}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise OSError(
            f"{name}: no such folder; it is not in the hub's cache, and the hub cannot be reached "
            "(no network, or HF_HUB_OFFLINE is set)"
        ) from None
    except Exception as error:  # the HTTP library's own exceptions differ between releases of huggingface_hub
        raise OSError(
            f"{name}: no such folder, and fetching it from the hub failed: {_first_line(error) or type(error).__name__}"
        ) from error
    return Path(folder)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


@contextlib.contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Hide huggingface_hub's bars inside the block unless they are wanted, and leave its setting as it was."""
    utils: Any = importlib.import_module("huggingface_hub.utils")
    if shown or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()
