"""What becomes of packed experts on their way into a model, where a checkpoint has several matrices as one weight.

The layouts are those of `halfbyte.models.expert_layouts`, which has checked the checkpoint before anything is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, WeightRenaming

from halfbyte.integrations.transformers.operations import Operation, Quantizer
from halfbyte.models import packed
from halfbyte.models.expert_stacks import Stacked
from halfbyte.models.recipe import PACKED_LAYERS
from halfbyte.models.transformers_split import Split, Target, on_cpu, targets
from halfbyte.nn import Params4bit
from halfbyte.state import PACKED_KEYS, TENSOR_KEYS, QuantState

_CODES, _BARE = "codes", "bare"
_ENDS = {
    **{rf"\.{re.escape(key)}": key for key in (*reversed(TENSOR_KEYS), *PACKED_KEYS)},
    # Last: older releases take the first pattern that matches.
    "": _CODES,
}


class Renaming(WeightRenaming):
    """A name of the checkpoint that the model, saved again, does not have."""

    __slots__ = ()


class Unstack(Operation):
    """Packed weights of several matrices to one for each; dense ones are split."""

    def __init__(self, hf_quantizer: Quantizer, split: Split, keys: Mapping[str, str], dtype: torch.dtype) -> None:
        """Remember what the patterns of the converter stand for, and the dtype of weights that do not say theirs."""
        super().__init__(hf_quantizer)
        self.split = split
        self.keys = keys
        self.dtype = dtype

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Make the weights of the experts of one layer, or of one expert; names are those in the model."""
        parts: dict[str, Tensor] = {
            self.keys[pattern]: value[0] if isinstance(value, list) else value for pattern, value in input_dict.items()
        }
        path, how, parameter = self.split.of(full_layer_name)
        experts = model.get_submodule(path)
        stacked = Stacked.of(how, parameter, experts)
        codes = parts.pop(_CODES)
        made: list[tuple[int, int, Any]]
        if not parts and codes.dim() == 3:
            dense = self.split.convert({"": codes}, full_layer_name=full_layer_name, model=model)
            return {name: weight.to(model.get_parameter(name).dtype) for name, weight in dense.items()}
        first = int(full_layer_name.rsplit(".", 3)[1])
        if not parts:
            made = [(first, place, codes[rows].contiguous()) for place, rows in stacked.rows.items()]
        elif _BARE in parts:
            state = stacked.state(parts[_BARE], codes, self.hf_quantizer.config.bnb_4bit_quant_type, self.dtype)
            made = _numbered(0, stacked.split(codes, state))
        else:
            weight = packed.parameter(4, codes, parts)
            assert isinstance(weight, Params4bit)
            assert weight.quant_state is not None
            if len(weight.quant_state.shape or ()) == 3:
                made = _numbered(0, stacked.split(weight.data, weight.quant_state))
            else:
                made = _numbered(first, [stacked.split_one(weight.data, weight.quant_state)])
        return dict(
            self._placed(model, f"{path}.{index}.{experts.projections[place]}", one) for index, place, one in made
        )

    def _placed(self, model: Any, layer: str, made: Any) -> tuple[str, Any]:
        """The weight of a layer under its name."""
        module = model.get_submodule(layer)
        if not isinstance(made, tuple):
            return f"{layer}.weight", made.to(module.weight.dtype)
        codes, state = made
        weight = Params4bit(
            codes,
            requires_grad=False,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=codes.dtype,
            bnb_quantized=True,
        )
        if not isinstance(module, PACKED_LAYERS):
            return f"{layer}.weight", packed.dense(weight, module.weight.dtype)
        module._is_hf_initialized = True  # type: ignore[assignment]
        return f"{layer}.weight", self.hf_quantizer.place(f"{layer}.weight", module, weight)


class StackBiases(Operation):
    """The biases of single experts to the parameter that has them all."""

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Stack them, in the order in which transformers collects them, which is that of the numbers."""
        (biases,) = input_dict.values()
        return {full_layer_name: torch.stack(biases).to(model.get_parameter(full_layer_name).dtype)}


def _numbered(
    first: int, experts: list[dict[int, tuple[Tensor, QuantState]]]
) -> list[tuple[int, int, tuple[Tensor, QuantState]]]:
    return [(first + index, place, made) for index, matrices in enumerate(experts) for place, made in matrices.items()]


def unstacked(model: nn.Module, given: Iterable[Any], hf_quantizer: Any, dtype: torch.dtype) -> list[Any]:
    """The converters of a model, those that split dense experts replaced by ones that split packed ones too.

    Args:
        model: With experts that were taken apart.
        given: The converters of the model's architecture.
        hf_quantizer: The quantizer that loads it.
        dtype: Of weights that do not say what they were quantized from.
    """
    kept = [entry for entry in given if not any(isinstance(op, Split) for op in getattr(entry, "operations", ()))]
    added: list[Any] = []
    if not any(".router.linear." in name for name in model.state_dict()):
        added.append(Renaming(r"\.router\.linear\.", ".router."))
    for target in targets(model, kept):
        of_all = rf"(?<=\.){re.escape(target.experts)}\.{target.parameter}"
        bare = rf"(?<=\.){re.escape(target.experts)}\.{'gate_up' if _is_up(target) else 'down'}_absmax$"
        keys = {f"{of_all}{end}$": key for end, key in _ENDS.items()}
        keys = {bare: _BARE, **keys}
        of_one = rf"(?<=\.){re.escape(target.experts)}\.{target.parameter}s\.(\d+)\.weight"
        keys_of_one = {f"{of_one}{end}$": key for end, key in _ENDS.items()}
        for index, patterns in (("0", keys), (r"\1", keys_of_one)):
            added.append(
                WeightConverter(
                    list(patterns),
                    f"{target.experts}.{index}.{target.projection}.weight",
                    operations=[Unstack(hf_quantizer, target.split, patterns, dtype)],
                    **on_cpu(),
                )
            )
        added.append(
            WeightConverter(
                rf"(?<=\.){re.escape(target.experts)}\.{target.parameter}s\.\d+\.bias$",
                f"{target.experts}.{target.parameter}_bias",
                operations=[StackBiases(hf_quantizer)],
            )
        )
    return [*added, *kept]


def _is_up(target: Target) -> bool:
    return any(parameter == how.up for how, parameter in target.split.parts.values())
