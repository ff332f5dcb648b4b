"""`bitsandbytes` served by halfbyte: each case in a process of its own, where nothing of the two is imported yet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fresh
import pytest

pytest.importorskip("torch")

# Hides an installed bitsandbytes, files and metadata, as if it were absent.
HIDE = """
import importlib.metadata, importlib.machinery, sys
def hidden(function):
    def find_spec(fullname, path=None, target=None):
        return None if fullname == "bitsandbytes" and path is None else function(fullname, path, target)
    return find_spec
finder = importlib.machinery.PathFinder
finder.find_spec = staticmethod(hidden(finder.find_spec))
distributions = finder.find_distributions
finder.find_distributions = staticmethod(lambda c: [] if c.name == "bitsandbytes" else distributions(c))
"""
INSTALL = "import halfbyte.compat; halfbyte.compat.install()\n"
ASK = (
    "import importlib.util, importlib.metadata, bitsandbytes\n"
    "assert importlib.util.find_spec('bitsandbytes') is not None\n"
    "assert importlib.metadata.version('bitsandbytes').startswith('0.50.2+halfbyte')\n"
    "assert bitsandbytes.__halfbyte__ and bitsandbytes.__version__.startswith('0.50.2+halfbyte')\n"
)


def python(code: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "HALFBYTE_BITSANDBYTES"}
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, env={**kept, **env}, check=False
    )


def passes(code: str, **env: str) -> None:
    done = python(code, **env)
    assert done.returncode == 0, done.stderr


def test_compat_imports_nothing_heavy() -> None:
    passes("import halfbyte.compat, sys; assert not {'torch', 'importlib.metadata', 'bitsandbytes'} & set(sys.modules)")


def test_offer_where_absent() -> None:
    passes(
        HIDE + "import halfbyte.compat as c\nassert not c.served() and c.offer() and c.offer() and c.served()\n"
        "assert 'torch' not in sys.modules\n"
        "assert sum(type(f).__module__ == 'halfbyte.compat' for f in sys.meta_path) == 1\n" + ASK
    )


def test_offer_where_a_finder_forbids_the_name() -> None:
    # As programs do to find out what happens without bitsandbytes; transformers imports it for any 4-bit model.
    passes(
        "import sys\nclass Forbids:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'bitsandbytes': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Forbids())\n"
        "import halfbyte.compat as c\n"
        "assert not c.served() and c.offer() and c.served()\nimport bitsandbytes\nassert bitsandbytes.__halfbyte__"
    )


def test_offer_leaves_an_installed_package_alone(tmp_path: Path) -> None:
    (tmp_path / "bitsandbytes.py").write_text("__version__ = 'theirs'")
    passes(
        "import halfbyte.compat as c, bitsandbytes\nassert not c.offer() and bitsandbytes.__version__ == 'theirs'",
        PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    )


def test_offer_is_switched_off_by_the_variable() -> None:
    passes(
        HIDE + "import halfbyte.compat as c, importlib.util\n"
        "assert not c.offer() and importlib.util.find_spec('bitsandbytes') is None",
        HALFBYTE_BITSANDBYTES="0",
    )


def test_install_refuses_once_the_real_one_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "bitsandbytes.py").write_text("__version__ = 'theirs'")
    done = python(
        "import bitsandbytes\n" + INSTALL,
        PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    )
    assert done.returncode == 1
    assert "must not be imported before halfbyte stands in for it, got bitsandbytes theirs" in done.stderr


def test_install_by_import() -> None:
    passes("import halfbyte.compat.bitsandbytes as b, bitsandbytes\nassert b is bitsandbytes\n" + ASK)


def test_install_reaches_a_subprocess() -> None:
    passes(INSTALL + f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {ASK!r}], check=True)")


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_install_reaches_multiprocessing(method: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    body = "".join(f"    {line}\n" for line in ASK.splitlines())
    script.write_text(
        f"import multiprocessing as mp\ndef ask():\n{body}\n"
        f"if __name__ == '__main__':\n    {INSTALL}    p = mp.get_context({method!r}).Process(target=ask)\n"
        "    p.start(); p.join(); raise SystemExit(p.exitcode)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_layer_classes_are_halfbytes_own() -> None:
    fresh.passes(
        INSTALL + "import bitsandbytes as b, halfbyte.nn as n, halfbyte.functional as f, torch\n"
        "assert b.nn.Linear4bit is n.Linear4bit and b.nn.modules.Params4bit is n.Params4bit\n"
        "assert b.functional.QuantState is f.QuantState\n"
        "assert b.nn.Linear8bitLt is n.Linear8bitLt and b.nn.modules.Int8Params is n.Int8Params\n"
        "import halfbyte; assert b.MatmulLtState is halfbyte.MatmulLtState\n"
        "assert not isinstance(torch.nn.Linear(2, 2), b.nn.Linear8bitLt)"
    )


@pytest.mark.parametrize("where", ["", ".nn", ".functional", ".optim", ".utils", ".autograd._functions", ".nn.modules"])
def test_layer_unknown_name_says_who_is_asked(where: str) -> None:
    done = fresh.run(INSTALL + f"import bitsandbytes; bitsandbytes{where}.nonsense")
    assert "has no attribute 'nonsense'; halfbyte stands in for bitsandbytes here" in done.stderr


STEPS = """
import torch, warnings
warnings.simplefilter("ignore")
import bitsandbytes.optim as B
def losses(make, dtype=torch.float32):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(40, 30, dtype=dtype))
    o = make([p])
    for i in range(12):
        p.grad = torch.randn(40, 30, generator=torch.Generator().manual_seed(i), dtype=dtype)
        o.step()
    return p.detach(), o
