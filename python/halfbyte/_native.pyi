"""The compiled core."""

__version__: str

class CheckpointError(ValueError):
    """The input is wrong: a checkpoint that is broken, or unsuitable for what was asked."""

class Plan:
    """What a run would do, from headers and config alone: no weight is read."""

    def to_json(self) -> str:
        """The plan as one JSON object."""

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
