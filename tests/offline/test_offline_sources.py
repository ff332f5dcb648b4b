"""Sources that nobody has seen before: models with code of their own, parts in subfolders, weights that are no longer
dense. What the command makes of them is loaded with transformers and bitsandbytes, or refused by name.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

import halfbyte  # noqa: E402
from halfbyte.cli.main import main  # noqa: E402
from halfbyte.offline.transformers_selection import RemoteCodeError, transformers_selection  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

IDS = torch.tensor([[1, 2, 3, 4]])

CODE = """
import torch.nn as nn
from transformers import PreTrainedModel, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput
from transformers.pytorch_utils import Conv1D
class Cfg(PretrainedConfig):
    model_type = "{name}"
class Table(nn.Embedding):
    pass
class Block(nn.Module):
    def __init__(s):
        super().__init__()
        {block}
    def forward(s, x):
        return x + {apply}
class LM(PreTrainedModel):
    config_class = Cfg
    def __init__(s, c):
        super().__init__(c)
        s.tokens = Table(96, 64)
        s.layers = nn.ModuleList([Block(), Block()])
        {head}
        s.post_init()
    def _init_weights(s, m):
        pass
    {extra}
    def forward(s, input_ids, **k):
        x = s.tokens(input_ids)
        for layer in s.layers:
            x = layer(x)
        return CausalLMOutput(logits=s.{out}(x))
"""
LINEAR = {"block": "s.fc = nn.Linear(64, 64, bias=False)", "apply": "s.fc(x).tanh()"}
CONV1D = {
    "block": "s.c_fc = Conv1D(256, 64); s.c_proj = Conv1D(64, 256); s.c_attn = Conv1D(64, 64)",
    "apply": "s.c_attn(s.c_proj(s.c_fc(x).tanh()))",
}
OUTPUT = "def get_output_embeddings(s): return s.output"
TRUST: dict[str, Any] = {"trust_remote_code": True}


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()
    transformers.logging.set_verbosity_warning()


def save(folder: Path, tensors: dict[str, Any], config: dict[str, Any] | None, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / name, metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def remote(folder: Path, name: str, **parts: str) -> Path:
    """A checkpoint of a model whose code lies beside it."""
    folder.mkdir()
    (folder / f"modeling_{name}.py").write_text(CODE.format(name=name, **{"extra": "", **parts}))
    table = {"AutoConfig": f"modeling_{name}.Cfg", "AutoModelForCausalLM": f"modeling_{name}.LM"}
    config = {"architectures": ["LM"], "model_type": name, "auto_map": table, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM
    model = auto.from_config(transformers.AutoConfig.from_pretrained(folder, **TRUST), **TRUST)
    return save(folder, model.state_dict(), None)


def logits(folder: Path, **options: Any) -> Any:
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **TRUST, **options)(IDS).logits


def packed(folder: Path) -> set[str]:
    return {k.removesuffix(".absmax") for k in load_file(folder / "model.safetensors") if k.endswith(".absmax")}


STOCK = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize(
    ("name", "block", "head", "out", "extra"),
    [
        ("fama", LINEAR, "s.output = nn.Linear(64, 96, bias=False)", "output", OUTPUT),
        ("famb", LINEAR, "s.last = nn.Linear(64, 80, bias=False)", "last", ""),
        ("famc", LINEAR, "s.places = Table(64, 64); s.words = nn.Linear(64, 96)", "words", ""),
        ("famd", CONV1D, "s.lm_head = nn.Linear(64, 96, bias=False)", "lm_head", ""),
    ],
)  # fmt: skip
def test_models_with_code_of_their_own_load_as_quantized(
    name: str, block: dict[str, str], head: str, out: str, extra: str, tmp_path: Path
) -> None:
    """By headers alone, and by the model's own code: the stock loader runs both, with the values it makes itself."""
    source = remote(tmp_path / "source", name, head=head, out=out, extra=extra, **block)
    layers = {f"layers.{i}.{leaf}.weight" for i in (0, 1) for leaf in ("fc", "c_fc", "c_proj", "c_attn")}
    expected = layers & set(load_file(source / "model.safetensors"))
    stock = logits(source, quantization_config=transformers.BitsAndBytesConfig(**STOCK))
    exact = logits(source)
    for number, options in enumerate(([], ["--selection", "transformers", "--trust-remote-code"])):
        made = tmp_path / f"out{number}"
        assert main(["quantize", str(source), str(made), "-q", *options]) == 0
        assert main(["verify", str(source), str(made), "-q"]) == 0
        assert expected <= packed(made)
        ours = logits(made)
        off, usual = ((x - exact).norm() / exact.norm() for x in (ours, stock))
        assert off <= 1.3 * usual + 1e-3, (options, off, usual)
    back = tmp_path / "back"
    assert main(["dequantize", str(tmp_path / "out0"), str(back), "-q"]) == 0
    shapes = [{k: v.shape for k, v in load_file(p / "model.safetensors").items()} for p in (source, back)]
    assert shapes[0] == shapes[1]


