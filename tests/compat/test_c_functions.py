"""The C functions under bitsandbytes' names, as unsloth and axolotl call them, on the processor."""

from __future__ import annotations

import ctypes as ct
import json
from itertools import product
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import pytest
import reference
from halfbyte import _native
from safetensors import safe_open

GOLDEN = Path(__file__).parents[1] / "golden" / "blockwise4.safetensors"

NAMES = [
    f"c{what}_blockwise_{dtype}{kind}"
    for what, dtype, kind in product(("dequantize", "quantize"), ("fp32", "fp16", "bf16"), ("", "_nf4", "_fp4"))
] + [f"cgemm_4bit_inference_naive_{dtype}" for dtype in ("fp32", "fp16", "bf16")]


@pytest.fixture(scope="module")
def lib() -> ct.CDLL:
    library = ct.CDLL(_native.__file__)
    library.halfbyte_last_error.restype = ct.c_char_p
    return library


def pointer(array: np.ndarray | None) -> ct.c_void_p:
    return ct.c_void_p(None if array is None else array.ctypes.data)


@pytest.mark.parametrize("name", NAMES)
def test_c_function_is_exported(lib: ct.CDLL, name: str) -> None:
    assert hasattr(lib, name)


DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def normal(n: int, dtype: str) -> np.ndarray:
    values = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    return reference.from_float32(values, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("n", "blocksize"), [(1, 64), (63, 32), (4096, 64), (100_001, 128)])
def test_c_4_bits_there_and_back(lib: ct.CDLL, dtype: str, quant_type: str, n: int, blocksize: int) -> None:
    values = normal(n, dtype)
    packed, absmax = np.zeros(-(-n // 2), np.uint8), np.zeros(-(-n // blocksize), np.float32)
    quantize = getattr(lib, f"cquantize_blockwise_{dtype}_{quant_type}")
    assert not quantize(None, pointer(values), pointer(absmax), pointer(packed), ct.c_int(blocksize), ct.c_int(n))
    wanted, scales = reference.quantize_4bit(reference.to_float32(values, DTYPES[dtype]), quant_type, blocksize)
    assert np.array_equal(packed, wanted)
    assert np.array_equal(absmax, scales)
    out = np.zeros_like(values)
    dequantize = getattr(lib, f"cdequantize_blockwise_{dtype}_{quant_type}")
    # As unsloth: no code, and the stream as the last argument.
    assert not dequantize(
        None, pointer(packed), pointer(absmax), pointer(out), ct.c_int(blocksize), ct.c_int(n), ct.c_void_p()
    )
    read = reference.dequantize_4bit(packed, absmax, n, quant_type, blocksize, DTYPES[dtype])
    assert np.array_equal(out, read)


def test_c_4_bits_of_the_golden_vectors(lib: ct.CDLL) -> None:
    seen = set()
    with safe_open(GOLDEN, "np") as golden:
        for number, case in enumerate(json.loads(golden.metadata()["cases"])):
            if case["dtype"] == "bf16":  # numpy has no bfloat16
                continue
            get = lambda name, n=number: golden.get_tensor(f"c{n:03d}.{name}")  # noqa: E731
            packed, absmax, wanted = get("weight"), get("weight.absmax"), get("dequantized")
            if case["nested"]:
                state = json.loads(bytes(get(f"weight.quant_state.bitsandbytes__{case['quant_type']}")))
                inputs = get("weight.nested_quant_map"), absmax, get("weight.nested_absmax")
                absmax = np.zeros(absmax.size, np.float32)
                numbers = ct.c_int(state["nested_blocksize"]), ct.c_int(absmax.size), None
                assert not lib.cdequantize_blockwise_fp32(*map(pointer, inputs), pointer(absmax), *numbers)
                absmax += np.float32(state["nested_offset"])
            out = np.zeros_like(wanted)
            name = f"cdequantize_blockwise_fp{case['dtype'][1:]}_{case['quant_type']}"
            numbers = ct.c_int(case["blocksize"]), ct.c_int(wanted.size), None
            assert not getattr(lib, name)(None, *map(pointer, (packed, absmax, out)), *numbers)
            assert np.array_equal(out, wanted, equal_nan=True), case
            seen.add(name)
    assert len(seen) == 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "blocksize"), [(1, 256), (1000, 256), (9000, 4096)])
