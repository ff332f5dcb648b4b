"""What this machine offers: processor, threads, memory, disk, GPU, and the versions of the libraries around.

Nothing heavy is imported: versions come from package metadata, the GPU from the driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halfbyte import _native
from halfbyte._terminal import format_bytes, printable

PACKAGES = ("numpy", "safetensors", "torch", "transformers", "accelerate", "peft", "bitsandbytes", "huggingface_hub")
_SMI_SECONDS = 10


def examine() -> dict[str, Any]:
    """Everything that `halfbyte doctor` shows, in types that JSON has. Never raises: what is absent is None."""
    return {
        "halfbyte": {"version": _native.__version__, "native": str(getattr(_native, "__file__", "built in"))},
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
            "executable": sys.executable,
        },
        "platform": {
            "system": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
            "libc": " ".join(platform.libc_ver()).strip() or None,
        },
        "cpu": _cpu(),
        "memory": _memory(),
        "packages": {name: _version(name) for name in PACKAGES},
        "gpu": {**_gpu(), "kernels": _gpu_kernels()},
        "disk": _disk(Path.cwd() if _cwd_exists() else Path("/")),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("HALFBYTE_")},
    }


def render(found: dict[str, Any]) -> str:
    """The examination for people, one subject a line."""
    cpu, memory, gpu, disk = found["cpu"], found["memory"], found["gpu"], found["disk"]
    system = found["platform"]
    lines = [
        ("halfbyte", f"{found['halfbyte']['version']} ({found['halfbyte']['native']})"),
        ("Python", f"{found['python']['version']} ({found['python']['executable']})"),
        ("platform", " ".join(str(v) for v in system.values() if v)),
        ("processor", f"{cpu['model'] or 'unknown'}, {cpu['usable']} of {cpu['cores']} cores usable"),
        ("kernels", cpu["simd"]),
        ("features", " ".join(cpu["features"]) or "none that matter here"),
        ("memory", _amounts(memory["total_bytes"], memory["available_bytes"], "available")),
    ]
    devices = gpu["devices"]
    for number, device in enumerate(devices):
        parts = [device["name"]]
        if device.get("memory_bytes"):
            parts.append(format_bytes(device["memory_bytes"]))
        if device.get("compute_capability"):
            parts.append(f"compute capability {device['compute_capability']}")
        lines.append((f"GPU {number}", ", ".join(parts)))
    if not devices:
        lines.append(("GPU", "none found; the offline tool needs none"))
    for number, kernels in enumerate(gpu["kernels"]):
        lines.append((f"GPU kernels {number}" if number else "GPU kernels", kernels))
    driver = gpu["driver"]
    if driver:
        cuda = f", CUDA up to {gpu['cuda']}" if gpu["cuda"] else ""
        lines.append(("driver", f"NVIDIA {driver}{cuda}"))
    lines.append(("disk", f"{_amounts(disk['total_bytes'], disk['free_bytes'], 'free')} in {disk['path']}"))
    for name, version in found["packages"].items():
        lines.append((name, version or "not installed"))
    for name, value in found["environment"].items():
        lines.append((name, value))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {printable(str(text))}" for name, text in lines)


def _amounts(total: int | None, part: int | None, word: str) -> str:
    if total is None:
        return "unknown"
    return format_bytes(total) + (f", {format_bytes(part)} {word}" if part is not None else "")


def _cwd_exists() -> bool:
    try:
        Path.cwd()
    except OSError:
        return False
    return True


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    except Exception:  # metadata of a broken install
        return "broken install"


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _field(text: str | None, *names: str) -> str | None:
    """The value of the first line ``name : value`` with one of these names."""
    for line in (text or "").splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip() in names and value.strip():
            return value.strip()
    return None


def _cpu() -> dict[str, Any]:
    info = _read("/proc/cpuinfo")
    model = _field(info, "model name", "Model", "Hardware") or platform.processor() or None
    affinity = getattr(os, "sched_getaffinity", None)
    cores = os.cpu_count() or 1
    return {
        "model": model,
        "features": _native.cpu_features(),
        "simd": _simd(),
        "cores": cores,
        "usable": len(affinity(0)) if affinity else cores,
    }


def _simd() -> str:
    """The kernels in use; when the environment asks for some that this processor lacks, what is wrong with that."""
    try:
        return _native.simd()
    except ValueError as error:
        return str(error)


def _memory() -> dict[str, int | None]:
    """Bytes that this process may use: of the machine, or of the container when that is less."""
    info = _read("/proc/meminfo")

    def kib(name: str) -> int | None:
        value = _field(info, name)
        return int(value.split()[0]) * 1024 if value and value.split()[0].isdecimal() else None

    total, available = kib("MemTotal"), kib("MemAvailable")
    limit = (_read("/sys/fs/cgroup/memory.max") or "").strip()
    used = (_read("/sys/fs/cgroup/memory.current") or "").strip()
    if total is not None and limit.isdecimal() and int(limit) < total:
        total = int(limit)
        if available is not None and used.isdecimal():
            available = min(available, max(total - int(used), 0))
    return {"total_bytes": total, "available_bytes": available}


def _disk(path: Path) -> dict[str, Any]:
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return {"path": str(path), "free_bytes": None, "total_bytes": None}
    return {"path": str(path), "free_bytes": usage.free, "total_bytes": usage.total}


def _gpu() -> dict[str, Any]:
    """Driver, the CUDA version it supports, and devices: from the driver's library, else its tool, else /proc."""
    asks: tuple[Callable[[], dict[str, Any] | None], ...] = (_gpu_by_tool, _gpu_by_library)
    found: dict[str, Any] = {"driver": None, "cuda": None, "devices": []}
    for ask in asks:
        with contextlib.suppress(Exception):  # a half-installed driver fails in ways of its own
            answer = ask()
            if answer is not None:
                for key, value in answer.items():
                    found[key] = found[key] or value
    if found["driver"] is None:
        # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep …"
        words = (_field(_read("/proc/driver/nvidia/version"), "NVRM version") or "").split()
        found["driver"] = next((w for w in words if w[0].isdecimal() and "." in w), None)
    return found