def test_code_is_run_when_it_is_trusted_and_nothing_is_asked(tmp_path: Path) -> None:
    source = remote(
        tmp_path / "source", "famq", head="s.output = nn.Linear(64, 96, bias=False)", out="output", **LINEAR
    )
    command = [sys.executable, "-m", "halfbyte", "quantize", source, tmp_path / "out", "--selection", "transformers"]
    done = subprocess.run(command, capture_output=True, text=True, input="y\n", timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--trust-remote-code" in done.stderr.splitlines()[-1]
    with pytest.raises(RemoteCodeError, match="auto_map"):
        transformers_selection(source)
    assert transformers_selection(source, **TRUST) == ["layers.0.fc.weight", "layers.1.fc.weight"]
    with pytest.raises(ValueError, match="selection='transformers'"):
        halfbyte.plan_checkpoint(source, **TRUST)
    (source / "modeling_famq.py").write_text(CODE.format(name="famq", head="1 / 0", out="x", extra="", **LINEAR))
    with pytest.raises(halfbyte.CheckpointError, match="own code failed: ZeroDivisionError"):
        halfbyte.plan_checkpoint(source, selection="transformers", **TRUST)


def llama(**more: Any) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=96, tie_word_embeddings=False, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def test_a_skip_list_holds_for_the_base_class_too(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "source")
    rule = r"layers\.0\.=keep"
    report = halfbyte.quantize_checkpoint(tmp_path / "source", tmp_path / "out", rules=[rule])
    assert {"model.layers.0", "layers.0"} <= set(report.quantization_config["llm_int8_skip_modules"])
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        model = auto.from_pretrained(tmp_path / "out")
        assert torch.isfinite(model(IDS)[0]).all()
        layers = model.get_decoder().layers
        kinds = [type(layer.mlp.up_proj).__name__ for layer in layers]
        assert kinds == ["Linear", "Linear4bit"], auto


def test_a_skip_list_of_a_vision_tower_holds_for_the_base_class_too(tmp_path: Path) -> None:
    import tiny_models

    source = tiny_models.save("Gemma3ForConditionalGeneration", tmp_path / "source")
    report = halfbyte.quantize_checkpoint(source, tmp_path / "out", skip=["vision_tower"])
    assert {"model.vision_tower", "vision_tower"} & set(report.quantization_config["llm_int8_skip_modules"])
    for cls in (transformers.Gemma3ForConditionalGeneration, transformers.Gemma3Model):
        model = cls.from_pretrained(tmp_path / "out")
        packed = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
        assert packed, cls
        assert not any("vision_tower" in name for name in packed), cls


def test_parts_in_subfolders_are_copied_and_exports_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    llama().save_pretrained(source)
    save(source / "2_Dense", {"linear.weight": torch.randn(32, 64)}, {"in_features": 64, "out_features": 32})
    save(source / "fp16", load_file(source / "model.safetensors"), None)
    (source / "onnx").mkdir()
    (source / "onnx/model.onnx").write_bytes(b"x")
    assert main(["quantize", str(source), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "copied as they are: 2_Dense/model.safetensors" in said
    assert "left out: onnx/model.onnx: another form" in said
    assert "left out: fp16/model.safetensors: another form" in said
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*") if p.is_file()}
    assert {"2_Dense/config.json", "2_Dense/model.safetensors"} <= names
    assert not any(name.startswith(("onnx", "fp16")) for name in names)
    report = halfbyte.quantize_checkpoint(source, tmp_path / "again")
    assert len(report.left_out) == 2
    assert "2_Dense/model.safetensors" in report.copied


def int8(tensors: dict[str, Any], key: str) -> str:
    tensors[key] = (tensors[key] * 100).to(torch.int8)
    tensors[key.removesuffix("weight") + "SCB"] = torch.ones(tensors[key].shape[0])
    return key.removesuffix("weight") + "SCB"


def fp8_blocks(tensors: dict[str, Any], key: str) -> str:
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    tensors[key + "_scale_inv"] = torch.ones(1, 1)
    return key + "_scale_inv"


def fp8_plain(tensors: dict[str, Any], key: str) -> str:
    tensors[key] = tensors[key].to(torch.float8_e5m2)
    return key


def gptq(tensors: dict[str, Any], key: str) -> str:
    stem = key.removesuffix("weight")
    del tensors[key]
    tensors |= {stem + "qweight": torch.zeros(8, 64, dtype=torch.int32), stem + "scales": torch.ones(1, 64)}
    return stem + "qweight"


@pytest.mark.parametrize("change", [int8, fp8_blocks, fp8_plain, gptq])
def test_weights_that_are_quantized_already_are_refused_by_name(
    change: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llama()
    tensors = dict(model.state_dict())
    name = change(tensors, "model.layers.1.mlp.up_proj.weight")
    source = save(tmp_path / "source", tensors, json.loads(model.config.to_json_string()))
    assert main(["quantize", str(source), str(tmp_path / "out"), "-q"]) == 3
    assert name in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_eight_bits_are_undone_where_their_parts_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    quantization = {"load_in_8bit": True, "quant_method": "bitsandbytes"}
    config = {**json.loads(model.config.to_json_string()), "quantization_config": quantization}
    tensors = dict(model.state_dict())
    scales = int8(tensors, "model.layers.1.mlp.up_proj.weight")
    source = save(tmp_path / "source", tensors, config)
    out = tmp_path / "out"
    assert main(["quantize", str(source), str(out), "-q"]) == 3
    assert "undo it with: halfbyte dequantize" in capsys.readouterr().err
    assert main(["dequantize", str(source), str(out), "-q"]) == 0
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    del tensors[scales]
    source = save(tmp_path / "broken", tensors, config)
    assert main(["dequantize", str(source), str(tmp_path / "none"), "-q"]) == 3
    assert scales in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_value_that_float16_cannot_hold_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    tensors = dict(model.state_dict())
    tensors["model.norm.weight"] = torch.full((64,), 1e5).bfloat16()
    config = {**json.loads(model.config.to_json_string()), "dtype": "half"}
    source = save(tmp_path / "source", tensors, config)
    # By the option, and by the dtype that config.json asks for under torch's other name.
    for options in (["--dtype", "float16"], []):
        assert main(["quantize", str(source), str(tmp_path / "out"), "-q", *options]) == 3
        said = capsys.readouterr().err
        assert "model.norm.weight" in said
        assert "too large for float16" in said
        assert not (tmp_path / "out").exists()
    assert main(["quantize", str(source), str(tmp_path / "out"), "-q", "--dtype", "bfloat16"]) == 0


def test_adapters_are_called_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save(tmp_path / "a", {name: torch.randn(8, 64)}, None, "adapter_model.safetensors")
    (tmp_path / "a/adapter_config.json").write_text('{"peft_type": "LORA"}')
    for source in (tmp_path / "a", tmp_path / "a/adapter_model.safetensors"):
        assert main(["quantize", str(source), str(tmp_path / "out"), "-q"]) == 3
        assert "holds an adapter" in capsys.readouterr().err


def test_an_index_may_lead_into_a_subfolder(tmp_path: Path) -> None:
    model = llama()
    tensors = model.state_dict()
    source = save(tmp_path / "source", {}, json.loads(model.config.to_json_string()), "empty.safetensors")
    save(source / "w", tensors, None)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "w/model.safetensors")}))
    assert main(["quantize", str(source), str(tmp_path / "out"), "-q"]) == 0
    assert not (tmp_path / "out/w").exists()
    filled = halfbyte.quantize_model(llama(), checkpoint=source, progress=False)
    assert torch.isfinite(filled(IDS).logits).all()
    for bad in ("../source/w/model.safetensors", "/w/model.safetensors", "w//model.safetensors", "w/../w.safetensors"):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, bad)}))
        with pytest.raises(halfbyte.CheckpointError, match="inside the folder"):
            halfbyte.quantize_model(llama(), checkpoint=source, progress=False)
