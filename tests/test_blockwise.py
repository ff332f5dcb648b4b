"""The compiled 4-bit and 8-bit arithmetic: against golden vectors of bitsandbytes on CUDA, and a slow reference."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from halfbyte import _native
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

GOLDEN = Path(__file__).parent / "golden" / "blockwise4.safetensors"
DTYPES = ("float32", "float16", "bfloat16")
ON_DISK = {"F32": ("float32", np.float32), "F16": ("float16", np.float16), "BF16": ("bfloat16", np.uint16)}
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def raw(array: np.ndarray, dtype: str | None = None) -> tuple[int, int, str]:
    """What the compiled core takes for an array."""
    return array.ctypes.data, array.size, dtype or array.dtype.name


def quantize_4bit(
    values: np.ndarray, dtype: str, quant_type: str, blocksize: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    packed = np.full(-(-values.size // 2), 0xEE, np.uint8)
    absmax = np.full(-(-values.size // blocksize), np.nan, np.float32)
    finite = _native.quantize_4bit(raw(values, dtype), raw(packed), raw(absmax), quant_type, blocksize)
    return packed, absmax, finite


def dequantize_4bit(
    packed: np.ndarray, absmax: np.ndarray, n: int, dtype: str, quant_type: str, blocksize: int
) -> np.ndarray:
    out = np.full(n, 7, np.uint16 if dtype == "bfloat16" else dtype)
    _native.dequantize_4bit(raw(packed), raw(absmax), raw(out, dtype), quant_type, blocksize)
    return out


def quantize_8bit(values: np.ndarray, map_: np.ndarray, blocksize: int) -> tuple[np.ndarray, np.ndarray]:
    codes = np.full(values.size, 0xEE, np.uint8)
    absmax = np.full(-(-values.size // blocksize), np.nan, np.float32)
    _native.quantize_8bit(raw(values), raw(map_), raw(codes), raw(absmax), blocksize)
    return codes, absmax


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal as bits, NaN being equal to any NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    unsigned = a.view(f"u{a.itemsize}") == b.view(f"u{b.itemsize}")
    if a.dtype == np.uint16:  # bfloat16
        a, b = reference.bfloat16_to_float32(a), reference.bfloat16_to_float32(b)
    return bool(np.all(unsigned | (np.isnan(a) & np.isnan(b))))


class Golden:
    """A safetensors file read with numpy alone, bfloat16 as bits."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        self.header: dict[str, Any] = json.loads(data[8:start])
        self.body = data[start:]
        self.cases: list[dict[str, Any]] = json.loads(self.header["__metadata__"]["cases"])

    def __call__(self, name: str) -> tuple[np.ndarray, str]:
        entry = self.header[name]
        dtype, stored = ON_DISK.get(entry["dtype"], ("uint8", np.uint8))
        begin, end = entry["data_offsets"]
        return np.frombuffer(self.body[begin:end], stored).copy(), dtype

    def offset(self, k: int, quant_type: str) -> np.float32:
        state, _ = self(f"c{k:03}.weight.quant_state.bitsandbytes__{quant_type}")
        return np.float32(json.loads(state.tobytes())["nested_offset"])


@functools.cache
def golden() -> Golden:
    return Golden(GOLDEN)


CASES = [pytest.param(k, case, id=f"c{k:03}") for k, case in enumerate(Golden(GOLDEN).cases)]


