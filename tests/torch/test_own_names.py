"""Models with tensors of their own that are called as parts of packed weights are: they are not taken for these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import halfbyte  # noqa: E402  (needs torch)
import tiny_models  # noqa: E402
from halfbyte.models.recipe import PACKED_LAYERS  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet_transformers")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
CONFIGS = {"nf4": NF4, "nested": {**NF4, "bnb_4bit_use_double_quant": True}, "int8": {"load_in_8bit": True}}


def own(module: nn.Module, *names: str) -> None:
    """Give a module buffers of these names."""
    for index, name in enumerate(names):
        module.register_buffer(name, torch.full((3,), float(index + 1)))


class Observed(nn.Module):
    """A layer with buffers of its own, one without, and a module that has buffers alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.up, self.observer = nn.Linear(64, 64), nn.Linear(64, 64), nn.Module()
        own(self.fc, "absmax", "quant_map", "nested_absmax")
        own(self.observer, "absmax", "quant_map", "SCB")
        self.norm = nn.LayerNorm(64)
        own(self.norm, "SCB", "absmax")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.up(self.fc(x)))


def empty(make: Any, *arguments: Any) -> Any:
    with torch.device("meta"):
        return make(*arguments)


def packed(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PACKED_LAYERS)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_own_names_in_a_plain_model(kind: str, tmp_path: Path) -> None:
    model, x = Observed(), torch.randn(2, 64)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(halfbyte.CheckpointError, match="holds no 4-bit weight and none of 8 bits"):
        halfbyte.load_quantized(empty(Observed), tmp_path)
    want = halfbyte.quantize_model(model, CONFIGS[kind])
    made = halfbyte.quantize_model(empty(Observed), CONFIGS[kind], checkpoint=tmp_path)
    assert packed(made) == packed(want) == ["fc", "up"]
    assert torch.equal(made(x), want(x))
    save_file(made.state_dict(), tmp_path / "model.safetensors")
    loaded = halfbyte.load_quantized(empty(Observed), tmp_path)
    assert packed(loaded) == ["fc", "up"]
    for other in (made, loaded):
        assert torch.equal(other(x), want(x))
        for name, buffer in Observed().named_buffers():
            assert torch.equal(other.get_buffer(name), buffer), name


@pytest.mark.parametrize("name", ["SCB", "weight_format"])
def test_own_names_that_an_8_bit_layer_saves_its_scales_under_are_refused(name: str, tmp_path: Path) -> None:
    model = Observed()
    own(model.fc, name)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for arguments in ({}, {"checkpoint": tmp_path}):
        with pytest.raises(ValueError, match=rf"^fc: has a tensor of its own called {name}, .*skip=\['fc'\]"):
            halfbyte.quantize_model(model, CONFIGS["int8"], **arguments)
        assert packed(model) == []
    assert packed(halfbyte.quantize_model(model, CONFIGS["int8"], skip=["fc"])) == ["up"]
    model = Observed()
    own(model.fc, name)
    assert packed(halfbyte.quantize_model(model, NF4)) == ["fc", "up"]


class Llama(transformers.LlamaForCausalLM):
    """A model of transformers with buffers of its own."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        own(self.model.norm, "SCB", "absmax")
        own(self.lm_head, "SCB", "absmax", "quant_map")
        own(self.model.layers[0].mlp, "SCB")


@pytest.mark.parametrize("kind", CONFIGS)
def test_own_names_in_a_model_of_transformers(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Llama(tiny_models.tiny_config("LlamaForCausalLM")).eval()
    buffers = {name: b for name, b in model.named_buffers() if not name.endswith("inv_freq")}
    assert len(buffers) == 6
    dense, out, ids = tmp_path / "dense", tmp_path / "out", torch.arange(8)[None]
    model.save_pretrained(dense)
    config = halfbyte.BitsAndBytesConfig(**CONFIGS[kind])
    made = Llama.from_pretrained(dense, quantization_config=config, device_map="cpu").eval()
    made.save_pretrained(out)
    again = Llama.from_pretrained(out, quantization_config=config, device_map="cpu").eval()
    halfbyte.quantize_checkpoint(dense, tmp_path / "offline", config=CONFIGS[kind], progress=None)
    others = [
        halfbyte.load_quantized(empty(Llama, model.config), folder).eval() for folder in (out, tmp_path / "offline")
    ]
    with torch.inference_mode():
        want = halfbyte.quantize_model(model, CONFIGS[kind])(ids).logits
        for other in (made, again, *others):
            assert len(packed(other)) == 14
            for name, buffer in buffers.items():
                assert torch.equal(other.get_buffer(name), buffer), name
            assert torch.equal(other(ids).logits, want)
    assert {name for name in load_file(out / "model.safetensors") if name in buffers} == set(buffers)
