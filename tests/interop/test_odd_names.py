"""Models whose modules are named like the parts of packed weights, saved and loaded by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from halfbyte import BitsAndBytesConfig  # noqa: E402
from halfbyte.nn import Linear4bit, Linear8bitLt  # noqa: E402

NAMES = ("weight", "reweight", "SCB", "SCBlock", "absmax", "quant_map", "weight_format")


class OddConfig(transformers.PretrainedConfig):  # type: ignore[misc,name-defined]
    model_type = "odd_names"


class Odd(transformers.PreTrainedModel):  # type: ignore[misc,name-defined]
    config_class = OddConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.parts = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64) for name in NAMES})
        self.reweight = torch.nn.ModuleDict({"SCB": torch.nn.Linear(64, 64)})
        self.last = torch.nn.Linear(64, 8)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        pass

    def forward(self, x: Any) -> Any:
        for layer in self.parts.values():
            x = layer(x)
        return self.last(self.reweight["SCB"](x))


@pytest.mark.parametrize("bits", [4, 8])
def test_modules_named_like_parts_of_packed_weights_are_loaded(tmp_path: Path, bits: int) -> None:
    torch.manual_seed(0)
    Odd(OddConfig()).save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = Odd.from_pretrained(tmp_path / "dense", quantization_config=config)
    kind = Linear4bit if bits == 4 else Linear8bitLt
    assert sum(isinstance(module, kind) for module in model.modules()) == len(NAMES) + 2
    model.save_pretrained(tmp_path / "packed")
    again = Odd.from_pretrained(tmp_path / "packed", quantization_config=config)
    x = torch.randn(2, 64)
    assert torch.equal(again(x), model(x))
