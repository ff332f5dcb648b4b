"""The code in the documentation runs, and does what the text around it says."""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "blockwise4.safetensors"
# numpy has no bfloat16: its bytes are read as uint16.
NUMPY_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U8": np.uint8}


def read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and tensors of a safetensors file, by its published layout alone."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(data[begin:end], NUMPY_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return metadata, tensors


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of finite float32 values rounded to bfloat16, to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


METADATA, TENSORS = read_safetensors(GOLDEN)
CASES = json.loads(METADATA["cases"])


@pytest.fixture(scope="module")
def reader() -> Callable[[dict[str, np.ndarray], str], np.ndarray]:
    """`read_weight` of docs/format.md."""
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, "docs/format.md has exactly one block of Python"
    body = blocks[0].split("def read_weight", 1)[1]
    assert len(body.splitlines()) <= 25
    namespace: dict[str, Any] = {}
    exec(compile(blocks[0], "docs/format.md", "exec"), namespace)
    function: Callable[[dict[str, np.ndarray], str], np.ndarray] = namespace["read_weight"]
    return function


@pytest.mark.parametrize("case", range(len(CASES)))
def test_reader_of_format_page_reads_golden_vectors(
    reader: Callable[[dict[str, np.ndarray], str], np.ndarray], case: int
) -> None:
    prefix = f"c{case:03d}."
    tensors = {key.removeprefix(prefix): value for key, value in TENSORS.items() if key.startswith(prefix)}
    expected = tensors.pop("dequantized")
    tensors.pop("input")
    found = reader(tensors, "weight")
    assert found.dtype == np.float32
    rounded = to_bfloat16(found) if expected.dtype == np.uint16 else found.astype(expected.dtype)
    assert rounded.shape == expected.shape == tuple(CASES[case]["shape"])
    # Bits, not values: zeros have signs.
    assert rounded.tobytes() == expected.tobytes()


def test_reader_of_format_page_reads_every_storage_dtype(
    reader: Callable[[dict[str, np.ndarray], str], np.ndarray],
) -> None:
    tensors = {key.removeprefix("c000."): value for key, value in TENSORS.items() if key.startswith("c000.")}
    expected = tensors["dequantized"]
    for storage in (np.int8, np.float16, np.float32, np.float64):
        relabelled = {**tensors, "weight": tensors["weight"].reshape(-1).view(storage).reshape(-1, 1)}
        assert reader(relabelled, "weight").tobytes() == expected.tobytes()


def test_writing_rules_of_format_page_give_golden_codes() -> None:
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    listed = re.search(r"fifteen numbers `scaled` exceeds:\s+`([^`]+)`", text)
    assert listed
    thresholds = np.array([float(number) for number in listed[1].split(",")], np.float32)
    assert thresholds.shape == (15,)
    checked = 0
    for index, case in enumerate(CASES):
        if case["quant_type"] != "nf4" or case["dtype"] == "bf16":
            continue
        x = TENSORS[f"c{index:03d}.input"].astype(np.float32).reshape(-1)
        block = np.arange(x.size) // case["blocksize"]
        absmax = np.zeros(block[-1] + 1, np.float32)
        np.maximum.at(absmax, block, np.abs(x))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            scaled = x * (np.float32(1) / absmax)[block]
        codes = (scaled[:, None] > thresholds).sum(axis=1).astype(np.uint8)
        codes = np.append(codes, [7] * (codes.size % 2)).astype(np.uint8)
        packed = codes[0::2] << 4 | codes[1::2]
        assert packed.tobytes() == TENSORS[f"c{index:03d}.weight"].tobytes(), case
        checked += 1
    assert checked >= 10


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a Markdown text."""
    headings = re.findall(r"^#+ +(.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benches/*.md")]),
)
def test_links_inside_the_repository_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    outside_code = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", outside_code):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / file if file else ROOT / page
        assert linked.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(linked.read_text(encoding="utf-8")), f"{page}: {target}"


# ---- docstrings ------------------------------------------------------------------------------------------------------

PACKAGE = ROOT / "python" / "halfbyte"


@pytest.mark.parametrize(
    "path", [p for p in sorted(PACKAGE.rglob("*.py")) if ">>> " in p.read_text(encoding="utf-8")], ids=lambda p: p.stem
)
def test_examples_of_docstrings(path: Path) -> None:
    pytest.importorskip("torch")
    name = ".".join(("halfbyte", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    failed, tried = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert tried > 0
    assert failed == 0


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_transformers_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    text = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(compile(block, "docs/transformers.md", "exec"), namespace)
    layers = [type(module).__name__ for module in namespace["again"].modules()]
    assert layers.count("Linear4bit") == 14
    assert namespace["again"].config.quantization_config.bnb_4bit_compute_dtype is namespace["torch"].bfloat16


# ---- pages whose Python is run ---------------------------------------------------------------------------------------


def python_blocks(page: str) -> list[str]:
    """The blocks of Python of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


# What a page's code must have made, as an expression that its last block is followed by.
PAGES = {
    "docs/arrays.md": (
        "up.shape == (128, 64) and up.dtype == np.float32 and stored.quant_type == 'nf4'"
        " and 'torch' not in __import__('sys').modules"
    ),
    "README.md": "sum(isinstance(m, halfbyte.nn.Linear4bit) for m in model.modules()) == 14 and y.shape == (2, 14336)",
    "docs/from-bitsandbytes.md": "model.is_loaded_in_4bit",
    "docs/qlora.md": (
        "not getattr(merged, 'is_quantized', False) and len(trainer.state.log_history) > 4 and report.fused == 14"
    ),
    "docs/serving.md": "model.model.layers[1].mlp.up_proj.weight.is_meta and tokens.shape[1] > 2",
}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_pages_run_from_top_to_bottom(page: str, tmp_path: Path) -> None:
    for package in ("transformers", "peft", "trl"):
        pytest.importorskip(package)
    from tiny_models import save_llama_with_words

    # A tiny model, in a folder of the name that the pages use.
    save_llama_with_words(tmp_path / "Llama-3.2-1B", dtype="bfloat16")
    code = "\n".join(python_blocks(page)) + f"\nassert {PAGES[page]}\nprint('all of it ran')\n"
    (tmp_path / "page.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "all of it ran"


def strings_of(folder: Path) -> Iterator[str]:
    """Every string in the Python files below a folder, with `…` for what an f-string or `%` puts in."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[sdr]", "…", node.value)
            elif isinstance(node, ast.JoinedStr):
                yield "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)


def test_messages_of_troubleshooting_page_are_real() -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.*)`$", text, flags=re.MULTILINE)
    assert len(messages) == text.count("\n### ") > 30
    theirs = [Path(transformers.__file__).parent / "quantizers", Path(peft.__file__).parent / "tuners" / "lora"]
    sources = [text for folder in (PACKAGE, *theirs) for text in strings_of(folder)]
    trainer = (Path(transformers.__file__).parent / "trainer_utils.py").read_text(encoding="utf-8")
    for message in messages:
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))), flags=re.DOTALL)
        found = any(pattern.search(source.replace("`", "")) for source in [*sources, trainer])
        assert found, message
