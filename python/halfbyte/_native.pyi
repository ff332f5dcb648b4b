"""The compiled core."""

from typing import final

__all__ = [
    "CheckpointError",
    "Job",
    "Plan",
    "__version__",
    "inspect",
    "is_conv1d",
    "plan_dequantize",
    "plan_quantize",
    "run_plan",
    "select",
    "verify",
]

__version__: str

class CheckpointError(ValueError):
    """The input is wrong: a checkpoint that is broken, or unsuitable for what was asked."""

@final
class Plan:
    """What a run would do, from headers and config alone: no weight is read."""

    def to_json(self) -> str:
        """The plan as one JSON object."""

@final
class Job:
    """Work on threads of its own."""

    def wait(self, seconds: float) -> bool:
        """Wait at most this long, without the GIL. True when the work has ended."""

    def progress(self) -> tuple[int, int, str]:
        """Bytes done, bytes in all, and what is being worked on."""

    def cancel(self) -> None:
        """Stop soon: `result` then raises KeyboardInterrupt."""

    def result(self) -> str:
        """The report, one JSON object; raises what went wrong."""

def plan_quantize(source: str, config_json: str | None, options_json: str) -> Plan:
    """Decide what becomes of every tensor of the checkpoint in the folder `source`."""

def plan_dequantize(source: str, config_json: str | None, options_json: str) -> Plan:
    """The way back: every quantized weight to a float dtype."""

def run_plan(plan: Plan, destination: str, mode: str, config_text: str | None, threads: int, fsync: bool) -> Job:
    """Carry the plan out. `mode` is "new", "overwrite" or "resume"."""

def verify(a: str, b: str, config_json: str | None, threads: int) -> Job:
    """Compare every quantized tensor of `b` with a fresh quantization of `a`, or with `a` when that is quantized."""

def inspect(path: str) -> str:
    """What a folder or a file holds, as one JSON object."""

def select(config_json: str | None, tensors_json: str, options_json: str = "{}") -> str:
    """The selection alone: `[[name, shape, dtype], …]` in, decisions with reasons out, both JSON."""

def is_conv1d(config_json: str, name: str) -> bool:
    """Whether this weight is stored `[in, out]`, as those of transformers' `Conv1D` are."""
