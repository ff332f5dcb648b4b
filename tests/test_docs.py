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


# ---- pages whose code is run -----------------------------------------------------------------------------------------

# A page's blocks of `python` and `bash` run from top to bottom, in a folder with a tiny model under the name that the
# pages use. Blocks of `console` show installations and other commands that a test cannot run. The values are
# expressions that must be true at the end, with the names that the page's Python has defined.
PAGES = {
    "docs/arrays.md": (
        "up.shape == (128, 64) and up.dtype == np.float32 and stored.quant_type == 'nf4'"
        " and 'torch' not in __import__('sys').modules"
    ),
    "README.md": "sum(isinstance(m, halfbyte.nn.Linear4bit) for m in model.modules()) == 14 and y.shape == (2, 14336)",
    "docs/api.md": "report.bits_per_weight > 4",
    "docs/command.md": "json.loads(Path('report.json').read_text())['totals']['quantized_tensors'] == 14",
    "docs/double-quantization.md": "error[True] > error[False] > 0",
    "docs/environment.md": "Path('Llama-3.2-1B-scalar').is_dir()",
    "docs/from-bitsandbytes.md": "model.is_loaded_in_4bit",
    "docs/getting-started.md": "y.shape == (3, 128) and tokens.shape[1] > 2",
    "docs/kernels.md": "dense.shape == (512, 256)",
    "docs/mixture-of-experts.md": (
        "sum(type(m).__name__ == 'Linear4bit' for m in again.modules()) == 2 * (4 + 8 * 3)"
        " and sum('.experts.' in name for name, _ in on_dense.named_parameters() if 'lora_A' in name) == 4"
        " and torch.equal(offline(tokens).logits, again(tokens).logits) and dense_again.dtype is torch.bfloat16"
    ),
    "docs/llm-int8.md": (
        "losses[-1] < losses[0] and merged.is_loaded_in_8bit and Path('Llama-3.2-1B-int8').is_dir() "
        "and not any(isinstance(m, halfbyte.nn.Linear8bitLt) for m in mixed.model.layers[1].modules())"
    ),
    "docs/merging.md": "not getattr(merged, 'is_quantized', False)",
    "docs/offline.md": "report.converted_tensors == 7 and Path('mixed').is_dir()",
    "docs/qlora.md": (
        "not getattr(merged, 'is_quantized', False) and len(trainer.state.log_history) > 4 and report.fused == 14"
    ),
    "docs/serving.md": "model.model.layers[1].mlp.up_proj.weight.is_meta and tokens.shape[1] > 2",
    "docs/transformers.md": (
        "sum(type(m).__name__ == 'Linear4bit' for m in again.modules()) == 14"
        " and again.config.quantization_config.bnb_4bit_compute_dtype is torch.bfloat16"
    ),
}
# These have none: an index, tables, headings of messages, and the reader that is run above.
WITHOUT_CODE = {"docs/README.md", "docs/supported.md", "docs/troubleshooting.md", "docs/format.md"}


def program(page: str) -> str:
    """The blocks of a page as one Python program."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = ["import json, subprocess", "from pathlib import Path"]
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        if language == "python":
            lines.append(block)
        elif language == "bash":
            lines.append(f"subprocess.run(['bash', '-euo', 'pipefail', '-c', {block!r}], check=True)")
        else:
            assert language in ("console", "json"), f"{page}: a block of {language or 'no language'}"
    return "\n".join([*lines, f"assert {PAGES[page]}", "print('all of it ran')", ""])


def test_pages_are_all_run() -> None:
    pages = {str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
    assert pages == PAGES.keys() | WITHOUT_CODE
    assert all("```" in (ROOT / page).read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(PAGES))
def test_pages_run_from_top_to_bottom(page: str, tmp_path: Path) -> None:
    for package in ("transformers", "peft", "trl"):
        pytest.importorskip(package)
    from tiny_models import save_llama_with_words

    save_llama_with_words(tmp_path / "Llama-3.2-1B", dtype="bfloat16")
    (tmp_path / "page.py").write_text(program(page), encoding="utf-8")
    command = tmp_path / "bin" / "halfbyte"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m halfbyte "$@"\n')
    command.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "PATH": os.pathsep.join([str(command.parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "all of it ran"


def test_environment_page_lists_every_variable() -> None:
    """Each name of a variable in the sources is on the page, and each on the page is in the sources."""
    name = re.compile(r"HALFBYTE_[A-Z_]*[A-Z]")
    sources = [
        path
        for folder in ("python", "rust", "kernels", "tests", "benches", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".rs", ".cu", ".cuh", ".h") and path != Path(__file__)
    ]
    used = {found for path in sources for found in name.findall(path.read_text(encoding="utf-8"))}
    text = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    assert set(name.findall(text)) == used


def test_command_page_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    from halfbyte.cli.main import main

    text = (ROOT / "docs" / "command.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert len(options) > 15
    assert options <= set(re.findall(r"--[a-z][a-z-]+", text))


def test_api_page_lists_every_public_name() -> None:
    pytest.importorskip("torch")
    import halfbyte

    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    names = {*halfbyte.__all__, *halfbyte.nn.__all__, *halfbyte.functional.__all__}
    indirect = {"__version__", "nn", "functional", "fix_4bit_weight_quant_state_from_module"}
    # `_nf4` and `_fp4` stand for the functions of one codebook.
    assert {n for n in names - indirect if not n.endswith(("_nf4", "_fp4")) and n not in text} == set()


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
