"""What this machine offers: processor, threads, memory, disk, GPU, and the versions of installed libraries.

Nothing heavy is imported: versions come from package metadata, facts about the GPU from the compiled core.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from halfbyte import _native
from halfbyte._terminal import format_bytes, printable

PACKAGES = ("numpy", "safetensors", "torch", "transformers", "accelerate", "peft", "bitsandbytes", "huggingface_hub")


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
    if driver or gpu["cuda"]:
        parts = [f"NVIDIA {driver}"] if driver else []
        lines.append(("driver", ", ".join([*parts, *([f"CUDA up to {gpu['cuda']}"] if gpu["cuda"] else [])])))
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
    """The driver, the CUDA version that it supports, and its devices."""
    # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep …"
    words = (_field(_read("/proc/driver/nvidia/version"), "NVRM version") or "").split()
    found: dict[str, Any] = {
        "driver": next((w for w in words if w[0].isdecimal() and "." in w), None),
        "cuda": None,
        "devices": [],
    }
    with contextlib.suppress(RuntimeError):  # no driver, or one that does not work: `_gpu_kernels` says which
        found["cuda"] = "{}.{}".format(*_native.cuda_driver_version())
        found["devices"] = [_device(number) for number in range(_native.cuda_device_count())]
    return found


def _device(number: int) -> dict[str, Any]:
    device: dict[str, Any] = {"name": "unsupported", "memory_bytes": None, "compute_capability": None}
    with contextlib.suppress(RuntimeError, ValueError):
        device["memory_bytes"] = _native.cuda_device_memory(number)
        name, (major, minor), _, _ = _native.cuda_device(number)
        device["name"], device["compute_capability"] = name, f"{major}.{minor}"
    return device


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
            form = "cubins" if _native.cuda_kernel_form(device) == "cubin" else "PTX, which the driver compiles"
            found.append(f"usable on {name} (sm_{major}{minor}, {multiprocessors} multiprocessors), as {form}")
        except (RuntimeError, ValueError) as error:
            found.append(str(error))
    return found
