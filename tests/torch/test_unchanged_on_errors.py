"""Filling a model from a checkpoint: an error after reading has begun leaves the model as it was."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import halfbyte  # noqa: E402  (needs torch)
import tiny_models  # noqa: E402
from halfbyte.models.checkpoint_reader import Folder  # noqa: E402
from torch import nn  # noqa: E402
from torch_models import NF4  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet_transformers")

CLASSES = {"LlamaForCausalLM": 14, "GPT2LMHeadModel": 8, "MixtralForCausalLM": 32}
"""With buffers that no checkpoint holds, with transposed weights, with experts that are taken apart; their layers."""


def empty(name: str) -> Any:
    with torch.device("meta"):
        return getattr(transformers, name)(tiny_models.tiny_config(name))


def picture(model: nn.Module) -> dict[str, Any]:
    """The modules of a model and its tensors, as the objects that they are."""
    return {
        **dict(model.named_modules(remove_duplicate=False)),
        **{f"{name} (parameter)": p for name, p in model.named_parameters(remove_duplicate=False)},
        **{f"{name} (buffer)": (b.is_meta, b.shape) for name, b in model.named_buffers(remove_duplicate=False)},
    }


def is_same(model: nn.Module, before: dict[str, Any]) -> bool:
    after = picture(model)
    return after.keys() == before.keys() and all(
        after[key] == value if isinstance(value, tuple) else after[key] is value for key, value in before.items()
    )


@pytest.mark.parametrize("name", CLASSES)
def test_quantize_model_from_a_checkpoint_that_is_interrupted_changes_nothing(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, model = tiny_models.save(name, tmp_path), empty(name)
    before = picture(model)

    def stop(done: int, total: int, layer: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        halfbyte.quantize_model(model, NF4, checkpoint=folder, progress=stop)
    told = f"stopped after 5 of {CLASSES[name]} layers: the model is unchanged"
    assert told in caplog.text
    if sys.version_info >= (3, 11):
        assert told in caught.value.__notes__[0]
    assert is_same(model, before)
    # The same model can be filled all the same.
    ids = torch.arange(8)[None]
    want = halfbyte.quantize_model(empty(name), NF4, checkpoint=folder)
    filled = halfbyte.quantize_model(model, NF4, checkpoint=folder)
    with torch.inference_mode():
        assert torch.equal(filled.eval()(ids).logits, want.eval()(ids).logits)


@pytest.mark.parametrize("name", CLASSES)
def test_load_quantized_from_a_file_that_cannot_be_read_changes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "saved"
    halfbyte.quantize_checkpoint(tiny_models.save(name, tmp_path / "source"), saved, config=NF4, progress=None)
    model = empty(name)
    before = picture(model)
    view = Folder.view

    def broken(self: Folder, tensor: str) -> torch.Tensor:
        if "norm" in tensor or "ln_f" in tensor:
            raise OSError("the disk is gone")
        return view(self, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "view", broken)
        with pytest.raises(OSError, match="the disk is gone"):
            halfbyte.load_quantized(model, saved)
    assert is_same(model, before)
    assert model.dtype.is_floating_point
    assert not any(p.is_meta for p in halfbyte.load_quantized(model, saved).parameters())
