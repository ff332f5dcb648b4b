"""`halfbyte doctor`."""

from __future__ import annotations

import json

import pytest
from halfbyte import _native
from halfbyte.cli import doctor


class Driver:
    """What the compiled core answers about GPUs, in the place of its functions."""

    def __init__(self, monkeypatch, version: object, count: object = 0, devices: object = ()) -> None:
        self.answers = {
            "cuda_driver_version": lambda: version,
            "cuda_device_count": lambda: count,
            "cuda_device": lambda number: devices[number],
            "cuda_device_memory": lambda number: 80 * 10**9,
        }
        for name in self.answers:
            monkeypatch.setattr(_native, name, self.answer(name))

    def answer(self, name: str) -> object:
        def call(*arguments: int) -> object:
            found = self.answers[name](*arguments)
            if isinstance(found, Exception):
                raise found
            return found

        return call


def test_doctor_names_gpus_as_the_driver_does(monkeypatch):
    old = RuntimeError("device 1 (Tesla P100): compute capability 6.0: the kernels need 7.5 or later")
    Driver(monkeypatch, (13, 0), 2, [("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448), old])
    found = doctor.examine()
    assert found["gpu"]["cuda"] == "13.0"
    assert found["gpu"]["devices"] == [
        {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 * 10**9, "compute_capability": "9.0"},
        {"name": "unsupported", "memory_bytes": 80 * 10**9, "compute_capability": None},
    ]
    text = doctor.render(found)
    assert "NVIDIA H100 80GB HBM3, 80.0 GB, compute capability 9.0" in text
    assert "Tesla P100" in text
    assert "CUDA up to 13.0" in text


def test_doctor_without_a_driver(monkeypatch):
    absent = getattr(_native, "NoCudaDriverError", RuntimeError)("CUDA: the NVIDIA driver is not installed")
    Driver(monkeypatch, absent, absent)
    found = doctor.examine()["gpu"]
    assert (found["cuda"], found["devices"], found["kernels"]) == (None, [], [])


def test_doctor_survives_a_broken_driver(monkeypatch):
    Driver(monkeypatch, (13, 0), RuntimeError("CUDA: cuInit failed: driver half installed"))
    found = doctor.examine()
    assert found["gpu"]["devices"] == []
    assert "driver half installed" in doctor.render(found)


def test_doctor_starts_no_other_program(monkeypatch):
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr("subprocess.Popen", refuse)
    doctor.render(doctor.examine())


def test_doctor_survives_a_wrong_switch(monkeypatch):
    def refuse() -> str:
        raise ValueError("HALFBYTE_SIMD must be another, got 'mmx'")

    monkeypatch.setattr(_native, "simd", refuse)
    monkeypatch.setenv("HALFBYTE_SIMD", "mmx")
    assert doctor.render(doctor.examine()).count("mmx") == 2


@pytest.mark.parametrize(
    ("error", "kernels"),
    [(_native.NoCudaDriverError("no driver"), []), (RuntimeError("driver too old"), ["driver too old"])],
)
def test_doctor_says_why_kernels_cannot_be_used_unless_there_is_no_driver(error, kernels, monkeypatch):
    def fail() -> int:
        raise error

    monkeypatch.setattr(_native, "cuda_device_count", fail)
    assert doctor.examine()["gpu"]["kernels"] == kernels


def test_doctor_reads_this_machine():
    found = doctor.examine()
    assert found["halfbyte"]["version"] == _native.__version__
    assert found["cpu"]["usable"] >= 1
    assert found["cpu"]["simd"] == _native.simd()
    assert found["disk"]["free_bytes"] > 0
    assert found["packages"]["safetensors"]
    json.dumps(found)
