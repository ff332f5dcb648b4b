"""The names, signatures and classes of the layer beside those of the real package, where that is installed."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from typing import Any

import fresh
import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")

# Prints, for each module, what bitsandbytes itself put there: for what can be called its parameters, for classes the
# names of their bases too; and the schemas of the operations.
LIST = """
import importlib, inspect, json, pkgutil, torch
import bitsandbytes as b
def own(value):
    module = getattr(value, "__module__", None)
    if module is not None:
        return module.startswith(("bitsandbytes", "halfbyte"))
    return isinstance(value, (str, int, float, tuple, set, dict, torch.Tensor, torch.device))
def default(value):
    return None if value is inspect.Parameter.empty else repr(value)
def parameters(value):
    try:
        return [[p.name, p.kind.name, default(p.default)] for p in inspect.signature(value).parameters.values()]
    except (TypeError, ValueError):
        return None
def describe(value):
    if inspect.isclass(value):
        return {"bases": [c.__name__ for c in value.__mro__], "parameters": parameters(value)}
    return {"parameters": parameters(value)} if callable(value) else {}
names = [""] + [m.name.removeprefix("bitsandbytes") for m in pkgutil.walk_packages(b.__path__, "bitsandbytes.")
                if not m.name.startswith(("bitsandbytes.backends.", "bitsandbytes.lib")) and "__main__" not in m.name]
out = {}
for name in names:
    module = importlib.import_module("bitsandbytes" + name)
    out[name] = {k: describe(v) for k, v in vars(module).items() if not k.startswith("_") and own(v)}
out["ops"] = {}
for name in torch._C._dispatch_get_all_op_names():
    if name.startswith("bitsandbytes::"):
        op, _, overload = name.removeprefix("bitsandbytes::").partition(".")
        out["ops"][name] = str(getattr(getattr(torch.ops.bitsandbytes, op), overload or "default")._schema)
print(json.dumps(out))
"""

# Names of the real package that the layer leaves out, and why.
ABSENT = {
    # One compiled core serves all versions of CUDA: there is nothing to choose from.
    "cextension": {
        "CudaBNBNativeLibrary",
        "XpuBNBNativeLibrary",
        "get_available_cuda_binary_versions",
        "get_xpu_bnb_library_path",
        "parse_cuda_version",
    },
    # The driver alone is used: no runtime library is looked for.
    "diagnostics.cuda": {
        "CUDART_PATH_IGNORED_ENVVARS",
        "CUDART_PATH_PREFERRED_ENVVARS",
        "CUDA_RUNTIME_LIB_PATTERNS",
        "find_cuda_libraries_in_path_list",
        "find_cudart_libraries",
        "get_potentially_lib_path_containing_env_vars",
        "is_relevant_candidate_env_var",
    },
}
# Imports of one module from another that no one takes from there.
PASSING = {
    "diagnostics.cuda": {"HIP_ENVIRONMENT", "get_cuda_bnb_library_path", "print_dedented"},
    "diagnostics.main": {"PACKAGE_GITHUB_URL", "print_dedented"},
    "nn.modules": {"T", "has_avx512bf16"},
    "optim.adamw": {"Optimizer2State"},
    "optim.optimizer": {"sync_gpu"},
}


@cache
def listed(layer: bool) -> dict[str, dict[str, Any]]:
    install = "import halfbyte.compat; halfbyte.compat.install()\n" if layer else ""
    done = fresh.run("import warnings; warnings.simplefilter('ignore')\n" + install + LIST)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return {name.removeprefix("."): names for name, names in found.items()}


@pytest.mark.slow
def test_names_of_every_module_are_served() -> None:
    real, ours = listed(False), listed(True)
    assert set(real) - set(ours) == {"backends"}  # kernels of bitsandbytes' own, device by device
    missing = {
        module: left
        for module, names in real.items()
        if module in ours
        and (left := set(names) - set(ours[module]) - ABSENT.get(module, set()) - PASSING.get(module, set()))
    }
    assert not missing
    assert all(not names & set(ours[module]) for module, names in ABSENT.items())


@pytest.mark.slow
def test_operations_have_the_same_schemas() -> None:
    real, ours = listed(False)["ops"], listed(True)["ops"]
    assert len(real) >= 18
    assert ours == real


def signatures(module: str) -> tuple[dict[str, Any], dict[str, Any]]:
    real, ours = listed(False)[module], listed(True)[module]
    both = sorted(set(real) & set(ours))
    return {n: real[n].get("parameters") for n in both}, {n: ours[n].get("parameters") for n in both}


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    ["optim", "optim.optimizer", "functional", "utils", "nn", "nn.parametrize", "autograd._functions", "cuda_specs"],
)
def test_signatures_are_the_same(module: str) -> None:
    real, ours = signatures(module)
    assert len(real) >= 3
    if module == "nn":
        # One more, for PEFT, which makes a new weight of what it finds in the old one's __dict__.
        ours["Params4bit"].remove(["_module", "POSITIONAL_OR_KEYWORD", "None"])
        # The real layers have one block size.
        for name in ("Linear4bit", "Embedding4bit"):
            ours[name].remove(["blocksize", "KEYWORD_ONLY", "64"])
    assert ours == real


@pytest.mark.slow
def test_optimizers_have_the_same_bases() -> None:
    real, ours = listed(False)["optim"], listed(True)["optim"]
    bases = {name: what["bases"] for name, what in real.items() if "bases" in what}
    assert len(bases) == 41
    assert {name: [b for b in ours[name]["bases"] if not b.startswith("_")] for name in bases} == bases
