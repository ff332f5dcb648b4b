"""`halfbyte.functional` with bad input: what is refused, and by which words."""

from __future__ import annotations

import halfbyte
import pytest
import torch
from functional_cases import BLOCK_SIZES, STORAGES, bytes_of
from halfbyte import functional as F
from halfbyte.state import QuantState
from hypothesis import given, settings
from hypothesis import strategies as st

X = torch.randn(8, 64)


PACKED, STATE = F.quantize_4bit(X, quant_type="nf4")


def state_with(**changes):
    fields = {name: getattr(STATE, name) for name in ("absmax", "shape", "code", "blocksize", "quant_type", "dtype")}
    return QuantState(**{**fields, **changes})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: F.quantize_4bit(X, blocksize=63), ValueError, "blocksize: 63 is not one of 32, 64, 128"),
        (lambda: F.quantize_4bit(X, blocksize=64.0), TypeError, "blocksize: 64.0"),
        (lambda: F.quantize_4bit(X, blocksize=True), TypeError, "blocksize: True"),
        (lambda: F.quantize_4bit(X, quant_type="nf5"), ValueError, "quant_type: 'nf5' is not one of 'nf4', 'fp4'"),
        (lambda: F.quantize_4bit(X, quant_type=4), TypeError, "quant_type: 4"),
        (lambda: F.quantize_4bit(X, quant_storage=torch.int16), ValueError, "quant_storage: torch.int16"),
        (lambda: F.quantize_4bit(X, quant_storage="uint8"), TypeError, "quant_storage: 'uint8'"),
        (lambda: F.quantize_4bit(X.double()), TypeError, "dtype torch.float64 is not one of torch.float16"),
        (lambda: F.quantize_4bit(X.int()), TypeError, "dtype torch.int32"),
        (lambda: F.quantize_4bit([1.0]), TypeError, "A: list is not a torch.Tensor"),
        (lambda: F.quantize_4bit(X.to_sparse()), TypeError, "layout torch.sparse_coo"),
        (lambda: F.quantize_4bit(X, out=torch.empty(3, 1, dtype=torch.uint8)), ValueError, r"out: is .*\[3, 1\]"),
        (lambda: F.quantize_4bit(X, out=torch.empty(256, 1)), TypeError, "out: is torch.float32"),
        (lambda: F.quantize_4bit(X, absmax=torch.empty(9)), ValueError, r"absmax: is .*\[9\].*expected.*\[8\]"),
        (lambda: F.dequantize_4bit(PACKED), ValueError, "absmax and out must be given"),
        (
            lambda: F.dequantize_4bit(PACKED, {}),
            TypeError,
            "quant_state must be a QuantState from .*, got dict",
        ),
        (lambda: F.dequantize_4bit(PACKED[:-1], STATE), ValueError, "packed: 255 elements of torch.uint8 do not hold"),
        (lambda: F.dequantize_4bit(PACKED.int(), STATE), TypeError, "packed: dtype torch.int32"),
        (lambda: F.dequantize_4bit(PACKED, state_with(absmax=torch.ones(7))), ValueError, "absmax: 7 scales"),
        (lambda: F.dequantize_4bit(PACKED, state_with(absmax=torch.ones(8).int())), TypeError, "absmax: dtype"),
        (lambda: F.dequantize_4bit(PACKED, state_with(dtype=torch.float64)), TypeError, "quant_state.dtype: dtype"),
        (lambda: F.dequantize_4bit(PACKED, state_with(shape=None)), ValueError, "quant_state: has no shape"),
        (lambda: F.dequantize_4bit(PACKED, state_with(quant_type="nf3")), ValueError, "quant_type: 'nf3'"),
        (lambda: F.dequantize_4bit(PACKED, STATE, out=torch.empty(8, 63)), ValueError, r"out: shape \[8, 63\]"),
        (lambda: F.dequantize_4bit(PACKED, STATE, out=torch.empty(8, 64).half()), TypeError, "out: dtype"),
        (lambda: F.dequantize_4bit(PACKED.to("meta"), STATE), ValueError, "absmax: is on cpu, but packed is on meta"),
        (lambda: halfbyte.matmul_4bit(X, PACKED, None), TypeError, "quant_state: NoneType"),
        (lambda: halfbyte.matmul_4bit([], PACKED, STATE), TypeError, "A: list"),
        (lambda: halfbyte.matmul_4bit(X[:, 1:], PACKED, STATE), ValueError, "does not end with in_features, 64"),
        (lambda: halfbyte.matmul_4bit(X.double(), PACKED, STATE), TypeError, "x: dtype torch.float64"),
        (lambda: halfbyte.matmul_4bit(X.long(), PACKED, STATE), TypeError, "x: dtype torch.int64"),
        (lambda: halfbyte.matmul_4bit(torch.tensor(1.0), PACKED, STATE), ValueError, "in_features"),
        (lambda: halfbyte.matmul_4bit(X, PACKED, state_with(shape=(4, 2, 64))), ValueError, "quant_state.shape"),
        (lambda: halfbyte.matmul_4bit(X, PACKED, STATE, bias=torch.ones(7)), ValueError, r"bias: shape \[7\]"),
        (lambda: halfbyte.matmul_4bit(X.to("meta"), PACKED, STATE), ValueError, "is on cpu, but x is on meta"),
        (lambda: F.gemv_4bit(X, PACKED), ValueError, "state must be a QuantState"),
        (lambda: F.quantize_blockwise(X, blocksize=0), ValueError, "blocksize: 0"),
        (lambda: F.quantize_blockwise(X, blocksize=6.4), TypeError, "blocksize: 6.4"),
        (lambda: F.quantize_blockwise(X.int()), TypeError, "A: dtype torch.int32"),
        (lambda: F.quantize_blockwise(X, code=torch.ones(0)), ValueError, "code: 0 elements"),
        (lambda: F.quantize_blockwise(X, code=torch.ones(257)), ValueError, "code: 257 elements"),
        (lambda: F.quantize_blockwise(X, code=torch.full((16,), torch.nan)), ValueError, "256 finite values"),
        (lambda: F.dequantize_blockwise(PACKED), ValueError, "absmax must be given"),
        (lambda: F.dequantize_blockwise(X, absmax=torch.ones(1)), TypeError, "codes: dtype torch.float32"),
        (lambda: F.dequantize_blockwise(PACKED, absmax=torch.ones(2)), ValueError, "absmax: 2 scales"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@settings(max_examples=150)
@given(st.data())
def test_fuzzed_views_never_leave_their_memory(data):
    """Any view of the right or the wrong size: the reference's result, or a Python error."""
    base = torch.randint(0, 256, (600,), dtype=torch.uint8)
    storage = data.draw(st.sampled_from(STORAGES))
    start, step = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 3))
    start -= start % storage.itemsize
    view = base[start : start + 512].view(storage)[::step]
    view = view[: data.draw(st.integers(0, len(view)))]
    shape = data.draw(st.tuples(st.integers(0, 17), st.integers(0, 30)))
    blocksize = data.draw(st.sampled_from(BLOCK_SIZES[:3]))
    n = shape[0] * shape[1]
    blocks = -(-n // blocksize) + data.draw(st.sampled_from([0, 0, 0, 1, -1]))
    absmax = torch.rand(2 * max(blocks, 0) + 1)[1::2][: max(blocks, 0)]
    state = QuantState(absmax, shape, None, blocksize, "nf4", torch.float32)
    fits = len(absmax) == -(-n // blocksize) and view.numel() == -(-((n + 1) // 2) // storage.itemsize)
    if not fits:
        with pytest.raises(ValueError, match=r"packed|absmax"):
            F.dequantize_4bit(view, state)
        return
    values = F.dequantize_4bit(view, state)
    same = F.dequantize_4bit(bytes_of(view)[: (n + 1) // 2].clone(), state)
    assert torch.equal(values, same)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.quantize_4bit(X.double()), "dtype torch.float64 is not one of"),
        (lambda: F.quantize_blockwise(X.double()), "A: dtype torch.float64"),
        (lambda: F.dequantize_blockwise(PACKED.view(torch.int8), absmax=torch.ones(1)), "codes: dtype torch.int8"),
        (lambda: halfbyte.matmul_4bit(X, PACKED, None), "quant_state: NoneType"),
    ],
)
def test_a_wrong_dtype_is_a_value_error_too(call, message):
    for kind in (TypeError, ValueError):
        with pytest.raises(kind, match=message):
            call()
