"""The CUDA functions of the compiled core where there is no GPU, or where the call is wrong anyway."""

from __future__ import annotations

import ctypes
import os
from types import SimpleNamespace

import pytest
from compiler import tools
from halfbyte import _native
from halfbyte.cli import doctor


def has_driver() -> bool:
    """Whether the NVIDIA driver's library can be opened."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


EMPTY = (0, 0, "uint8")


def test_without_a_driver_the_error_says_so() -> None:
    if has_driver():
        pytest.skip("this machine has an NVIDIA driver")
    no_driver = r"libcuda\) is not installed"
    with pytest.raises(RuntimeError, match=no_driver):
        _native.cuda_driver_version()
    for call in (
        _native.cuda_device_count,
        lambda: _native.cuda_kernel_form(0),
        lambda: _native.cuda_device(0),
        lambda: _native.cuda_prepare(0),
        lambda: _native.cuda_quantize_4bit(0, 0, (0, 0, "float32"), EMPTY, (0, 0, "float32"), "nf4", 64),
        lambda: _native.cuda_expand_absmax(0, 0, EMPTY, *[(0, 0, "float32")] * 3),
        lambda: _native.cuda_quantize_8bit(0, 0, *[(0, 0, "float32")] * 2, EMPTY, (0, 0, "float32"), 64),
        lambda: _native.cuda_quantize_rows(0, 0, (0, 0, "float32"), (0, 0, "int8"), (0, 0, "float32"), 0, 0),
    ):
        # Kernels that are missing are said first: a driver would not help.
        kernels = _native.cuda_kernels()
        error, said = (
            (_native.NoCudaDriverError, no_driver) if kernels else (RuntimeError, "has no CUDA kernels.*pip install")
        )
        with pytest.raises(error, match=said):
            call()


def test_kernels_are_built_where_their_compilers_are() -> None:
    try:
        tools.find(os.environ.get("HALFBYTE_NVIDIA"))
    except tools.MissingToolsError as error:
        pytest.skip(str(error))
    kernels = _native.cuda_kernels()
    assert {
        "quantize_blockwise4_bf16_nf4",
        "gemm_4bit_tile_sm90a_f16_256",
        "gemm_4bit_small_m_sm90_long_bf16_32_nested",
    } <= set(kernels)
    # All of them with the cargo feature test-kernels, else none.
    for_tests = {"dequantize_blockwise4_reference_f32", "quantize_int8_rowwise_reference_f16", "floor_read"}
    assert for_tests & set(kernels) in (for_tests, set())


def test_ptx_of_a_kernel() -> None:
    for name in _native.cuda_kernels():
        text = _native.cuda_kernel_ptx(name, (9, 0)).decode()
        assert text.startswith(".version 8.0\n.target sm_")
        assert f".entry {name}(" in text
    with pytest.raises(ValueError, match='kernel is "none": expected the name of a kernel that this build has'):
        _native.cuda_kernel_ptx("none", (9, 0))
    if _native.cuda_kernels():
        assert ".target sm_90a" in _native.cuda_kernel_ptx("gemm_4bit_tile_sm90a_f16_256", (9, 0)).decode()
        with pytest.raises(ValueError, match=r"capability is \(10, 0\): expected one that the kernel is compiled for"):
            _native.cuda_kernel_ptx("gemm_4bit_tile_sm90a_f16_256", (10, 0))


@pytest.mark.parametrize(("form", "words"), [("cubin", "as cubins"), ("ptx", "as PTX, which the driver compiles")])
def test_doctor_says_in_which_form_kernels_are_loaded(monkeypatch: pytest.MonkeyPatch, form: str, words: str) -> None:
    device = SimpleNamespace(
        cuda_device_count=lambda: 1,
        cuda_device=lambda _: ("NVIDIA H200", (9, 0), 132, 232_448),
        cuda_kernel_form=lambda _: form,
    )
    monkeypatch.setattr(doctor, "_native", device)
    assert doctor._gpu_kernels() == [f"usable on NVIDIA H200 (sm_90, 132 multiprocessors), {words}"]


def test_doctor_says_that_a_build_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def count() -> int:
        raise RuntimeError("CUDA is not available: this build of halfbyte has no CUDA kernels: how")

    functions = SimpleNamespace(cuda_device_count=count, NoCudaDriverError=_native.NoCudaDriverError)
    monkeypatch.setattr(doctor, "_native", functions)
    assert doctor._gpu_kernels() == ["CUDA is not available: this build of halfbyte has no CUDA kernels: how"]


def test_wrong_arguments_are_found_before_a_device_is_asked_for() -> None:
    floats = (0, 0, "float32")
    with pytest.raises(ValueError, match="blocksize is 48"):
        _native.cuda_quantize_4bit(0, 0, floats, EMPTY, floats, "nf4", 48)
    with pytest.raises(ValueError, match='quant_type is "int3"'):
        _native.cuda_dequantize_4bit(0, 0, EMPTY, floats, None, None, floats, "int3", 64)
    with pytest.raises(ValueError, match="offset is None: expected given, because absmax2 is"):
        _native.cuda_dequantize_4bit(0, 0, EMPTY, EMPTY, floats, None, floats, "nf4", 64)
    with pytest.raises(ValueError, match="input is at address 0x1"):
        _native.cuda_quantize_4bit(0, 0, (1, 8, "float32"), EMPTY, floats, "nf4", 64)
    with pytest.raises(ValueError, match="codes is at address 0x2: expected an address that is a multiple of 8"):
        _native.cuda_expand_absmax(0, 0, (2, 8, "int64"), floats, floats, floats)
    with pytest.raises(ValueError, match="absmax2 is None: expected given, because offset is"):
        _native.cuda_embedding_4bit(0, 0, (0, 0, "int64"), EMPTY, floats, None, floats, floats, 0, 0, "nf4", 64)
    with pytest.raises(ValueError, match='indices is of dtype "int16": expected one of'):
        _native.cuda_embedding_4bit(0, 0, (0, 0, "int16"), EMPTY, floats, None, None, floats, 0, 0, "nf4", 64)
    with pytest.raises(ValueError, match="input is at the null address"):
        _native.cuda_quantize_8bit(0, 0, (0, 8, "float32"), floats, EMPTY, floats, 64)
    with pytest.raises(ValueError, match="out is at address 0x1: expected an address that is a multiple of 2"):
        _native.cuda_dequantize_8bit(0, 0, EMPTY, floats, floats, (1, 8, "bfloat16"), 64)
    with pytest.raises(ValueError, match='scales is of dtype "complex64"'):
        _native.cuda_quantize_rows(0, 0, floats, (0, 0, "int8"), (0, 0, "complex64"), 0, 0)
    with pytest.raises(ValueError, match="scales is at address 0x2"):
        _native.cuda_dequantize_rows(0, 0, (0, 0, "int8"), (2, 1, "float32"), floats, 1, 0)
    with pytest.raises(ValueError, match='kernel is "other"'):
        _native.cuda_matmul_4bit(
            0, 0, floats, EMPTY, floats, None, None, None, floats, 0, 0, 0, "nf4", 64, kernel="other"
        )


def test_the_workspace_has_a_sum_for_every_group_of_every_level() -> None:
    assert [_native.cuda_compress_workspace(n) for n in (0, 1, 256, 257, 256**3)] == [0, 1, 1, 2, 256**2]
    assert _native.cuda_compress_workspace(256**3 + 1) == 256**2 + 1 + 257
