"""What halfbyte writes is what transformers and bitsandbytes write; they, PEFT and vLLM's reader take it as their own.

Two differences are known and bounded here, both on the side of bitsandbytes' CPU code (its CUDA code does as halfbyte
does): its FP4 thresholds are midpoints of a rounded table, and its 8-bit codes for double quantization come from a
table of 2^16 steps instead of a search.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import halfbyte
import numpy as np
import pytest
import reference
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit
from checkpoints import (
    MINILM,
    STATE,
    Case,
    bnb_state,
    load,
    load_tensors,
    outputs,
    parts,
    raw,
    read_json,
    states,
)
from safetensors import safe_open

CASES = [
    Case("llama", "bfloat16", "nf4", False, "uint8", sharded=True),
    Case("llama", "float16", "nf4", False, "float16"),
    Case("llama", "bfloat16", "fp4", True, "float32"),
    Case("llama-tied", "bfloat16", "nf4", True, "bfloat16", sharded=True),
    Case("llama-tied", "float16", "fp4", False, "uint8"),
    Case("gpt2", "float32", "nf4", False, "float32"),
    Case("gpt2", "float32", "nf4", True, "uint8"),
    Case("gpt2", "bfloat16", "fp4", True, "int8"),
    Case("t5", "float16", "fp4", False, "float16"),
    Case("t5", "bfloat16", "nf4", True, "float64"),
    Case("ragged", "float32", "nf4", True, "uint8"),
    Case("ragged", "bfloat16", "fp4", False, "uint8"),
    Case(MINILM, "float32", "nf4", False, "uint8"),
    Case(MINILM, "float32", "nf4", True, "uint8"),
    Case(MINILM, "float32", "fp4", False, "bfloat16"),
]
RUNNING = [case for case in CASES if case.model != "ragged"]
by_case = pytest.mark.parametrize("case", CASES, ids=str)


def pairs(workshop, case):
    """Both checkpoints: (tensors, states) of theirs and of ours."""
    theirs, ours = load_tensors(workshop.theirs(case)), load_tensors(workshop.ours(case))
    return theirs, ours, states(theirs), states(ours)


def scaled_source(workshop, case, weight, state):
    """The scaled blocks and the scales of a weight of the source, transposed as `Conv1D` weights are."""
    dense = load_tensors(workshop.source(*case.source))[weight]
    if case.model in ("gpt2", "ragged"):
        dense = dense.T
    assert list(dense.shape) == state["shape"]
    return reference.scaled_blocks(dense.float().contiguous().reshape(-1).numpy(), state["blocksize"])


def unpacked(packed: torch.Tensor, n: int) -> np.ndarray:
    data = np.frombuffer(raw(packed), np.uint8)
    return np.stack([data >> 4, data & 15], axis=1).reshape(-1)[:n]


# -------------------------------------------------------------------------------------------------- the same checkpoint


@by_case
def test_same_tensors_of_same_dtypes_and_shapes(workshop, case):
    theirs, ours, their_states, our_states = pairs(workshop, case)
    assert len(our_states) >= 8
    assert our_states.keys() == their_states.keys()
    extra = ours.keys() - theirs.keys()
    # The real checkpoint carries a buffer of an older transformers, which today's class no longer has.
    assert extra == ({"embeddings.position_ids"} if case.model == MINILM else set())
    assert not theirs.keys() - ours.keys()
    for name, tensor in theirs.items():
        if name.endswith(STATE + case.quant_type) and case.double:
            continue  # The digits of the offset make its length.
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].shape == tensor.shape, name


@by_case
def test_kept_tensors_are_copied_byte_for_byte(workshop, case):
    theirs, ours, _, our_states = pairs(workshop, case)
    source = load_tensors(workshop.source(*case.source))
    kept = source.keys() - our_states.keys()
    assert kept
    assert ours.keys() == kept | {name for weight, state in our_states.items() for name in parts(weight, state)}
    for name in kept:
        # T5 keeps its `wo` in float32, because its values leave the range of float16. transformers reads a quantized
        # checkpoint's weights in the dtype that they are stored in, so these are stored wider.
        wider = case.model == "t5" and case.dtype == "float16" and name.endswith(".wo.weight")
        assert raw(ours[name]) == raw(source[name].float() if wider else source[name]), name
        if name in theirs:
            assert raw(ours[name]) == raw(theirs[name]), name


@by_case
def test_codes_and_codebooks(workshop, case):
    theirs, ours, _, our_states = pairs(workshop, case)
    elsewhere = total = 0
    for weight, state in our_states.items():
        assert raw(ours[weight + ".quant_map"]) == raw(theirs[weight + ".quant_map"])
        if case.quant_type == "nf4":
            assert raw(ours[weight]) == raw(theirs[weight]), weight
            continue
        # The rule of CUDA, written a second time.
        scaled, _ = scaled_source(workshop, case, weight, state)
        n = int(np.prod(state["shape"]))
        assert np.array_equal(unpacked(ours[weight], n), reference.codes_4bit(scaled, "fp4").reshape(-1)[:n]), weight
        # Theirs differs where its thresholds do, by at most 5e-5, and in the code of zero: it has no negative one.
        mine, other = unpacked(ours[weight], n), unpacked(theirs[weight], n)
        differ = mine != other
        near = np.abs(np.abs(scaled.reshape(-1)[:n, None]) - reference.THRESHOLDS["fp4"]).min(axis=1) <= 5e-5
        both_zero = (mine & 7 == 0) & (other & 7 == 0)
        assert (near | both_zero)[differ].all(), weight
        elsewhere += (differ & ~both_zero).sum()
        total += n
    assert elsewhere <= 1e-3 * total


@by_case
def test_scales(workshop, case):
    theirs, ours, their_states, our_states = pairs(workshop, case)
    moved = total = 0
    for weight, state in our_states.items():
        if not case.double:
            assert raw(ours[weight + ".absmax"]) == raw(theirs[weight + ".absmax"]), weight
            continue
        assert raw(ours[weight + ".nested_quant_map"]) == raw(theirs[weight + ".nested_quant_map"])
        mine, other = np.float32(state["nested_offset"]), np.float32(their_states[weight]["nested_offset"])
        ulp = np.spacing(max(abs(mine), abs(other)))
        assert abs(mine - other) <= ulp, weight

        mine2, other2 = ours[weight + ".nested_absmax"].numpy(), theirs[weight + ".nested_absmax"].numpy()
        # max |absmax - offset| moves with the offset, and the difference is rounded once more.
        assert (np.abs(mine2 - other2) <= ulp + np.spacing(mine2)).all(), weight

        # Codes: ours are the nearest ones; theirs are off by no more than a step of their table.
        _, absmax = scaled_source(workshop, case, weight, state)
        scaled = (absmax - mine) / np.repeat(mine2, 256)[: len(absmax)]
        table = ours[weight + ".nested_quant_map"].numpy()
        codes, their_codes = ours[weight + ".absmax"].numpy(), theirs[weight + ".absmax"].numpy()
        best = np.abs(scaled[:, None] - table).min(axis=1)
        rounding = 2 * ulp / mine2.min() + 2.0**-23
        assert (np.abs(scaled - table[codes]) <= best + rounding).all(), weight
        assert (np.abs(scaled - table[their_codes]) <= best + rounding + 2.0**-15).all(), weight
        moved += (codes != their_codes).sum()
        total += len(codes)
    assert moved <= 0.01 * total


@by_case
def test_states_are_the_same_text(workshop, case):
    theirs, ours, their_states, our_states = pairs(workshop, case)
    for weight, state in our_states.items():
        assert list(state) == list(their_states[weight])
        name = weight + STATE + case.quant_type
        text = raw(ours[name]).decode()
        if case.double:
            text = text.replace(repr(state["nested_offset"]), repr(their_states[weight]["nested_offset"]))
        assert text == raw(theirs[name]).decode()


@by_case
def test_config_json(workshop, case):
    source, theirs, ours = (
        read_json(folder / "config.json")
        for folder in (workshop.source(*case.source), workshop.theirs(case), workshop.ours(case))
    )
    assert list(ours["quantization_config"].items()) == list(theirs["quantization_config"].items())
    assert {k: v for k, v in ours.items() if k != "quantization_config"} == source
    if case.model != MINILM:  # written by an older transformers
        assert ours == theirs


@pytest.mark.parametrize("case", [case for case in CASES if case.sharded], ids=str)
def test_index_and_shards(workshop, case):
    folder = workshop.ours(case)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    assert [f.name for f in files] == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    index = read_json(folder / "model.safetensors.index.json")
    there = {}
    for file in files:
        with safe_open(file, "pt") as reader:
            assert reader.metadata() == {"format": "pt"}
            there |= dict.fromkeys(reader.keys(), file.name)
    assert index["weight_map"] == there
    tensors = load_tensors(folder)
    assert index["metadata"]["total_size"] == sum(len(raw(t)) for t in tensors.values())
    theirs = read_json(workshop.theirs(case) / "model.safetensors.index.json")
    assert index["metadata"].keys() == theirs["metadata"].keys()
    # A weight and its state stay together.
    for weight, state in states(tensors).items():
        assert len({there[name] for name in parts(weight, state)}) == 1


# -------------------------------------------------------------------------------------- stock loading, same outputs


@pytest.mark.parametrize("case", [c for c in RUNNING if c.quant_type == "nf4" and not c.double], ids=str)
def test_stock_loading_gives_the_very_same_outputs(workshop, case):
    """Of ours, of theirs, and of the original that is quantized while it is loaded."""
    models = [load(workshop.ours(case), case.model), load(workshop.theirs(case), case.model)]
    if case.model != MINILM:  # seconds
        source = workshop.source(*case.source)
        models.append(load(source, case.model, quantization_config=case.config(), device_map="cpu"))
    for training in (True, False):
        ours, *others = (outputs(model, training) for model in models)
        assert ours.isfinite().all()
        assert ours.std() > 0
        for other in others:
            assert torch.equal(ours, other)


@pytest.mark.parametrize("case", [c for c in RUNNING if c.model != MINILM or c.double], ids=str)
def test_stock_loading_computes_with_our_values(workshop, case):
    """The 4-bit model, loaded by transformers, says exactly what the model of our dequantized weights says."""
    packed, dense = load(workshop.ours(case), case.model), load(workshop.dequantized(case), case.model)
    assert any(isinstance(module, Linear4bit) for module in packed.modules())
    assert not any(isinstance(module, Linear4bit) for module in dense.modules())
    assert torch.equal(outputs(packed, training=True), outputs(dense, training=True))


@pytest.mark.parametrize("case", [c for c in RUNNING if c.dtype == "float32" and c.double], ids=str)
def test_double_quantized_outputs_are_close_to_theirs(workshop, case):
    """Under a third of what double quantization itself changes.

    It moves every scale by up to half an 8-bit step, 0.29 steps in the mean square; their table moves fewer than one
    scale in a hundred, by a step: at most 0.1 steps. In float32, so that nothing else is rounded.
    """
    single = Case(case.model, case.dtype, case.quant_type, False, case.storage, case.sharded)
    ours, theirs, without = (
        outputs(load(folder, case.model), training=True).double()
        for folder in (workshop.ours(case), workshop.theirs(case), workshop.ours(single))
    )
    distance = (ours - theirs).square().mean().sqrt()
    assert distance <= 0.33 * (theirs - without).square().mean().sqrt()


# ------------------------------------------------------------------------------------------------------ rules and names


def quantized_modules(model: Any) -> dict[str, str]:
    """The path and the codebook of every 4-bit module."""
    return {
        name: module.weight.quant_state.quant_type
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        ("llama", {"rules": ["lm_head=nf4"]}, {"lm_head": "nf4", "o_proj": "nf4", "gate_proj": "nf4"}),
        ("llama", {"rules": [("lm_head", "fp4"), "mlp=keep"]}, {"lm_head": "fp4", "o_proj": "nf4", "gate_proj": None}),
        ("llama", {"rules": [r"layers\.0\..*_proj=keep", "down_proj=fp4"]}, {"lm_head": None, "down_proj": "fp4"}),
        ("llama", {"skip": ["q_proj", "model.layers.1.mlp"]}, {"q_proj": None, "o_proj": "nf4", "lm_head": None}),
        ("llama-tied", {"skip": ["up_proj"]}, {"lm_head": None, "up_proj": None, "k_proj": "nf4"}),
        ("gpt2", {"rules": ["attn=keep"]}, {"c_attn": None, "c_fc": "nf4", "lm_head": None}),
        ("t5", {"rules": ["EncDecAttention=fp4"], "skip": ["wi"]}, {"wo": None, "wi": None, "lm_head": None}),
    ],
    ids=["lm_head", "lm_head-mlp", "layer", "skip", "tied", "gpt2", "t5"],
)
def test_rules_and_skip_names_hold_when_transformers_loads(workshop, tmp_path, model, options, expected):
    """Exactly the modules whose weights are 4-bit in the files become 4-bit modules, with their codebooks."""
    case = Case(model, "bfloat16", "nf4", True, "uint8")
    halfbyte.quantize_checkpoint(workshop.source(*case.source), tmp_path / "q", case.config(), fsync=False, **options)
    weights = states(load_tensors(tmp_path / "q"))
    in_files = {name.removesuffix(".weight"): state["quant_type"] for name, state in weights.items()}
    loaded = load(tmp_path / "q", model)
    found = quantized_modules(loaded)
    assert found == in_files
    # Of a name's modules in the last layer: all or none.
    last = {name.rpartition(".")[2]: quant_type for name, quant_type in found.items()}
    assert {name: last.get(name) for name in expected} == expected
    halfbyte.dequantize_checkpoint(tmp_path / "q", tmp_path / "d", fsync=False)
    ours, dense = outputs(loaded, training=True), outputs(load(tmp_path / "d", model), training=True)
    if model == "gpt2":
        # A Conv1D is not a linear layer when it is dense: not every processor adds up in the same order for both.
        torch.testing.assert_close(ours, dense, rtol=2e-2, atol=2e-2)
    else:
        assert torch.equal(ours, dense)
    assert outputs(loaded, training=False).isfinite().all()


def test_skip_names_are_added_to_the_defaults_and_read_by_transformers(workshop, tmp_path):
    """A skip list replaces the defaults of transformers; the list that we write holds both."""
    source = workshop.source("llama", "bfloat16")
    report = halfbyte.quantize_checkpoint(source, tmp_path / "ours", skip=["q_proj"], fsync=False)
    written = report.quantization_config["llm_int8_skip_modules"]
    assert read_json(tmp_path / "ours" / "config.json")["quantization_config"]["llm_int8_skip_modules"] == written
    assert set(written) == {"q_proj", "lm_head"}
    # Given this list, transformers quantizes the original in the same places.
    case = Case("llama", "bfloat16", "nf4", True, "uint8")
    config = case.config()
    config.llm_int8_skip_modules = written
    theirs = load(source, "llama", quantization_config=config, device_map="cpu")
    assert quantized_modules(theirs) == quantized_modules(load(tmp_path / "ours", "llama"))


@pytest.mark.parametrize(
    "case",
    [
        Case("llama", "bfloat16", "fp4", True, "float32"),
        Case("llama", "bfloat16", "nf4", False, "uint8", sharded=True),
        Case("t5", "bfloat16", "nf4", True, "float64"),
    ],
    ids=str,
)
def test_a_reader_that_goes_by_names_finds_every_state(workshop, case):
    """As in vLLM: the last component sorts the tensors, and a weight is 4-bit when its state's name is there."""
    tensors = load_tensors(workshop.ours(case))
    words = ("absmax", "quant_map", "bitsandbytes")
    of_states = {name: t for name, t in tensors.items() if any(word in name.rpartition(".")[2] for word in words)}
    weights = {
        name: t
        for name, t in tensors.items()
        if name not in of_states and any(f"{name}{STATE}{kind}" in of_states for kind in ("nf4", "fp4"))
    }
    expected = states(tensors)
    assert weights.keys() == expected.keys()
    read = set()
    for name, weight in weights.items():
        own = {key: t.clone() for key, t in of_states.items() if f"{name}." in key}
        read |= own.keys()
        state = QuantState.from_dict(own, torch.device("cpu"))
        assert (state.quant_type, state.nested) == (case.quant_type, case.double)
        assert list(state.shape) == expected[name]["shape"]
        again = bnb_state(tensors, name, expected[name])
        assert torch.equal(dequantize_4bit(weight, state), dequantize_4bit(weight, again))
    assert read == of_states.keys()


