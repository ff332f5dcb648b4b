"""That running kernels of compute capability 9.0 on the processor finds mistakes: each of tests/planted_hopper.cu.

And that what is right there gives the right results: copies of tiles, products of warpgroups with operands in each
form, clusters.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import build_emulator
import native
import numpy as np
import pytest
from harness import Argument, Buffer, Case, KernelError, Launch, SanitizerError, built, lines_of, pointers, tensor_map

PLANTED = build_emulator.HERE / "tests" / "planted_hopper.cu"
OPERANDS = build_emulator.HERE / "tests" / "operands.cu"
THREADS = 160
COLUMNS = 64
TILE = 8 * COLUMNS


@dataclass(frozen=True)
class Kernel:
    """A launch of a kernel, whose result is in `out` and has to be `expected`."""

    case: Case
    out: Buffer
    expected: np.ndarray


def integers(n: int, seed: int = 1) -> np.ndarray:
    """Small integers in bfloat16, of which sums of products are exact."""
    return native.from_float32(np.random.default_rng(seed).integers(-8, 9, n).astype(np.float32), "bf16")


def tiles(buffer: Buffer) -> Argument:
    """A matrix of 64 columns, in tiles of 8 rows."""
    return tensor_map(buffer, 2, (COLUMNS, buffer.data.size // COLUMNS), (2 * COLUMNS,), (COLUMNS, 8), 128)


def ring(name: str) -> Kernel:
    x, out = Buffer(integers(4 * TILE)), Buffer(np.zeros(4 * TILE, np.uint16))
    return Kernel(Case([Launch(name, 1, THREADS, [tiles(x), pointers(out)], 2 * 1024 + 64)]), out, x.data)


def multiply(name: str) -> Kernel:
    a, b, out = Buffer(integers(64 * 64)), Buffer(integers(64 * 64, 2)), Buffer(np.zeros((64, 64), np.float32))
    expected = np.matmul(
        *(native.to_float32(x.data, "bf16").reshape(64, 64) for x in (a, b)), axes=[(0, 1), (1, 0), (0, 1)]
    )
    shared = 8192 + 128 * name.endswith("MISALIGNED")
    launch = Launch(name, 1, THREADS, [pointers(a), pointers(b), pointers(out)], shared)
    return Kernel(Case([launch]), out, expected)


def multiply_bytes(name: str) -> Kernel:
    random = np.random.default_rng(3)
    a, b = (Buffer(random.integers(-128, 128, (64, 128)).astype(np.int8)) for _ in range(2))
    out = Buffer(np.zeros((64, 64), np.int32))
    shared = 2 * 8192 + 128 * name.endswith("MISALIGNED")
    launch = Launch(name, 1, THREADS, [pointers(a), pointers(b), pointers(out)], shared)
    return Kernel(Case([launch]), out, a.data.astype(np.int32) @ b.data.astype(np.int32).T)


def send(name: str) -> Kernel:
    x, out = Buffer(integers(4 * TILE)), Buffer(np.zeros(4 * TILE, np.uint16))
    return Kernel(Case([Launch(name, 1, THREADS, [pointers(x), tiles(out)], 1024)]), out, x.data)


def roles(name: str) -> Kernel:
    x, out = Buffer(np.arange(256, dtype=np.float32)), Buffer(np.zeros(256, np.float32))
    return Kernel(Case([Launch(name, 1, 384, [pointers(x), pointers(out)])]), out, 2 * x.data)


def exchange(name: str) -> Kernel:
    x, out = Buffer(np.arange(4 * 512, dtype=np.float32)), Buffer(np.zeros(4 * 512, np.float32))
    launch = Launch(name, 4, THREADS, [pointers(x), pointers(out)], 2048, cluster=2)
    return Kernel(Case([launch]), out, x.data.reshape(2, 2, 512)[:, ::-1].reshape(-1))


def share(name: str) -> Kernel:
    x, out = Buffer(integers(TILE)), Buffer(np.zeros(2 * TILE, np.uint16))
    launch = Launch(name, 2, THREADS, [tiles(x), pointers(out)], 1024 + 8, cluster=2)
    return Kernel(Case([launch]), out, np.tile(x.data, 2))


def relay(name: str) -> Kernel:
    x, out = Buffer(integers(2 * TILE)), Buffer(np.zeros(2 * TILE, np.uint16))
    launch = Launch(name, 2, THREADS, [pointers(x), pointers(out)], 1024 + 24, cluster=2)
    expected = x.data.reshape(2, TILE).copy()
    expected[:, 1] = expected[::-1, 1].copy()
    return Kernel(Case([launch]), out, expected.reshape(-1))


KERNELS: dict[str, Callable[[str], Kernel]] = {
    kernel.__name__: kernel for kernel in (ring, multiply, multiply_bytes, send, roles, exchange, share, relay)
}
WAYS = {
    "lowest": ("library", False),
    "highest": ("library", True),
    "asan": ("asan", False),
    "tsan": ("tsan", False),
    "stores": ("stores", False),
    "stores, highest": ("stores", True),
}


def outcome(way: str, kernel: Kernel) -> str:
    """What a way to run says about a kernel: nothing, "wrong values", or its report."""
    mode, highest_first = WAYS[way]
    try:
        results = built(PLANTED, mode).run(kernel.case, highest_first)
    except (KernelError, SanitizerError) as error:
        return str(error)
    found = results[next(k for k, buffer in enumerate(kernel.case.buffers) if buffer is kernel.out)]
    return "" if np.array_equal(found, kernel.expected) else WRONG


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_found_in_what_is_right(kernel: str, way: str) -> None:
    assert outcome(way, KERNELS[kernel](f"{kernel}_NONE")) == ""


WRONG, STILL, RACE, POISON = "wrong values", "no thread can go on", "data race", "use-after-poison"
UNFENCED = "without a fence.proxy.async of that thread"
# By the engine, whatever kernels are compiled with.
ALWAYS = ("lowest", "highest", "stores")
# By which ways each mistake is found at least, and the words of the report.
MISTAKES = {
    ("ring", "EXPECT_FEWER_BYTES"): dict.fromkeys(ALWAYS, "brings 16 bytes more than were expected at"),
    ("ring", "EXPECT_MORE_BYTES"): dict.fromkeys(ALWAYS, "0 arrivals and 16 bytes, expected at"),
    ("ring", "EXPECT_NOTHING"): {
        "lowest": "is on its way to",
        "highest": "1024 bytes came that nobody expected",
        "asan": POISON,
        "tsan": RACE,
        "stores": "is on its way to is read at",
    },
    ("ring", "NO_WAIT_FOR_BOX"): {"lowest": STILL, "highest": WRONG, "tsan": RACE},
    ("ring", "BARRIERS_NOT_KNOWN"): dict.fromkeys(ALWAYS, "that its maker has not made known"),
    ("ring", "NO_WAIT_FOR_ROOM"): dict.fromkeys(("lowest", "asan", "tsan"), "one arrival more") | {"highest": STILL},
    ("ring", "BOX_MISALIGNED"): dict.fromkeys(ALWAYS, "which is not a multiple of 128"),
    ("ring", "BOX_NOBODY_WAITS_FOR"): {"lowest": "on its way when its block ends", "stores": "on its way when"},
    ("ring", "TWO_ARRIVALS"): dict.fromkeys(ALWAYS, "one arrival more than the barrier was made for"),
    ("ring", "STORE_INTO_COMING_BOX"): {"highest": WRONG, "asan": POISON, "stores": "is on its way to is written at"},
    ("multiply", "NO_PROXY_FENCE"): dict.fromkeys(("stores", "stores, highest"), UNFENCED),
    ("multiply", "PROXY_FENCE_OF_ANOTHER"): dict.fromkeys(("stores", "stores, highest"), UNFENCED),
    ("multiply", "NO_PRODUCTS_BEGIN"): dict.fromkeys(ALWAYS, "takes registers without a wgmma.fence"),
    ("multiply", "SUMS_READ_BEFORE_WAIT"): {"lowest": WRONG, "highest": WRONG},
    ("multiply", "SUMS_WRITTEN_BEFORE_WAIT"): dict.fromkeys(ALWAYS, "sums were changed before the wait"),
    ("multiply", "A_CHANGED_BEFORE_WAIT"): dict.fromkeys(ALWAYS, "registers that wgmma reads were changed before"),
    ("multiply", "A_CHANGED_WITHOUT_BEGIN"): dict.fromkeys(ALWAYS, "were changed since wgmma.fence"),
    ("multiply", "B_CHANGED_BEFORE_WAIT"): {
        "lowest": WRONG,
        "tsan": RACE,
        "stores": "still read from here on is written",
    },
    ("multiply", "OPERAND_PAST_END"): dict.fromkeys(ALWAYS, "which is not in the block's shared memory"),
    ("multiply", "OPERAND_MISALIGNED"): dict.fromkeys(ALWAYS, "it begins inside of the pattern"),
    ("multiply", "HALF_A_WARPGROUP"): dict.fromkeys(ALWAYS, STILL),
    ("multiply", "DIFFERENT_OPERANDS"): dict.fromkeys(ALWAYS, "one wgmma, and another one"),
    ("multiply", "NOBODY_WAITS"): dict.fromkeys(ALWAYS, "nobody waits for them"),
    ("multiply", "NO_SWIZZLE"): {"lowest": WRONG, "highest": WRONG},
    ("multiply_bytes", "NO_PROXY_FENCE"): dict.fromkeys(("stores", "stores, highest"), UNFENCED),
    ("multiply_bytes", "PROXY_FENCE_OF_ANOTHER"): dict.fromkeys(("stores", "stores, highest"), UNFENCED),
    ("multiply_bytes", "NO_PRODUCTS_BEGIN"): dict.fromkeys(ALWAYS, "takes registers without a wgmma.fence"),
    ("multiply_bytes", "SUMS_READ_BEFORE_WAIT"): {"lowest": WRONG, "highest": WRONG},
    ("multiply_bytes", "SUMS_WRITTEN_BEFORE_WAIT"): dict.fromkeys(ALWAYS, "sums were changed before the wait"),
    ("multiply_bytes", "A_CHANGED_BEFORE_WAIT"): {
        "lowest": WRONG,
        "tsan": RACE,
        "stores": "still read from here on is written",
    },
    ("multiply_bytes", "OPERAND_PAST_END"): dict.fromkeys(ALWAYS, "which is not in the block's shared memory"),
    ("multiply_bytes", "OPERAND_MISALIGNED"): dict.fromkeys(ALWAYS, "it begins inside of the pattern"),
    ("multiply_bytes", "DIFFERENT_OPERANDS"): dict.fromkeys(ALWAYS, "one wgmma, and another one"),
    ("multiply_bytes", "NOBODY_WAITS"): dict.fromkeys(ALWAYS, "nobody waits for them"),
    ("multiply_bytes", "NO_SWIZZLE"): {"lowest": WRONG, "highest": WRONG},
    ("send", "NO_PROXY_FENCE"): dict.fromkeys(("stores", "stores, highest"), UNFENCED),
    ("send", "PROXY_FENCE_OF_ANOTHER"): dict.fromkeys(("stores", "stores, highest"), UNFENCED),
    ("send", "REUSED_BEFORE_READ"): {"lowest": WRONG, "stores": "still read from here on is written"},
    ("send", "STORE_NOBODY_WAITS_FOR"): dict.fromkeys(ALWAYS, "that nobody waits for: its thread ends"),
    ("roles", "TOO_MANY_REGISTERS"): dict.fromkeys(ALWAYS, "setmaxnreg, until there are registers"),
    ("roles", "REGISTERS_NOT_BY_EIGHT"): dict.fromkeys(ALWAYS, "a multiple of 8 from 24 to 256"),
    ("roles", "GIVES_TO_HAVE_MORE"): dict.fromkeys(ALWAYS, "that is not fewer"),
    ("roles", "ONE_BARRIER_TWO_SIZES"): dict.fromkeys(ALWAYS, "threads that is one for"),
    ("exchange", "NO_CLUSTER_MEET"): {"lowest": WRONG, "highest": WRONG, "tsan": RACE},
    ("exchange", "ENDED_BEFORE_WRITTEN"): {"lowest": "of the cluster, which has ended", "highest": WRONG},
    ("exchange", "NO_SUCH_RANK"): dict.fromkeys(ALWAYS, "rank 2 in a cluster of 2"),
    ("share", "NOT_FOR_ALL_BLOCKS"): dict.fromkeys(ALWAYS, "0 arrivals and 1024 bytes, expected at"),
    ("relay", "BYTES_NOT_BY_SIXTEEN"): dict.fromkeys(ALWAYS, "multiples of 16"),
    ("relay", "NO_BARRIER_THERE"): dict.fromkeys(ALWAYS, "no barrier was made at this address"),
}

FOUND = [
    # Builds for sanitizers take long.
    pytest.param(
        kernel,
        mistake,
        way,
        words,
        id=f"{kernel}-{mistake}-{way}",
        marks=[pytest.mark.slow] if way in ("asan", "tsan") else [],
    )
    for (kernel, mistake), ways in MISTAKES.items()
    for way, words in ways.items()
]


@pytest.mark.parametrize(("kernel", "mistake", "way", "words"), FOUND)
def test_a_planted_mistake_is_found(kernel: str, mistake: str, way: str, words: str) -> None:
    said = outcome(way, KERNELS[kernel](f"{kernel}_{mistake}"))
    assert words in said
    if words != WRONG:
        named = set(re.findall(r"planted_hopper\.cu:\d+", said))
        assert named & lines_of(PLANTED, mistake), f"the report names {sorted(named)}:\n{said}"


def test_every_planted_mistake_is_tried() -> None:
    text = PLANTED.read_text(encoding="utf-8")
    instances = {
        (kernel, mistake)
        for kernel in KERNELS
        for mistake in re.findall(rf"^{kernel.upper()}\((\w+)\)$", text, re.MULTILINE)
    }
    assert instances == set(MISTAKES) | {(kernel, "NONE") for kernel in KERNELS}
    named = set(re.findall(r"^    ([A-Z_]+),$", text, re.MULTILINE)) - {"NONE"}
    assert named == {mistake for _, mistake in MISTAKES}


@pytest.mark.parametrize("highest_first", [False, True])
def test_a_box_beyond_the_matrix_is_filled_with_zeros(highest_first: bool) -> None:
    rows, columns = 27, 61
    x, out = Buffer(integers(rows * COLUMNS)), Buffer(np.zeros(4 * TILE, np.uint16))
    inner = tensor_map(x, 2, (columns, rows), (2 * COLUMNS,), (COLUMNS, 8), 128)
    launch = Launch("ring_NONE", 1, THREADS, [inner, pointers(out)], 2 * 1024 + 64)
    expected = np.zeros((32, COLUMNS), np.uint16)
    expected[:rows, :columns] = x.data.reshape(rows, COLUMNS)[:, :columns]
    found = built(PLANTED, "library").run(Case([launch]), highest_first)[1]
    assert np.array_equal(found.reshape(32, COLUMNS), expected)


@pytest.mark.parametrize(
    ("words", "item", "sizes", "strides", "box", "swizzle", "shift"),
    [
        ("rows of 8 bytes, which is not a multiple of 16", 2, (64, 32), (128,), (4, 8), 0, 0),
        ("rows of 128 bytes, swizzled within 64", 2, (64, 32), (128,), (64, 8), 64, 0),
        ("rows of 64 bytes, swizzled within 128", 2, (64, 32), (128,), (32, 8), 128, 0),
        ("a stride of 120 bytes", 2, (60, 32), (120,), (64, 8), 128, 0),
        ("and boxes 257", 2, (64, 32), (128,), (64, 257), 128, 0),
        ("has 0 elements", 2, (64, 0), (128,), (64, 8), 128, 0),
        ("by a tensor map of 1", 2, (64,), (), (64,), 128, 0),
        ("memory at .* which is not a multiple of 16", 2, (64, 32), (128,), (64, 8), 128, 8),
    ],
)
def test_maps_that_no_driver_would_make_are_refused(
    words: str,
    item: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
    shift: int,
) -> None:
    x, out = Buffer(integers(4 * TILE), shift), Buffer(np.zeros(4 * TILE, np.uint16))
    bad = tensor_map(x, item, sizes, strides, box, swizzle)
    launch = Launch("ring_NONE", 1, THREADS, [bad, pointers(out)], 2 * 1024 + 64)
    with pytest.raises(KernelError, match=words):
        built(PLANTED, "library").run(Case([launch]))


def test_what_is_no_map_is_refused() -> None:
    out = Buffer(np.zeros(4 * TILE, np.uint16))
    launch = Launch("ring_NONE", 1, THREADS, [Argument(bytes(128)), pointers(out)], 2 * 1024 + 64)
    with pytest.raises(KernelError, match="is no tensor map"):
        built(PLANTED, "library").run(Case([launch]))


@pytest.mark.parametrize("grid", [3, 4])
def test_a_grid_is_whole_clusters(grid: int) -> None:
    x, out = Buffer(np.zeros(grid * 512, np.float32)), Buffer(np.zeros(grid * 512, np.float32))
    part = None if grid == 3 else (1, 2)
    launch = Launch("exchange_NONE", grid, THREADS, [pointers(x), pointers(out)], 2048, part, cluster=2)
    with pytest.raises(KernelError, match="3 blocks in clusters of 2" if grid == 3 else "a part of a cluster"):
        built(PLANTED, "library").run(Case([launch]))


@pytest.mark.parametrize("highest_first", [False, True])
@pytest.mark.parametrize("form", ["rows_rows", "rows_columns", "columns_rows"])
@pytest.mark.parametrize("span", [0, 32, 64, 128])
def test_operands_in_shared_memory(span: int, form: str, highest_first: bool) -> None:
    """K-major and transposed, in each swizzle: what descriptors say."""
    random = np.random.default_rng(span)
    a = random.integers(-8, 9, (64, 16)).astype(np.float16)
    b = random.integers(-8, 9, (128, 16)).astype(np.float16)
    out = Buffer(np.zeros((64, 128), np.float32))
    arguments = [pointers(Buffer(a)), pointers(Buffer(b)), pointers(out)]
    launch = Launch(f"operands_{span}_{form}", 1, 128, arguments, 8192 + 16384)
    found = built(OPERANDS, "library").run(Case([launch]), highest_first)[2]
    assert np.array_equal(found, a.astype(np.float32) @ b.astype(np.float32).T)
