"""Products that go straight to the compiled core, which reads the tensors by itself; and what it leaves to others."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from halfbyte import _native  # noqa: E402
from halfbyte.backends import cpu  # noqa: E402
from halfbyte.functional import quantize_4bit  # noqa: E402
from halfbyte.nn import Linear4bit  # noqa: E402
from halfbyte.ops import dispatch  # noqa: E402
from halfbyte.ops.packed import Memo, PackedWeight, Packing, packed_pair  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

N, K = 48, 128

reads_tensors = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch has no C interface of DLPack before 2.10"
)

FLOATS = [torch.float16, torch.bfloat16, torch.float32]


def no() -> bool:
    return False


def questions(**changes: Any) -> _native.DirectCalls:
    """Those of a process where nothing listens; the long way to a product is told by the text that it gives."""
    quiet: dict[str, Any] = {
        "plain_types": {torch.Tensor, torch.nn.Parameter, type(None)},
        "kernels": {"cpu": SimpleNamespace(linear_4bit=lambda x, weight, bias: "the long way")},
        "transforms": (no, no),
        "function_modes": no,
        "forward_ad_level": (SimpleNamespace(level=-1), "level"),
        "is_grad_enabled": torch.is_grad_enabled,
        "empty": lambda sizes, strides, dtype: torch.empty_strided(sizes, strides, dtype=dtype),
        "get_num_threads": lambda: 1,
        "packed_weight": packed_pair,
    }
    return _native.DirectCalls(**{**quiet, **changes})


def weight(nested: bool) -> PackedWeight:
    torch.manual_seed(0)
    packed, state = quantize_4bit(torch.randn(N, K), quant_type="nf4", compress_statistics=nested)
    return state.packed(packed)


def kernel(nested: bool = True, dtype: str = "float32", bias: str | None = "float32") -> _native.CpuLinear:
    return _native.CpuLinear(dtype, N, K, "nf4", 64, nested, bias)


def arguments(nested: bool = True) -> dict[str, Any]:
    codes, packing = weight(nested)
    return {
        "x": torch.randn(3, K),
        "codes": codes,
        "absmax": packing.absmax,
        "absmax2": packing.absmax2,
        "offset": packing.offset,
        "bias": torch.randn(N),
    }


def product(direct: _native.DirectCalls, given: dict[str, Any], known: _native.CpuLinear | None) -> Any:
    memo = None if known is None else Memo()
    if memo is not None:
        memo.linear = known
    packing = Packing(given["absmax"], given["absmax2"], given["offset"], (N, K), 64, "nf4", memo)
    return direct.linear_4bit(given["x"], given["codes"], packing, given["bias"])


def by_addresses(given: dict[str, Any], nested: bool) -> Tensor:
    """The same by the addresses of tensors."""
    x, bias = given["x"], given["bias"]
    out = torch.empty(*x.shape[:-1], N, dtype=x.dtype)
    names = [None if tensor is None else str(tensor.dtype).removeprefix("torch.") for tensor in (x, bias)]
    addresses = [0 if value is None else value.data_ptr() for value in given.values()]
    kernel(nested, str(names[0]), names[1]).forward(x.numel() // K, *addresses, out.data_ptr(), 1)
    return out


# ---- the core's way --------------------------------------------------------------------------------------------------


@reads_tensors
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias", [*FLOATS, None])
@pytest.mark.parametrize("dtype", FLOATS)
def test_direct_call_gives_the_bits_of_addresses(nested: bool, dtype: Any, bias: Any) -> None:
    given = arguments(nested)
    given["x"] = given["x"].to(dtype)
    given["bias"] = None if bias is None else given["bias"].to(bias)
    # One kernel is for all dtypes.
    found = product(questions(), given, kernel(nested))
    assert found.dtype is dtype
    assert torch.equal(found, by_addresses(given, nested))


@reads_tensors
@pytest.mark.parametrize("shape", [(K,), (1, K), (5, K), (2, 1, 3, K)])
def test_direct_call_gives_a_row_for_each_of_x(shape: tuple[int, ...]) -> None:
    given = arguments()
    given["x"] = torch.randn(shape)
    found = product(questions(), given, kernel())
    assert found.shape == (*shape[:-1], N)
    assert found.stride() == torch.empty(*shape[:-1], N).stride()
    assert torch.equal(found, by_addresses(given, True))


@reads_tensors
def test_direct_call_takes_codes_of_any_dtype_and_parameters() -> None:
    given = arguments()
    expected = by_addresses(given, True)
    for dtype in (torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        codes = given["codes"].view(1, -1).view(dtype)
        given["codes"] = torch.nn.Parameter(codes, requires_grad=False)
        given["bias"] = torch.nn.Parameter(given["bias"], requires_grad=False)
        assert torch.equal(product(questions(), given, kernel()), expected)
        given["codes"] = codes.view(torch.uint8)


def shifted(tensor: Tensor) -> Tensor:
    """The same values, at an address that does not suit the dtype."""
    data = bytearray(1) + bytearray(tensor.numpy().tobytes())
    moved = torch.frombuffer(data, dtype=tensor.dtype, count=tensor.numel(), offset=1)
    assert moved.data_ptr() % tensor.element_size()
    return moved.view(tensor.shape)


CHANGES: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "another number of columns": ("x", lambda x: torch.randn(3, K + 1)),
    "columns apart": ("x", lambda x: torch.randn(3, 2 * K)[:, ::2]),
    "rows apart": ("x", lambda x: torch.randn(3, 2 * K)[:, :K]),
    "transposed": ("x", lambda x: torch.randn(K, 3).t()),
    "one row for all": ("x", lambda x: torch.randn(1, K).expand(3, K)),
    "float64": ("x", lambda x: x.double()),
    "integers": ("x", lambda x: x.to(torch.int8)),
    "a number": ("x", lambda x: torch.tensor(1.0)),
    "no rows": ("x", lambda x: x[:0]),
    "sparse": ("x", lambda x: x.to_sparse()),
    "at an odd address": ("x", shifted),
    "fewer codes": ("codes", lambda packed: packed[:-1]),
    "fewer scales": ("absmax", lambda absmax: absmax[:-1].clone()),
    "scales of another dtype": ("absmax", lambda absmax: absmax.to(torch.float16)),
    "fewer scales of scales": ("absmax2", lambda absmax2: absmax2[:0]),
    "scales of scales at an odd address": ("absmax2", shifted),
    "no scales of scales": ("absmax2", lambda absmax2: None),
    "no offset": ("offset", lambda offset: None),
    "a bias of another length": ("bias", lambda bias: bias[:-1]),
    "a bias of two dimensions": ("bias", lambda bias: bias[None]),
    "a bias of float64": ("bias", lambda bias: bias.double()),
    "a bias at an odd address": ("bias", shifted),
}


@pytest.mark.parametrize("change", CHANGES)
def test_direct_call_leaves_the_rest_to_python(change: str) -> None:
    given = arguments()
    name, made = CHANGES[change]
    given[name] = made(given[name])
    made_of: list[Any] = []
    direct = questions(empty=lambda *layout: made_of.append(layout))
    assert product(direct, given, kernel()) == "the long way"
    assert made_of == []


def test_direct_call_of_a_weight_without_columns() -> None:
    given = {**arguments(), "x": torch.randn(3, 5)}
    assert product(questions(), given, _native.CpuLinear("float32", N, 0, "nf4", 64, True)) == "the long way"


def test_direct_call_hands_the_parts_on() -> None:
    given = arguments()
    seen: list[Any] = []
    direct = questions(kernels={"cpu": SimpleNamespace(linear_4bit=lambda *call: seen.append(call) or "done")})
    assert product(direct, given, None) == "done"
    ((x, handed, bias),) = seen
    assert x is given["x"]
    assert bias is given["bias"]
    assert type(handed) is PackedWeight
    assert handed.codes is given["codes"]
    assert handed.packing[:3] == (given["absmax"], given["absmax2"], given["offset"])


@reads_tensors
@pytest.mark.parametrize("made", [torch.empty(3, N - 1), torch.empty(3, N, dtype=torch.float16), "no tensor"])
def test_direct_call_checks_the_result_that_it_is_given(made: Any) -> None:
    assert product(questions(empty=lambda *_: made), arguments(), kernel()) == "the long way"


@reads_tensors
def test_direct_call_refuses_a_result_in_the_memory_of_an_input() -> None:
    given = arguments()
    shared = torch.randn(3, K)
    given["x"] = shared
    with pytest.raises(ValueError, match="out"):
        product(questions(empty=lambda *_: shared.view(-1)[: 3 * N].view(3, N)), given, kernel())


@reads_tensors
def test_direct_call_passes_errors_on() -> None:
    def refuses(*_: object) -> None:
        raise MemoryError("no more")

    with pytest.raises(MemoryError, match="no more"):
        product(questions(empty=refuses), arguments(), kernel())
    with pytest.raises(ZeroDivisionError):
        product(questions(function_modes=lambda: 1 // 0), arguments(), kernel())


@reads_tensors
def test_direct_call_asks_for_threads_where_they_help() -> None:
    before = _native.get_threads()
    asked: list[int] = []

    def three() -> int:
        asked.append(3)
        return 3

    direct, given = questions(get_num_threads=three), arguments()
    try:
        product(direct, given, kernel())
        assert not asked
        given["x"] = torch.randn(64, K)
        found = product(direct, given, kernel())
        assert asked
        assert _native.get_threads() == 3
        assert torch.equal(found, by_addresses(given, True))
        # What others say stays until torch's number changes.
        _native.set_threads(2)
        product(direct, given, kernel())
        assert _native.get_threads() == 2
    finally:
        _native.set_threads(before)
        _native.follow_threads(torch.get_num_threads())


@reads_tensors
def test_direct_call_is_what_a_second_product_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Linear4bit(K, N, quant_type="nf4", device="cpu").to("cpu").requires_grad_(False)
    x = torch.randn(2, K)
    first = layer(x)

    def refused(*_: object) -> None:
        raise AssertionError("the long way")

    monkeypatch.setattr(cpu, "check_weight", refused)
    assert torch.equal(layer(x), first)
    for dtype in FLOATS:
        assert layer(x.to(dtype)).dtype is dtype
    with torch.inference_mode():
        assert layer(x).is_inference()
    assert not layer(x).is_inference()
    with pytest.raises(AssertionError, match="the long way"):
        layer(torch.randn(K, 2).t())


def test_direct_call_needs_the_interface() -> None:
    assert not _native.read_tensors_of(int)


# ---- the questions ---------------------------------------------------------------------------------------------------


class Mine(torch.Tensor):
    """A class with a say."""


YES: dict[str, dict[str, Any]] = {
    "a transform": {"transforms": (no, lambda: object())},
    "a mode": {"transforms": (lambda: 1, no)},
    "a function mode": {"function_modes": lambda: 2},
    "a level": {"forward_ad_level": (SimpleNamespace(level=0), "level")},
}


@pytest.mark.parametrize("change", YES)
def test_direct_call_asks_each_question(change: str) -> None:
    x = torch.randn(3, K)
    quiet, heard = questions(), questions(**YES[change])
    assert quiet.kernels(x) is not None
    assert not quiet.transformed()
    assert heard.kernels(x) is None
    assert heard.transformed() is (change != "a function mode")
    assert product(heard, arguments(), kernel()) is None


TENSORS: dict[str, Callable[[], Tensor]] = {
    "another class": lambda: torch.randn(N).as_subclass(Mine),
    "negated": lambda: torch._neg_view(torch.randn(N)),
    "with a gradient": lambda: torch.randn(N, requires_grad=True),
}


@pytest.mark.parametrize("change", TENSORS)
def test_direct_call_asks_both_factors(change: str) -> None:
    direct, plain, other = questions(), torch.randn(N), TENSORS[change]()
    assert direct.kernels(plain, plain) is not None
    assert direct.kernels(other) is None
    assert direct.kernels(plain, other) is None
    given = arguments()
    assert product(direct, {**given, "bias": other}, kernel()) is None
    with torch.no_grad():
        assert (direct.kernels(plain, other) is not None) == (change == "with a gradient")
    for part in ("codes", "absmax", "absmax2", "offset"):
        packing = Packing(
            *({**given, part: other}[name] for name in ("absmax", "absmax2", "offset")), (N, K), 64, "nf4"
        )
        codes = other if part == "codes" else given["codes"]
        assert (direct.kernels_of(plain, None, codes, packing) is None) == (change == "another class")
        assert direct.kernels_of(other, None, codes, packing) is None
    assert (direct.kernels(plain, None, plain, other) is None) == (change == "another class")


def test_direct_call_asks_for_the_class_that_is_added_later() -> None:
    plain_types: set[type] = {torch.Tensor}
    direct, x = questions(plain_types=plain_types), torch.randn(3).as_subclass(Mine)
    assert direct.kernels(x) is None
    plain_types.add(Mine)
    assert direct.kernels(x) is not None


def test_direct_call_by_device() -> None:
    direct = questions(kernels={"cpu": cpu, "meta": SimpleNamespace()})
    assert direct.kernels(torch.empty(1)) is cpu
    assert direct.kernels(torch.empty(1, device="meta")) not in (cpu, None)
    assert questions().kernels(torch.empty(1, device="meta")) is None


def test_direct_call_of_what_is_no_tensor() -> None:
    for other in ([1.0], torch.ones(2).numpy(), 1):
        assert questions().kernels(other) is None


class DispatchMode(TorchDispatchMode):
    """Listens."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class FunctionMode(TorchFunctionMode):
    """Listens to functions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning", "ignore:`torch.jit.trace:DeprecationWarning")
def test_direct_call_is_asked_of_torch_itself() -> None:
    x = torch.randn(3, K)
    assert dispatch.kernels(x) is cpu
    assert not dispatch.transformed()
    found: list[Any] = []

    def ask(y: Tensor) -> Tensor:
        found.append((dispatch.kernels(x), dispatch.transformed()))
        return y.clone()

    torch.func.vmap(ask)(torch.randn(2, 2))
    torch.jit.trace(ask, (torch.randn(2),), check_trace=False)
    with torch.autograd.forward_ad.dual_level():
        ask(x)
    with DispatchMode():
        ask(x)
    assert len(found) >= 4
    assert all(answer == (None, True) for answer in found)
    del found[:]
    with FunctionMode():
        ask(x)
    assert found == [(None, False)]
    assert dispatch.kernels(x) is cpu
    assert not dispatch.transformed()