# ----------------------------------------------------------------------------------------------------------------- LoRA


def lora(folder: Path, save: Path) -> tuple[list[float], dict[str, Any]]:
    """Three steps of LoRA on a 4-bit Llama, saved, loaded again and merged; the losses and the merged state dict."""
    import peft

    torch.manual_seed(3)
    base = peft.prepare_model_for_kbit_training(load(folder, "llama"), use_gradient_checkpointing=False)
    before = {name: raw(p) for name, p in base.named_parameters()}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3 * 2
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-2)
    ids = torch.arange(5, 53).reshape(2, 24)
    losses = []
    for step in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for name, p in trained.items():
            assert p.grad is not None
            assert p.grad.isfinite().all(), name
            # The second matrix starts at zero, so the first has no gradient in the first step.
            assert p.grad.any() or (step == 0 and "lora_A" in name), name
        optimizer.step()
    model.eval()
    after = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): p for name, p in model.named_parameters()
    }
    assert all(raw(after[name]) == data for name, data in before.items())

    model.save_pretrained(save)
    again = peft.PeftModel.from_pretrained(load(folder, "llama"), save)
    with torch.no_grad():
        # In training mode: once evaluated on some CPUs, bitsandbytes' weights are repacked, and a merge reads garbage.
        adapted = again.train()(input_ids=ids).logits
        plain = load(folder, "llama").train()(input_ids=ids).logits
        merged = again.merge_and_unload()
        assert isinstance(merged.model.layers[0].self_attn.q_proj, Linear4bit)
        close = merged.train()(input_ids=ids).logits
    # What is lost by quantizing the merged weights is less than what the adapter adds.
    assert (close - adapted).square().mean() < 0.5 * (plain - adapted).square().mean()
    return losses, {name: raw(t) for name, t in merged.state_dict().items()}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers")
@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear may get different generations:UserWarning:peft")
def test_lora_trains_saves_loads_and_merges_as_on_theirs(workshop, tmp_path):
    case = Case("llama", "bfloat16", "nf4", False, "uint8", sharded=True)
    losses, merged = lora(workshop.ours(case), tmp_path / "ours")
    assert losses[2] < losses[1] < losses[0]
    assert (losses, merged) == lora(workshop.theirs(case), tmp_path / "theirs")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers")
@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear may get different generations:UserWarning:peft")
def test_lora_on_double_quantized_weights_in_other_storage(workshop, tmp_path):
    case = Case("llama-tied", "bfloat16", "nf4", True, "bfloat16", sharded=True)
    losses, _ = lora(workshop.ours(case), tmp_path / "ours")
    assert losses[2] < losses[1] < losses[0]
