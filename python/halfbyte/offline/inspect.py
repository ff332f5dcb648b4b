"""What a checkpoint on disk holds."""

from __future__ import annotations

from typing import Any

from halfbyte import _native
from halfbyte.offline import config_json
from halfbyte.offline.hub import Hub, resolve_source
from halfbyte.offline.options import StrPath
from halfbyte.offline.report import InspectReport


def inspect_checkpoint(
    path: StrPath,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: StrPath | None = None,
) -> InspectReport:
    """What a folder or a ``.safetensors`` file holds: which weights are quantized, how, and how large.

    Only headers, quantization states and the scales that are few (rows' and nested ones) are read. The checkpoint may
    be of any origin.

    Args:
        path: A folder, a file, or a name on the hub.
        revision: As for `quantize_checkpoint`.
        token: As for `quantize_checkpoint`.
        cache_dir: As for `quantize_checkpoint`.

    Raises:
        CheckpointError: The files break their format.
        OSError: They cannot be read.
    """
    folder = resolve_source(path, Hub(revision, token, cache_dir))
    # A single file is inspected as it is: a config.json beside it may be another model's.
    config = config_json.read_config(folder) if folder.is_dir() else None
    data: dict[str, Any] = {**_native.inspect(str(folder), config_json.native_text(config))}
    data["quantization_config"] = (config or {}).get("quantization_config")
    return InspectReport(data)
