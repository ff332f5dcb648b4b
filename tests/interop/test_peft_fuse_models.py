"""`halfbyte.integrations.peft.fuse` and everything that PEFT does with its layers, and what is left to PEFT."""

from __future__ import annotations

import copy
import io
import logging
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import halfbyte  # noqa: E402
from compilers import needs_compiler  # noqa: E402
from halfbyte.integrations import peft as integration  # noqa: E402
from halfbyte.integrations.peft import fuse, unfuse  # noqa: E402
from halfbyte.integrations.peft.layers import is_fused  # noqa: E402
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit  # noqa: E402
from peft_models import IDS, LAYERS, MARKS, adapted, base_model, difference, first, gradients, lora_config  # noqa: E402
from torch import nn  # noqa: E402

pytestmark = MARKS


@torch.no_grad()
def logits(model: Any) -> Any:
    return model.eval()(IDS).logits


# ---- what PEFT does with its layers ----------------------------------------------------------------------------------


def test_fused_are_the_layers_that_peft_makes() -> None:
    """Without a call: PEFT's own class, computed as after `fuse`; `unfuse` gives PEFT's numbers."""
    model = adapted(fused=True)
    assert type(first(model)) is PeftLinear4bit
    found = gradients(model)
    fuse(model)
    after = gradients(model)
    assert found[0] == after[0]
    assert all(torch.equal(after[1][name], grad) for name, grad in found[1].items())
    assert unfuse(model) == LAYERS
    theirs = gradients(model)
    assert theirs[0] == pytest.approx(found[0], rel=1e-6)
    assert difference(found[1], theirs[1]) < 2e-6