@pytest.mark.parametrize(("k", "case"), CASES)
def test_quantizes_as_bitsandbytes(k: int, case: dict[str, Any]) -> None:
    values, dtype = golden()(f"c{k:03}.input")
    quant_type, blocksize = case["quant_type"], case["blocksize"]
    packed, absmax, finite = quantize_4bit(values, dtype, quant_type, blocksize)
    assert finite
    expected, _ = golden()(f"c{k:03}.weight")
    if quant_type == "nf4":
        assert same_bits(packed, expected)
    else:
        ours, theirs = (np.stack([p >> 4, p & 15], 1).reshape(-1) for p in (packed, expected))
        scaled, _ = reference.scaled_blocks(reference.to_float32(values, dtype), blocksize)
        for i in np.flatnonzero(ours != theirs):
            # An approximate reciprocal there: only values within 2 ulp of a threshold may differ.
            bits = np.abs(scaled.reshape(-1)[i]).view(np.int32)
            assert np.abs(reference.THRESHOLDS["fp4"].view(np.int32) - bits).min() <= 2
    if case["nested"]:
        codes, absmax2, offset = compress(absmax)
        wanted = golden().offset(k, quant_type)
        assert abs(int(offset.view(np.int32)) - int(wanted.view(np.int32))) <= 1
        if offset == wanted:
            assert same_bits(codes, golden()(f"c{k:03}.weight.absmax")[0])
            assert same_bits(absmax2, golden()(f"c{k:03}.weight.nested_absmax")[0])
    else:
        assert same_bits(absmax, golden()(f"c{k:03}.weight.absmax")[0])


@pytest.mark.parametrize(("k", "case"), CASES)
def test_dequantizes_as_bitsandbytes(k: int, case: dict[str, Any]) -> None:
    expected, dtype = golden()(f"c{k:03}.dequantized")
    packed, _ = golden()(f"c{k:03}.weight")
    absmax, _ = golden()(f"c{k:03}.weight.absmax")
    if case["nested"]:
        absmax = expand(absmax, golden()(f"c{k:03}.weight.nested_absmax")[0], golden().offset(k, case["quant_type"]))
    out = dequantize_4bit(packed, absmax, expected.size, dtype, case["quant_type"], case["blocksize"])
    assert same_bits(out, expected)


