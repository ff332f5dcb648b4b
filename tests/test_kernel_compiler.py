"""What builds the CUDA kernels (kernels/compiler), without NVIDIA's compilers: `make kernels-check` runs those."""

from __future__ import annotations

import json
import lzma
import os
import re
import stat
import subprocess
import sys
import zlib
from pathlib import Path

import build_kernels
import pytest
from compiler import build, pack, ptx, tools
from compiler.modules import KERNELS, MODULES, SHIPPED

ROOT = KERNELS.parent

PTX = """\
.version 8.0
.target sm_80
.address_size 64

	// .globl	one
.global .align 4 .u32 THREADS = 256;
.global .align 4 .u32 NF4;
.global .align 4 .u32 NOWHERE = -1;
.global .align 4 .u32 _ZN5ShapeILi64ELb1EE5BYTESE = 189696;
.global .align 8 .u64 _ZN39_INTERNAL_00000000_9_decode_cu_fa1276e02nv6target5sm_35E = 35;
.const .align 4 .b8 VALUES[8] = {0, 0, 128, 191, 177, 57, 50, 191};
.global .align 8 .u64 POINTER[1] = {VALUES};
.extern .shared .align 128 .b8 shared_base[];
.func helper(
	.param .b64 helper_param_0
)
;
.visible .entry two(
	.param .u64 two_param_0
)
.maxntid 512, 1, 1
{
	.reg .pred 	%p<3>;
	{
	mov.u64 	%rd1, shared_base;
	}
	ret;

}
	// .globl	one
.visible .entry one(
	.param .u64 one_param_0
)
.maxntid 256, 1, 1
{
	ld.global.u64 	%rd1, [POINTER];
	call helper, (param0);
	ret;

}
.func helper(
	.param .b64 helper_param_0
)
{
	ret;
}
"""


def test_ptx_is_split_into_modules_of_one_kernel() -> None:
    two, one = ptx.split(PTX)
    assert (one.name, one.threads, one.dynamic_shared) == ("one", 256, False)
    assert (two.name, two.threads, two.dynamic_shared) == ("two", 512, True)
    for kernel in (one, two):
        assert kernel.ptx.startswith(".version 8.0\n.target sm_80\n.address_size 64\n")
        assert kernel.ptx.count(".entry") == 1
        assert kernel.ptx.count("{") == kernel.ptx.count("}")
    # What a table points to comes along, what nothing uses does not, and a function with its declaration.
    assert "POINTER[1]" in one.ptx
    assert "VALUES[8]" in one.ptx
    assert one.ptx.count(".func helper(") == 2
    assert "shared_base" not in one.ptx
    assert "THREADS" not in one.ptx
    assert "VALUES" not in two.ptx
    assert ".func" not in two.ptx


def test_ptx_constants_have_names_of_rust() -> None:
    assert ptx.constants(PTX) == {"THREADS": 256, "NF4": 0, "SHAPE_64_1_BYTES": 189696}


def test_ptx_that_is_cut_off_is_an_error() -> None:
    with pytest.raises(ValueError, match="ends within a statement"):
        ptx.split(PTX.removesuffix("}\n"))
    with pytest.raises(ValueError, match="without a name or __launch_bounds__"):
        ptx.split(PTX.replace(".maxntid 256, 1, 1\n", ""))


def test_pins_of_a_wheel_are_those_of_the_requirements() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = \[(.*?)^\]", pyproject, re.MULTILINE | re.DOTALL)
    assert requires is not None
    pins = dict(re.findall(r'"(nvidia-[\w-]+)==([\d.]+); sys_platform', requires[1]))
    assert pins == tools.pinned()
    assert len(pins) == 3


def test_lock_lists_every_module_and_its_kernels() -> None:
    lock = json.loads(build_kernels.LOCK.read_text())
    assert lock["tools"] == tools.pinned()
    assert set(lock["modules"]) == {module.name for module in MODULES}
    assert set(lock["constants"]) == {module.stem for module in MODULES}
    kernels = {name: about for module in lock["modules"].values() for name, about in module["kernels"].items()}
    assert kernels["dequantize_blockwise4_bf16"]["for_tests"] is False
    assert all(about["for_tests"] == ("reference" in name or "floor" in name) for name, about in kernels.items())


