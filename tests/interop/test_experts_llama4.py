"""Llama 4, whose experts transformers calls with all tokens once for each of them: packed while a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.8")
peft = pytest.importorskip("peft")

import halfbyte  # noqa: E402
from halfbyte.models.experts import fuse, fused_paths, unfuse  # noqa: E402
from halfbyte.nn import Experts4bit, Linear4bit, Linear8bitLt  # noqa: E402
from halfbyte.nn.experts import DispatchedExperts4bit  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning", "ignore::UserWarning", "ignore::RuntimeWarning"
)

FIELDS: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 32, "intermediate_size_mlp": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4,
    "interleave_moe_layer_step": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
X = torch.arange(18).reshape(2, 9) % 90
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def config(**more: Any) -> halfbyte.BitsAndBytesConfig:
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return halfbyte.BitsAndBytesConfig(**{**nf4, **more})


def dense_model(chosen: int = 1) -> Any:
    torch.manual_seed(0)
    made = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**FIELDS, num_experts_per_tok=chosen)).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter.data, std=0.05)
    return made


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(X).logits  # type: ignore[no-any-return]


def files(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def rounded(matrix: torch.Tensor) -> torch.Tensor:
    """Quantized and dequantized as `[out, in]`."""
    packed, state = halfbyte.functional.quantize_4bit(matrix.contiguous(), quant_type="nf4", compress_statistics=True)
    return halfbyte.functional.dequantize_4bit(packed, state)


def with_quantized_matrices(model: Any, paths: list[str]) -> Any:
    """The dense model with the matrices of these linear layers, and of all experts, quantized and dequantized."""
    with torch.no_grad():
        for path in paths:
            weight = model.get_submodule(path).weight
            weight.copy_(rounded(weight))
        for layer in model.model.layers:
            experts = layer.feed_forward.experts
            assert type(experts).__name__ == "Llama4TextExperts"
            for up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
                for part in (up[:, :32], up[:, 32:], down):
                    part.copy_(rounded(part.t()).t())
    return model


@pytest.mark.parametrize("chosen", [1, 3])
def test_llama4_experts_come_apart_and_together(chosen: int) -> None:
    model = dense_model(chosen)
    paths = fused_paths(model.named_modules())
    assert paths == [f"model.layers.{index}.feed_forward.experts" for index in range(2)]
    layer = model.get_submodule(paths[0]).float()
    apart = unfuse(layer)
    assert isinstance(apart, DispatchedExperts4bit)
    assert apart.projections == PROJECTIONS
    x = torch.randn(4, 7, 64) * (torch.rand(4, 7, 1) < 0.4)
    x[:, 2] = 0
    torch.testing.assert_close(apart(x.view(-1, 64)), layer(x.view(-1, 64)))
    assert apart(x[:, :0].reshape(-1, 64)).shape == (0, 64)
    again = fuse(apart)
    assert type(again) is type(layer)
    before, after = dict(layer.named_parameters()), dict(again.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("chosen", [1, 3])
def test_llama4_experts_are_packed_by_a_load_and_saved_apart(chosen: int, tmp_path: Path) -> None:
    dense = dense_model(chosen)
    cls = type(dense)
    dense.save_pretrained(tmp_path / "dense")
    source = files(tmp_path / "dense")
    assert source["model.layers.0.feed_forward.experts.gate_up_proj"].shape == (4, 64, 64)
    model = cls.from_pretrained(tmp_path / "dense", quantization_config=config())
    experts = [module for module in model.modules() if isinstance(module, Experts4bit)]
    assert [type(module) for module in experts] == [DispatchedExperts4bit] * 2
    assert all(isinstance(getattr(experts[1]._modules["3"], leaf), Linear4bit) for leaf in PROJECTIONS)
    assert type(model.model.layers[0].feed_forward.router).__name__ == "Llama4Router"
    linear = [path for path, m in model.named_modules() if isinstance(m, Linear4bit) and ".experts." not in path]
    assert len(linear) == 2 * (4 + 3)
    torch.testing.assert_close(logits(model), logits(with_quantized_matrices(dense, linear)), rtol=1e-4, atol=1e-5)
    # As one operation.
    assert all(module._held.table is not None for module in experts)

    # Names and bytes of the offline tool.
    model.save_pretrained(tmp_path / "packed")
    saved = files(tmp_path / "packed")
    assert {f"model.layers.1.feed_forward.experts.3.{leaf}.weight.absmax" for leaf in PROJECTIONS} <= saved.keys()
    halfbyte.quantize_checkpoint(tmp_path / "dense", tmp_path / "offline", config())
    for folder in ("packed", "offline"):
        again = cls.from_pretrained(tmp_path / folder, quantization_config=config())
        assert type(again.model.layers[0].feed_forward.experts) is DispatchedExperts4bit
        assert torch.equal(logits(again), logits(model))
        again.save_pretrained(tmp_path / "again")
        resaved = files(tmp_path / "again")
        assert resaved.keys() == saved.keys() == files(tmp_path / "offline").keys()
        assert all(torch.equal(resaved[key], value) for key, value in saved.items())
        with torch.device("meta"):
            empty = cls(dense.config)
        assert torch.equal(logits(halfbyte.load_quantized(empty, tmp_path / folder).eval()), logits(model))

    whole = again.dequantize()
    assert fused_paths(whole.named_modules()) == fused_paths(dense.named_modules())
    torch.testing.assert_close(logits(whole), logits(model), rtol=1e-4, atol=1e-5)
    whole.save_pretrained(tmp_path / "whole")
    assert {key: value.shape for key, value in files(tmp_path / "whole").items()} == {
        key: value.shape for key, value in source.items()
    }
    torch.testing.assert_close(logits(cls.from_pretrained(tmp_path / "whole")), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["memory", "checkpoint"])
def test_llama4_experts_are_packed_by_quantize_model(how: str, tmp_path: Path) -> None:
    dense = dense_model()
    dense.save_pretrained(tmp_path / "dense")
    model = type(dense).from_pretrained(tmp_path / "dense", quantization_config=config())
    if how == "memory":
        made = halfbyte.quantize_model(dense, config())
    else:
        with torch.device("meta"):
            empty = type(dense)(dense.config)
        made = halfbyte.quantize_model(empty, config(), checkpoint=tmp_path / "dense").eval()
    assert torch.equal(logits(made), logits(model))
    model.save_pretrained(tmp_path / "a")
    made.save_pretrained(tmp_path / "b")
    expected, found = files(tmp_path / "a"), files(tmp_path / "b")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_llama4_experts_of_the_multimodal_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
    }  # fmt: skip
    text = {**FIELDS, "num_experts_per_tok": 1}
    dense = transformers.Llama4ForConditionalGeneration(
        transformers.Llama4Config(text_config=text, vision_config=vision)
    ).eval()
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter.data, std=0.05)
    dense.save_pretrained(tmp_path / "dense")
    model = type(dense).from_pretrained(tmp_path / "dense", quantization_config=config())
    assert sum(type(module) is DispatchedExperts4bit for module in model.modules()) == 2
    model.save_pretrained(tmp_path / "packed")
    halfbyte.quantize_checkpoint(tmp_path / "dense", tmp_path / "offline", config())
    saved, offline = files(tmp_path / "packed"), files(tmp_path / "offline")
    assert saved.keys() == offline.keys()
    assert all(torch.equal(saved[key], value) for key, value in offline.items())
    again = type(dense).from_pretrained(tmp_path / "packed", quantization_config=config())
    # The whole model of transformers 5.24 takes no text without an image, whatever its weights are.
    assert torch.equal(logits(again.language_model), logits(model.language_model))


def test_llama4_experts_that_are_kept(tmp_path: Path) -> None:
    dense = dense_model()
    dense.save_pretrained(tmp_path / "dense")
    cls = type(dense)
    skip = config(llm_int8_skip_modules=["model.layers.0.feed_forward.experts"])
    model = cls.from_pretrained(tmp_path / "dense", quantization_config=skip)
    assert type(model.model.layers[0].feed_forward.experts).__name__ == "Llama4TextExperts"
    assert type(model.model.layers[1].feed_forward.experts) is DispatchedExperts4bit
    model.save_pretrained(tmp_path / "packed")
    again = cls.from_pretrained(tmp_path / "packed", quantization_config=config())
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    # The offline tool writes matrices of single experts where it keeps all of them too.
    halfbyte.quantize_checkpoint(tmp_path / "dense", tmp_path / "kept", config(), rules=[r"\.experts\.=keep"])
    assert not any(".experts." in key and key.endswith(".absmax") for key in files(tmp_path / "kept"))
    loaded = cls.from_pretrained(tmp_path / "kept", quantization_config=config())
    with torch.device("meta"):
        empty = cls(dense.config)
    assert torch.equal(logits(halfbyte.load_quantized(empty, tmp_path / "kept").eval()), logits(loaded))
    kept = halfbyte.quantize_model(dense, config(), rules=[r"\.experts\.=keep"])
    assert len(fused_paths(kept.named_modules())) == 2
    torch.testing.assert_close(logits(loaded), logits(kept), rtol=1e-4, atol=1e-5)


def test_llama4_experts_are_compiled_without_a_break(tmp_path: Path) -> None:
    dense = dense_model()
    dense.save_pretrained(tmp_path)
    model = type(dense).from_pretrained(tmp_path, quantization_config=config())
    layer = model.model.layers[0].feed_forward
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        expected = layer(x)[0]
        torch.compiler.reset()
        found = torch.compile(layer, fullgraph=True, backend="eager")(x)[0]
    torch.testing.assert_close(found, expected)


def test_llama4_experts_in_8_bits(tmp_path: Path) -> None:
    dense = dense_model()
    dense.save_pretrained(tmp_path)
    model = type(dense).from_pretrained(tmp_path, quantization_config=halfbyte.BitsAndBytesConfig(load_in_8bit=True))
    assert isinstance(model.model.layers[0].feed_forward.experts._modules["1"].up_proj, Linear8bitLt)
    difference = logits(model) - logits(dense)
    assert difference.norm() < 0.02 * logits(dense).norm()


def test_llama4_experts_are_trained_with_adapters(tmp_path: Path) -> None:
    dense = dense_model()
    dense.save_pretrained(tmp_path / "dense")

    def packed() -> Any:
        return type(dense).from_pretrained(tmp_path / "dense", quantization_config=config())

    lora = peft.LoraConfig(
        r=4,
        task_type="CAUSAL_LM",
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    model = peft.get_peft_model(packed(), lora).train()
    adapted = [path for path, _ in model.named_modules() if path.endswith("lora_A.default")]
    assert sum(".experts.2." in path for path in adapted) == 6
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter.data, std=0.05)
    base = packed()
    # The dense model with the adapters merged.
    whole = packed().dequantize()
    with torch.no_grad():
        for index, layer in enumerate(whole.model.layers):
            for expert in range(4):
                path = f"base_model.model.model.layers.{index}.feed_forward.experts.{expert}"
                for leaf, part in (
                    ("gate_proj", layer.feed_forward.experts.gate_up_proj[expert][:, :32]),
                    ("up_proj", layer.feed_forward.experts.gate_up_proj[expert][:, 32:]),
                    ("down_proj", layer.feed_forward.experts.down_proj[expert]),
                ):
                    adapter = model.get_submodule(f"{path}.{leaf}")
                    a, b = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
                    part.add_((adapter.scaling["default"] * b @ a).t())
            adapter = model.get_submodule(f"base_model.model.model.layers.{index}.self_attn.q_proj")
            a, b = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
            layer.self_attn.q_proj.weight.add_(adapter.scaling["default"] * b @ a)
    torch.testing.assert_close(logits(model), logits(whole), rtol=1e-4, atol=1e-5)
    assert (logits(model) - logits(base)).norm() > 1e-3 * logits(base).norm()
    model(X, labels=X).loss.backward()
    gradients = [parameter.grad for key, parameter in model.named_parameters() if ".experts." in key and "lora" in key]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert sum(bool(gradient.any()) for gradient in gradients) > len(gradients) // 2
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(packed(), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model.eval()))
