"""The tensors of a checkpoint folder, for torch: by name, one at a time, from safetensors alone.

`Folder.view` maps the file: nothing is read until it is used, and the tensor keeps the mapping alive. `Folder.read`
gives a tensor memory of its own, which goes as soon as the tensor does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from halfbyte._native import CheckpointError
from halfbyte.backends.cpu import aligned
from halfbyte.offline import config_json
from halfbyte.offline.hub import Hub, resolve_source
from halfbyte.offline.shards import INDEX, lacking, list_shards, open_shard

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def dtypes_in(files: Iterable[str]) -> dict[str, torch.dtype]:
    """The dtypes of the tensors in safetensors files, from their headers; without rare ones, and other files."""
    found: dict[str, torch.dtype] = {}
    for file in files:
        if not file.endswith(".safetensors"):
            continue
        with open_shard(Path(file), "pt") as handle:
            for name in handle.keys():  # noqa: SIM118  (not a dict)
                dtype = _DTYPES.get(handle.get_slice(name).get_dtype())
                if dtype is not None:
                    found[name] = dtype
    return found


class Folder:
    """A checkpoint: a folder with `model.safetensors` or its index, or one `.safetensors` file. A context manager.

    Attributes:
        path: What was opened.
        names: All tensors, in the order of files and of data.
        config: `config.json` of the folder, or None.

    Raises:
        CheckpointError: There is no checkpoint there, or it is broken; the message names the file.
    """

    def __init__(self, path: Any, hub: Hub = Hub()) -> None:  # noqa: B008  (frozen)
        """Read the index and the headers."""
        self.path = resolve_source(path, hub)
        folder = self.path if self.path.is_dir() else self.path.parent
        self.config = config_json.read_config(folder)
        self._stack = contextlib.ExitStack()
        self._views: dict[Path, Any] = {}
        self._readers: dict[Path, Any] = {}
        self._files: dict[str, Path] = {}
        self._instead: dict[str, Tensor] = {}
        listed = list_shards(self.path)
        for file, expected in listed.items():
            handle = self._open(self._views, file)
            # In the order of the data, where this release of safetensors can tell.
            found = handle.offset_keys() if hasattr(handle, "offset_keys") else handle.keys()
            absent = sorted(expected - set(found))
            if absent:
                raise lacking(file, absent)
            for name in found:
                other = self._files.get(name)
                if other is None or name in expected:
                    self._files[name] = file
                elif name not in listed[other]:
                    raise CheckpointError(
                        f"{file}: {name!r} is in {other} too, and {INDEX} does not say which to take; save, or "
                        "download, the checkpoint again"
                    )
        self.names = list(self._files)
        if not self.names:
            raise CheckpointError(f"{self.path}: holds no tensor")

    def _open(self, handles: dict[Path, Any], file: Path, **how: Any) -> Any:
        if file not in handles:
            handles[file] = self._stack.enter_context(open_shard(file, "pt", device="cpu", **how))
        return handles[file]

    def __enter__(self) -> Folder:
        """Return the folder itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files. Tensors that were given out stay valid."""
        self._stack.close()

    def replace(self, hidden: Collection[str], tensors: Mapping[str, tuple[str, Tensor]]) -> None:
        """Have other tensors in the place of some.

        Args:
            hidden: Names of those that are as if they were not there.
            tensors: By name: the tensor of the checkpoint that each is a part of, and itself.
        """
        self._instead.update({name: tensor for name, (_, tensor) in tensors.items()})
        self._files.update({name: self._files[source] for name, (source, _) in tensors.items()})
        for name in hidden:
            del self._files[name]
        self.names = list(self._files)

    def is_replaced(self, name: str) -> bool:
        """Is a tensor one that was given to `replace`?"""
        return name in self._instead

    def __contains__(self, name: str) -> bool:
        """Is there a tensor of this name?"""
        return name in self._files

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name]

    def dtype(self, name: str) -> str:
        """The dtype of a tensor, as safetensors writes it."""
        dtype: str = self._open(self._views, self._files[name]).get_slice(name).get_dtype()
        return dtype

    def facts(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype, from the header. ValueError for a dtype that models are not kept in."""
        if name in self._instead:
            return tuple(self._instead[name].shape), self._instead[name].dtype
        piece = self._open(self._views, self._files[name]).get_slice(name)
        dtype = _DTYPES.get(piece.get_dtype())
        if dtype is None:
            # Rare ones, such as 8-bit floats: let safetensors say.
            dtype = self.view(name).dtype
        return tuple(piece.get_shape()), dtype

    def view(self, name: str) -> Tensor:
        """The tensor, in mapped memory where its address suits its dtype. Writing to it does not reach the file."""
        if name in self._instead:
            return self._instead[name]
        file = self._files[name]
        tensor: Tensor = self._open(self._views, file).get_tensor(name)
        return aligned(tensor)

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own."""
        if name in self._instead:
            return self._instead[name].clone()
        file = self._files[name]
        try:
            handle = self._open(self._readers, file, backend="pread")
        except TypeError:
            # safetensors before 0.8 can only map. Pages of the file then count as memory of the process.
            return self.view(name).clone()
        tensor: Tensor = handle.get_tensor(name)
        return tensor
