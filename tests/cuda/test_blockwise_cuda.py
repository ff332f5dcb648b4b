"""Quantize, dequantize and nested scales on the GPU: bits equal to the processor's, for every input."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from halfbyte import _native  # noqa: E402

import kernels as k  # noqa: E402

SIZES = (1, 2, 7, 8, 9, 63, 64, 65, 4095, 4096, 4097, 8191, 8192, 8193, 16383, 16384, 16385, 100_003)


def extremes(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal values with zeros, denormals, infinities and NaN among them, whole blocks of some."""
    generator = torch.Generator().manual_seed(n)
    values = torch.randn(n, generator=generator) * 10 ** torch.randint(-6, 4, (n,), generator=generator)
    for special in (0.0, -0.0, 1e-40, -3e-39, 1e-44, float("inf"), float("-inf"), float("nan"), 6e4, 3e38):
        start = int(torch.randint(n, (), generator=generator))
        length = (1, 64, 5000)[int(torch.randint(3, (), generator=generator))]
        values[start : start + length] = special
        values[int(torch.randint(n, (), generator=generator))] = special
    return values.to(dtype)


def all_patterns(dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern of a 16-bit type."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def check_quantize(values: torch.Tensor, quant_type: str, blocksize: int, **how: int | bool) -> None:
    expected = k.cpu_quantize(values, quant_type, blocksize)
    found = k.quantize(values.cuda(), quant_type, blocksize, **how)
    assert k.same_bits(found.absmax, expected.absmax), "absmax"
    assert k.same_bits(found.packed, expected.packed), "packed"


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dtype", k.DTYPES)
@pytest.mark.parametrize("quant_type", k.QUANT_TYPES)
def test_quantize(quant_type: str, dtype: torch.dtype, reference: bool) -> None:
    for blocksize in k.BLOCK_SIZES:
        for n in SIZES:
            check_quantize(extremes(n, dtype), quant_type, blocksize, reference=reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant_type", k.QUANT_TYPES)
def test_quantize_every_pattern(quant_type: str, dtype: torch.dtype) -> None:
    patterns = all_patterns(dtype)
    shuffled = patterns[torch.randperm(2**16, generator=torch.Generator().manual_seed(1))]
    for blocksize in k.BLOCK_SIZES:
        check_quantize(patterns, quant_type, blocksize)
        check_quantize(shuffled, quant_type, blocksize)
        # Every pattern in a block whose scale is one of some: the largest of the block is given, smaller ones stay.
        for largest in (1.0, 0.75, 3.0, 2.0**-14, 65504.0):
            blocks = patterns.view(-1, 16).repeat(1, blocksize // 16)
            kept = blocks.float().abs() <= largest
            blocks = torch.where(kept, blocks, torch.zeros((), dtype=dtype))
            blocks[:, 0] = largest
            check_quantize(blocks.reshape(-1), quant_type, blocksize)


@pytest.mark.parametrize("quant_type", k.QUANT_TYPES)
def test_quantize_around_every_threshold(quant_type: str) -> None:
    """float32 values within four steps of each middle of two codebook values, and of every edge of a cell."""
    map_ = torch.tensor(sorted(_native.quant_map(quant_type)))
    points = torch.cat(
        [map_, (map_[1:] + map_[:-1]) / 2, (torch.arange(-64, 64) * 4 - 66) / 57.0, map_.new_tensor([1])]
    )
    points = points[points.abs() <= 1]
    steps = torch.arange(-4, 5, dtype=torch.int32)
    near = (points.view(torch.int32)[:, None] + steps).view(torch.float32).reshape(-1)
    near = near[near.abs() <= 1]
    for largest in (1.0, 0.1, 3.0, 1e-30, 2.0**-119, 2.0**-121, 2.0**-126, 2.0**-127, 2.0**-129, 1e-44, 3e38):
        blocks = torch.nn.functional.pad(near, (0, -near.numel() % 63)).reshape(-1, 63) * largest
        values = torch.cat([torch.full((len(blocks), 1), largest), blocks], 1).reshape(-1)
        check_quantize(values, quant_type, 64)


@pytest.mark.parametrize("dtype", k.DTYPES)
def test_quantize_unaligned(dtype: torch.dtype) -> None:
    values = extremes(50_000, dtype)
    for start in range(1, 9):
        for offset in range(4):
            part = values.cuda()[start:]
            expected = k.cpu_quantize(values[start:].clone(), "nf4", 64)
            assert k.same(k.quantize(part, "nf4", 64, offset=offset), expected), (start, offset)


def check_nested(values: torch.Tensor, quant_type: str, blocksize: int, *, offset: int = 0) -> None:
    expected = k.cpu_compress(k.cpu_quantize(values.cpu(), quant_type, blocksize))
    assert k.same(k.quantize_nested(values.cuda(), quant_type, blocksize, offset=offset), expected)


@pytest.mark.parametrize("dtype", k.DTYPES)
@pytest.mark.parametrize("quant_type", k.QUANT_TYPES)
def test_quantize_nested(quant_type: str, dtype: torch.dtype) -> None:
    for n in (*SIZES, 3_000_003, 1 << 22):
        generator = torch.Generator().manual_seed(n)
        values = (torch.randn(n, generator=generator) * torch.rand(n, generator=generator)).to(dtype)
        for blocksize in k.BLOCK_SIZES:
            check_nested(values, quant_type, blocksize)
        check_nested(extremes(n, dtype), quant_type, 64)
        check_nested(values.cuda()[n % 9 :], quant_type, 64, offset=n % 4)


def test_quantize_nested_on_several_streams() -> None:
    """Calls one after another and side by side, each with a workspace of its own."""
    tensors = [torch.randn((1 << 20) + 64 * i, dtype=torch.bfloat16, device="cuda") * i for i in range(1, 9)]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for i, values in enumerate(tensors):
            with torch.cuda.stream(streams[i % 4]):
                found.append((values, k.quantize_nested(values, "nf4", 64)))
    torch.cuda.synchronize()
    expected = [k.cpu_compress(k.cpu_quantize(values.cpu(), "nf4", 64)) for values in tensors]
    for i, (_, weight) in enumerate(found):
        assert k.same(weight, expected[i % len(tensors)]), i


def scales_of(n: int, nested: bool) -> k.Quantized:
    """Random codes with random scales, some of them not finite."""
    generator = torch.Generator().manual_seed(n)
    packed = torch.randint(256, (-(-n // 2),), dtype=torch.uint8, generator=generator)
    blocks = -(-n // 32)
    absmax = torch.rand(blocks, generator=generator) * 4
    absmax[torch.randint(blocks, (3,), generator=generator)] = torch.tensor([0.0, 1e-42, 1e38])
    weight = k.Quantized(packed, absmax)
    if nested:
        return k.cpu_compress(weight)
    weight.absmax[torch.randint(blocks, (2,), generator=generator)] = torch.tensor([float("inf"), float("nan")])
    return weight


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", k.DTYPES)
@pytest.mark.parametrize("quant_type", k.QUANT_TYPES)
def test_dequantize(quant_type: str, dtype: torch.dtype, nested: bool, reference: bool) -> None:
    for n in (*SIZES, 1_000_001):
        everything = scales_of(n, nested)
        for blocksize in k.BLOCK_SIZES:
            blocks = -(-n // blocksize)
            absmax2 = None if everything.absmax2 is None else everything.absmax2[: -(-blocks // 256)].clone()
            weight = k.Quantized(everything.packed, everything.absmax[:blocks].clone(), absmax2, everything.offset)
            expected = k.cpu_dequantize(weight, n, dtype, quant_type, blocksize)
            on_gpu = k.Quantized(*(None if t is None else t.cuda() for t in weight.parts))
            found = k.dequantize(on_gpu, n, dtype, quant_type, blocksize, reference=reference)
            assert k.same_bits(found, expected), (n, blocksize)


@pytest.mark.parametrize("dtype", k.DTYPES)
def test_dequantize_unaligned(dtype: torch.dtype) -> None:
    n = 30_001
    weight = scales_of(n, nested=False)
    absmax = weight.absmax[: -(-n // 64)].clone()
    expected = k.cpu_dequantize(k.Quantized(weight.packed, absmax), n, dtype, "fp4", 64)
    for start in range(4):
        packed = k.poisoned(weight.packed.numel(), torch.uint8, start)
        packed.copy_(weight.packed)
        for offset in range(9):
            found = k.dequantize(k.Quantized(packed, absmax.cuda()), n, dtype, "fp4", 64, offset=offset)
            assert k.same_bits(found, expected), (start, offset)


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 2048, 65535, 65536, 65537, 1_000_003, 256**3 + 1])
def test_compress(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    absmax = torch.rand(n, generator=generator) * torch.rand((), generator=generator)
    plain = k.Quantized(torch.empty(0, dtype=torch.uint8), absmax)
    expected = k.cpu_compress(plain)
    found = k.compress(k.Quantized(plain.packed.cuda(), absmax.cuda()))
    assert k.same(found, expected)


@pytest.mark.parametrize("special", [0.0, 0.25, float("inf"), 1e-42])
def test_compress_odd_scales(special: float) -> None:
    for absmax in (torch.full((300,), special), torch.cat([torch.rand(1000), torch.tensor([special])])):
        plain = k.Quantized(torch.empty(0, dtype=torch.uint8), absmax)
        assert k.same(k.compress(k.Quantized(plain.packed.cuda(), absmax.cuda())), k.cpu_compress(plain))


def test_compress_between_codes() -> None:
    """Scales in the middle between two values of the map, next to it, or next to where a cell of the look-up begins."""
    map_ = torch.tensor(_native.dynamic_map())
    cells = torch.arange(0x34000000, 0x3F800000, 1 << 17, dtype=torch.int32).view(torch.float32)
    points = torch.cat([(map_[:-1] + map_[1:]) * 0.5, map_[map_ != 0], cells])
    near = (points.view(torch.int32)[:, None] + torch.arange(-2, 3, dtype=torch.int32)).view(torch.float32).reshape(-1)
    near = near[near.abs() <= 1]
    # Each group has the scale 1, and half of it mirrors the other, so that the mean is 0.
    rows = torch.nn.functional.pad(near, (0, -near.numel() % 127)).view(-1, 127)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    rows = torch.cat([rows, -rows], 1).reshape(-1)
    plain = k.Quantized(torch.empty(0, dtype=torch.uint8), rows)
    expected = k.cpu_compress(plain)
    assert expected.offset == 0
    assert k.same(k.compress(k.Quantized(plain.packed.cuda(), plain.absmax.cuda())), expected)


def test_more_than_two_to_the_31_values() -> None:
    n = 2**31 + 12_345
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    values = torch.empty(n, dtype=torch.bfloat16, device="cuda").normal_()
    weight = k.quantize(values, "nf4", 64)
    last = n // 64 * 64 - 64 * 10_000
    expected = k.cpu_quantize(values[last:].cpu(), "nf4", 64)
    assert k.same_bits(weight.packed[last // 2 :], expected.packed)
    assert k.same_bits(weight.absmax[last // 64 :], expected.absmax)
    del values
    out = k.dequantize(weight, n, torch.bfloat16, "nf4", 64)
    assert k.same_bits(out[last:], k.cpu_dequantize(expected, n - last, torch.bfloat16, "nf4", 64))
    assert k.same(k.compress(weight).cpu(), k.cpu_compress(weight.cpu()))


def test_in_a_graph_and_on_another_stream() -> None:
    values = torch.randn(1 << 20, dtype=torch.bfloat16)
    expected = k.cpu_compress(k.cpu_quantize(values, "nf4", 64))
    back = k.cpu_dequantize(expected, values.numel(), torch.bfloat16, "nf4", 64)
    on_gpu = torch.zeros_like(values, device="cuda")
    _native.cuda_prepare(torch.cuda.current_device())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weight = k.compress(k.quantize(on_gpu, "nf4", 64))
        in_one = k.quantize_nested(on_gpu, "nf4", 64)
        out = k.dequantize(weight, values.numel(), torch.bfloat16, "nf4", 64)
    on_gpu.copy_(values)
    graph.replay()
    assert k.same(weight, expected)
    assert k.same(in_one, expected)
    assert k.same_bits(out, back)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = k.quantize(on_gpu, "nf4", 64)
    stream.synchronize()
    assert k.same_bits(found.packed, expected.packed)


def test_nothing() -> None:
    empty = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    weight = k.quantize(empty, "nf4", 64)
    assert weight.packed.numel() == weight.absmax.numel() == 0
    assert k.dequantize(weight, 0, torch.bfloat16, "nf4", 64).numel() == 0
    # The mean of nothing is 0, as on the processor.
    assert k.same(k.compress(weight), k.cpu_compress(weight.cpu()))
    check_nested(empty, "nf4", 64)


def test_wrong_calls() -> None:
    values = torch.randn(128, device="cuda")
    packed, absmax = k.poisoned(64, torch.uint8), k.poisoned(2, torch.float32)
    call = _native.cuda_quantize_4bit
    with pytest.raises(ValueError, match=r"blocksize must be one of .*, got 48"):
        call(*k.here(), k.raw(values), k.raw(packed), k.raw(absmax), "nf4", 48)
    with pytest.raises(ValueError, match=r"absmax must be 4 elements long.*, got 2"):
        call(*k.here(), k.raw(values), k.raw(packed), k.raw(absmax), "nf4", 32)
    with pytest.raises(ValueError, match="packed must be of dtype uint8, got"):
        call(*k.here(), k.raw(values), k.raw(packed.view(torch.float32)), k.raw(absmax), "nf4", 64)
    with pytest.raises(ValueError, match=r"device must be an ordinal below .*, got 63"):
        call(63, 0, k.raw(values), k.raw(packed), k.raw(absmax), "nf4", 64)