def same(a, b):
    torch.testing.assert_close(losses(a)[0], losses(b)[0], rtol=1e-5, atol=1e-6)
O = torch.optim
"""


EQUAL = (
    ("B.AdamW(p, lr=.01, weight_decay=.1)", "O.AdamW(p, lr=.01, weight_decay=.1)"),
    ("B.PagedAdamW8bit(p, lr=.01, weight_decay=.1)", "O.AdamW(p, lr=.01, weight_decay=.1)"),
    ("B.Adam8bit(p, lr=.01)", "O.Adam(p, lr=.01)"),
    ("B.SGD8bit(p, lr=.01, momentum=.9, weight_decay=.1)", "O.SGD(p, lr=.01, momentum=.9, weight_decay=.1)"),
    ("B.RMSprop(p, lr=.01, weight_decay=.1)", "O.RMSprop(p, lr=.01, weight_decay=.1)"),
    ("B.Adagrad8bit(p, lr=.01, weight_decay=.1)", "O.Adagrad(p, lr=.01, weight_decay=.1)"),
)


def test_optimizers_equal_torchs() -> None:
    # In one process: its start takes longer than all of them.
    fresh.passes(INSTALL + STEPS + "\n".join(f"same(lambda p: {ours}, lambda p: {torchs})" for ours, torchs in EQUAL))


def test_optimizer_warns_once_and_keeps_float32_states() -> None:
    fresh.passes(
        INSTALL + STEPS + "warnings.simplefilter('always')\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    _, o = losses(B.PagedLion8bit, torch.bfloat16); losses(B.AdamW8bit)\n"
        "assert len(seen) == 1 and 'kept in float32' in str(seen[0].message), seen\n"
        "assert 'bitsandbytes' in str(type(o))\n"
        "s = next(iter(o.state.values()))['state1']; assert s.dtype is torch.float32\n"
        "_, fresh = losses(B.PagedLion8bit, torch.bfloat16); fresh.load_state_dict(o.state_dict())\n"
        "assert torch.equal(next(iter(fresh.state.values()))['state1'], s)"
    )


def test_optimizer_override_of_one_module() -> None:
    fresh.passes(
        INSTALL + "import bitsandbytes as b, torch\nm = torch.nn.Linear(4, 4, bias=False)\n"
        "b.optim.GlobalOptimManager.get_instance().register_module_override(m, 'weight', {'lr': 0.0})\n"
        "before = m.weight.detach().clone(); m.weight.grad = torch.ones(4, 4)\n"
        "b.optim.AdamW(m.parameters(), lr=1.0).step(); assert torch.equal(m.weight, before)"
    )


def test_parametrize_reads_what_was_quantized() -> None:
    fresh.passes(
        INSTALL + "import bitsandbytes as b, torch\nfrom bitsandbytes.nn.parametrize import *\n"
        "m = torch.nn.Linear(64, 32, bias=False); w = m.weight.detach().clone()\n"
        "replace_parameter_4bit(m, 'weight', compress_statistics=True)\n"
        "want = b.functional.quantize_nf4(w, compress_statistics=True)\n"
        "want = b.functional.dequantize_4bit(*want)\n"
        "assert torch.equal(m.weight, want)\n"
        "s = m.state_dict(); assert 'weight.quant_state.bitsandbytes__nf4' in s and s['weight'].dtype is torch.uint8\n"
        "n = torch.nn.Linear(64, 32, bias=False); n.weight = torch.nn.Parameter(s['weight'], requires_grad=False)\n"
        "replace_parameter_4bit_prequantized(n, 'weight', {k[7:]: v for k, v in s.items() if k != 'weight'}, 'cpu')\n"
        "assert torch.equal(n.weight, want)"
    )


def test_ops_equal_the_functions() -> None:
    fresh.passes(
        INSTALL + "import bitsandbytes.functional as f, torch\no = torch.ops.bitsandbytes\n"
        "w = torch.randn(48, 64); q, s = f.quantize_4bit(w, quant_type='nf4')\n"
        "p, a = o.quantize_4bit(w, 64, 'nf4', torch.uint8)\n"
        "assert torch.equal(p, q) and torch.equal(a, s.absmax)\n"
        "d = f.dequantize_4bit(q, s); r = torch.empty_like(d)\n"
        "assert torch.equal(o.dequantize_4bit(p, a, 64, 'nf4', w.shape, torch.float32), d)\n"
        "o.dequantize_4bit.out(p, a, 64, 'nf4', w.shape, torch.float32, out=r); assert torch.equal(r, d)\n"
        "x = torch.randn(1, 64); y = o.gemv_4bit(x, p, w.shape, a, s.code, 64)\n"
        "torch.testing.assert_close(y, x @ d.t())\n"
        "b = torch.randn(48); q, s = f.quantize_4bit(w, quant_type='nf4', compress_statistics=True)\n"
        "y = o.gemm_4bit(x, q, w.shape, s.state2.absmax, 64, 'nf4', b, s.absmax, s.state2.code, s.offset)\n"
        "torch.testing.assert_close(y, x @ f.dequantize_4bit(q, s).t() + b)"
    )


def test_run_script(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("")
    script = tmp_path / "script.py"
    script.write_text("import sys, beside\n" + ASK + "print(sys.argv[1:]); sys.exit(7)")
    done = subprocess.run(
        [sys.executable, "-m", "halfbyte", "run", str(script), "--json", "-x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (7, "['--json', '-x']\n"), done.stderr


def test_run_module_and_wrong_usage() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "halfbyte", "run", "-m", "json.tool", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "json" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "halfbyte", "run", "--nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "expected script.py or -m MODULE, got '--nonsense'" in done.stderr
