"""That running kernels on the processor finds mistakes: each of tests/planted.cu, and nothing in what is right."""

from __future__ import annotations

import re
from dataclasses import dataclass

import build_emulator
import numpy as np
import pytest
from harness import Buffer, Case, KernelError, Launch, SanitizerError, built, lines_of, pointers

PLANTED = build_emulator.HERE / "tests" / "planted.cu"
BLOCKS = 3
THREADS = 64


@dataclass(frozen=True)
class Kernel:
    """How a kernel is launched, and what it does."""

    grid: int
    values: int
    shared: int = 0

    def case(self, name: str) -> Case:
        """Launched on small integers, which float32 adds exactly."""
        data = np.random.default_rng(1).integers(1, 100, self.values).astype(np.float32)
        out = np.zeros(max(self.values, BLOCKS + 2), np.float32)
        return Case([Launch(name, self.grid, THREADS, [pointers(Buffer(data)), pointers(Buffer(out))], self.shared)])


KERNELS = {
    "reverse": Kernel(BLOCKS, BLOCKS * THREADS),
    "rotate": Kernel(BLOCKS, BLOCKS * THREADS),
    "reverse_in_turn": Kernel(1, 3 * THREADS, 4 * THREADS),
    "reverse_in_warp": Kernel(1, THREADS),
    "sum_in_warp": Kernel(1, THREADS),
    "copy_words": Kernel(1, 4 * THREADS),
    "staged": Kernel(1, 3 * 4 * THREADS),
    "by_blocks": Kernel(BLOCKS, BLOCKS * THREADS),
    "add_up": Kernel(BLOCKS, BLOCKS * THREADS),
    "add_up_last": Kernel(BLOCKS, BLOCKS * THREADS),
    "hand_over": Kernel(1, 3 * THREADS // 2),
}


def expected(kernel: str, data: np.ndarray) -> np.ndarray:
    """What a kernel writes first."""
    if kernel in ("reverse", "reverse_in_turn"):
        return data.reshape(-1, THREADS)[:, ::-1].reshape(-1)
    if kernel == "hand_over":
        return data.reshape(-1, THREADS // 2)[:, ::-1].reshape(-1)
    if kernel == "rotate":
        return np.roll(data.reshape(-1, THREADS), -1, axis=1).reshape(-1)
    if kernel == "reverse_in_warp":
        return data.reshape(-1, 32)[:, ::-1].reshape(-1)
    if kernel == "sum_in_warp":
        return np.repeat(data.reshape(-1, 32).sum(1), 32)
    if kernel == "staged":
        return np.roll(data.reshape(3, THREADS, 4), -1, axis=1).reshape(-1)
    if kernel in ("add_up", "add_up_last"):
        return data.sum(keepdims=True)
    return data


# How kernels are run.
WAYS = {"lowest": ("library", False), "highest": ("library", True), "asan": ("asan", False), "tsan": ("tsan", False)}


def outcome(way: str, kernel: str, mistake: str) -> str:
    """What a way to run says about a kernel: nothing, "wrong values", or its report."""
    mode, highest_first = WAYS.get(way, ("ucontext", False))
    runner = built(PLANTED, mode)
    case = KERNELS[kernel].case(f"{kernel}_{mistake}")
    try:
        _, out = runner.run(case, highest_first)
    except (KernelError, SanitizerError) as error:
        return str(error)
    wanted = expected(kernel, case.buffers[0].data)
    return "" if np.array_equal(out[: wanted.size], wanted) else "wrong values"


@pytest.mark.slow
@pytest.mark.parametrize("way", [*WAYS, "portable"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_found_in_what_is_right(kernel: str, way: str) -> None:
    assert outcome(way, kernel, "NONE") == ""


# By which ways each mistake is found at least, and the words of the report.
RACE, BOUNDS, MEMORY = "data race", "out of bounds for type", "AddressSanitizer: "
STILL, WRONG, PLACES = "no thread can go on", "wrong values", "reached in different places"
MISTAKES = {
    ("reverse", "NO_BARRIER"): {"lowest": WRONG, "highest": WRONG, "tsan": RACE},
    ("reverse", "NEVER_WRITTEN"): {"lowest": WRONG, "highest": WRONG},
    ("reverse", "SHARED_READ_PAST"): {"lowest": WRONG, "asan": BOUNDS},
    ("reverse", "SHARED_WRITE_PAST"): {"lowest": WRONG, "asan": BOUNDS},
    ("reverse", "GLOBAL_READ_PAST"): {"lowest": WRONG, "asan": MEMORY + "heap-buffer-overflow"},
    ("reverse", "GLOBAL_WRITE_PAST"): {"lowest": "a write outside of buffer", "asan": MEMORY + "heap-buffer-overflow"},
    ("reverse", "SOME_AT_BARRIER"): {"lowest": STILL, "highest": STILL, "asan": STILL, "tsan": RACE},
    ("reverse", "EXIT_BEFORE_BARRIER"): dict.fromkeys(WAYS, STILL),
    ("reverse", "TWO_BARRIERS"): dict.fromkeys(WAYS, PLACES),
    ("rotate", "NEIGHBOUR_ABOVE"): {"lowest": WRONG, "tsan": RACE},
    ("rotate", "NEIGHBOUR_BELOW"): {"highest": WRONG, "tsan": RACE},
    ("reverse_in_turn", "NO_SECOND_BARRIER"): {"lowest": WRONG, "highest": WRONG, "tsan": RACE},
    ("reverse_in_turn", "DYNAMIC_READ_PAST"): {"asan": MEMORY + "heap-buffer-overflow"},
    ("reverse_in_warp", "NO_SYNCWARP"): {"lowest": WRONG, "highest": WRONG, "tsan": RACE},
    ("sum_in_warp", "SHUFFLE_BY_HALF"): dict.fromkeys(WAYS, STILL),
    ("sum_in_warp", "SHUFFLE_IN_TWO_PLACES"): dict.fromkeys(WAYS, "while lane"),
    ("sum_in_warp", "SHUFFLE_FROM_OUTSIDE"): {"lowest": WRONG, "highest": WRONG},
    ("sum_in_warp", "SHUFFLE_NOT_IN_MASK"): dict.fromkeys(WAYS, "its mask leaves out"),
    ("copy_words", "MISALIGNED_WRAPPER"): dict.fromkeys(WAYS, "is not a multiple of 16"),
    ("copy_words", "MISALIGNED_ACCESS"): {"asan": "load of misaligned address"},
    ("staged", "NO_WAIT"): {"lowest": WRONG, "asan": MEMORY + "use-after-poison"},
    ("staged", "WAIT_TOO_SHORT"): {"lowest": WRONG, "asan": MEMORY + "use-after-poison"},
    ("staged", "NO_BARRIER_AFTER_WAIT"): {"lowest": WRONG, "highest": WRONG, "tsan": RACE},
    ("staged", "NO_BARRIER_BEFORE_REUSE"): {"lowest": WRONG, "highest": WRONG, "tsan": RACE},
    ("staged", "COPY_READ_PAST"): {"asan": MEMORY + "heap-buffer-overflow"},
    ("by_blocks", "SAME_ELEMENT"): {"lowest": WRONG, "tsan": RACE},
    ("add_up", "NOT_ATOMIC"): {"tsan": RACE},
    ("add_up_last", "NO_FENCE"): {"tsan": RACE},
    ("hand_over", "NO_WAIT_FOR_PHASE"): {"lowest": WRONG, "highest": STILL, "tsan": RACE},
    ("hand_over", "WAIT_FOR_OTHER_PARITY"): dict.fromkeys(WAYS, STILL),
    ("hand_over", "TOO_FEW_ARRIVALS"): dict.fromkeys(WAYS, STILL),
    ("hand_over", "NO_BARRIER_MADE"): dict.fromkeys(WAYS, "no barrier was made"),
    ("hand_over", "NO_WAIT_BEFORE_REUSE"): {"lowest": STILL, "tsan": RACE},
}


FOUND = [
    # Builds for sanitizers take long.
    pytest.param(
        kernel, mistake, way, words, id=f"{mistake}-{way}", marks=[pytest.mark.slow] if way in ("asan", "tsan") else []
    )
    for (kernel, mistake), ways in MISTAKES.items()
    for way, words in ways.items()
]


@pytest.mark.parametrize(("kernel", "mistake", "way", "words"), FOUND)
def test_a_planted_mistake_is_found(kernel: str, mistake: str, way: str, words: str) -> None:
    said = outcome(way, kernel, mistake)
    assert words in said
    if words != WRONG and not words.startswith("a write outside"):
        named = set(re.findall(r"planted\.cu:\d+", said))
        assert named & lines_of(PLANTED, mistake), f"the report names {sorted(named)}:\n{said}"


def test_every_planted_mistake_is_tried() -> None:
    instances = set(re.findall(r"^INSTANCE\((\w+), (\w+)\)", PLANTED.read_text(encoding="utf-8"), re.MULTILINE))
    assert instances == set(MISTAKES) | {(kernel, "NONE") for kernel in KERNELS}
