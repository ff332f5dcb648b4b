"""numpy arrays: quantized as tensors are, and checkpoints read without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import halfbyte
import numpy as np
import pytest
import reference
from halfbyte import arrays
from safetensors import safe_open
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden"
BLOCKWISE = GOLDEN / "blockwise4.safetensors"
with safe_open(BLOCKWISE, "numpy") as _file:
    CASES = json.loads(_file.metadata()["cases"])
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def stored_entry(file: Path, name: str) -> np.ndarray:
    """A tensor of a file as it lies there; bfloat16 as its bits."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + length])[name]
    begin, end = (8 + length + offset for offset in entry["data_offsets"])
    dtype = {"F32": "f4", "F16": "f2", "BF16": "u2", "U8": "u1", "I8": "i1"}[entry["dtype"]]
    return np.frombuffer(data[begin:end], dtype).reshape(entry["shape"])


def values(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    return reference.from_float32(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# ---- quantize and dequantize -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(len(CASES)))
def test_golden_weights_are_read_and_made(case: int) -> None:
    name = f"c{case:03d}.weight"
    expected = stored_entry(BLOCKWISE, f"c{case:03d}.dequantized")
    found = arrays.load_tensor(BLOCKWISE, name, np.uint16 if CASES[case]["dtype"] == "bf16" else None)
    assert same_bits(found, expected)
    made = arrays.quantize_4bit(
        stored_entry(BLOCKWISE, f"c{case:03d}.input"),
        CASES[case]["quant_type"],
        CASES[case]["blocksize"],
        CASES[case]["nested"],
    )
    golden = arrays.load_packed(BLOCKWISE, name)
    # FP4 of bitsandbytes on CUDA differs where a value lies within two ulp of a threshold: 18 times in all cases.
    assert (made.codes != golden.codes).sum() <= (18 if made.quant_type == "fp4" else 0)
    assert same_bits(made.absmax, golden.absmax)
    if golden.offset is not None and golden.absmax2 is not None:
        assert made.absmax2 is not None
        np.testing.assert_allclose(made.absmax2, golden.absmax2, rtol=1e-6)
        np.testing.assert_allclose(made.offset, golden.offset, rtol=1e-6)
    assert (made.shape, made.dtype, made.blocksize) == (golden.shape, golden.dtype, golden.blocksize)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantize_gives_the_bits_of_the_torch_path(quant_type: str, dtype: str, blocksize: int, nested: bool) -> None:
    torch = pytest.importorskip("torch")
    from halfbyte import functional

    weight = values((37, 145), dtype, blocksize)
    tensor = torch.from_numpy(weight).view(getattr(torch, dtype))
    codes, state = functional.quantize_4bit(
        tensor, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
    )
    packed = arrays.quantize_4bit(weight, quant_type, blocksize, nested)
    assert same_bits(packed.codes, codes.numpy())
    assert same_bits(packed.absmax, state.absmax.numpy())
    if nested:
        assert packed.absmax2 is not None
        assert same_bits(packed.absmax2, state.state2.absmax.numpy())
        assert packed.offset == state.offset.item()
    dense = functional.dequantize_4bit(codes, state)
    bits = dense.view(torch.uint16) if dtype == "bfloat16" else dense
    assert same_bits(arrays.dequantize_4bit(packed, STORED[dtype]), bits.numpy())
    assert same_bits(arrays.dequantize_4bit(packed), dense.float().numpy() if dtype == "bfloat16" else dense.numpy())


def test_quantize_takes_any_layout() -> None:
    plain = values((24, 34), "float32")
    expected = arrays.quantize_4bit(plain)
    unaligned = np.frombuffer(b"x" + plain.tobytes(), np.uint8)[1:].view(np.float32).reshape(plain.shape)
    assert not unaligned.flags.aligned
    frozen = plain.copy()
    frozen.flags.writeable = False
    doubled = np.repeat(plain, 2, axis=1)[:, ::2]
    for same in (np.asfortranarray(plain), plain.astype(">f4"), unaligned, frozen, doubled, plain[::-1][::-1]):
        found = arrays.quantize_4bit(same)
        assert same_bits(found.codes, expected.codes)
        assert same_bits(found.absmax, expected.absmax)
    codes, scales = arrays.quantize_rowwise(plain.astype(">f4"))
    assert same_bits(codes, arrays.quantize_rowwise(plain)[0])
    assert same_bits(scales, np.abs(plain).max(1))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (0,), (0, 5), (5, 0), (2, 3, 5)])