def test_lock_differences_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = build_kernels.LOCK.read_text()
    assert build_kernels.compare_lock(text) == []
    lock = json.loads(text)
    lock["modules"]["gemv_4bit_75"]["kernels"]["gemv_4bit_f16"]["ptx_sha256"] = "0"
    del lock["constants"]["int8_rowwise"]
    assert build_kernels.compare_lock(json.dumps(lock)) == [
        "kernels.lock.json: constants: int8_rowwise",
        "kernels.lock.json: modules: gemv_4bit_75",
    ]
    monkeypatch.setattr(build_kernels, "LOCK", tmp_path / "kernels.lock.json")
    assert "kernels.lock.json: modules: gemv_4bit_75" in build_kernels.compare_lock(text)


def test_resources_growth_and_spills_are_named() -> None:
    committed = json.loads(build_kernels.RESOURCES.read_text())

    def found(more_registers: int = 0, spills: int = 0) -> dict[str, dict[str, build.Assembled]]:
        return {
            where: {k: build.Assembled(b"", r + more_registers, spills, s) for k, (r, s) in kernels.items()}
            for where, kernels in committed.items()
        }

    assert build_kernels.compare_resources(found()) == []
    assert build_kernels.compare_resources(found(more_registers=-1)) == []
    grown = build_kernels.compare_resources(found(more_registers=1))
    registers, _ = committed["gemv_4bit_75 sm_80"]["gemv_4bit_f16"]
    assert f"gemv_4bit_75 sm_80: gemv_4bit_f16 takes {registers + 1} registers, {registers} are committed" in grown
    spilled = build_kernels.compare_resources(found(spills=8))
    assert "gemv_4bit_75 sm_80: gemv_4bit_f16 spills or has a stack: 8 bytes" in spilled
    assert build_kernels.compare_resources({"new sm_80": {"new": build.Assembled(b"", 1, 0, 0)}})


