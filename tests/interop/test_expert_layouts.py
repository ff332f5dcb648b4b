"""Packed experts in the layouts of other tools: written by bitsandbytes' own functions, read by every front door."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.8")
pytest.importorskip("bitsandbytes")

import bitsandbytes.functional as theirs  # noqa: E402
import halfbyte  # noqa: E402
from halfbyte.nn import Experts4bit, Linear4bit  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

COMMON: dict[str, Any] = {
    "vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
X = torch.arange(18).reshape(2, 9) % 90
Packed = tuple[dict[str, torch.Tensor], torch.Tensor]


def dense_model(name: str, hidden: int = 64, intermediate: int = 32) -> Any:
    torch.manual_seed(0)
    if name == "Qwen3Moe":
        fields = {"num_experts": 4, "moe_intermediate_size": intermediate, "intermediate_size": 96}
    else:
        fields = {"num_local_experts": 4, "intermediate_size": intermediate}
    config = getattr(transformers, f"{name}Config")(**COMMON, **fields, hidden_size=hidden)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.bfloat16).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.05)
    return model


def config(**more: Any) -> halfbyte.BitsAndBytesConfig:
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    return halfbyte.BitsAndBytesConfig(**{**nf4, **more})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(X).logits.float()  # type: ignore[no-any-return]


def files(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """The same bytes: codes that are seen as floats may be no numbers."""
    assert a.keys() == b.keys()
    assert all(a[key].dtype == value.dtype for key, value in b.items())
    assert all(
        torch.equal(a[key].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
        for key, value in b.items()
    )


def read_back(codes: torch.Tensor, state: Any) -> torch.Tensor:
    """What bitsandbytes makes of packed values.

    In rows of one block: its functions for processors with AVX-512 read others wrong where rows are no whole blocks.
    """
    flat = copy.copy(state)
    shape, flat.shape = state.shape, torch.Size((state.shape.numel() // state.blocksize, state.blocksize))
    return theirs.dequantize_4bit(codes, flat).reshape(shape)


def quantized(name: str, value: torch.Tensor, nested: bool = False, **more: Any) -> Packed:
    """A packed weight with its parts, and its values, both by bitsandbytes."""
    codes, state = theirs.quantize_4bit(value.contiguous(), quant_type="nf4", compress_statistics=nested, **more)
    parts = {f"{name}.{key}": part.contiguous() for key, part in state.as_dict(packed=True).items()}
    return {name: codes, **parts}, read_back(codes, state)


def linears(model: Any) -> list[str]:
    return [
        path for path, module in model.named_modules()
        if type(module) is torch.nn.Linear and path != "lm_head" and ".experts." not in path
    ]  # fmt: skip


def write(folder: Path, model: Any, tensors: dict[str, torch.Tensor], **fields: Any) -> None:
    """A checkpoint of these tensors, and of the linear layers packed, which also become their values in `model`."""
    for path in linears(model):
        parts, values = quantized(f"{path}.weight", model.get_submodule(path).weight.data, fields.get("nested", False))
        tensors |= parts
        model.get_submodule(path).weight.data.copy_(values)
    folder.mkdir()
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    said = model.config.to_dict()
    said["architectures"] = [type(model).__name__]
    said["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": bool(fields.get("nested")), "bnb_4bit_compute_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(said))


def experts_of(model: Any) -> list[tuple[str, Any]]:
    return [(path, module) for path, module in model.named_modules() if path.endswith("mlp.experts")]


def others(model: Any) -> dict[str, torch.Tensor]:
    """The tensors that no layout changes."""
    packed = {f"{path}.weight" for path in linears(model)}
    return {key: value for key, value in model.state_dict().items() if key not in packed and ".experts." not in key}


def fused(folder: Path, model: Any, nested: bool = False, storage: torch.dtype = torch.uint8) -> None:
    """Unsloth's: all experts of a projection in one packed weight. The model gets its values."""
    tensors = others(model)
    for path, module in experts_of(model):
        for name in ("gate_up_proj", "down_proj"):
            parameter = module._parameters[name]
            parts, values = quantized(f"{path}.{name}", parameter.data, nested, quant_storage=storage)
            tensors |= parts
            parameter.data.copy_(values)
    write(folder, model, tensors, nested=nested)


def bare(folder: Path, model: Any) -> None:
    """`Experts4bit` of bitsandbytes: codes and scales of each expert in a row."""
    tensors = others(model)
    for path, module in experts_of(model):
        for name in ("gate_up", "down"):
            parameter = module._parameters[f"{name}_proj"]
            made = [theirs.quantize_4bit(one.contiguous(), quant_type="nf4") for one in parameter.data]
            tensors[f"{path}.{name}_proj"] = torch.stack([codes.flatten() for codes, _ in made])
            tensors[f"{path}.{name}_absmax"] = torch.stack([state.absmax for _, state in made])
            parameter.data.copy_(torch.stack([read_back(*one) for one in made]))
    write(folder, model, tensors)