@pytest.mark.parametrize("nested", [False, True])
def test_quantize_keeps_the_shape(shape: tuple[int, ...], nested: bool) -> None:
    packed = arrays.quantize_4bit(np.full(shape, 2, np.float16), nested=nested)
    back = arrays.dequantize_4bit(packed)
    assert (back.shape, back.dtype) == (shape, np.float16)
    assert (back == 2).all()
    codes, absmax = arrays.quantize_blockwise(np.full(shape, 2, np.float16))
    assert (arrays.dequantize_blockwise(codes, absmax) == 2).all()
    assert codes.shape == shape
    if shape:
        codes, scales = arrays.quantize_rowwise(np.full(shape, 2, np.float16))
        assert same_bits(arrays.dequantize_rowwise(codes, scales, np.float16), np.full(shape, 2, np.float16))


def test_quantize_logs_nonfinite(caplog: pytest.LogCaptureFixture) -> None:
    weight = values((2, 64), "float32")
    weight[1, 3] = np.nan
    back = arrays.dequantize_4bit(arrays.quantize_4bit(weight))
    assert "values of shape [2, 64] contain NaN or Inf; NaN gets code 0, blocks with Inf" in caplog.text
    assert back[1, 3] == -np.nanmax(np.abs(weight[1]))  # what code 0 of nf4 stands for
    weight[1, 3] = np.inf
    back = arrays.dequantize_4bit(arrays.quantize_4bit(weight))
    assert np.isfinite(back[0]).all()
    assert not np.isfinite(back[1]).any()


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("blocksize", [64, 4096])
def test_blockwise_gives_the_bits_of_the_torch_path(dtype: str, blocksize: int) -> None:
    torch = pytest.importorskip("torch")
    from halfbyte import functional

    weight = values((33, 140), dtype)
    tensor = torch.from_numpy(weight).view(getattr(torch, dtype))
    for code in (None, np.linspace(-1, 1, 256, dtype=np.float32)):
        codes, state = functional.quantize_blockwise(
            tensor, None if code is None else torch.from_numpy(code), blocksize=blocksize
        )
        found, absmax = arrays.quantize_blockwise(weight, code, blocksize)
        assert same_bits(found, codes.numpy())
        assert same_bits(absmax, state.absmax.numpy())
        state.dtype = torch.float32
        back = arrays.dequantize_blockwise(found, absmax, code, blocksize)
        assert same_bits(back, functional.dequantize_blockwise(codes, state).numpy())


@pytest.mark.parametrize("name", ["r0", "r1", "r2"])
def test_golden_rows(name: str) -> None:
    file = GOLDEN / "int8.safetensors"
    codes, scales = arrays.quantize_rowwise(stored_entry(file, f"{name}.input"))
    assert same_bits(codes, stored_entry(file, f"{name}.CB"))
    assert same_bits(scales, stored_entry(file, f"{name}.SCB"))
    np.testing.assert_allclose(
        arrays.dequantize_rowwise(codes, scales), stored_entry(file, f"{name}.dequantized"), rtol=3e-7
    )


