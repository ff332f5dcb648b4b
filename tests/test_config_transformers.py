"""transformers with a `BitsAndBytesConfig` of halfbyte: quantizers, configurations of models, saving and loading."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from config_cases import NF4, Theirs, run_python  # noqa: E402
from halfbyte.config import BitsAndBytesConfig  # noqa: E402
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig  # noqa: E402


@pytest.mark.parametrize("kwargs", [NF4, {"load_in_4bit": True}, {"load_in_8bit": True}])
def test_auto_quantizer_accepts_ours(kwargs):
    ours, theirs = BitsAndBytesConfig(**kwargs), Theirs(**kwargs)
    made = AutoHfQuantizer.from_config(ours, pre_quantized=False)
    assert isinstance(made, type(AutoHfQuantizer.from_config(theirs, pre_quantized=False)))
    assert made.quantization_config is ours
    if kwargs:
        assert AutoHfQuantizer.supports_quant_method(ours.to_dict())
        assert AutoQuantizationConfig.from_dict(ours.to_dict()) == ours
        # Nothing is said where nothing that was given is ignored.
        merged = AutoHfQuantizer.merge_quantization_configs(theirs.to_dict(), ours)
        assert ours == merged
        assert type(merged) is BitsAndBytesConfig
        assert AutoHfQuantizer.merge_quantization_configs(ours, copy.deepcopy(ours)) is ours
        with pytest.warns(UserWarning, match="already has a `quantization_config`"):
            assert AutoHfQuantizer.merge_quantization_configs(ours, theirs) is ours


def test_auto_quantizer_refuses_a_config_that_quantizes_nothing():
    with pytest.raises(ValueError, match="load_in_4bit must be True"):
        AutoHfQuantizer.from_config(BitsAndBytesConfig(), pre_quantized=False)


def test_auto_quantizer_still_refuses_other_methods():
    gptq = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match=r"says quant_method 'gptq'"):
        AutoHfQuantizer.merge_quantization_configs(gptq, BitsAndBytesConfig(**NF4))


def test_model_config_holds_ours():
    config = transformers.LlamaConfig(num_hidden_layers=1)
    expected = copy.deepcopy(config)
    config.quantization_config, expected.quantization_config = BitsAndBytesConfig(**NF4), Theirs(**NF4)
    assert config.to_dict() == expected.to_dict()
    assert config.to_json_string() == expected.to_json_string()
    assert copy.deepcopy(config).quantization_config == config.quantization_config
    assert pickle.loads(pickle.dumps(config)).quantization_config == config.quantization_config


MODEL = """
import filecmp, json, sys
from pathlib import Path

order, folder = sys.argv[1], Path(sys.argv[2])
CASES = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16",
                bnb_4bit_use_double_quant=True),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16", llm_int8_skip_modules=["lm_head", "q_proj"]),
    "int8": dict(load_in_8bit=True, llm_int8_threshold=4.0),
}
if order == "halfbyte first":
    import halfbyte
    ours = {name: halfbyte.BitsAndBytesConfig(**case) for name, case in CASES.items()}
    assert not {"torch", "transformers"} & set(sys.modules)
    import torch, transformers
else:
    import torch, transformers
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    import halfbyte
    ours = {name: halfbyte.BitsAndBytesConfig(**case) for name, case in CASES.items()}

torch.manual_seed(0)
geometry = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                    num_key_value_heads=2, vocab_size=80)
transformers.LlamaForCausalLM(geometry).to(torch.bfloat16).save_pretrained(folder / "plain")
tokens = torch.arange(12)[None]

def load(path, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(path, device_map="cpu", **kwargs).eval()

for name, case in CASES.items():
    saved = {}
    for side, config in ("ours", ours[name]), ("theirs", transformers.BitsAndBytesConfig(**case)):
        saved[side] = folder / name / side
        model = load(folder / "plain", quantization_config=config)
        assert type(model.config.quantization_config) is type(config)
        model.save_pretrained(saved[side])
    # bitsandbytes' CPU code has other fp4 thresholds than its CUDA code, whose bytes halfbyte makes everywhere, and
    # rounds a few codes of int8 the other way.
    for file in {"fp4": (), "int8": ("config.json",)}.get(name, ("config.json", "model.safetensors")):
        assert filecmp.cmp(saved["ours"] / file, saved["theirs"] / file, shallow=False), (name, file)
    written = json.loads((saved["ours"] / "config.json").read_text())["quantization_config"]
    assert ours[name].to_dict() == transformers.BitsAndBytesConfig(**case).to_dict()
    # A compute dtype that was not given is written as the model's.
    given = {} if name == "int8" else {"bnb_4bit_compute_dtype": "bfloat16"}
    assert written == {**ours[name].to_dict(), **given}
    layer = model.model.layers[0].mlp.up_proj.weight
    assert type(layer).__module__.startswith("bitsandbytes"), type(layer)
    logits = load(saved["theirs"])(tokens).logits
    assert torch.isfinite(logits).all()
    again = load(saved["ours"])(tokens).logits
    torch.testing.assert_close(again, logits, rtol=0.1, atol=0.05)
    served = load(saved["ours"], quantization_config=ours[name])
    layer = served.model.layers[0].mlp.up_proj
    assert type(layer).__module__.startswith("halfbyte"), type(layer)
    torch.testing.assert_close(served(tokens).logits, logits, rtol=0.1, atol=0.05)
print("compared", *CASES)
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", ["halfbyte first", "transformers first"])
def test_config_model_quantized_saved_and_reloaded(order, tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    assert run_python(MODEL, order, str(tmp_path)).split() == ["compared", "nf4", "fp4", "int8"]
