"""PEFT: adapters on the experts of a Mixture-of-Experts model whose experts are layers of their own.

transformers 5 holds the experts of most models as fused parameters. PEFT therefore rewrites a config that names their
projections, and merges the tensors of adapters that have one for each expert. Where the experts are `Experts4bit`, both
would miss their layers. There adapters are added to the layers, and saved under the names that PEFT gave them before
transformers 5, which it reads for fused parameters too. Adapters of fused parameters are split when they are loaded.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from halfbyte.nn.experts import Experts4bit

_logger = logging.getLogger(__name__)


def enter(conversion: ModuleType) -> None:
    """Wrap the two functions of `peft.utils.transformers_weight_conversion` that PEFT calls; once."""
    of_config = conversion.convert_peft_config_for_transformers
    if hasattr(of_config, "__halfbyte__"):
        return
    of_tensors = conversion.convert_peft_adapter_state_dict_for_transformers

    @functools.wraps(of_config)
    def config(peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not any(_experts(model)):
            return of_config(peft_config, model, *args, **kwargs)
        _to_layers(peft_config, model)
        return None

    @functools.wraps(of_tensors)
    def tensors(
        model: nn.Module, peft_config: Any, adapter_state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        if not any(_experts(model)):
            return of_tensors(model, peft_config, adapter_state_dict, *args, **kwargs)
        return _split(adapter_state_dict, dict(_experts(model)))

    config.__halfbyte__ = True  # type: ignore[attr-defined]
    vars(conversion).update(
        convert_peft_config_for_transformers=config, convert_peft_adapter_state_dict_for_transformers=tensors
    )


def _experts(model: nn.Module) -> Iterator[tuple[str, Experts4bit]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Experts4bit))


def _to_layers(config: Any, model: nn.Module) -> None:
    """Have a config name the layers of the experts where it names fused parameters of them."""
    fused, names = [], dict[str, None]()
    for parameter in getattr(config, "target_parameters", None) or ():
        for gate, up, down in {experts.projections for _, experts in _experts(model)}:
            leaf = parameter.rpartition(".")[2]
            found = {"gate_up_proj": (gate, up), "up_proj": (up,), "down_proj": (down,)}.get(leaf, ())
            names.update(dict.fromkeys(name for name in found if name))
            if found and parameter not in fused:
                fused.append(parameter)
    if not fused:
        return
    left = [parameter for parameter in config.target_parameters if parameter not in fused]
    modules = config.target_modules
    if isinstance(modules, str) and modules.lower() == "all-linear":
        pass
    elif not isinstance(modules, str) and not _others(model, names):
        # In this form PEFT reads the adapter for a model with fused experts too.
        config.target_modules = {*(modules or ()), *names}
    else:
        # By a pattern: a set of paths would be compared with each module, one by one.
        pattern = rf".*\.\d+\.({'|'.join(map(re.escape, names))})"
        if isinstance(modules, str):
            pattern = f"({modules})|{pattern}"
        elif modules:
            pattern = rf"(.*\.)?({'|'.join(map(re.escape, sorted(modules)))})|{pattern}"
        config.target_modules = pattern
    config.target_parameters = left or None
    _logger.info(
        "target_parameters %s: the experts are layers here: target_modules is %r", fused, config.target_modules
    )


def _others(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether layers that belong to no expert have one of these names."""
    inside = {module for _, experts in _experts(model) for module in experts.modules()}
    return any(path.rpartition(".")[2] in names and module not in inside for path, module in model.named_modules())


def _split(tensors: Mapping[str, Tensor], experts: Mapping[str, Experts4bit]) -> dict[str, Tensor]:
    """Adapters of fused parameters to those of the experts' layers; all other tensors as they are.

    PEFT has the rows of A expert by expert, the columns of B rank by rank: `[experts * r, in]`, `[out, r * experts]`.
    """
    made: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.*?)(\.base_layer)?\.(lora_[AB])\.weight", key)
        module = next((m for path, m in experts.items() if match and match.group(1).endswith(path)), None)
        if match is None or module is None or tensor.dim() != 2:
            made[key] = tensor
            continue
        gate, up, down = module.projections
        first: Any = module._modules["0"]
        count, side = module.num_experts, match.group(3)
        inner = getattr(first, down)
        # The parameter is told by its shape; where gate and down are square, by its place: PEFT wraps down last.
        width = inner.in_features if side == "lora_A" else inner.out_features
        is_down = tensor.shape[1 if side == "lora_A" else 0] == width and not match.group(2)
        for index in range(count):
            part = (
                tensor.reshape(count, -1, tensor.shape[1])[index]
                if side == "lora_A"
                else tensor.reshape(tensor.shape[0], -1, count)[..., index]
            )
            names = [down] if is_down else [name for name in (gate, up) if name]
            if side == "lora_A":
                parts = [part] * len(names)
            elif module.interleaved and len(names) == 2:
                parts = [part[0::2], part[1::2]]
            else:
                parts = list(part.chunk(len(names)))
            for name, piece in zip(names, parts, strict=True):
                made[f"{match.group(1)}.{index}.{name}.{side}.weight"] = piece.contiguous()
    return made
