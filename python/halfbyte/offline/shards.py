"""The safetensors files of a checkpoint: which there are, and their tensors as bytes, without torch.

safetensors checks each header; the bytes are then read where the header says, since numpy has no name for some of the
dtypes that models are kept in.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from halfbyte._native import CheckpointError
from halfbyte.offline.hub import resolve_source

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
AGAIN = "it is incomplete: save, or download, it again"
_MAX_INDEX_BYTES = 512 * 2**20


def _is_inside(file: str) -> bool:
    """Is this a path that leads to a place inside the folder it starts from? Also ``part/model.safetensors``."""
    parts = file.split("/")
    return not ({"", ".", ".."} & set(parts)) and "\\" not in file and "\0" not in file and not Path(file).is_absolute()


def list_shards(path: Path) -> dict[Path, set[str]]:
    """The files of the checkpoint at `path`, a folder or one file, and which tensors its index expects in each."""
    if path.is_file():
        return {path: set()}
    index, single = path / INDEX, path / SINGLE
    if single.is_file():
        return {single: set()}
    if not index.is_file():
        raise CheckpointError(f"{path}: holds no checkpoint; expected {SINGLE} or {INDEX}")
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise CheckpointError(f"{index}: must have at most {_MAX_INDEX_BYTES} bytes, got {index.stat().st_size}")
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, set[str]] = {}
        for name, file in table.items():
            if not isinstance(file, str) or not _is_inside(file):
                raise CheckpointError(f"{index}: the file of {name!r} must be inside the folder, got {file!r}")
            files.setdefault(path / file, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        why = f" ({error})" if isinstance(error, ValueError) else ""
        raise CheckpointError(
            f'{index}: is no valid index, an object with "weight_map": tensor name -> file name{why}; save, or '
            "download, it again"
        ) from None
    return files


def open_shard(file: Path, framework: str, **how: Any) -> Any:
    """`safetensors.safe_open`, whose errors name the file."""
    if not file.is_file():
        raise CheckpointError(f"{file}: there is no such file, but the checkpoint has tensors in it; {AGAIN}")
    try:
        return safe_open(file, framework=framework, **how)
    except SafetensorError as error:
        raise not_whole(file, error) from None


def not_whole(file: str | os.PathLike[str], error: SafetensorError) -> CheckpointError:
    """A file that safetensors refuses: what it is instead, or what safetensors says."""
    with Path(file).open("rb") as stream:
        if stream.read(8) == b"version ":
            return CheckpointError(f"{file}: is a Git LFS pointer and not the weights: fetch them with `git lfs pull`")
    return CheckpointError(f"{file}: is not a whole safetensors file ({error}); save, or download, it again")


def lacking(file: Path, names: list[str]) -> CheckpointError:
    """A file does not hold these tensors, which the index says are there."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return CheckpointError(f"{file}: lacks {names[0]!r}{more}, which {INDEX} says it holds; {AGAIN}")


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its dtype as safetensors names it ("BF16"), and where its bytes are."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def read(self) -> bytearray:
        """The bytes. CheckpointError when the file has become shorter since its header was read."""
        size = self.end - self.begin
        data = bytearray(size)
        with self.file.open("rb") as stream:
            stream.seek(self.begin)
            if stream.readinto(data) != size:
                raise CheckpointError(
                    f"{self.file}: ends inside of the tensor {self.name!r}; it was changed while it was being read"
                )
        return data


def read_entries(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """Every tensor of a checkpoint by its name, in the order of files and of data. No tensor is read."""
    source = resolve_source(path)
    entries: dict[str, Entry] = {}
    for file, expected in list_shards(source).items():
        with open_shard(file, "numpy"):
            # Opened to have it checked: the lengths fit the shapes, and nothing overlaps or lies outside of the file.
            pass
        found = _header(file)
        absent = sorted(expected - found.keys())
        if absent:
            raise lacking(file, absent)
        entries.update(found)
    return entries


def _header(file: Path) -> dict[str, Entry]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    start = 8 + length
    found = [
        Entry(name, file, item["dtype"], tuple(item["shape"]), *(start + offset for offset in item["data_offsets"]))
        for name, item in header.items()
        if name != "__metadata__"
    ]
    return {entry.name: entry for entry in sorted(found, key=lambda entry: (entry.begin, entry.name))}