def _gpu_kernels() -> list[str]:
    """Of every GPU whether halfbyte's kernels can be used there, or why not; of no GPU nothing."""
    try:
        count = _native.cuda_device_count()
    except _native.NoCudaDriverError:
        # Without a driver that is no news.
        return []
    except RuntimeError as error:
        return [str(error)]
    found = []
    for device in range(count):
        try:
            name, (major, minor), multiprocessors, _ = _native.cuda_device(device)
            found.append(f"usable on {name} (sm_{major}{minor}, {multiprocessors} multiprocessors)")
        except (RuntimeError, ValueError) as error:
            found.append(str(error))
    return found


def _gpu_by_tool() -> dict[str, Any] | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    fields = "driver_version,name,memory.total,compute_cap"
    done = subprocess.run(
        [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_SMI_SECONDS,
        check=False,
    )
    return parse_smi(done.stdout) if done.returncode == 0 else None


def parse_smi(text: str) -> dict[str, Any] | None:
    """Read ``nvidia-smi --query-gpu=driver_version,name,memory.total,compute_cap --format=csv,noheader,nounits``."""
    driver = None
    devices = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) < 4:
            continue
        driver = driver or cells[0]
        memory, capability = cells[-2], cells[-1]
        devices.append(
            {
                "name": ", ".join(cells[1:-2]),
                "memory_bytes": int(memory) * 2**20 if memory.isdecimal() else None,
                "compute_capability": capability if capability.replace(".", "").isdecimal() else None,
            }
        )
    return {"driver": driver, "devices": devices} if devices else None


def _gpu_by_library() -> dict[str, Any] | None:
    """Ask libcuda itself: device names, memory, and the CUDA version that the driver supports."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    supported = f"{version.value // 1000}.{version.value % 1000 // 10}"
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return {"cuda": supported, "devices": []}
    # CUdevice_attribute: COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR.
    major_attribute, minor_attribute = 75, 76
    devices = []
    for number in range(count.value):
        device = ctypes.c_int()
        if cuda.cuDeviceGet(ctypes.byref(device), number) != 0:
            continue
        name = ctypes.create_string_buffer(256)
        memory = ctypes.c_size_t()
        major, minor = ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGetName(name, len(name), device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), major_attribute, device)
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), minor_attribute, device)
        devices.append(
            {
                "name": name.value.decode("utf-8", "replace"),
                "memory_bytes": memory.value or None,
                "compute_capability": f"{major.value}.{minor.value}",
            }
        )
    return {"cuda": supported, "devices": devices}
