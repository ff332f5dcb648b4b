"""Packing the code of kernels: what resembles each other goes into one compressed stream.

The instances of a template differ in few places, so that a stream for each source takes about a third of what a stream
for each kernel takes. A stream is unpacked as a whole when the first of its kernels is used, which is why there is none
for a whole architecture (benches/RESULTS.md, "CUDA: first use", has what was compared).
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

MIN_DICTIONARY = 4096
"""What LZMA2 demands, and its decoder in rust/cuda/src/family.rs."""

_PROPERTIES: Mapping[str, Mapping[str, int]] = {
    # Text has no alignment; the character before says most about the next one.
    "ptx": {"lc": 4, "lp": 0, "pb": 0},
    # Instructions are 16 bytes, with their fields at the same places.
    "cubin": {"lc": 0, "lp": 3, "pb": 4},
}


@dataclass(frozen=True)
class Image:
    """A kernel's code of one kind for one architecture."""

    kernel: str
    source: str
    kind: Literal["ptx", "cubin"]
    arch: str
    content: bytes

    @property
    def family(self) -> str:
        """Names the stream that it goes into.

        PTX of a source hardly differs from architecture to architecture, and unpacking it takes milliseconds where the
        driver then takes hundreds to compile it. Cubins differ, and their first use is to be fast.
        """
        return f"{self.source} {self.kind}" + (f" {self.arch}" if self.kind == "cubin" else "")


def group(images: list[Image]) -> list[list[Image]]:
    """The images of each family, in the order in which they come."""
    families: dict[str, list[Image]] = {}
    for image in images:
        families.setdefault(image.family, []).append(image)
    return list(families.values())


def filters(kind: str, size: int) -> list[dict[str, Any]]:
    """What a stream of this kind and length is packed with.

    The decoder allocates the dictionary, which is as long as what is packed. The stream is bare, without a container:
    every image has a checksum of its own.
    """
    return [{"id": lzma.FILTER_LZMA2, "dict_size": max(size, MIN_DICTIONARY), **_PROPERTIES[kind]}]


def compress(kind: str, content: bytes) -> bytes:
    """One stream."""
    return lzma.compress(content, format=lzma.FORMAT_RAW, filters=filters(kind, len(content)))


def index(families: list[list[Image]], streams: list[bytes]) -> dict[str, list[dict[str, Any]]]:
    """Where each family is in the streams one after another, and where each image is in its unpacked family."""
    packed, images, start = [], [], 0
    for number, (family, stream) in enumerate(zip(families, streams, strict=True)):
        at = 0
        for image in family:
            size = len(image.content)
            place = {"family": number, "at": at, "size": size, "crc32": zlib.crc32(image.content)}
            images.append({"kernel": image.kernel, "kind": image.kind, "arch": image.arch, **place})
            at += size
        packed.append({"at": start, "bytes": len(stream), "size": at})
        start += len(stream)
    return {"families": packed, "images": images}
