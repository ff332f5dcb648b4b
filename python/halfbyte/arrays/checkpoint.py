"""The tensors of a checkpoint as arrays: 4-bit and int8 ones dequantized, or as they are stored."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from halfbyte import _native
from halfbyte._native import CheckpointError
from halfbyte.arrays.dtypes import FLOATS, Array, cast, widen
from halfbyte.arrays.quantize import PackedArray, check_part, dequantize_4bit, dequantize_rowwise
from halfbyte.geometry import BLOCK_SIZES, NESTED_BLOCKSIZE, PACKED_KEYS, blocks_of, packed_bytes
from halfbyte.offline.shards import Entry, read_entries

_MAX_STATE_BYTES = 2**16

_ON_DISK = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "uint16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint, as `load_tensor` gives it.

    Attributes:
        name: Its name; of a quantized weight, without the names of its scales.
        shape: Its shape, once dequantized.
        dtype: Its dtype, once dequantized, such as "bfloat16"; "float32" of int8 weights, which do not record one.
        quant_type: "nf4", "fp4", "int8", or None where it is not quantized.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    quant_type: str | None


def iter_tensors(path: str | os.PathLike[str]) -> Iterator[TensorInfo]:
    """The tensors of a checkpoint, in the order of its files. Only headers are read, and the states of 4-bit weights.

    Args:
        path: A folder with `model.safetensors` or its index, a `.safetensors` file, or a model name, which is fetched
            from the hub when `huggingface_hub` is installed.

    Raises:
        CheckpointError: There is no checkpoint there, or it is broken; the message names the file.
    """
    entries = read_entries(path)
    owned = set()
    for name in entries:
        for key in _state_keys(entries, name):
            owned |= {f"{name}.{key}", f"{name}.absmax", f"{name}.quant_map"}
            owned |= {f"{name}.nested_absmax", f"{name}.nested_quant_map"}
        if _int8_scales(entries, name) is not None:
            owned |= {_beside(name, "SCB"), _beside(name, "weight_format")}
    for name, entry in entries.items():
        if name in owned:
            continue
        if _state_keys(entries, name):
            state = _read_state(entries, name)
            yield TensorInfo(name, tuple(state["shape"]), state["dtype"], state["quant_type"])
        elif _int8_scales(entries, name) is not None:
            yield TensorInfo(name, entry.shape, "float32", "int8")
        else:
            dtype = "bfloat16" if entry.dtype == "BF16" else _ON_DISK.get(entry.dtype, entry.dtype)
            yield TensorInfo(name, entry.shape, dtype, None)


def load_tensor(path: str | os.PathLike[str], name: str, dtype: DTypeLike | None = None) -> Array:
    """One tensor of a checkpoint, dequantized where it is quantized (4-bit, or LLM.int8()). Nothing else is read.

    Args:
        path: As of `iter_tensors`.
        name: The tensor's name, such as "model.layers.0.mlp.up_proj.weight".
        dtype: As of `dequantize_4bit`. Tensors that are not quantized are cast; by default they keep their dtype, and
            bfloat16 is given as float32.

    Raises:
        CheckpointError: There is no such tensor or checkpoint, or it is broken; the message names the file.
    """
    entries = read_entries(path)
    entry = _entry(entries, path, name)
    if _state_keys(entries, name):
        return dequantize_4bit(_packed(entries, name), dtype)
    scales = _int8_scales(entries, name)
    if scales is not None:
        _check_rows(entries, entry, scales)
        return dequantize_rowwise(_stored(entry), _stored(scales).reshape(-1), np.float32 if dtype is None else dtype)
    array = _stored(entry)
    array = widen(array) if entry.dtype == "BF16" else array
    return array if dtype is None else cast(array, dtype)


def load_packed(path: str | os.PathLike[str], name: str) -> PackedArray:
    """One 4-bit weight of a checkpoint as it is stored, its bytes viewed as uint8.

    Arguments and errors are those of `load_tensor`.
    """
    entries = read_entries(path)
    entry = _entry(entries, path, name)
    if not _state_keys(entries, name):
        raise CheckpointError(f"{entry.file}: {name!r} must be a 4-bit weight, got {entry.dtype} {list(entry.shape)}")
    return _packed(entries, name)


def _entry(entries: Mapping[str, Entry], path: object, name: str) -> Entry:
    if name not in entries:
        close = difflib.get_close_matches(str(name), entries, 3) or list(entries)[:3]
        raise CheckpointError(f"{path}: name must be one of its tensors ({', '.join(close)}, …), got {name!r}")
    return entries[name]


def _stored(entry: Entry) -> Array:
    """A tensor as it lies in the file; bfloat16 as its bits."""
    if entry.dtype not in _ON_DISK:
        raise CheckpointError(f"{entry.file}: dtype of {entry.name!r} must be one that numpy has, got {entry.dtype}")
    little = np.dtype(_ON_DISK[entry.dtype]).newbyteorder("<")
    return np.frombuffer(entry.read(), little).astype(little.newbyteorder("="), copy=False).reshape(entry.shape)


def _beside(name: str, leaf: str) -> str:
    """The name of another tensor of the same module."""
    return f"{name.rpartition('.')[0]}.{leaf}".lstrip(".")


def _int8_scales(entries: Mapping[str, Entry], name: str) -> Entry | None:
    """The scales of an LLM.int8() weight."""
    if entries[name].dtype != "I8" or name.rpartition(".")[2] != "weight":
        return None
    scales = entries.get(_beside(name, "SCB"))
    if scales is None and _beside(name, "weight_format") in entries:
        raise CheckpointError(f"{entries[name].file}: {name!r} is an int8 weight without its {_beside(name, 'SCB')}")
    return scales


def _check_rows(entries: Mapping[str, Entry], codes: Entry, scales: Entry) -> None:
    """Check that the parts of an LLM.int8() weight fit each other."""
    if len(codes.shape) != 2:
        raise CheckpointError(f"{codes.file}: {codes.name!r} must have two dimensions, got {list(codes.shape)}")
    if scales.dtype != "F32" or prod(scales.shape) != codes.shape[0]:
        raise CheckpointError(
            f"{scales.file}: {scales.name!r} must be F32 [{codes.shape[0]}], a scale for each row of {codes.name!r}, "
            f"got {scales.dtype} {list(scales.shape)}"
        )
    layout = entries.get(_beside(codes.name, "weight_format"))
    if layout is not None and layout.dtype != "U8":
        raise CheckpointError(f"{layout.file}: {layout.name!r} must be U8, got {layout.dtype}")
    if layout is not None and layout.read() != b"\0":
        raise CheckpointError(f"{layout.file}: {layout.name!r} must be 0 (rows), got {_stored(layout).tolist()}")


def _state_keys(entries: Mapping[str, Entry], name: str) -> list[str]:
    """Under which keys the weight has the state of a 4-bit one."""
    return [key for key in PACKED_KEYS if f"{name}.{key}" in entries]


def _read_state(entries: Mapping[str, Entry], name: str) -> dict[str, Any]:
    """The JSON of a 4-bit weight, checked."""
    keys = _state_keys(entries, name)
    entry = entries[f"{name}.{keys[0]}"]

    def fail(problem: str) -> CheckpointError:
        return CheckpointError(f"{entry.file}: {entry.name!r}: {problem}")

    if len(keys) > 1:
        raise fail(f"a weight must have one quantization state, got {' and '.join(keys)}")
    if entry.dtype != "U8" or entry.end - entry.begin > _MAX_STATE_BYTES:
        raise fail(f"must be the uint8 text of a quantization state, got {entry.dtype} {list(entry.shape)}")
    try:
        state = json.loads(entry.read())
    except (ValueError, RecursionError) as error:
        raise fail(f"must be the JSON of a quantization state, got: {error}") from None
    if not isinstance(state, dict):
        raise fail(f"must be a JSON object, got {type(state).__name__}")
    shape = state.get("shape")
    legal = {
        "quant_type": (keys[0].rpartition("__")[2],),
        "blocksize": BLOCK_SIZES,
        "dtype": FLOATS,
        "nested_blocksize": (None, NESTED_BLOCKSIZE),
        "nested_dtype": (None, "float32"),
    }
    for key, values in legal.items():
        if state.get(key) not in values:
            raise fail(f"{key} must be one of {', '.join(map(repr, filter(None, values)))}, got {state.get(key)!r}")
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
        raise fail(f"shape must be a list of non-negative integers, got {shape!r}")
    if "nested_blocksize" in state and not isinstance(state.get("nested_offset"), (int, float)):
        raise fail(f"nested_offset must be a number, got {state.get('nested_offset')!r}")
    return state


def _packed(entries: Mapping[str, Entry], name: str) -> PackedArray:
    """A 4-bit weight, whatever dtype its bytes are stored as, and wherever its parts are."""
    entry, state = entries[name], _read_state(entries, name)
    size = packed_bytes(prod(state["shape"]))

    def part(key: str) -> Array:
        if f"{name}.{key}" not in entries:
            raise CheckpointError(f"{entry.file}: {name!r} is a 4-bit weight without its {name}.{key}")
        found = entries[f"{name}.{key}"]
        array = _stored(found)
        return cast(widen(array) if found.dtype == "BF16" else array, np.float32) if array.dtype != np.uint8 else array

    data = np.frombuffer(entry.read(), np.uint8)
    itemsize = np.dtype(_ON_DISK.get(entry.dtype, "uint8")).itemsize
    if not size <= data.size < size + itemsize:
        raise CheckpointError(
            f"{entry.file}: {name!r} must hold {size} packed bytes for the shape {state['shape']}, got {data.size}"
        )
    nested: dict[str, Any] = {}
    if "nested_blocksize" in state:
        absmax2 = part("nested_absmax").reshape(-1)
        scales = blocks_of(prod(state["shape"]), state["blocksize"])
        try:
            check_part("nested_absmax", absmax2, np.float32, blocks_of(scales, NESTED_BLOCKSIZE))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{entry.file}: {name}.{error}") from None
        nested = {"absmax2": absmax2, "offset": float(np.float32(state["nested_offset"]))}
        if f"{name}.nested_quant_map" in entries and not np.allclose(
            part("nested_quant_map"), _native.dynamic_map(), rtol=0, atol=1e-6
        ):
            raise CheckpointError(f"{entry.file}: {name}.nested_quant_map must be the signed 8-bit dynamic map")
    try:
        return PackedArray(
            data[:size].reshape(-1, 1),
            part("absmax").reshape(-1),
            tuple(state["shape"]),
            state["dtype"],
            state["blocksize"],
            state["quant_type"],
            **nested,
        )
    except (TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{entry.file}: {name!r}: {error}") from None