def test_fused_calls_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers that PEFT makes do not call their adapters' modules; after `unfuse` they do."""
    called: list[nn.Module] = []
    original = nn.Linear.forward
    model = adapted(fused=True)
    mine = {id(module) for name, module in model.named_modules() if "lora_" in name}

    def forward(self: nn.Linear, x: Any) -> Any:
        if id(self) in mine:
            called.append(self)
        return original(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    logits(model)
    assert not called
    unfuse(model)
    logits(model)
    assert len(called) == 2 * LAYERS


@pytest.mark.slow
def test_fused_layers_are_left_alone_when_asked_by_the_environment(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import halfbyte, peft, torch\n"
        "from peft_models import adapted, first\n"
        "from halfbyte.integrations.peft import fuse, unfuse\n"
        "from halfbyte.integrations.peft.layers import is_fused\n"
        "model = adapted(fused=True)\n"
        "assert not is_fused(first(model)) and unfuse(model) == 0\n"
        "assert fuse(model).fused and is_fused(first(model))\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[1] / "support"), *filter(None, sys.path)])
    environment = {**os.environ, "HALFBYTE_FUSE_LORA": "0", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_fused_forward_that_another_library_replaces_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(fused=True)
    original = PeftLinear4bit.forward
    monkeypatch.setattr(PeftLinear4bit, "forward", lambda self, x, *args: original(self, x, *args) * 0)
    assert not first(model)(torch.ones(1, 64)).any()
    report = fuse(model)
    assert report.fused == 0
    assert "its forward was replaced" in next(iter(report.left))


def test_unfuse_restores_class_state_and_numbers() -> None:
    model = adapted()
    before = gradients(model)
    classes = [type(module) for module in model.modules()]
    objects = dict(model.state_dict(keep_vars=True))
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    report = fuse(model)
    assert report == integration.FuseReport(LAYERS, {})
    assert type(first(model)) is PeftLinear4bit
    assert fuse(model) == report
    state = model.state_dict(keep_vars=True)
    assert list(state) == list(objects)
    assert all(state[name] is objects[name] for name in state if "lora_" in name)
    assert unfuse(model) == LAYERS
    assert [type(module) for module in model.modules()] == classes
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert unfuse(model) == 0
    after = gradients(model)
    assert before[0] == after[0]
    assert all(torch.equal(after[1][name], grad) for name, grad in before[1].items())


def test_fuse_with_several_adapters() -> None:
    model = adapted()
    fuse(model)
    model.add_adapter("other", lora_config(r=8, lora_alpha=4))
    model.base_model.set_adapter(["default", "other"])
    found = gradients(model)
    assert len(found[1]) == 4 * LAYERS
    unfuse(model)
    expected = gradients(model)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert difference(found[1], expected[1]) < 2e-6
    fuse(model)
    for names in ("other", "default", ["other"]):
        model.base_model.set_adapter(names)
        found = gradients(model)
        assert len(found[1]) == 2 * LAYERS
        unfuse(model)
        assert found[0] == pytest.approx(gradients(model)[0], rel=1e-6)
        fuse(model)
    model.set_adapter("default")
    expected = logits(model)
    model.delete_adapter("other")
    assert torch.equal(logits(model), expected)


def test_fuse_leaves_disabled_merged_and_mixed_calls_to_peft() -> None:
    model = adapted()
    model.add_adapter("other", lora_config())
    model.eval()
    batch = {"input_ids": IDS, "adapter_names": ["other", "__base__"]}
    with torch.no_grad():
        expected = model(**batch).logits
        fuse(model)
        assert torch.equal(model(**batch).logits, expected)
        with model.disable_adapter():
            base = model(IDS).logits
        assert torch.equal(base[1], expected[1])
    with_adapter = logits(model)
    assert not torch.allclose(with_adapter, base)
    model.merge_adapter()
    merged = logits(model)
    assert not torch.equal(merged, base)
    unfuse(model)
    assert torch.equal(logits(model), merged)
    fuse(model)
    model.unmerge_adapter()
    assert first(model).merged_adapters == []


def test_fuse_then_merge_and_unload() -> None:
    results = []
    for fused in (False, True):
        model = adapted()
        if fused:
            fuse(model)
        merged = model.merge_and_unload()
        assert not any(isinstance(module, PeftLinear4bit) for module in merged.modules())
        results.append(logits(merged))
    assert torch.equal(*results)
    model = adapted()
    with model.disable_adapter():
        expected = logits(model)
    fuse(model)
    assert torch.equal(logits(model.unload()), expected)


# Older releases of PEFT look for the config of the base, which is in no folder.
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_fuse_then_save_and_load_the_adapter(tmp_path: Path) -> None:
    model = adapted()
    plain = peft.get_peft_model_state_dict(model)
    fuse(model)
    state = peft.get_peft_model_state_dict(model)
    assert list(state) == list(plain)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base_model(), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(again), logits(model))
    assert fuse(again).fused == LAYERS
    assert torch.equal(logits(again), logits(model))


def test_fuse_survives_deepcopy_and_pickle() -> None:
    model = adapted()
    fuse(model)
    expected = gradients(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = gradients(copied)
        assert found[0] == expected[0]
        assert all(torch.equal(found[1][name], grad) for name, grad in expected[1].items())
        assert unfuse(copied) == LAYERS
        assert is_fused(first(model))
        assert not is_fused(first(copied))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    model.load_state_dict(torch.load(buffer))


@pytest.mark.slow
@needs_compiler
def test_fuse_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    model = adapted()
    expected = gradients(model)
    fuse(model)
    plain = model.forward
    model.forward = torch.compile(plain, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of the compiler, about what transformers' code does.
        found = gradients(model)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert difference(found[1], expected[1]) < 1e-4
    torch._dynamo.reset()


# ---- what is left to PEFT --------------------------------------------------------------------------------------------


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("halfbyte.integrations.peft")]


def test_fuse_leaves_dora_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    model = adapted(use_dora=True)
    expected = gradients(model)
    report = fuse(model)
    assert report.fused == 0
    assert sum(report.left.values()) == LAYERS
    (reason,) = report.left
    assert "DoraLinearVariant" in reason
    fuse(model)
    assert len(messages(caplog)) == 1
    assert reason in messages(caplog)[0]
    found = gradients(model)
    assert all(torch.equal(found[1][name], grad) for name, grad in expected[1].items())


def test_fuse_leaves_an_active_dora_adapter_at_the_call(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = adapted(lora_dropout=0.5)
    model.add_adapter("dora", lora_config(use_dora=True))
    model.base_model.set_adapter(["default", "dora"])
    expected = gradients(model)
    assert fuse(model) == integration.FuseReport(LAYERS, {})
    found = gradients(model)
    # Nothing was dropped before it was known that PEFT computes.
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], grad) for name, grad in expected[1].items())
    assert len(messages(caplog)) == 1
    assert "DoraLinearVariant" in messages(caplog)[0]


def test_fuse_leaves_adapters_with_a_bias() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, that such adapters cannot be merged.
        model = adapted(lora_bias=True)
    (reason,) = fuse(model).left
    assert "lora_bias" in reason


def test_fuse_leaves_other_layers_of_peft() -> None:
    model = adapted(config=lora_config(target_modules=["q_proj", "lm_head", "embed_tokens"]))
    report = fuse(model)
    assert report.fused == 2
    assert sorted(report.left.values()) == [1, 1]
    assert all("it is not PEFT's LoRA layer for 4-bit weights" in reason for reason in report.left)
    assert any("torch.nn.modules.linear.Linear" in reason for reason in report.left)


def test_fuse_leaves_layers_of_bitsandbytes() -> None:
    import bitsandbytes

    base = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
    assert not isinstance(base, halfbyte.nn.Linear4bit)
    model = nn.ModuleDict({"layer": PeftLinear4bit(base, "default", config=peft.LoraConfig(), r=4)})
    report = fuse(model)
    assert report.fused == 0
    assert "the base layer is not halfbyte's Linear4bit" in next(iter(report.left))


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default"])
def test_fuse_runs_hooks_of_parts(part: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = adapted()
    expected = logits(model)
    fuse(model)
    calls = []
    handle = first(model).get_submodule(part).register_forward_hook(lambda *given: calls.append(given))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 1
    assert len(messages(caplog)) == 1
    assert "hooks" in messages(caplog)[0]
    handle.remove()
    logits(model)
    assert len(calls) == 1


def test_fuse_beside_accelerates_hooks() -> None:
    """Those of a layer that stays where it is change nothing; those of an offloaded one bring its weight."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = adapted()
    expected = logits(model)
    base = first(model).base_layer
    for hook, fused in (
        (AlignDevicesHook(execution_device="cpu"), True),
        (AlignDevicesHook(io_same_device=True), False),
    ):
        add_hook_to_module(base, hook)
        report = fuse(model)
        assert (report.fused == LAYERS) == fused, report
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        unfuse(model)


def test_fuse_refuses_what_has_no_adapters() -> None:
    with pytest.raises(ValueError, match="model must have LoRA layers of PEFT, got LlamaForCausalLM without any"):
        fuse(base_model())
    for function in (fuse, unfuse):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
            function("model")


def test_fuse_of_a_part_of_a_model() -> None:
    model = adapted()
    assert fuse(model.base_model.model.model.layers[0]).fused == LAYERS // 2
    assert unfuse(model) == LAYERS // 2
