"""Mixture-of-Experts models of transformers: experts are packed, saved apart, loaded in every layout, and adapted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from thorough import thorough

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.8")
peft = pytest.importorskip("peft")

import halfbyte  # noqa: E402
import tiny_models  # noqa: E402
from halfbyte.models.experts import fuse, fused_paths, unfuse  # noqa: E402
from halfbyte.nn import Experts4bit, Linear4bit, Linear8bitLt  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

# PEFT's own, about merging, ranks of what it does not find, and its use of what transformers deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning", "ignore::UserWarning", "ignore::RuntimeWarning"
)

COMMON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# The class, what is particular, and the first expert's projections as the checkpoint calls them.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], tuple[str | None, str, str]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, ("w1", "w3", "w2")),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
        ("gate_proj", "up_proj", "down_proj"),
    ),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, ("gate_proj", "up_proj", "down_proj")),
    # Fused in files too, gates and up projections alternating, with biases.
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
        ("gate_proj", "up_proj", "down_proj"),
    ),
    "granitemoe": (
        "GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2}, ("gate_proj", "up_proj", "down_proj"),
    ),
}  # fmt: skip
X = torch.arange(18).reshape(2, 9) % 90
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def dense_model(name: str) -> Any:
    stem, more, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(**COMMON, **more)
    model = getattr(transformers, f"{stem}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.05)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(X).logits  # type: ignore[no-any-return]


def files(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def config(**more: Any) -> halfbyte.BitsAndBytesConfig:
    return halfbyte.BitsAndBytesConfig(**{**NF4, **more})


def with_quantized_matrices(model: Any) -> Any:
    """The dense model whose linear layers, and matrices of experts, are quantized and dequantized one by one."""

    def rounded(matrix: torch.Tensor) -> torch.Tensor:
        packed, state = halfbyte.functional.quantize_4bit(
            matrix.contiguous(), quant_type="nf4", compress_statistics=True
        )
        return halfbyte.functional.dequantize_4bit(packed, state)

    with torch.no_grad():
        for path, module in model.named_modules():
            if type(module) is torch.nn.Linear and path != "lm_head":
                module.weight.copy_(rounded(module.weight))
        for path in fused_paths(model.named_modules()):
            module = model.get_submodule(path)
            for name in ("gate_up_proj", "down_proj"):
                for matrix in module._parameters[name]:
                    out = matrix.t() if module.is_transposed else matrix
                    if name == "down_proj":
                        parts = [out]
                    else:
                        parts = list(out.chunk(2)) if module.is_concatenated else [out[0::2], out[1::2]]
                    for part in parts:
                        part.copy_(rounded(part))
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_experts_come_apart_and_together(name: str) -> None:
    model = dense_model(name)
    paths = fused_paths(model.named_modules())
    assert len(paths) == 2
    for path in paths:
        module = model.get_submodule(path)
        x, ids = torch.randn(7, 64), torch.randint(0, 4, (7, 2))
        weights = torch.rand(7, 2)
        apart = unfuse(module)
        expected = module(x, ids, weights)
        torch.testing.assert_close(apart(x, ids, weights), expected)
        # Numbers of experts that are not here count nothing.
        some = ids.clone()
        some[3:, 1] = 4
        none = weights.clone()
        none[3:, 1] = 0
        torch.testing.assert_close(apart(x, some, weights), module(x, ids, none))
        assert apart(x[:0], ids[:0], weights[:0]).shape == (0, 64)
        again = fuse(apart)
        assert type(again) is type(module)
        before, after = dict(module.named_parameters()), dict(again.named_parameters())
        assert before.keys() == after.keys()
        assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", thorough(ARCHITECTURES, quick=["mixtral", "gpt_oss"]))
def test_experts_are_packed_by_a_load_and_saved_apart(name: str, tmp_path: Path) -> None:
    dense = dense_model(name)
    cls = type(dense)
    dense.save_pretrained(tmp_path / "dense")
    model = cls.from_pretrained(tmp_path / "dense", quantization_config=config())
    experts = [module for module in model.modules() if isinstance(module, Experts4bit)]
    assert [module.projections for module in experts] == [ARCHITECTURES[name][2]] * 2
    assert all(isinstance(getattr(experts[0]._modules["3"], leaf), Linear4bit) for leaf in experts[0].projections)
    torch.testing.assert_close(logits(model), logits(with_quantized_matrices(dense)), rtol=1e-4, atol=1e-5)
    # As one operation, whose activation is known.
    assert all(module._held.table is not None for module in experts)

    model.save_pretrained(tmp_path / "packed")
    saved = files(tmp_path / "packed")
    of_expert = {key for key in saved if ".experts.3." in key}
    leaves = [leaf for leaf in ARCHITECTURES[name][2] if leaf]
    assert {key.rsplit(".experts.3.", 1)[1] for key in of_expert} == {
        f"{leaf}.weight{part}" for leaf in leaves for part in
        ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4")
    }  # fmt: skip
    again = cls.from_pretrained(tmp_path / "packed", quantization_config=config())
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    resaved = files(tmp_path / "again")
    assert resaved.keys() == saved.keys()
    assert all(torch.equal(resaved[key], value) for key, value in saved.items())

    with torch.device("meta"):
        empty = cls(dense.config)
    loaded = halfbyte.load_quantized(empty, tmp_path / "packed").eval()
    assert torch.equal(logits(loaded), logits(model))

    whole = again.dequantize()
    assert not any(isinstance(module, Experts4bit) for module in whole.modules())
    torch.testing.assert_close(logits(whole), logits(model), rtol=1e-4, atol=1e-5)
    whole.save_pretrained(tmp_path / "whole")
    if name != "granitemoe":
        # transformers reads its files under two names for the same, and saves what it loaded.
        assert files(tmp_path / "whole").keys() == files(tmp_path / "dense").keys()
    torch.testing.assert_close(logits(cls.from_pretrained(tmp_path / "whole")), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("how", ["memory", "checkpoint"])
def test_experts_are_packed_by_quantize_model(name: str, how: str, tmp_path: Path) -> None:
    dense = dense_model(name)
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


def test_experts_that_are_kept_stay_together(tmp_path: Path) -> None:
    dense = dense_model("qwen3_moe")
    dense.save_pretrained(tmp_path)
    cls = type(dense)
    skip = config(llm_int8_skip_modules=["model.layers.0.mlp.experts"])
    model = cls.from_pretrained(tmp_path, quantization_config=skip)
    assert not isinstance(model.model.layers[0].mlp.experts, Experts4bit)
    assert isinstance(model.model.layers[1].mlp.experts, Experts4bit)
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(cls.from_pretrained(tmp_path / "packed", quantization_config=config())), logits(model))
    made = halfbyte.quantize_model(dense, config(), rules=[r"experts=keep"])
    assert len(fused_paths(made.named_modules())) == 2


@pytest.mark.parametrize("order", ["[experts, in, out]", "[experts, out, in]"])
@pytest.mark.parametrize("skipped", [None, "model.language_model.layers.0.mlp.experts"])
def test_experts_that_transformers_transposes_are_those_of_the_file(
    order: str, skipped: str | None, tmp_path: Path
) -> None:
    """A converter of transformers has the same names: it was taken, and experts were random."""
    cls = transformers.Qwen3VLMoeForConditionalGeneration
    torch.manual_seed(0)
    made = tiny_models.configure(cls.config_class, {"architectures": [cls.__name__]})
    dense = cls(made).to(torch.bfloat16)
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter.data, std=0.05)
    dense.save_pretrained(tmp_path / "dense")
    (file,) = (tmp_path / "dense").glob("*.safetensors")
    tensors = load_file(file)
    for key, value in dense.state_dict().items():
        if re.search(r"experts\.\w+_proj$", key):
            tensors[key] = value.transpose(1, 2).contiguous() if order == "[experts, in, out]" else value.clone()
    save_file(tensors, file, {"format": "pt"})

    skip = [skipped] if skipped else []
    expected = halfbyte.quantize_model(dense, NF4, skip=skip, progress=False).state_dict()
    assert any(re.search(r"layers\.1\.mlp\.experts\.3\.up_proj\.weight\.absmax$", key) for key in expected)
    with torch.device("meta"):
        empty = cls(made)
    for model in (
        cls.from_pretrained(tmp_path / "dense", quantization_config=config(llm_int8_skip_modules=skip or None)),
        halfbyte.quantize_model(empty, NF4, skip=skip, checkpoint=tmp_path / "dense", progress=False),
    ):
        state = model.state_dict()
        assert state.keys() == expected.keys()
        assert [key for key, value in expected.items() if not torch.equal(state[key], value)] == []


@pytest.mark.parametrize("name", thorough(ARCHITECTURES, quick=["mixtral", "gpt_oss"]))
def test_experts_that_are_kept_beside_packed_ones_have_memory_of_their_own(name: str, tmp_path: Path) -> None:
    """Views of the fused parameters held all of it, and transposed ones could not be saved."""
    gate, _, down = ARCHITECTURES[name][2]
    model = halfbyte.quantize_model(dense_model(name), NF4, rules=[r"experts\.1\.=keep"], progress=False)
    dense = unfuse(dense_model(name).get_submodule(experts_path(model)))
    for projection in (gate, down):
        kept = model.get_submodule(f"{experts_path(model)}.1.{projection}").weight
        assert kept.is_contiguous()
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
    first = model.get_submodule(f"{experts_path(model)}.1.{down}").weight
    assert torch.equal(first, dense.get_submodule("1.down_proj").weight)
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved", quantization_config=config())
    assert torch.equal(logits(again), logits(model))


def experts_path(model: Any) -> str:
    return next(path for path, module in model.named_modules() if isinstance(module, Experts4bit))


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe"])
def test_experts_that_a_quantized_checkpoint_has_in_one_tensor_stay_so(name: str, tmp_path: Path) -> None:
    """They were taken apart beside packed ones, and saved under names that no loader of 16-bit checkpoints reads."""
    model = halfbyte.quantize_model(dense_model(name), NF4, rules=[r"layers\.1\.=keep"], progress=False)
    model.save_pretrained(tmp_path / "one")
    one = files(tmp_path / "one")
    for again in (
        type(model).from_pretrained(tmp_path / "one", quantization_config=config()),
        halfbyte.load_quantized(dense_model(name), tmp_path / "one"),
    ):
        assert sum(isinstance(module, Experts4bit) for module in again.modules()) == 1
        assert torch.equal(logits(again), logits(model))
        again.save_pretrained(tmp_path / "two")
        two = files(tmp_path / "two")
        assert one.keys() == two.keys()
        assert all(torch.equal(two[key], value) for key, value in one.items())


@pytest.mark.parametrize("skipped", ["experts", "mlp.experts", "layers.1.mlp.experts", "model.layers.1.mlp.experts"])
def test_experts_are_kept_by_the_name_of_their_list_everywhere(skipped: str, tmp_path: Path) -> None:
    dense = dense_model("qwen3_moe")
    dense.save_pretrained(tmp_path / "dense")
    loaded = type(dense).from_pretrained(
        tmp_path / "dense", quantization_config=config(llm_int8_skip_modules=[skipped])
    )
    model = halfbyte.quantize_model(dense, NF4, skip=[skipped], progress=False)
    halfbyte.quantize_checkpoint(tmp_path / "dense", tmp_path / "offline", config(), skip=[skipped])
    packed = {key for key in files(tmp_path / "offline") if key.endswith(".absmax")}
    assert any(".experts." in key for key in packed) == ("1" in skipped)
    for made in (loaded, model):
        assert {key for key in made.state_dict() if key.endswith(".absmax")} == packed


def test_experts_of_a_failed_call_are_as_before() -> None:
    dense = dense_model("qwen3_moe")
    before = dict(dense.named_parameters())
    with pytest.raises(ValueError, match="has no linear layer"):
        halfbyte.quantize_model(dense, config(), rules=[".=keep"])
    after = dict(dense.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[key] is value for key, value in before.items())


def test_experts_in_8_bits(tmp_path: Path) -> None:
    dense = dense_model("qwen3_moe")
    dense.save_pretrained(tmp_path)
    model = type(dense).from_pretrained(tmp_path, quantization_config=halfbyte.BitsAndBytesConfig(load_in_8bit=True))
    assert isinstance(model.model.layers[0].mlp.experts._modules["1"].up_proj, Linear8bitLt)
    difference = logits(model) - logits(dense)
    assert difference.norm() < 0.02 * logits(dense).norm()


# ---- adapters --------------------------------------------------------------------------------------------------------

FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def train(model: Any, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(X, labels=X).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("name", thorough(["mixtral", "qwen3_moe"], quick=["mixtral"]))
@pytest.mark.parametrize("how", ["all-linear", "parameters"])
def test_adapters_on_experts_are_those_of_the_dense_model_too(name: str, how: str, tmp_path: Path) -> None:
    dense = dense_model(name)
    dense.save_pretrained(tmp_path / "dense")
    cls = type(dense)

    def packed() -> Any:
        return cls.from_pretrained(tmp_path / "dense", quantization_config=config())

    target: dict[str, Any] = {"target_modules": "all-linear"}
    if how == "parameters":
        target = {"target_modules": ["q_proj"], "target_parameters": FUSED}
    model = peft.get_peft_model(packed(), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **target))
    adapted = [path for path, _ in model.named_modules() if path.endswith("lora_A.default")]
    assert sum(".experts.2." in path for path in adapted) == 6
    model.train()
    train(model)
    expected = logits(model)
    base = logits(packed())
    assert not torch.allclose(expected, base)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(packed(), tmp_path / "adapter").eval()), expected)
    # PEFT merges what it finds for each expert to what it has for fused parameters.
    whole = packed().dequantize()
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()), expected, rtol=1e-4, atol=1e-5
    )
    merged = peft.PeftModel.from_pretrained(packed(), tmp_path / "adapter").merge_and_unload()
    assert (logits(merged) - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_adapters_of_fused_parameters_are_split(name: str, tmp_path: Path) -> None:
    dense = dense_model(name)
    dense.save_pretrained(tmp_path / "dense")
    cls = type(dense)
    whole = cls.from_pretrained(tmp_path / "dense", quantization_config=config()).dequantize()
    model = peft.get_peft_model(
        whole, peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], target_parameters=FUSED)
    )
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter.data, std=0.05)
    model.eval()
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    packed = cls.from_pretrained(tmp_path / "dense", quantization_config=config())
    base = logits(packed)
    found = logits(peft.PeftModel.from_pretrained(packed, tmp_path / "adapter").eval())
    assert (expected - base).norm() > 1e-3 * base.norm()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(X, labels=X)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", thorough(["mixtral", "qwen3_moe", "gpt_oss"], quick=["gpt_oss"]))
def test_adapters_of_all_experts_are_one_function(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.integrations.peft import fuse as fuse_lora
    from halfbyte.integrations.peft import unfuse as unfuse_lora

    made: list[int] = []
    real = Experts4bit._one_by_one
    monkeypatch.setattr(
        Experts4bit, "_one_by_one", lambda self, x, *args: (made.append(len(x)), real(self, x, *args))[1]
    )
    dense = dense_model(name)
    dense.save_pretrained(tmp_path)
    packed = type(dense).from_pretrained(tmp_path, quantization_config=config())
    lora = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], target_parameters=FUSED)
    model = peft.get_peft_model(packed, lora).train()
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter.data, std=0.1)
    logits_together, together = gradients(model)
    assert not made
    assert unfuse_lora(model) > 0
    logits_apart, apart = gradients(model)
    assert made == [18, 18]
    torch.testing.assert_close(logits_together, logits_apart, rtol=1e-5, atol=1e-6)
    assert sum(".experts." in key for key in apart) >= 12
    for key, expected in apart.items():
        assert (together[key] - expected).norm() <= 1e-5 * expected.norm()
    # Experts that no token came to have zeros.
    assert all((together[key] == 0).all() for key in together.keys() - apart.keys())
    fuse_lora(model)
    with torch.autocast("cpu", torch.bfloat16):
        gradients(model)
    assert len(made) == 2
    # What changes is noticed: an adapter that is off, another scaling of one expert, a listener, and dropout.
    experts = next(module for module in model.modules() if isinstance(module, Experts4bit))
    layer: Any = getattr(experts._modules["3"], experts.projections[2])
    for change, undo in (
        (lambda: layer.scaling.update(default=3.0), lambda: layer.scaling.update(default=2.0)),
        (lambda: layer.enable_adapters(False), lambda: layer.enable_adapters(True)),
        (
            lambda: vars(layer).update(seen=layer.lora_A["default"].register_forward_hook(lambda *a: None)),
            lambda: vars(layer).pop("seen").remove(),
        ),
        (
            lambda: layer.lora_dropout.update({"default": torch.nn.Dropout(0.1)}),
            lambda: layer.lora_dropout.update({"default": torch.nn.Identity()}),
        ),
    ):
        count = len(made)
        change()
        gradients(model)
        assert len(made) == count + 1
        undo()
    del made[:]
    gradients(model)
    assert not made


def test_a_packed_matrix_of_another_shape_is_refused(tmp_path: Path) -> None:
    dense = dense_model("mixtral")
    dense.save_pretrained(tmp_path / "dense")
    cls = type(dense)
    cls.from_pretrained(tmp_path / "dense", quantization_config=config()).save_pretrained(tmp_path / "packed")
    (file,) = (tmp_path / "packed").glob("*.safetensors")
    tensors = load_file(file)
    lost = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    save_file({key: value for key, value in tensors.items() if key != lost}, file, {"format": "pt"})
    with pytest.raises(halfbyte.CheckpointError, match=r"experts\.2\.w3\.weight"):
        cls.from_pretrained(tmp_path / "packed", quantization_config=config())