def test_c_8_bits_there_and_back(lib: ct.CDLL, dtype: str, n: int, blocksize: int) -> None:
    code, values = reference.dynamic_map(), normal(n, dtype)
    codes, absmax = np.zeros(n, np.uint8), np.zeros(-(-n // blocksize), np.float32)
    quantize, size = getattr(lib, f"cquantize_blockwise_{dtype}"), ct.c_int(blocksize)
    assert not quantize(pointer(code), pointer(values), pointer(absmax), pointer(codes), size, ct.c_int(n))
    wanted, scales = reference.quantize_8bit(reference.to_float32(values, DTYPES[dtype]), code, blocksize)
    assert np.array_equal(codes, wanted)
    assert np.array_equal(absmax, scales)
    out = np.zeros_like(values)
    dequantize = getattr(lib, f"cdequantize_blockwise_{dtype}")
    assert not dequantize(pointer(code), pointer(codes), pointer(absmax), pointer(out), size, ct.c_int(n), None)
    read = reference.dequantize_8bit(codes, absmax, code, blocksize)
    assert np.array_equal(out, reference.from_float32(read, DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "ldb", "blocksize"), [(5, 64, 32, 64), (3, 200, 100, 64), (7, 33, 20, 32)])
def test_c_product_is_of_the_table_given(lib: ct.CDLL, dtype: str, m: int, k: int, ldb: int, blocksize: int) -> None:
    random = np.random.default_rng(k)
    table = random.standard_normal(16).astype(np.float32)  # neither NF4 nor FP4
    x = normal(k, dtype)
    values = reference.to_float32(x, DTYPES[dtype]).astype(np.float64)
    packed = random.integers(0, 256, m * ldb, np.uint8)
    absmax = random.uniform(0.5, 1.5, -(-2 * m * ldb // blocksize)).astype(np.float32)
    out = np.zeros(m, x.dtype)
    call = getattr(lib, f"cgemm_4bit_inference_naive_{dtype}")
    numbers = [ct.c_int(v) for v in (m, ldb, m, blocksize)]
    pointers = [pointer(a) for a in (x, packed, absmax, table, out)]
    assert not call(ct.c_int(m), ct.c_int(1), ct.c_int(k), *pointers, *numbers, ct.c_void_p())
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    weight = (table[codes].astype(np.float64) * np.repeat(absmax, blocksize)[: codes.size]).reshape(m, 2 * ldb)[:, :k]
    exact = weight @ values
    bound = {"fp32": 2.0**-20, "fp16": 2.0**-9, "bf16": 2.0**-6}[dtype]
    error = np.abs(reference.to_float32(out, DTYPES[dtype]) - exact)
    assert np.all(error <= bound * (np.abs(weight) @ np.abs(values)))


def test_c_function_says_what_is_wrong(lib: ct.CDLL) -> None:
    def error(name: str, *arguments: Any) -> str:
        assert getattr(lib, name)(*arguments) == 1
        return str(lib.halfbyte_last_error().decode())

    some = pointer(np.zeros(64, np.uint8))
    assert error("cdequantize_blockwise_fp32_nf4", None, None, some, some, 64, 8, None).startswith(
        "A must be memory of 4 elements, got the null address"
    )
    assert error("cdequantize_blockwise_fp32_nf4", None, some, some, some, 65, 8, None).endswith(", got 65")
    assert error("cdequantize_blockwise_fp32_nf4", None, some, some, some, 64, -1, None).startswith(
        "n must be 0 or more, got -1"
    )
    assert "code must be memory of 256 elements, got the null address" in error(
        "cdequantize_blockwise_fp32", None, some, some, None, 64, 0, None
    )
    a, out = np.zeros(256, np.float32), np.zeros(256, np.float32)
    product = (pointer(a), pointer(out[64:]), pointer(a[64:]), pointer(a[128:]), pointer(out))
    assert "n must be 1 (the product is of one vector), got 2" in error(
        "cgemm_4bit_inference_naive_fp32", 4, 2, 64, *product, 4, 32, 4, 64, None
    )
    assert "stride must be at least 32 (the bytes of a row of 64 codes), got 31" in error(
        "cgemm_4bit_inference_naive_fp32", 4, 1, 64, *product, 4, 31, 4, 64, None
    )


LAYER = """
import halfbyte.compat; halfbyte.compat.install()
import ctypes, torch, bitsandbytes as bnb
lib, get_ptr = bnb.functional.lib, bnb.functional.get_ptr
w = torch.randn(48, 128, dtype=torch.float16)
packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
# Nested scales, then values, as unsloth's fast_dequantize does.
scales = torch.empty_like(state.absmax, dtype=torch.float32)
n = ctypes.c_int(scales.numel()); two = state.state2
assert lib.cdequantize_blockwise_fp32(
    get_ptr(two.code), get_ptr(state.absmax), get_ptr(two.absmax), get_ptr(scales), ctypes.c_int(two.blocksize), n, None
) is None
scales += state.offset
out = torch.empty_like(w)
call = lib.cdequantize_blockwise_fp16_nf4
call(get_ptr(None), get_ptr(packed), get_ptr(scales), get_ptr(out), ctypes.c_int(64), ctypes.c_int(out.numel()), None)
assert torch.equal(out, bnb.functional.dequantize_4bit(packed, state))
assert call is lib["cdequantize_blockwise_fp16_nf4"] and hasattr(call, "restype") and not hasattr(lib, "cigemm")
class Stream:
    _as_parameter_ = ctypes.c_void_p(0)
call(None, get_ptr(packed), get_ptr(scales), get_ptr(out), 64, out.numel(), Stream())
try:
    call(None, get_ptr(packed), get_ptr(scales), get_ptr(out), 63, out.numel(), None)
except RuntimeError as error:
    assert str(error).startswith("cdequantize_blockwise_fp16_nf4: blocksize must be one of"), error
else:
    raise AssertionError("accepted")
"""


@pytest.mark.slow
def test_c_functions_through_the_layer() -> None:
    pytest.importorskip("torch")
    fresh.passes(LAYER)
