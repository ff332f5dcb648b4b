"""Checkpoints by their names on the hub: from ``org/name`` to a local folder, through huggingface_hub."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Hub:
    """Where and as whom to look a model up, for names on the hub.

    Attributes:
        revision: A branch, a tag or a commit; None for the main branch.
        token: An access token; True for the one that ``hf auth login`` has stored, False for none, None for the stored
            one where there is one.
        cache_dir: The folder of downloaded files; None for huggingface_hub's.
        progress: Show huggingface_hub's progress bars.
    """

    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | os.PathLike[str] | None = None
    progress: bool = False


def resolve_source(source: str | os.PathLike[str], hub: Hub = Hub()) -> Path:
    """The local folder or file of a checkpoint, downloaded when ``source`` is a name on the hub.

    Args:
        source: A folder, a ``.safetensors`` file, or a name such as ``"org/name"``.
        hub: How to look a name up.

    Raises:
        CheckpointError: Nothing has that name, here or on the hub, or the model's licence was not accepted.
        OSError: The hub cannot be reached, and the model is not in the cache.
        ValueError: A revision of what is not on the hub.
    """
    text = os.fspath(source)
    if not isinstance(text, str):
        raise ValueError(f"source must be a str or a path, got {text!r}")
    if isinstance(source, str) and is_model_name(text):
        return _download(text, hub)
    path = Path(text).expanduser() if text.startswith("~") else Path(text)
    if not text or not path.exists():
        raise CheckpointError(f"{text or repr(text)}: no such file or folder")
    if hub.revision is not None:
        raise ValueError(f"revision must be None for a file or folder on this disk ({text}), got {hub.revision!r}")
    return path


def resolve_sources(sources: tuple[str | os.PathLike[str], str | os.PathLike[str]], hub: Hub) -> tuple[Path, Path]:
    """Both checkpoints of a comparison. A revision is that of those that are names on the hub."""
    named = [isinstance(source, str) and is_model_name(source) for source in sources]
    local = Hub(None, hub.token, hub.cache_dir, hub.progress) if any(named) else hub
    a, b = (resolve_source(source, hub if name else local) for source, name in zip(sources, named, strict=True))
    return a, b


def _download(name: str, hub: Hub) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise CheckpointError(
            f"{name}: no such folder; to fetch it from the hub as a model name: pip install 'halfbyte[hub]'"
        ) from None
    try:
        with _progress_bars(hub.progress):
            folder = huggingface_hub.snapshot_download(
                name,
                revision=hub.revision,
                token=hub.token,
                cache_dir=None if hub.cache_dir is None else os.fspath(hub.cache_dir),
                allow_patterns=list(ALLOW),
                ignore_patterns=list(IGNORE),
                library_name="halfbyte",
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
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{name}: the model has no revision {hub.revision!r} on the hub") from None
    except errors.HFValidationError as error:
        raise CheckpointError(f"{name}: no such folder, and no name for a model: {_first_line(error)}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        at = "" if hub.revision is None else f" at revision {hub.revision!r}"
        raise OSError(
            f"{name}: no such folder; it is not in the hub's cache{at}, and the hub cannot be reached "
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