def listed(folder: Path, model: Any, nested: bool = True, kept: tuple[int, ...] = ()) -> None:
    """gpt-oss by Unsloth: a linear layer for each expert, its rows as they alternate, and another router."""
    tensors = others(model)
    for key in [key for key in tensors if ".router." in key]:
        tensors[key.replace(".router.", ".router.linear.")] = tensors.pop(key)
    for path, module in experts_of(model):
        for name in ("gate_up_proj", "down_proj"):
            for index, matrix in enumerate(module._parameters[name].data):
                one = f"{path}.{name}s.{index}"
                tensors[f"{one}.bias"] = module._parameters[f"{name}_bias"].data[index]
                if index in kept:
                    tensors[f"{one}.weight"] = matrix.t()
                    continue
                parts, values = quantized(f"{one}.weight", matrix.t(), nested)
                tensors |= parts
                matrix.copy_(values.t())
    write(folder, model, tensors, nested=nested)


LAYOUTS: dict[str, tuple[str, Callable[..., None], dict[str, Any]]] = {
    "fused": ("Qwen3Moe", fused, {}),
    "fused-nested": ("Qwen3Moe", fused, {"nested": True}),
    "fused-bfloat16": ("Qwen3Moe", fused, {"storage": torch.bfloat16}),
    "bare": ("Qwen3Moe", bare, {}),
    "listed": ("GptOss", listed, {}),
    "listed-plain": ("GptOss", listed, {"nested": False}),
    "listed-some": ("GptOss", listed, {"kept": (1, 3)}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_read_exactly_and_saved_apart(layout: str, tmp_path: Path) -> None:
    name, make, how = LAYOUTS[layout]
    # As it was quantized, and then dequantized by bitsandbytes.
    dense = dense_model(name)
    make(tmp_path / "source", dense, **how)
    cls = type(dense)
    model = cls.from_pretrained(tmp_path / "source", quantization_config=config())
    experts = [module for module in model.modules() if isinstance(module, Experts4bit)]
    assert len(experts) == 2
    kept = how.get("kept", ())
    for path, module in experts_of(dense):
        packed = model.get_submodule(path)
        for index in range(4):
            gate, up, down = (getattr(packed._modules[str(index)], leaf) for leaf in packed.projections)
            assert all(isinstance(layer, Linear4bit) == (index not in kept) for layer in (gate, up, down))
            ours = [layer.dequantize() if index not in kept else layer.weight for layer in (gate, up, down)]
            whole = module.gate_up_proj[index]
            theirs_up = whole.t() if name == "GptOss" else whole
            expected = [theirs_up[0::2], theirs_up[1::2]] if name == "GptOss" else list(theirs_up.chunk(2))
            expected.append(module.down_proj[index].t() if name == "GptOss" else module.down_proj[index])
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    torch.testing.assert_close(logits(model), logits(dense), rtol=0.05, atol=0.05)
    if not kept:
        assert all(module._held.table is not None for module in experts)

    with torch.device("meta"):
        empty = cls(dense.config)
    loaded = halfbyte.load_quantized(empty, tmp_path / "source").eval()
    assert torch.equal(logits(loaded), logits(model))

    model.save_pretrained(tmp_path / "saved")
    saved = files(tmp_path / "saved")
    assert "model.layers.1.mlp.experts.2.up_proj.weight.absmax" in saved
    assert not any(part in key for key in saved for part in ("gate_up_proj.", "_projs.", "gate_up_absmax", ".linear."))
    again = cls.from_pretrained(tmp_path / "saved", quantization_config=config())
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    resaved = files(tmp_path / "again")
    assert_same(resaved, saved)
    loaded.save_pretrained(tmp_path / "loaded")
    assert_same(files(tmp_path / "loaded"), saved)


@pytest.mark.parametrize("size", [128, 64])
def test_layouts_keep_nested_scales_where_no_block_crosses_a_matrix(size: int, tmp_path: Path) -> None:
    """Of 128 x 128 values there are 256 scales, which is one block of scales."""
    dense = dense_model("Qwen3Moe", hidden=128, intermediate=size)
    fused(tmp_path / "source", dense, nested=True)
    model = type(dense).from_pretrained(tmp_path / "source", quantization_config=config())
    for path, module in experts_of(dense):
        for index in range(4):
            expert = model.get_submodule(path)._modules[str(index)]
            layers = (expert.gate_proj, expert.up_proj, expert.down_proj)
            assert [layer.weight.quant_state.nested for layer in layers] == [size == 128] * 3
            ours = [layer.dequantize() for layer in layers]
            expected = [*module.gate_up_proj[index].chunk(2), module.down_proj[index]]
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("layout", ["fused-nested", "listed", "bare"])
def test_layouts_are_read_under_the_names_of_the_base_model(layout: str, tmp_path: Path) -> None:
    """A base model has no prefix, and a checkpoint of the whole one has."""
    name, make, how = LAYOUTS[layout]
    dense = dense_model(name)
    make(tmp_path / "source", dense, **how)
    cls = type(dense.model)
    model = cls.from_pretrained(tmp_path / "source", quantization_config=config())
    with torch.no_grad():
        torch.testing.assert_close(model(X).last_hidden_state, dense.model(X).last_hidden_state, rtol=0.05, atol=0.05)
    assert isinstance(model.layers[1].mlp.experts, Experts4bit)


@pytest.mark.parametrize("layout", ["fused-nested", "listed", "bare"])
def test_layouts_are_offloaded_to_disk(layout: str, tmp_path: Path) -> None:
    name, make, how = LAYOUTS[layout]
    dense = dense_model(name)
    make(tmp_path / "source", dense, **how)
    here = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu")
    model = type(dense).from_pretrained(
        tmp_path / "source",
        quantization_config=config(),
        device_map={**here, "model.layers.1": "disk"},
        offload_folder=tmp_path / "offloaded",
    )
    assert all(parameter.is_meta for parameter in model.model.layers[1].mlp.experts.parameters())
    torch.testing.assert_close(logits(model), logits(dense), rtol=0.05, atol=0.05)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = files(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


E = "model.layers.1.mlp.experts"


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)  # type: ignore[no-any-return]


def cut(name: str, count: int = 1) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, tensors[name][:-count].clone())  # type: ignore[no-any-return]


# The layout, what happens to the file, and what the message says besides the name of the tensor, which comes first.
BROKEN: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], None], str, str]] = {
    "scales missing": ("fused", drop(f"{E}.gate_up_proj.absmax"), f"{E}.gate_up_proj", "lacks .*gate_up_proj.absmax"),
    "state missing": (
        "fused",
        drop(f"{E}.down_proj.quant_state.bitsandbytes__nf4"),
        f"{E}.down_proj",
        "lacks .*quant_state.bitsandbytes__nf4",
    ),
    "second scales missing": (
        "fused-nested", drop(f"{E}.down_proj.nested_absmax"), f"{E}.down_proj", "lacks .*down_proj.nested_absmax",
    ),
    "codes missing": ("fused", drop(f"{E}.down_proj"), f"{E}.down_proj", "lacks .*down_proj"),
    "codes too short": ("fused", cut(f"{E}.gate_up_proj"), f"{E}.gate_up_proj", "expected 8192"),
    "scales too short": ("fused", cut(f"{E}.gate_up_proj.absmax"), f"{E}.gate_up_proj", "absmax"),
    "bare scales missing": ("bare", drop(f"{E}.down_absmax"), f"{E}.gate_up_proj", "lacks .*down_absmax"),
    "bare codes missing": ("bare", drop(f"{E}.gate_up_proj"), f"{E}.gate_up_absmax", "lacks .*gate_up_proj"),
    "bare scales too short": ("bare", cut(f"{E}.gate_up_absmax"), f"{E}.gate_up_proj", r"must be \[4, n\]"),
    "bare codes too short": ("bare", cut(f"{E}.down_proj"), f"{E}.down_proj", r"\[4, 1024\], got .* \[3, 1024\]"),
    "an expert missing": (
        "listed", drop(f"{E}.gate_up_projs.2.weight"), f"{E}.gate_up_projs.0.weight", "lacks .*gate_up_projs.2.weight",
    ),
    "a part of an expert missing": (
        "listed", drop(f"{E}.down_projs.3.weight.quant_map"), f"{E}.down_projs.3.weight", "lacks .*quant_map",
    ),
    "a bias missing": (
        "listed", drop(f"{E}.down_projs.3.bias"), f"{E}.down_projs.0.bias", "lacks .*down_projs.3.bias",
    ),
    "an expert too many": (
        "listed",
        lambda tensors: tensors.__setitem__(f"{E}.down_projs.4.weight", torch.zeros(64, 32)),
        f"{E}.down_projs.4.weight",
        "one expert too many, the model has 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_layouts_that_are_broken_are_named_before_the_model_is_changed(broken: str, tmp_path: Path) -> None:
    layout, change, tensor, message = BROKEN[broken]
    name, make, how = LAYOUTS[layout]
    dense = dense_model(name)
    make(tmp_path / "source", dense, **how)
    edit(tmp_path / "source", change)
    assert_refused(dense, tmp_path / "source", rf"{tensor}\b.*{message}")


def assert_refused(dense: Any, folder: Path, message: str) -> None:
    """By both front doors, and the model that was to be filled is as before."""
    with pytest.raises(halfbyte.CheckpointError, match=message):
        type(dense).from_pretrained(folder, quantization_config=config())
    with torch.device("meta"):
        empty = type(dense)(dense.config)
    before = dict(empty.named_parameters())
    with pytest.raises(halfbyte.CheckpointError, match=message):
        halfbyte.load_quantized(empty, folder)
    after = dict(empty.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[key] is value for key, value in before.items())


@pytest.mark.parametrize("layout", ["fused", "bare"])
def test_layouts_with_another_number_of_experts_are_refused(layout: str, tmp_path: Path) -> None:
    name, make, how = LAYOUTS[layout]
    dense = dense_model(name)
    make(tmp_path / "source", dense, **how)
    dense.config.num_experts = 8
    said = json.loads((tmp_path / "source/config.json").read_text())
    (tmp_path / "source/config.json").write_text(json.dumps({**said, "num_experts": 8, "num_local_experts": 8}))
    message = r"experts.gate_up_proj: holds \[4, 64, 64\], the model has \[8, 64, 64\]"
    if layout == "bare":
        message = r"experts.gate_up_proj: must be torch.uint8 \[8, 2048\], got torch.uint8 \[4, 2048\]"
    assert_refused(dense, tmp_path / "source", message)


def test_layouts_whose_matrices_share_a_block_are_refused(tmp_path: Path) -> None:
    """Half of 6 x 16 values is no whole number of blocks of 64, and a row of 16 neither."""
    dense = dense_model("Qwen3Moe", hidden=16, intermediate=6)
    fused(tmp_path / "source", dense)
    assert_refused(dense, tmp_path / "source", r"gate_up_proj: a matrix has 6 x 16 values, no multiple of .* 64")
    dense = dense_model("GptOss", hidden=16, intermediate=32)
    listed(tmp_path / "listed", dense)
    assert_refused(dense, tmp_path / "listed", r"gate_up_projs.0.weight: a row has 16 values, no multiple of .* 64")


def test_layouts_of_transposed_matrices_in_one_weight_are_refused(tmp_path: Path) -> None:
    dense = dense_model("GptOss")
    fused(tmp_path / "source", dense)
    message = r"gate_up_proj: is packed as \[4, 64, 64\], .* `halfbyte dequantize`"
    assert_refused(dense, tmp_path / "source", message)


def test_bare_layout_needs_a_config_that_says_what_codes_mean(tmp_path: Path) -> None:
    dense = dense_model("Qwen3Moe")
    bare(tmp_path / "source", dense)
    (tmp_path / "source/config.json").unlink()
    with torch.device("meta"):
        empty = type(dense)(dense.config)
    with pytest.raises(halfbyte.CheckpointError, match=r"gate_up_proj: only config.json says what its codes mean"):
        halfbyte.load_quantized(empty, tmp_path / "source")


@pytest.mark.parametrize("layout", ["fused-nested", "bare", "listed"])
def test_layouts_are_known_to_the_offline_commands(layout: str, tmp_path: Path) -> None:
    name, make, how = LAYOUTS[layout]
    dense = dense_model(name)
    make(tmp_path / "source", dense, **how)
    source = files(tmp_path / "source")
    report = halfbyte.inspect_checkpoint(tmp_path / "source")
    packed = {key.rpartition(".absmax")[0] for key in source if key.endswith(".absmax")}
    packed |= {
        f"{key.removesuffix('_absmax')}_proj" for key in source if key.endswith("_absmax") and ".nested" not in key
    }
    assert any(".experts." in key for key in packed)
    assert {weight["name"] for weight in report.data["weights"]} == packed
    halfbyte.dequantize_checkpoint(tmp_path / "source", tmp_path / "dense")
    back = files(tmp_path / "dense")
    for path, module in experts_of(dense):
        if layout == "listed":
            assert all(
                torch.equal(back[f"{path}.gate_up_projs.{index}.weight"], module.gate_up_proj[index].t())
                for index in range(4)
            )
        else:
            assert torch.equal(back[f"{path}.gate_up_proj"], module.gate_up_proj)
    if layout != "listed":
        # Value for value with the original, which has the same names.
        dense_model(name).save_pretrained(tmp_path / "original")
        original = files(tmp_path / "original")
        save_file(
            {key: value for key, value in original.items() if ".experts." not in key}
            | {
                f"{path}.{leaf}": getattr(module, leaf).data.contiguous()
                for path, module in experts_of(dense_model(name))
                for leaf in ("gate_up_proj", "down_proj")
            },
            tmp_path / "original/model.safetensors",
            {"format": "pt"},
        )
        assert halfbyte.verify_checkpoint(tmp_path / "original", tmp_path / "source").ok
