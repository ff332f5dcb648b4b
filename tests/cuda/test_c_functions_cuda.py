"""The C functions of the compiled core under bitsandbytes' names, on memory of a GPU, on torch's stream."""

from __future__ import annotations

import ctypes as ct

import pytest

torch = pytest.importorskip("torch")

import halfbyte.functional as F  # noqa: E402
from halfbyte import _native  # noqa: E402

import kernels as k  # noqa: E402

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@pytest.fixture(scope="module")
def lib() -> ct.CDLL:
    library = ct.CDLL(_native.__file__)
    library.halfbyte_last_error.restype = ct.c_char_p
    return library


def pointer(tensor: torch.Tensor | None) -> ct.c_void_p:
    return ct.c_void_p(None if tensor is None else tensor.data_ptr())


def stream() -> ct.c_void_p:
    return ct.c_void_p(torch.cuda.current_stream().cuda_stream)


@pytest.mark.parametrize("dtype", k.DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", k.QUANT_TYPES)
def test_c_4_bits(lib: ct.CDLL, dtype: torch.dtype, quant_type: str) -> None:
    for n, blocksize in ((1, 64), (4097, 64), (1 << 20, 256)):
        values = torch.randn(n, device="cuda").to(dtype)
        packed, absmax = k.poisoned(-(-n // 2), torch.uint8), k.poisoned(-(-n // blocksize), torch.float32)
        torch.cuda.synchronize()  # the legacy stream is not torch's, if that was changed
        quantize = getattr(lib, f"cquantize_blockwise_{NAMES[dtype]}_{quant_type}")
        assert not quantize(None, pointer(values), pointer(absmax), pointer(packed), ct.c_int(blocksize), ct.c_int(n))
        torch.cuda.synchronize()
        wanted, state = F.quantize_4bit(values, blocksize=blocksize, quant_type=quant_type)
        assert k.same_bits(packed, wanted.view(-1))
        assert k.same_bits(absmax, state.absmax)
        out = k.poisoned(n, dtype)
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            call = getattr(lib, f"cdequantize_blockwise_{NAMES[dtype]}_{quant_type}")
            size, count = ct.c_int(blocksize), ct.c_int(n)
            assert not call(None, pointer(packed), pointer(absmax), pointer(out), size, count, stream())
            torch.cuda.current_stream().synchronize()
        assert k.same_bits(out, F.dequantize_4bit(wanted, state).view(-1))


@pytest.mark.parametrize("dtype", k.DTYPES, ids=str)
def test_c_8_bits(lib: ct.CDLL, dtype: torch.dtype) -> None:
    code = F.create_dynamic_map().cuda()
    for n, blocksize in ((1000, 256), (70_000, 4096)):
        values = torch.randn(n, device="cuda").to(dtype)
        codes, absmax = k.poisoned(n, torch.uint8), k.poisoned(-(-n // blocksize), torch.float32)
        size, count = ct.c_int(blocksize), ct.c_int(n)
        torch.cuda.synchronize()
        quantize = getattr(lib, f"cquantize_blockwise_{NAMES[dtype]}")
        assert not quantize(pointer(code), pointer(values), pointer(absmax), pointer(codes), size, count)
        torch.cuda.synchronize()
        wanted, state = F.quantize_blockwise(values, blocksize=blocksize)
        assert k.same_bits(codes, wanted)
        assert k.same_bits(absmax, state.absmax)
        out = k.poisoned(n, dtype)
        call = getattr(lib, f"cdequantize_blockwise_{NAMES[dtype]}")
        assert not call(pointer(code), pointer(codes), pointer(absmax), pointer(out), size, count, stream())
        assert k.same_bits(out, F.dequantize_blockwise(wanted, state).to(dtype))


@pytest.mark.parametrize("dtype", k.DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", k.QUANT_TYPES)
@pytest.mark.parametrize(("m", "columns"), [(4096, 4096), (1000, 320), (7, 100)])
def test_c_product(lib: ct.CDLL, dtype: torch.dtype, quant_type: str, m: int, columns: int) -> None:
    weight, x = torch.randn(m, columns, device="cuda"), torch.randn(columns, device="cuda").to(dtype)
    packed, state = F.quantize_4bit(weight, quant_type=quant_type)
    out = k.poisoned(m, dtype)
    pointers = [pointer(t) for t in (x, packed, state.absmax, state.code, out)]
    numbers = [ct.c_int(v) for v in (m, (columns + 1) // 2, m, 64)]
    call = getattr(lib, f"cgemm_4bit_inference_naive_{NAMES[dtype]}")
    assert not call(ct.c_int(m), ct.c_int(1), ct.c_int(columns), *pointers, *numbers, stream())
    meant = F.dequantize_4bit(packed, state).double()
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-21}[dtype]
    bound = unit * (meant.abs() @ x.double().abs()) + 1e-30
    assert bool(((out.double() - meant @ x.double()).abs() <= bound).all())


def test_c_functions_in_a_graph(lib: ct.CDLL) -> None:
    weight, x = torch.randn(256, 512, device="cuda"), torch.randn(512, device="cuda")
    packed, state = F.quantize_4bit(weight, quant_type="nf4")
    dense, out = torch.empty_like(weight), torch.empty(256, device="cuda")

    def step() -> None:
        size, count = ct.c_int(64), ct.c_int(dense.numel())
        assert not lib.cdequantize_blockwise_fp32_nf4(
            None, pointer(packed), pointer(state.absmax), pointer(dense), size, count, stream()
        )
        pointers = [pointer(t) for t in (x, packed, state.absmax, state.code, out)]
        numbers = [ct.c_int(v) for v in (256, 256, 256, 64)]
        assert not lib.cgemm_4bit_inference_naive_fp32(
            ct.c_int(256), ct.c_int(1), ct.c_int(512), *pointers, *numbers, stream()
        )

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    x.copy_(torch.randn(512, device="cuda"))
    graph.replay()
    torch.cuda.synchronize()
    assert k.same_bits(dense, F.dequantize_4bit(packed, state))
    torch.testing.assert_close(out, dense @ x, rtol=1e-4, atol=1e-4)


def test_c_function_says_what_is_wrong(lib: ct.CDLL) -> None:
    values = torch.zeros(64, device="cuda")
    absmax, packed = torch.zeros(1, device="cuda"), torch.zeros(32, dtype=torch.uint8, device="cuda")
    arguments = pointer(packed), pointer(absmax), pointer(values)
    assert lib.cdequantize_blockwise_fp32_nf4(None, *arguments, ct.c_int(63), ct.c_int(64), stream()) == 1
    assert lib.halfbyte_last_error().decode().startswith("blocksize must be one of")
