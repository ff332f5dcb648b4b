"""``config.json``: read with care, and given or relieved of its ``quantization_config``."""

from __future__ import annotations

import bisect
import json
import math
from pathlib import Path
from typing import Any

from halfbyte._native import CheckpointError

FILE = "config.json"
# The largest that are published hold long label lists and stay under 1 MB.
MAX_BYTES = 64 * 2**20


def read_config(folder: Path) -> dict[str, Any] | None:
    """The folder's ``config.json``, its keys in order; None where there is none.

    ``Infinity`` is kept: transformers writes it into configs of state-space models.

    Raises:
        CheckpointError: The file is no JSON object, is nested too deeply, holds NaN, or is larger than 64 MiB.
        OSError: The file cannot be read.
    """
    path = folder / FILE
    if not path.exists():
        return None
    if not path.is_file():
        raise CheckpointError(f"{path}: is not a file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise CheckpointError(f"{path}: must be a model's configuration of at most {MAX_BYTES} bytes, got {size}")
    try:
        config = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_constant)
        # Both directions have a limit of their own on the depth.
        native_text(config)
    except RecursionError:
        raise CheckpointError(f"{path}: is nested too deeply for a model's configuration") from None
    except ValueError as error:  # bad JSON, bad UTF-8, numbers too long to read
        raise CheckpointError(f"{path}: is not valid JSON ({error}); save, or download, it again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {_KINDS[type(config)]}")
    return config


_KINDS = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("it holds NaN")
    return float(name)


def native_text(config: dict[str, Any] | None) -> str | None:
    """The config as strict JSON: infinities become null, which JSON itself has no word for. None stays None."""
    if config is None:
        return None
    try:
        return json.dumps(config, allow_nan=False)
    except ValueError:
        return json.dumps(_without_infinities(config), allow_nan=False)


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_infinities(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_infinities(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def existing_quantization(config: dict[str, Any]) -> str | None:
    """The method by which the checkpoint is quantized already, as its config says; None when it is not.

    The part of a composite model (``text_config``) counts too. ``compression_config`` is an older name for the same.
    """
    parts = [config, *(v for k, v in config.items() if k.endswith("_config") and isinstance(v, dict))]
    for part in parts:
        for key in ("quantization_config", "compression_config"):
            found = part.get(key)
            if found is None:
                continue
            method = found.get("quant_method") if isinstance(found, dict) else None
            # bitsandbytes' configs before 2023-09 do not name their method.
            if method is None and isinstance(found, dict) and (found.get("load_in_4bit") or found.get("load_in_8bit")):
                method = "bitsandbytes"
            return str(method or "unknown method")
    return None


def with_quantization(config: dict[str, Any], quantization: dict[str, Any], dtype: str | None = None) -> str:
    """The text of the output's ``config.json``: the source's keys and order, ``quantization_config``, and ``dtype``.

    transformers writes its configs sorted, two spaces to a level, with a final newline. The new key goes to its place
    in the alphabet when the source's keys are sorted, else to the end; its own keys are sorted, as transformers has
    them.
    """
    quantization = dict(sorted(quantization.items()))
    out = _with_dtype({k: v for k, v in config.items() if k != "quantization_config"}, dtype)
    keys = list(out)
    place = bisect.bisect(keys, "quantization_config") if keys == sorted(keys) else len(keys)
    items = list(out.items())
    items.insert(place, ("quantization_config", quantization))
    return dump(dict(items))


def without_quantization(config: dict[str, Any], dtype: str | None) -> str:
    """The text of the config of a dequantized checkpoint: without ``quantization_config``, in ``dtype``."""
    return dump(_with_dtype({k: v for k, v in config.items() if k != "quantization_config"}, dtype))


def names_dtype(config: dict[str, Any]) -> bool:
    """Whether the config of a model, or of a part of a composite one, names a dtype."""
    parts = [config, *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))]
    return any(part.get(key) is not None for part in parts for key in ("dtype", "torch_dtype"))


def _with_dtype(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """The config of a model in another dtype; None leaves it as it is.

    ``dtype`` goes under the names that the source uses: ``dtype``, ``torch_dtype`` (transformers before 4.56), or both;
    parts of composite models that name a dtype get it too.
    """
    if dtype is None:
        return config
    out = dict(config)
    if not any(key in out for key in ("dtype", "torch_dtype")):
        # All versions of transformers read the older name.
        out["torch_dtype"] = dtype
    parts = {k: dict(v) for k, v in out.items() if k.endswith("_config") and isinstance(v, dict)}
    out.update(parts)
    for part in [out, *parts.values()]:
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = dtype
    return dict(sorted(out.items())) if list(config) == sorted(config) else out


def dump(config: dict[str, Any]) -> str:
    """JSON as transformers lays it out."""
    return json.dumps(config, indent=2) + "\n"
