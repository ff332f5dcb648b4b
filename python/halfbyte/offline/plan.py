"""What a run would do, before it does anything: the plan as Python objects and as a table."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from halfbyte import _native
from halfbyte._terminal import format_bytes, format_count, plural, printable, table, wrap

if TYPE_CHECKING:
    from halfbyte._native import PlanData, TotalsData, TypeData

T = TypeVar("T")


@dataclass(frozen=True)
class TensorPlan:
    """What becomes of one tensor.

    Attributes:
        name: As in the source.
        shape: As in the source.
        source: Dtype in the source (``"BF16"``), or quantization type when the source is quantized.
        target: ``"nf4"``, ``"fp4"``, ``"int8"``, a dtype, or ``"keep"`` for a tensor that is copied.
        bytes_in: Bytes of the tensor in the source.
        bytes_out: Bytes of the tensor in the output, with its scales and state.
        reason: Why.
        shard: Output file.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    target: str
    bytes_in: int
    bytes_out: int
    reason: str
    shard: str


@dataclass(frozen=True)
class Group:
    """Tensors that differ in layer numbers only.

    Attributes:
        pattern: ``model.layers.{0-15}.mlp.up_proj.weight``: the numbers that occur, in ranges.
        count: How many tensors.
        shape: Common to all, like `source`, `target` and `reason`; see `TensorPlan`.
        source: See `shape`.
        target: See `shape`.
        bytes_in: Sum over all.
        bytes_out: Sum over all.
        reason: See `shape`.
    """

    pattern: str
    count: int
    shape: tuple[int, ...]
    source: str
    target: str
    bytes_in: int
    bytes_out: int
    reason: str


@dataclass(frozen=True)
class CheckpointPlan:
    """What a run would do, from headers and ``config.json`` alone. ``print(plan)`` shows it as a table."""

    data: PlanData = field(repr=False)
    native: _native.Plan = field(repr=False, compare=False)

    @classmethod
    def of(cls, native: _native.Plan) -> CheckpointPlan:
        """Wrap the compiled core's plan."""
        return cls(native.report(), native)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON has it, with every tensor."""
        return dict(self.data)

    @property
    def architecture(self) -> str | None:
        """The model's class, from ``config.json``."""
        return self.data["architecture"]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know before the run."""
        return tuple(self.data["notes"])

    @property
    def left_out(self) -> tuple[str, ...]:
        """Files of the source that are not copied, each with the reason."""
        return tuple(f"{left['file']}: {left['reason']}" for left in self.data["left_out"])

    @property
    def skip_modules(self) -> list[str] | None:
        """What ``llm_int8_skip_modules`` of the output has to be, so that a loader replaces the same modules."""
        return self.data["skip_modules"]

    @property
    def model_dtype(self) -> str | None:
        """The dtype of the quantized model: that asked for, else ``config.json``'s, else that of most weights."""
        return self.data["model_dtype"]

    @property
    def shards(self) -> tuple[tuple[str, int], ...]:
        """Name and bytes of every output file of weights."""
        return tuple((s["file"], s["bytes"]) for s in self.data["shards"])

    @property
    def types(self) -> list[TypeData]:
        """Sums over the tensors that become the same: type, tensors, weights, bytes_in, bytes_out."""
        return self.data["types"]

    @property
    def totals(self) -> TotalsData:
        """Sums: weights, quantized_weights, bytes_in, bytes_out, bits_per_weight, quantized_tensors, tensors."""
        return self.data["totals"]

    @cached_property
    def tensors(self) -> tuple[TensorPlan, ...]:
        """Every tensor, in the order of the source."""
        return tuple(
            TensorPlan(
                name=t["name"],
                shape=tuple(t["shape"]),
                source=t["from"],
                target=t["to"],
                bytes_in=t["bytes_in"],
                bytes_out=t["bytes_out"],
                reason=t["reason"],
                shard=t["shard"],
            )
            for t in self.data["tensors"]
        )

    def groups(self) -> list[Group]:
        """The tensors with layer numbers collapsed, in the order in which the groups begin."""
        return group_tensors(self.tensors)

    def __str__(self) -> str:
        return self.table()

    def table(self, width: int | None = None) -> str:
        """The plan for people: one line a group, then totals and notes, ``width`` columns wide (None: as needed)."""
        rows = [
            (
                group.pattern,
                f"{group.count:,}",
                shape_text(group.shape),
                f"{group.source} → {group.target}",
                format_bytes(group.bytes_in),
                format_bytes(group.bytes_out),
                group.reason,
            )
            for group in self.groups()
        ]
        headers = ("tensor", "count", "shape", "from → to", "before", "after", "why")
        head = self._title()
        lines = [head if width is None else wrap(head, width, "  "), ""]
        lines.append(table(headers, rows, right=(1, 4, 5), shrink=((6, 16), (0, 28), (6, 8)), width=width))
        lines.append("")
        facts = [*self._totals(), *(("note", printable(note)) for note in self.notes)]
        indent = max(len(name) for name, _ in facts) + 2
        for name, text in facts:
            filled = text if width is None else wrap(text, width, " " * indent, used=indent)
            lines.append(name.ljust(indent) + filled)
        return "\n".join(lines)

    def _title(self) -> str:
        architecture = self.architecture or "no architecture named"
        known = "" if self.data["known_architecture"] else " (not known here: planned by shape)"
        return f"{self.data['operation']} {printable(self.data['source'])}: {architecture}{known}"

    def _totals(self) -> list[tuple[str, str]]:
        t = self.totals
        count = f"{t['quantized_tensors']:,} of {plural(t['tensors'], 'tensor')}"
        weights = f"{format_count(t['quantized_weights'])} of {format_count(t['weights'])} weights"
        lines = [
            (f"{self.data['operation']}d", f"{count}, {weights}"),
            *((line["type"], type_text(line)) for line in several_types(self.types)),
            (
                "bytes",
                f"{format_bytes(t['bytes_in'])} → {format_bytes(t['bytes_out'])} "
                f"({ratio(t['bytes_out'], t['bytes_in'])}), {t['bits_per_weight']:.2f} bits per weight",
            ),
        ]
        files = [f"{plural(len(self.data['shards']), 'file')} of weights"]
        if self.data["copies"]:
            files.append(f"{plural(len(self.data['copies']), 'other file')} copied")
        lines.append(("output", ", ".join(files)))
        lines += [("left out", printable(left)) for left in self.left_out]
        return lines


