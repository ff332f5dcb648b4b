"""Products whose tensors the compiled core reads by itself, and what it leaves to Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from halfbyte import _native  # noqa: E402
from halfbyte.backends import cpu  # noqa: E402
from halfbyte.functional import quantize_4bit  # noqa: E402
from halfbyte.ops.packed import PackedWeight  # noqa: E402
from torch import Tensor  # noqa: E402

N, K = 48, 128

pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch has no C interface of DLPack before 2.10"
)


def weight(nested: bool) -> PackedWeight:
    torch.manual_seed(0)
    packed, state = quantize_4bit(torch.randn(N, K), quant_type="nf4", compress_statistics=nested)
    return state.packed(packed)


def kernel(nested: bool, dtype: str = "float32", bias: str | None = "float32") -> Any:
    return _native.CpuLinear(dtype, N, K, "nf4", 64, nested, bias)


def arguments(nested: bool) -> dict[str, Any]:
    codes, packing = weight(nested)
    return {
        "x": torch.randn(3, K),
        "packed": codes,
        "absmax": packing.absmax,
        "absmax2": packing.absmax2,
        "offset": packing.offset,
        "bias": torch.randn(N),
        "out": torch.full((3, N), 7.0),
    }


@pytest.mark.parametrize("nested", [False, True])
def test_direct_call_gives_the_bits_of_addresses(nested: bool) -> None:
    given = arguments(nested)
    assert kernel(nested).forward_tensors(*given.values(), 1)
    expected = torch.empty(3, N)
    addresses = [0 if value is None else value.data_ptr() for value in given.values()]
    kernel(nested).forward(3, *addresses[:-1], expected.data_ptr(), 1)
    assert torch.equal(given["out"], expected)


CHANGES: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "another number of columns": ("x", lambda x: torch.randn(3, K + 1)),
    "columns apart": ("x", lambda x: torch.randn(3, 2 * K)[:, ::2]),
    "rows apart": ("x", lambda x: torch.randn(3, 2 * K)[:, :K]),
    "transposed": ("x", lambda x: torch.randn(K, 3).t()),
    "one row for all": ("x", lambda x: torch.randn(1, K).expand(3, K)),
    "another dtype": ("x", lambda x: x.bfloat16()),
    "float64": ("x", lambda x: x.double()),
    "a number": ("x", lambda x: torch.tensor(1.0)),
    "no rows": ("x", lambda x: x[:0]),
    "more rows than the result": ("x", lambda x: torch.randn(4, K)),
    "a list": ("x", lambda x: x.tolist()),
    "nothing": ("x", lambda x: None),
    "on no device": ("x", lambda x: x.to("meta")),
    "sparse": ("x", lambda x: x.to_sparse()),
    "an array": ("x", lambda x: x.numpy()),
    "fewer codes": ("packed", lambda packed: packed[:-1]),
    "fewer scales": ("absmax", lambda absmax: absmax[:-1].clone()),
    "scales of another dtype": ("absmax", lambda absmax: absmax.to(torch.float16)),
    "fewer scales of scales": ("absmax2", lambda absmax2: absmax2[:0]),
    "no scales of scales": ("absmax2", lambda absmax2: None),
    "no offset": ("offset", lambda offset: None),
    "a bias of another length": ("bias", lambda bias: bias[:-1]),
    "a bias of another dtype": ("bias", lambda bias: bias.bfloat16()),
    "no bias": ("bias", lambda bias: None),
    "a smaller result": ("out", lambda out: out[:2]),
    "a result of another dtype": ("out", lambda out: out.bfloat16()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_direct_call_leaves_the_rest_to_python(change: str) -> None:
    given = arguments(nested=True)
    out = given["out"]
    name, made = CHANGES[change]
    given[name] = made(given[name])
    assert kernel(nested=True).forward_tensors(*given.values(), 1) is False
    assert (out == 7).all()


def test_direct_call_takes_codes_of_any_dtype_and_tensors_of_any_class() -> None:
    class Mine(torch.Tensor):
        pass

    given = arguments(nested=True)
    assert kernel(nested=True).forward_tensors(*given.values(), 1)
    expected = given["out"].clone()
    given["packed"] = torch.nn.Parameter(given["packed"].view(1, -1).view(torch.bfloat16), requires_grad=False)
    given["bias"] = torch.nn.Parameter(given["bias"])
    given["x"] = given["x"].as_subclass(Mine)
    given["out"] = torch.zeros(3, N)
    assert kernel(nested=True).forward_tensors(*given.values(), 1)
    assert torch.equal(given["out"], expected)


def test_direct_call_refuses_a_result_in_the_memory_of_an_input() -> None:
    given = arguments(nested=True)
    shared = torch.randn(3, K)
    given["x"], given["out"] = shared, shared.view(-1)[: 3 * N].view(3, N)
    with pytest.raises(ValueError, match="out"):
        kernel(nested=True).forward_tensors(*given.values(), 1)


def test_direct_call_is_what_a_second_product_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    known = weight(nested=True)
    assert known.packing.memo is not None
    x = torch.randn(2, K)
    first = cpu.linear_4bit(x, known, None)

    def refused(*_: object) -> None:
        raise AssertionError("the long way")

    monkeypatch.setattr(cpu, "check_weight", refused)
    assert torch.equal(cpu.linear_4bit(x, known, None), first)
    with pytest.raises(AssertionError, match="the long way"):
        cpu.linear_4bit(torch.randn(K, 2).t(), known, None)


def test_direct_call_needs_the_interface() -> None:
    assert not _native.read_tensors_of(int)