def fake_ptxas(folder: Path, words: str) -> Path:
    """A program that writes a cubin, says this, and notes each call in a file beside it."""
    path = folder / "ptxas"
    path.write_text(
        f'#!/bin/sh\necho call >>{folder}/calls\nwhile [ "$1" != -o ]; do shift; done\n'
        f"echo code >\"$2\"\ncat >&2 <<'END'\n{words}\nEND\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_cubins_are_made_once(tmp_path: Path) -> None:
    words = (
        "ptxas info    : 0 bytes gmem\n    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 24 registers, 64 bytes smem, 400 bytes cmem[0]"
    )
    ptxas = fake_ptxas(tmp_path, words)
    builder = build.Builder(tools.Tools(tmp_path, tmp_path, ptxas), tmp_path / "cache", jobs=1)
    jobs = [(kernel, "80") for kernel in ptx.split(PTX)]
    first = builder.assemble_all(jobs)
    assert first == [build.Assembled(b"code\n", 24, 28, 64)] * 2
    assert builder.assemble_all(jobs) == first
    assert (tmp_path / "calls").read_text().count("call") == 2
    # For another machine, and of another assembler.
    builder.assemble_all([(jobs[0][0], "90")])
    (other := tmp_path / "other").mkdir()
    builder.assemble_all(jobs, fake_ptxas(other, words + "\n"))
    assert (tmp_path / "calls").read_text().count("call") == 3
    assert (other / "calls").read_text().count("call") == 2


@pytest.mark.parametrize(
    ("capabilities", "machines"),
    [
        (None, {"75", "80", "90", "90a", "100", "120"}),
        (set(), set()),
        ({(8, 9)}, {"80"}),
        ({(9, 0), (7, 5)}, {"75", "90", "90a"}),
        ({(12, 1)}, {"120"}),
        ({(7, 0)}, set()),
    ],
)
def test_cubins_of_a_native_build_are_those_of_its_gpus(
    capabilities: set[tuple[int, int]] | None, machines: set[str]
) -> None:
    assert {machine for machine in SHIPPED if build.is_for(machine, capabilities)} == machines


def test_cubins_with_serialized_products_are_an_error(tmp_path: Path) -> None:
    ptxas = fake_ptxas(tmp_path, "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async are serialized")
    builder = build.Builder(tools.Tools(tmp_path, tmp_path, ptxas), tmp_path / "cache", jobs=1)
    for _ in range(2):
        with pytest.raises(tools.CompileError, match=r"two: .*sm_90a: \(C7510\) Potential Performance Loss"):
            builder.assemble_all([(ptx.split(PTX)[0], "90a")])


IMAGES = [
    pack.Image("one_f16", "gemm/one", "ptx", "75", b"one for all\0"),
    pack.Image("one_bf16", "gemm/one", "ptx", "80", b"one for most\0"),
    pack.Image("two", "gemm/two", "ptx", "80", b"two\0" * 2000),
    pack.Image("one_f16", "gemm/one", "cubin", "75", bytes(range(256)) * 32),
    pack.Image("one_f16", "gemm/one", "cubin", "80", bytes(64)),
    pack.Image("one_bf16", "gemm/one", "cubin", "80", bytes(range(128))),
]


def test_packed_families_are_ptx_of_a_source_and_cubins_of_a_source_for_a_machine() -> None:
    assert pack.group(IMAGES) == [IMAGES[:2], IMAGES[2:3], IMAGES[3:4], IMAGES[4:]]
    assert pack.group([]) == []
    assert pack.index([], []) == {"families": [], "images": []}


def test_packed_images_are_where_the_index_says(tmp_path: Path) -> None:
    builder = build.Builder(tools.Tools(tmp_path, tmp_path, tmp_path), tmp_path / "cache", jobs=1)
    families = pack.group(IMAGES)
    streams = builder.pack_all(families)
    index, packed = pack.index(families, streams), b"".join(streams)
    unpacked = []
    for family, images in zip(index["families"], families, strict=True):
        stream = packed[family["at"] : family["at"] + family["bytes"]]
        filters = pack.filters(images[0].kind, family["size"])
        unpacked.append(lzma.decompress(stream, format=lzma.FORMAT_RAW, filters=filters))
    assert [family["size"] for family in index["families"]] == list(map(len, unpacked))
    for image, place in zip(IMAGES, index["images"], strict=True):
        content = unpacked[place["family"]][place["at"] : place["at"] + place["size"]]
        assert content == image.content
        assert place["crc32"] == zlib.crc32(image.content)
        assert (place["kernel"], place["kind"], place["arch"]) == (image.kernel, image.kind, image.arch)


def test_packed_families_are_made_once(tmp_path: Path) -> None:
    builder = build.Builder(tools.Tools(tmp_path, tmp_path, tmp_path), tmp_path / "cache", jobs=1)
    families = pack.group(IMAGES)
    made = builder.pack_all(families)
    kept = sorted((tmp_path / "cache").iterdir())
    assert len(kept) == len(families)
    for path in kept:
        path.write_bytes(b"kept")
    assert builder.pack_all(families) == [b"kept"] * len(families)
    # The same bytes of another kind are packed in another way.
    (other,) = builder.pack_all([[pack.Image("two", "gemm/two", "cubin", "80", IMAGES[2].content)]])
    assert other not in (made[1], b"kept")


def test_cache_that_was_not_used_for_a_month_is_removed(tmp_path: Path) -> None:
    old, new = tmp_path / "old.cubin", tmp_path / "new.cubin"
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    build.Builder(tools.Tools(tmp_path, tmp_path, tmp_path), tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


def installed(folder: Path, versions: dict[str, str]) -> None:
    """What pip leaves of these packages, without the packages."""
    (folder / "nvidia").mkdir(parents=True, exist_ok=True)
    for name, version in versions.items():
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_tools_are_taken_in_their_version_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torchs, ours = tmp_path / "torchs", tmp_path / "ours"
    installed(torchs, {tools.NVRTC: "12.8.93", tools.HEADERS: tools.pinned()[tools.HEADERS]})
    installed(ours, tools.pinned())
    with pytest.raises(tools.MissingToolsError, match=f"{tools.NVRTC}==12.0.140, {tools.PTXAS}==12.9.86 not in"):
        tools.find(str(torchs))
    assert tools.find(str(ours)).ptxas == ours / "nvidia/cuda_nvcc/bin/ptxas"
    monkeypatch.setattr(sys, "path", [str(torchs), str(ours)])
    assert tools.find(None).nvrtc.is_relative_to(ours)
    assert tools.find(None).include.is_relative_to(torchs)


def test_tools_that_are_missing_are_status_3(tmp_path: Path) -> None:
    script = KERNELS / "build_kernels.py"
    command = [sys.executable, str(script), "build", "--nvidia", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == build_kernels.MISSING_TOOLS
    assert "pip install --target DIR -r requirements/kernels.txt" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