def shape_text(shape: Sequence[int]) -> str:
    """``2048×8192``."""
    return "×".join(str(n) for n in shape) or "scalar"


def ratio(after: float, before: float) -> str:
    """``31 %``: one size as a share of another."""
    return f"{100 * after / before:.0f} %" if before > 0 else "nothing"


def several_types(types: Sequence[TypeData]) -> list[TypeData]:
    """The sums of each type that weights are converted to, where there is more than one."""
    converted = [line for line in types if line["type"] != "keep"]
    return converted if len(converted) > 1 else []


def type_text(line: TypeData) -> str:
    """``12 tensors, 3.1 M weights, 6.3 MB → 3.2 MB (50 %)``."""
    return (
        f"{plural(line['tensors'], 'tensor')}, {format_count(line['weights'])} weights, "
        f"{format_bytes(line['bytes_in'])} → {format_bytes(line['bytes_out'])} "
        f"({ratio(line['bytes_out'], line['bytes_in'])})"
    )


def group_tensors(tensors: Iterable[TensorPlan]) -> list[Group]:
    """Collapse layer numbers: tensors of one pattern, shape, fate and reason become one group.

    A layer number is a part of the name, between dots, that is all digits: ``model.layers.7.mlp``.
    """
    return [
        Group(
            pattern=pattern,
            count=len(members),
            shape=members[0].shape,
            source=members[0].source,
            target=members[0].target,
            bytes_in=sum(m.bytes_in for m in members),
            bytes_out=sum(m.bytes_out for m in members),
            reason=members[0].reason,
        )
        for pattern, members in collapse((t.name, (t.shape, t.source, t.target, t.reason), t) for t in tensors)
    ]


def collapse(items: Iterable[tuple[str, Hashable, T]]) -> list[tuple[str, list[T]]]:
    """Group (name, kind, item): items of one kind, whose names differ in layer numbers only, under one pattern."""
    found: dict[tuple[Hashable, ...], list[tuple[list[str], T]]] = {}
    for name, kind, item in items:
        parts = name.split(".")
        template = tuple(None if _is_number(part) else part for part in parts)
        found.setdefault((template, kind), []).append((parts, item))
    groups = []
    for members in found.values():
        pattern = list(members[0][0])
        for place, part in enumerate(pattern):
            if _is_number(part):
                numbers = sorted({int(parts[place]) for parts, _ in members})
                if len(numbers) > 1:
                    pattern[place] = "{" + ranges(numbers) + "}"
        groups.append((".".join(pattern), [item for _, item in members]))
    return groups


def _is_number(part: str) -> bool:
    # isdecimal alone would take digits of other scripts; 18 digits bound what int() has to read.
    return part.isascii() and part.isdecimal() and len(part) <= 18


def ranges(numbers: Sequence[int], most: int = 5) -> str:
    """``0-3,5,7-9`` for sorted numbers; past ``most`` ranges the middle becomes ``…``."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in spans]
    if len(texts) > most:
        texts = [*texts[: most - 2], "…", texts[-1]]
    return ",".join(texts)
