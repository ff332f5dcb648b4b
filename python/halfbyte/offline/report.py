"""What a run did: reports as frozen dataclasses, with a text for people and a dict for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from halfbyte._terminal import format_bytes, format_count, format_seconds, plural, printable, table
from halfbyte.offline.plan import collapse, ratio, several_types, shape_text, type_text

if TYPE_CHECKING:
    from halfbyte._native import TypeData, VerifyData


@dataclass(frozen=True)
class _Report:
    def to_dict(self) -> dict[str, Any]:
        """The report in types that JSON has."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class ConvertReport(_Report):
    """What a conversion wrote.

    Attributes:
        source: The source folder.
        destination: The destination folder.
        files: Name and bytes of every shard in the destination.
        copied: Names of the other files.
        reused: How many shards were complete already (``resume``).
        already_complete: Whether there was nothing left to do.
        tensors: How many tensors there are.
        converted_tensors: How many of them were quantized or dequantized.
        weights: The numbers in all tensors.
        converted_weights: The numbers that were quantized or dequantized.
        bytes_in: Bytes of all tensors before.
        bytes_out: Bytes of all tensors after.
        bits_per_weight: ``8 * bytes_out / weights``, with absmax and whatever was kept.
        seconds: Wall time of the conversion.
        notes: Remarks of the plan.
        left_out: Files of the source that were not copied, each with the reason.
        types: Sums over the tensors that became the same: each a dict with type (``"nf4"``, ``"fp4"``, ``"int8"``, a
            dtype, ``"keep"``), tensors, weights, bytes_in and bytes_out.
    """

    source: str
    destination: str
    files: tuple[tuple[str, int], ...]
    copied: tuple[str, ...]
    reused: int
    already_complete: bool
    tensors: int
    converted_tensors: int
    weights: int
    converted_weights: int
    bytes_in: int
    bytes_out: int
    bits_per_weight: float
    seconds: float
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    types: tuple[TypeData, ...] = ()

    verb = "converted"

    @property
    def bytes_per_second(self) -> float:
        """The bytes of the tensors on the 16-bit side, over the time."""
        return max(self.bytes_in, self.bytes_out) / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report in types that JSON has."""
        files = [{"file": name, "bytes": size} for name, size in self.files]
        return {**super().to_dict(), "files": files, "bytes_per_second": self.bytes_per_second}

    def __str__(self) -> str:
        if self.already_complete:
            return f"nothing left to do: {printable(self.destination)} holds the complete output"
        reused = f", {self.reused} of them complete before" if self.reused else ""
        others = f" and {plural(len(self.copied), 'other file')}" if self.copied else ""
        speed = "" if self.reused else f", {format_bytes(self.bytes_per_second)}/s"
        return "\n".join(
            (
                f"{self.verb} {self.converted_tensors:,} of {plural(self.tensors, 'tensor')}, "
                f"{format_count(self.converted_weights)} of {format_count(self.weights)} weights",
                *(f"{line['type']}: {type_text(line)}" for line in several_types(self.types)),
                f"{format_bytes(self.bytes_in)} → {format_bytes(self.bytes_out)} "
                f"({ratio(self.bytes_out, self.bytes_in)}), {self.bits_per_weight:.2f} bits per weight",
                f"{format_seconds(self.seconds)}{speed}",
                f"{plural(len(self.files), 'file')} of weights{reused}{others} in {printable(self.destination)}",
            )
        )


@dataclass(frozen=True)
class QuantizeReport(ConvertReport):
    """What `quantize_checkpoint` wrote.

    Attributes:
        quantization_config: As in the output's ``config.json``.
    """

    quantization_config: dict[str, Any] = field(default_factory=dict)
    verb = "quantized"


@dataclass(frozen=True)
class DequantizeReport(ConvertReport):
    """What `dequantize_checkpoint` wrote."""

    verb = "dequantized"


@dataclass(frozen=True)
class TensorComparison(_Report):
    """One tensor of `verify_checkpoint`.

    Attributes:
        name: The tensor, or the quantized weight with all of its parts.
        status: ``"identical"``: the same bytes (of a quantized weight beside an original: those of a fresh
            quantization), or the same values in another dtype. ``"equal-codes"``: the same codes, absmax that differ in
            rounding. ``"rounded"``: of an 8-bit weight, the same scales, and codes next to each other where a value
            lies in the middle of both, some of which bitsandbytes rounds otherwise. ``"differs"``. ``"shape"``: not
            comparable. ``"missing"``: only in the first checkpoint. ``"extra"``: only in the second.
        kind: ``"nf4"``, ``"fp4"``, ``"int8"``, or a dtype.
        shape: Of the tensor, of the weight itself when it is quantized.
        rmse: Root mean square error of the values that a loader sees, beside those of the first checkpoint; None where
            there is nothing to compare, or where one of them is NaN or infinite.
        max_error: The largest error of these values; None like `rmse`.
        differing_bytes: Bytes of codes, or of the tensor, that are not the same.
        detail: What else there is to say.
    """

    name: str
    status: str
    kind: str = ""
    shape: tuple[int, ...] = ()
    rmse: float | None = None
    max_error: float | None = None
    differing_bytes: int | None = None
    detail: str = ""

    @property
    def same(self) -> bool:
        """True when a loader sees what it should see."""
        return self.status in ("identical", "equal-codes", "rounded")


@dataclass(frozen=True)
class VerifyReport(_Report):
    """What `verify_checkpoint` found.

    Attributes:
        a: The first folder.
        b: The second folder.
        tensors: Every tensor of both.
        seconds: Wall time.
        notes: What else there is to say of either; none of it makes them differ.
    """

    a: str
    b: str
    tensors: tuple[TensorComparison, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    # The text lists that many tensors that differ; the dict has all.
    MOST_ROWS: ClassVar[int] = 50

    @classmethod
    def of(cls, data: VerifyData, seconds: float) -> VerifyReport:
        """Wrap the compiled core's report."""
        tensors = tuple(
            TensorComparison(
                name=t["name"],
                status=t["status"],
                kind=t["kind"],
                shape=tuple(t["shape"]),
                rmse=t["rmse"],
                max_error=t["max_error"],
                differing_bytes=t["differing_bytes"],
                detail=t["detail"],
            )
            for t in data["tensors"]
        )
        return cls(data["a"], data["b"], tensors, seconds, tuple(data["notes"]))

    def to_dict(self) -> dict[str, Any]:
        """The report in types that JSON has, with the verdict and the count of each status."""
        return {"ok": self.ok, "counts": self.counts, **super().to_dict()}

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors have each status."""
        counts: dict[str, int] = {}
        for t in self.tensors:
            counts[t.status] = counts.get(t.status, 0) + 1
        return counts

    @property
    def differing(self) -> tuple[TensorComparison, ...]:
        """The tensors that are not what they should be."""
        return tuple(t for t in self.tensors if not t.same)

    @property
    def ok(self) -> bool:
        """True when nothing differs."""
        return not self.differing

    def __str__(self) -> str:
        return self.table()

    def table(self, width: int | None = None) -> str:
        """The result for people: a line for each tensor that differs, then the sums."""
        lines: list[str] = []
        wrong = self.differing
        if wrong:
            rows = [
                (t.name, t.status, t.kind, _number(t.rmse), _number(t.max_error), t.detail)
                for t in wrong[: self.MOST_ROWS]
            ]
            headers = ("tensor", "status", "kind", "rmse", "max error", "detail")
            lines.append(table(headers, rows, right=(3, 4), shrink=((5, 16), (0, 24)), width=width))
            if len(wrong) > self.MOST_ROWS:
                lines.append(f"… and {len(wrong) - self.MOST_ROWS:,} more; --json lists all")
            lines.append("")
        told = ", ".join(f"{n:,} {status}" for status, n in self.counts.items())
        lines.append(f"{plural(len(self.tensors), 'tensor')}: {told or 'nothing to compare'}")
        for bits, kinds in ((4, ("nf4", "fp4")), (8, ("int8",))):
            measured = [t for t in self.tensors if t.kind in kinds and t.rmse is not None]
            if not measured:
                continue
            worst = max(measured, key=lambda t: t.rmse or 0.0)
            lines.append(
                f"{plural(len(measured), f'{bits}-bit weight')}: rmse up to {_number(worst.rmse)} "
                f"({printable(worst.name)}), error up to {_number(max(t.max_error or 0.0 for t in measured))}"
            )
        lines += [f"note: {printable(note)}" for note in self.notes]
        return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


@dataclass(frozen=True)
class InspectReport:
    """What a checkpoint holds: ``print(report)`` shows it as tables.

    Attributes:
        data: All of it: ``path``; ``files`` (file, bytes, tensors, metadata); ``weights``, the quantized ones (name,
            quant_type, blocksize, nested, dtype, shape, storage, bytes, bits_per_weight, file; blocksize and dtype are
            None for int8); ``tensors``, the others (name, dtype, shape, bytes, file); ``groups`` (kind, tensors,
            weights, bytes); ``totals``; ``notes``; ``quantization_config`` of ``config.json``.
    """

    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return self.data

    def __str__(self) -> str:
        return self.table()

    def table(self, width: int | None = None) -> str:
        """The report for people: tensors with layer numbers collapsed, kinds, files, and totals."""
        data = self.data
        entries = [(t["name"], _kind(t), t) for t in [*data["weights"], *data["tensors"]]]
        rows = [
            (
                pattern,
                f"{len(ts):,}",
                shape_text(ts[0]["shape"]),
                _kind(ts[0])[0],
                format_bytes(sum(t["bytes"] for t in ts)),
            )
            for pattern, ts in collapse(entries)
        ]
        parts = [
            printable(data["path"]),
            table(
                ("tensor", "count", "shape", "kind", "bytes"), rows, right=(1, 4), shrink=((0, 24), (3, 8)), width=width
            ),
        ]
        total = data["totals"]["bytes"]
        kinds = [
            (
                g["kind"],
                f"{g['tensors']:,}",
                format_count(g["weights"]),
                format_bytes(g["bytes"]),
                ratio(g["bytes"], total),
            )
            for g in data["groups"]
        ]
        parts.append(table(("kind", "tensors", "values", "bytes", "share"), kinds, right=(1, 2, 3, 4), width=width))
        files = [(f["file"] or "", f"{f['tensors']:,}", format_bytes(f["bytes"])) for f in data["files"]]
        parts.append(table(("file", "tensors", "bytes"), files, right=(1, 2), shrink=((0, 16),), width=width))
        config = data.get("quantization_config")
        method = (
            "none"
            if config is None
            else str(config.get("quant_method", "unnamed"))
            if isinstance(config, dict)
            else "?"
        )
        totals = data["totals"]
        lines = [
            f"{_counted(data['weights'])}, {format_count(totals['weights'])} values, "
            f"{format_bytes(total)}, {totals['bits_per_weight']:.2f} bits per value",
            f"quantization_config in config.json: {printable(method)}",
            *(f"note: {printable(note)}" for note in data.get("notes") or ()),
        ]
        return "\n\n".join([*parts, "\n".join(lines)])


def _counted(weights: Sequence[dict[str, Any]]) -> str:
    """``112 4-bit weights and 4 8-bit weights``."""
    eight_bit = sum(t["quant_type"] == "int8" for t in weights)
    counts = [(len(weights) - eight_bit, "4-bit weight"), (eight_bit, "8-bit weight")]
    found = [plural(n, noun) for n, noun in counts if n]
    return " and ".join(found or [plural(0, "quantized weight")])


def _kind(t: dict[str, Any]) -> tuple[str, tuple[int, ...]]:
    """How a tensor of an inspection is stored, in words, and its shape."""
    if "quant_type" not in t:
        return t["dtype"], tuple(t["shape"])
    if t["blocksize"] is None:
        return f"{t['quant_type']}, a scale per row", tuple(t["shape"])
    nested = ", double" if t["nested"] else ""
    storage = "" if t["storage"] == "uint8" else f", stored as {t['storage']}"
    return f"{t['quant_type']}, blocks of {t['blocksize']}{nested}{storage}, was {t['dtype']}", tuple(t["shape"])