def compress(absmax: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    codes = np.full(absmax.size, 0xEE, np.uint8)
    absmax2 = np.full(-(-absmax.size // 256), np.nan, np.float32)
    offset = _native.compress_absmax(raw(absmax), raw(codes), raw(absmax2))
    return codes, absmax2, np.float32(offset)


def expand(codes: np.ndarray, absmax2: np.ndarray, offset: np.float32) -> np.ndarray:
    out = np.full(codes.size, np.nan, np.float32)
    _native.expand_absmax(raw(codes), raw(absmax2), float(offset), raw(out))
    return out


@st.composite
def tensors(draw: st.DrawFn) -> tuple[np.ndarray, str]:
    """Any bits, or weights, of any dtype."""
    dtype = draw(st.sampled_from(DTYPES))
    n = draw(st.integers(0, 400) | st.sampled_from([4095, 4096, 4097, 70_001]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["bits", "normal", "few", "tiny"]))
    if kind == "bits":
        width = 32 if dtype == "float32" else 16
        bits = random.integers(0, 2**width, n, dtype=np.uint64).astype(f"u{width // 8}")
        return bits.view(np.uint16 if dtype == "bfloat16" else dtype), dtype
    values = {
        "normal": random.standard_normal(n),
        "few": random.integers(-3, 4, n).astype(np.float64),
        "tiny": random.standard_normal(n) * 1e-39,
    }[kind]
    return reference.from_float32(values.astype(np.float32), dtype), dtype


@given(tensors(), st.sampled_from(["nf4", "fp4"]), st.sampled_from(BLOCK_SIZES))
def test_4bit_is_the_reference(tensor: tuple[np.ndarray, str], quant_type: str, blocksize: int) -> None:
    values, dtype = tensor
    wide = reference.to_float32(values, dtype)
    packed, absmax, finite = quantize_4bit(values, dtype, quant_type, blocksize)
    expected, expected_absmax = reference.quantize_4bit(wide, quant_type, blocksize)
    assert finite == bool(np.isfinite(wide).all())
    assert same_bits(packed, expected)
    assert same_bits(absmax, expected_absmax)
    for out_dtype in DTYPES:
        out = dequantize_4bit(packed, absmax, values.size, out_dtype, quant_type, blocksize)
        assert same_bits(out, reference.dequantize_4bit(packed, absmax, values.size, quant_type, blocksize, out_dtype))


@settings(max_examples=30)
@given(hnp.arrays(np.float32, st.integers(0, 600), elements=st.floats(width=32)), st.sampled_from((64, 256)))
def test_8bit_is_the_reference(values: np.ndarray, blocksize: int) -> None:
    map_ = reference.dynamic_map()
    codes, absmax = quantize_8bit(values, map_, blocksize)
    with np.errstate(invalid="ignore"):
        expected, expected_absmax = reference.quantize_8bit(values, map_, blocksize)
    assert same_bits(codes, expected)
    assert same_bits(absmax, expected_absmax)
    out = np.empty_like(values)
    _native.dequantize_8bit(raw(codes), raw(absmax), raw(map_), raw(out), blocksize)
    assert same_bits(out, reference.dequantize_8bit(codes, absmax, map_, blocksize))


@settings(max_examples=30)
@given(st.integers(1, 1500) | st.just(66_000), st.integers(0, 2**32), st.sampled_from([0.0, 1e-3, 1.0]))
def test_nested_is_the_reference(n: int, seed: int, spread: float) -> None:
    absmax = (1 + spread * np.random.default_rng(seed).random(n)).astype(np.float32)
    codes, absmax2, offset = compress(absmax)
    if n < 2000:
        expected = reference.compress_absmax(absmax)
        assert (offset, codes.tolist(), absmax2.tolist()) == (
            expected.offset,
            expected.codes.tolist(),
            expected.absmax.tolist(),
        )
    assert offset == reference.tree_mean(absmax)
    assert same_bits(expand(codes, absmax2, offset), reference.expand_absmax(reference.Nested(codes, absmax2, offset)))


def test_nothing_at_all() -> None:
    empty = np.empty(0, np.float32)
    assert quantize_4bit(empty, "float32", "nf4", 64)[2] is True
    assert dequantize_4bit(empty.view(np.uint8), empty, 0, "float16", "fp4", 64).size == 0
    assert compress(empty)[2] == 0


def test_tables() -> None:
    map_, _ = golden()("c001.weight.nested_quant_map")
    assert same_bits(np.array(_native.dynamic_map(), np.float32), map_)
    assert same_bits(reference.dynamic_map(), map_)
    for quant_type, k in (("nf4", 0), ("fp4", 3)):
        assert same_bits(np.array(_native.codebook(quant_type), np.float32), reference.CODEBOOKS[quant_type])
        stored, _ = golden()(f"c{k:03}.weight.quant_map")
        assert same_bits(np.array(_native.quant_map(quant_type), np.float32), stored)


def test_threads_do_not_change_a_byte() -> None:
    values = np.random.default_rng(5).standard_normal(300_001).astype(np.float32)
    before = _native.get_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            _native.set_threads(threads)
            assert _native.get_threads() == threads
            packed, absmax, _ = quantize_4bit(values, "float32", "nf4", 64)
            out = dequantize_4bit(packed, absmax, values.size, "bfloat16", "nf4", 64)
            results.append((packed.tobytes(), absmax.tobytes(), out.tobytes()))
    finally:
        _native.set_threads(before)
    assert len(set(results)) == 1


@pytest.mark.parametrize("threads", [0, 4097])
def test_threads_in_reason(threads: int) -> None:
    with pytest.raises(ValueError, match=rf"threads must be from 1 to 4096, got {threads}"):
        _native.set_threads(threads)


def test_calls_from_many_threads() -> None:
    values = np.random.default_rng(6).standard_normal(200_000).astype(np.float16)
    expected = quantize_4bit(values, "float16", "fp4", 128)[0].tobytes()
    found: list[bytes] = []
    workers = [
        threading.Thread(target=lambda: found.append(quantize_4bit(values, "float16", "fp4", 128)[0].tobytes()))
        for _ in range(8)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [expected] * 8


def _sum_in_child(queue: Any, values: np.ndarray) -> None:
    queue.put(int(quantize_4bit(values, "float32", "nf4", 64)[0].sum()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    values = np.random.default_rng(7).standard_normal(200_000).astype(np.float32)
    expected = int(quantize_4bit(values, "float32", "nf4", 64)[0].sum())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_sum_in_child, args=(queue, values))
    child.start()
    try:
        assert queue.get(timeout=600) == expected
    finally:
        child.join(10)
        child.kill()


def run_with_simd(value: str) -> subprocess.CompletedProcess[str]:
    code = """
import numpy as np
from halfbyte import _native
raw = lambda a: (a.ctypes.data, a.size, a.dtype.name)
values = np.arange(64, dtype=np.float32)
packed, absmax = np.empty(32, np.uint8), np.empty(1, np.float32)
_native.quantize_4bit(raw(values), raw(packed), raw(absmax), "nf4", 64)
print(_native.simd(), packed.tobytes().hex())
"""
    environment = {**os.environ, "HALFBYTE_SIMD": value}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_simd_is_forced_by_the_environment() -> None:
    features = set(_native.cpu_features())
    paths = ["scalar"]
    if {"avx2", "fma", "f16c"} <= features:
        paths.append("avx2")
        if {"avx512f", "avx512bw", "avx512vl"} <= features:
            paths.append("avx512")
    if "HALFBYTE_SIMD" not in os.environ:
        assert _native.simd() == paths[-1]
    printed = [run_with_simd(path).stdout.split() for path in paths]
    assert [path for path, _ in printed] == paths
    assert len({packed for _, packed in printed}) == 1


def test_simd_that_is_unknown_is_an_error() -> None:
    result = run_with_simd("sse9")
    assert result.returncode != 0
    assert 'ValueError: HALFBYTE_SIMD must be one that this machine has ("scalar"' in result.stderr


GOOD = (np.ones(65, np.float32), np.empty(33, np.uint8), np.empty(2, np.float32))


def arguments(**changes: Any) -> list[Any]:
    """Good arguments of quantize_4bit but for some."""
    values, packed, absmax = map(raw, GOOD)
    good = {"input": values, "packed": packed, "absmax": absmax, "quant_type": "nf4", "blocksize": 64}
    return list({**good, **changes}.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_type": "int4"}, r'quant_type must be "nf4" or "fp4", got "int4"'),
        ({"blocksize": 48}, r"blocksize must be one of \[32, 64.*, got 48"),
        ({"input": (64, 65, "float64")}, r"input must be of dtype uint8.*, got float64"),
        ({"input": (64, 65, "uint8")}, r"input must be of dtype float16.*, got uint8"),
        ({"packed": (64, 33, "float32")}, r"packed must be of dtype uint8.*, got float32"),
        ({"input": (0, 65, "float32")}, r"input must be memory of 65 elements, got the null address"),
        ({"input": (66, 65, "float32")}, r"input must be at an address that is a multiple of 4 \(float32\), got 0x42"),
        (
            {"input": (64, 2**62, "float32")},
            r"input must be memory within the address space, got 4611686018427387904 elements from 0x40 on",
        ),
        (
            {"packed": (2**64 - 8, 33, "uint8")},
            r"packed must be memory within the address space, got 33 elements from 0xfffffffffffffff8 on",
        ),
        (
            {"packed": (64, 33, "uint8"), "input": (64, 65, "float32")},
            r"packed must be memory of its own, got the memory of input",
        ),
        (
            {"packed": (64, 33, "uint8"), "absmax": (96, 2, "float32")},
            r"absmax must be memory of its own, got the memory of packed",
        ),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _native.quantize_4bit(*arguments(**changes))


def test_wrong_lengths_are_named() -> None:
    short = np.empty(32, np.uint8)
    with pytest.raises(ValueError, match=r"packed must be 33 elements long.*, got 32"):
        _native.quantize_4bit(*arguments(packed=raw(short)))
    one = np.empty(1, np.float32)
    with pytest.raises(ValueError, match=r"absmax must be 2 elements long.*, got 1"):
        _native.quantize_4bit(*arguments(absmax=raw(one)))
    with pytest.raises(ValueError, match=r"map must be 256 elements long.*, got 1"):
        quantize_8bit(np.ones(3, np.float32), one, 64)
    with pytest.raises(ValueError, match=r"map must be 256 finite values in ascending order, got "):
        quantize_8bit(np.ones(3, np.float32), reference.dynamic_map()[::-1].copy(), 64)


def test_the_good_arguments_are_good() -> None:
    assert _native.quantize_4bit(*arguments()) is True