def test_ml_dtypes_bfloat16() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = values((7, 33), "bfloat16")
    typed = bits.view(ml_dtypes.bfloat16)
    packed = arrays.quantize_4bit(typed)
    assert packed.dtype == "bfloat16"
    assert same_bits(packed.codes, arrays.quantize_4bit(bits).codes)
    back = arrays.dequantize_4bit(packed, ml_dtypes.bfloat16)
    assert back.dtype == ml_dtypes.bfloat16
    assert same_bits(back.view(np.uint16), arrays.dequantize_4bit(packed, np.uint16))
    assert same_bits(back.astype(np.float32), arrays.dequantize_4bit(packed))
    assert arrays.dequantize_4bit(packed, "bfloat16").dtype == ml_dtypes.bfloat16
    assert same_bits(arrays.quantize_rowwise(typed)[0], arrays.quantize_rowwise(bits)[0])
    assert same_bits(arrays.quantize_blockwise(typed)[0], arrays.quantize_blockwise(bits)[0])


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint with a 4-bit weight whose parts lie in two files, an int8 one, and plain tensors."""
    folder = tmp_path_factory.mktemp("arrays")
    weight = values((20, 31), "bfloat16")
    tensors = arrays.quantize_4bit(weight, "fp4", 32, nested=True).to_tensors("a.weight")
    codes, scales = arrays.quantize_rowwise(values((8, 16), "float16"))
    tensors |= {"b.weight": codes, "b.SCB": scales, "b.weight_format": np.array(0, np.uint8)}
    tensors |= {"b.bias": values((8,), "float16"), "ids": np.arange(3), "codes": np.ones(4, np.int8)}
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, own in shards.items():
        save_file({name: np.ascontiguousarray(tensors[name]) for name in own}, folder / file)
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_iter_tensors_lists_weights_once(checkpoint: Path) -> None:
    found = sorted(arrays.iter_tensors(checkpoint), key=lambda info: info.name)
    assert found == [
        arrays.TensorInfo("a.weight", (20, 31), "bfloat16", "fp4"),
        arrays.TensorInfo("b.bias", (8,), "float16", None),
        arrays.TensorInfo("b.weight", (8, 16), "float32", "int8"),
        arrays.TensorInfo("codes", (4,), "int8", None),
        arrays.TensorInfo("ids", (3,), "int64", None),
    ]


def test_load_tensor_finds_parts_in_other_files(checkpoint: Path) -> None:
    packed = arrays.quantize_4bit(values((20, 31), "bfloat16"), "fp4", 32, nested=True)
    found = arrays.load_packed(checkpoint, "a.weight")
    assert same_bits(found.codes, packed.codes)
    assert found.offset == packed.offset
    assert same_bits(arrays.load_tensor(checkpoint, "a.weight"), arrays.dequantize_4bit(packed))
    assert same_bits(arrays.load_tensor(checkpoint, "a.weight", np.float16), arrays.dequantize_4bit(packed, np.float16))


def test_load_tensor_reads_int8_and_plain(checkpoint: Path) -> None:
    codes, scales = arrays.quantize_rowwise(values((8, 16), "float16"))
    assert same_bits(arrays.load_tensor(checkpoint, "b.weight"), arrays.dequantize_rowwise(codes, scales))
    assert arrays.load_tensor(checkpoint, "b.weight", np.float16).dtype == np.float16
    assert same_bits(arrays.load_tensor(checkpoint, "ids"), np.arange(3))
    assert same_bits(arrays.load_tensor(checkpoint, "codes"), np.ones(4, np.int8))
    assert same_bits(arrays.load_tensor(checkpoint, "b.bias", np.float32), values((8,), "float16").astype(np.float32))


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "bitsandbytes"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float64"])
def test_load_tensor_reads_what_either_library_packs(tmp_path: Path, theirs: bool, nested: bool, storage: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save

    library: Any = pytest.importorskip("bitsandbytes.functional") if theirs else halfbyte.functional
    weight = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    packed, state = library.quantize_4bit(
        weight, compress_statistics=nested, quant_type="nf4", quant_storage=getattr(torch, storage)
    )
    parts = {f"w.{key}": value.contiguous() for key, value in state.as_dict(packed=True).items()}
    save({"w": packed, **parts}, tmp_path / "model.safetensors")
    expected = halfbyte.functional.dequantize_4bit(
        packed, halfbyte.functional.QuantState.from_dict(state.as_dict(packed=True))
    )
    assert same_bits(arrays.load_tensor(tmp_path, "w"), expected.float().numpy())
    assert list(arrays.iter_tensors(tmp_path)) == [arrays.TensorInfo("w", (9, 64), "bfloat16", "nf4")]


def test_load_tensor_converts_scales(tmp_path: Path) -> None:
    tensors = arrays.quantize_4bit(values((4, 64), "float32")).to_tensors("w")
    tensors["w.absmax"] = tensors["w.absmax"].astype(np.float16)
    del tensors["w.quant_map"]
    save_file(tensors, tmp_path / "one.safetensors")
    packed = arrays.load_packed(tmp_path / "one.safetensors", "w")
    assert same_bits(packed.absmax, tensors["w.absmax"].astype(np.float32))


def test_to_tensors_is_read_by_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    packed = arrays.quantize_4bit(values((9, 33), "float16"), nested=True)
    save_file(packed.to_tensors("w"), tmp_path / "w.safetensors")
    tensors = load_file(tmp_path / "w.safetensors")
    codes = tensors.pop("w")
    state = halfbyte.functional.QuantState.from_dict(tensors)
    dense = halfbyte.functional.dequantize_4bit(codes, state)
    assert dense.dtype is torch.float16
    assert same_bits(dense.numpy(), arrays.dequantize_4bit(packed))


def test_load_tensor_casts_as_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(3).integers(0, 2**32, 20000, np.uint32)
    bits[:3] = 0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF
    plain = bits.view(np.float32)
    save_file({"x": plain}, tmp_path / "model.safetensors")
    expected = torch.from_numpy(plain).to(torch.bfloat16)
    found = torch.from_numpy(arrays.load_tensor(tmp_path, "x", np.uint16)).view(torch.bfloat16)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0.0).view(torch.int16), expected.nan_to_num(0.0).view(torch.int16))


# ---- errors ----------------------------------------------------------------------------------------------------------

PACKED = arrays.quantize_4bit(np.ones((2, 64), np.float32))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: arrays.quantize_4bit([1.0]), TypeError, "values must be a numpy.ndarray, got list"),
        (lambda: arrays.quantize_4bit(np.ones(3)), TypeError, r"values must be float16, .*, got float64"),
        (lambda: arrays.quantize_4bit(np.ma.ones(3)), TypeError, "values must be a numpy.ndarray, got MaskedArray"),
        (lambda: arrays.quantize_4bit(PACKED.absmax, blocksize=63), ValueError, "blocksize must be one of 32, .* 63"),
        (lambda: arrays.quantize_4bit(PACKED.absmax, blocksize=64.0), TypeError, "blocksize must be an int, got 64.0"),
        (lambda: arrays.quantize_4bit(PACKED.absmax, "nf5"), ValueError, "quant_type must be 'nf4' or .* got 'nf5'"),
        (lambda: arrays.dequantize_4bit(PACKED.codes), TypeError, "packed must be a PackedArray, got ndarray"),
        (lambda: arrays.dequantize_4bit(PACKED, np.float64), TypeError, "dtype must be float16, .*, got float64"),
        (lambda: arrays.dequantize_4bit(PACKED, "bf17"), TypeError, "dtype must be float16, .*, got 'bf17'"),
        (lambda: arrays.quantize_blockwise(PACKED.absmax, np.ones(4, np.float32)), ValueError, "code must have 256"),
        (lambda: arrays.quantize_blockwise(PACKED.absmax, np.ones(256)), TypeError, "code must be float32, got .*64"),
        (lambda: arrays.dequantize_blockwise(PACKED.codes, np.ones(9, np.float32)), ValueError, "absmax must have 1 "),
        (lambda: arrays.quantize_rowwise(np.array(3, np.float32)), ValueError, "values must have at least one dim"),
        (lambda: arrays.dequantize_rowwise(np.ones((3, 2), np.int8), PACKED.absmax), ValueError, "scales must have 3"),
        (lambda: arrays.load_tensor(BLOCKWISE, "c000.weihgt"), ValueError, r"name must be one of .*c000\.weight.* got"),
        (lambda: arrays.load_packed(BLOCKWISE, "c000.input"), ValueError, "'c000.input' must be a 4-bit weight"),
        (lambda: arrays.load_tensor("/no/such/folder", "w"), ValueError, "/no/such/folder: no such file or folder"),
    ],
)  # fmt: skip
def test_errors_name_argument_and_value(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": np.ones(5, np.uint8)}, "codes must have 64 elements .* got 5"),
        ({"codes": np.ones(64, np.int8)}, "codes must be uint8, got int8"),
        ({"absmax": np.ones(2)}, "absmax must be float32, got float64"),
        ({"absmax2": np.ones(1, np.float32)}, "absmax2 and offset must be given both"),
        ({"absmax2": np.ones(1, np.float32), "offset": 1.0}, "absmax must be uint8, got float32"),
        ({"dtype": "float64"}, "dtype must be one of .* got 'float64'"),
    ],
)
def test_packed_array_refuses_parts_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    import dataclasses

    with pytest.raises((TypeError, ValueError), match=message):
        dataclasses.replace(PACKED, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": np.ones((9, 1), np.uint8)}, "'w' must hold 64 packed bytes for the shape .2, 64., got 9"),
        ({"w.absmax": None}, "'w' is a 4-bit weight without its w.absmax"),
        ({"w.absmax": np.ones(3, np.float32)}, "'w': absmax must have 2 elements"),
        ({"blocksize": 65}, "blocksize must be one of 32, .* got 65"),
        ({"quant_type": "fp4"}, "quant_type must be one of 'nf4', got 'fp4'"),
        ({"shape": [2, -64]}, "shape must be a list of non-negative integers"),
        ({"nested_blocksize": 256}, "nested_offset must be a number, got None"),
        ({"nested_blocksize": 128}, "nested_blocksize must be one of 256, got 128"),
    ],
)
def test_load_tensor_names_what_is_wrong(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    tensors: dict[str, Any] = PACKED.to_tensors("w")
    key = "w.quant_state.bitsandbytes__nf4"
    state = json.loads(tensors[key].tobytes())
    for name, value in change.items():
        if name.startswith("w"):
            tensors[name] = value
        else:
            state[name] = value
    tensors[key] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    file = tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(halfbyte.CheckpointError, match=message) as caught:
        arrays.load_tensor(tmp_path, "w")
    assert str(caught.value).startswith(f"{file}: ")


def test_load_tensor_refuses_other_layouts_of_int8(tmp_path: Path) -> None:
    tensors = {"b.weight": np.ones((2, 2), np.int8), "b.SCB": np.ones(2, np.float32)}
    save_file({**tensors, "b.weight_format": np.array(2, np.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(halfbyte.CheckpointError, match=r"'b.weight_format' must be 0 \(rows\), got 2"):
        arrays.load_tensor(tmp_path, "b.weight")


# ---- without torch ---------------------------------------------------------------------------------------------------

ALONE = """
import sys
for package in ("torch", "transformers", "ml_dtypes", "huggingface_hub"):
    sys.modules[package] = None  # makes its import fail
import numpy as np
from halfbyte import arrays
name = "c001.weight"
infos = {info.name: info for info in arrays.iter_tensors(sys.argv[1])}
weight = arrays.load_tensor(sys.argv[1], name)
packed = arrays.quantize_4bit(weight, nested=True)
assert arrays.dequantize_4bit(packed).shape == infos[name].shape == weight.shape
assert arrays.load_packed(sys.argv[1], "c002.weight").dtype == "bfloat16"
arrays.dequantize_rowwise(*arrays.quantize_rowwise(weight))
arrays.dequantize_blockwise(*arrays.quantize_blockwise(weight))
loaded = {name.partition(".")[0] for name, module in sys.modules.items() if module is not None}
assert not loaded & {"torch", "transformers"}, loaded
print("done")
"""


def test_arrays_need_numpy_and_safetensors_alone() -> None:
    paths = [str(Path(halfbyte.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(BLOCKWISE)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.stdout == "done\n", done.stderr


def test_import_of_arrays_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, halfbyte.arrays\nprint(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    paths = [str(Path(halfbyte.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600)
    assert done.stdout == "[]\n", done.stderr
