"""How the checkpoints of transformers' Mixture-of-Experts models call their experts, asked of its conversion tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from halfbyte.models.experts import (
    Names,
    fused,
    fused_paths,
    is_dispatched,
    put_back,
    unfuse_all,
    with_own_memory,
)
from halfbyte.models.layers import is_transformers_model
from halfbyte.nn.experts import Experts4bit
from halfbyte.offline.transformers_names import is_needless, plain

_PROJECTION = re.compile(r"\.\*\.(\w+)\.weight$")


def take_apart(model: Any, keep: Iterable[str]) -> dict[str, nn.Module]:
    """Take the fused experts of a model apart, in place, but those at the paths in `keep`.

    Experts whose checkpoint has them in a way that is not known stay as they are.

    Args:
        model: A transformers model, on any device.
        keep: Paths of modules.

    Returns:
        What was there, by path, for `halfbyte.models.experts.put_back`.
    """
    from transformers.core_model_loading import WeightConverter
    from transformers.quantizers.base import HfQuantizer

    if not hasattr(HfQuantizer, "update_weight_conversions"):
        # Releases before 5.8 do not let a load change their converters.
        return {}
    kept = set(keep)
    paths = [path for path in fused_paths(model.named_modules()) if path not in kept]
    if not paths:
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping

    converters = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter)]
    chosen = {path: _names(path, model.get_submodule(path), converters) for path in paths}
    return unfuse_all(model, {path: names for path, names in chosen.items() if names is not None})


def _names(path: str, module: nn.Module, converters: Iterable[Any]) -> Names | None:
    """How a checkpoint calls the projections of these experts; None where that is not known."""
    how = fused(module)
    assert how is not None
    up, down = _sources(f"{path}.{how.up}", converters), _sources(f"{path}.{how.down}", converters)
    if up is None or down is None:
        return None
    if not up and not down:
        return how.usual_names
    if len(up) != 1 + how.gated or len(down) != 1:
        return None
    return (up[0] if how.gated else None, up[-1], down[0])


def _sources(name: str, converters: Iterable[Any]) -> list[str] | None:
    """What is merged to a parameter; nothing where it is read as it is, None where it comes about in another way."""
    for converter in converters:
        if not any(name.endswith(plain(target)) for target in converter.target_patterns):
            continue
        operations = [type(operation).__name__ for operation in converter.operations]
        if set(operations) == {"Transpose"}:
            return []
        found = [_PROJECTION.search(source) for source in converter.source_patterns]
        merged = operations in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
        if len(converter.target_patterns) > 1 or not merged or not all(found):
            return None
        return [match.group(1) for match in found if match is not None]
    return []


class Apart:
    """Experts that were taken apart, and go together again on an error."""

    def __init__(self, model: nn.Module, before: dict[str, nn.Module]) -> None:
        self._model = model
        self._before = before

    def settle(self, names: Iterable[str]) -> None:
        """Put the experts together again of which nothing is in `names`, paths of layers.

        Of the others, layers that are not in `names` get memory of their own: views of a fused parameter would keep all
        of it, and cannot be saved where it is transposed.
        """
        # A layer is `….experts.<i>.<projection>`.
        chosen = set(names)
        parents = {name.rsplit(".", 2)[0] for name in chosen}
        whole = {path: module for path, module in self._before.items() if path not in parents}
        put_back(self._model, whole)
        self._before = {path: module for path, module in self._before.items() if path in parents}
        for path in self._before:
            for name, layer in self._model.get_submodule(path).named_modules():
                if type(layer) is nn.Linear and f"{path}.{name}" not in chosen:
                    layer.weight.data = with_own_memory(layer.weight.data)

    @property
    def paths(self) -> set[str]:
        """Of the experts that are apart."""
        return set(self._before)

    def join(self, paths: Iterable[str]) -> bool:
        """Put the experts at these paths together again, where transformers can fill them; whether there are any."""
        chosen = set(paths)
        whole = {path: m for path, m in self._before.items() if path in chosen and not is_dispatched(m)}
        put_back(self._model, whole)
        self._before = {path: m for path, m in self._before.items() if path not in whole}
        return bool(whole)

    def keep(self) -> None:
        """From now on they stay apart."""
        self._before = {}

    def undo(self) -> None:
        """Put them together again, unless they are to stay apart."""
        put_back(self._model, self._before)
        self._before = {}


@contextmanager
def apart(model: nn.Module, wanted: bool = True, single: bool = False) -> Iterator[Apart]:
    """Take the fused experts of a model of transformers apart; an error puts them together again.

    Args:
        model: Any module; those of other libraries are left as they are.
        wanted: Whether to take all of them apart.
        single: Whether to take those apart that no matrices of single experts could fill, as a checkpoint has them.
    """
    before: dict[str, nn.Module] = {}
    if (wanted or single) and is_transformers_model(model):
        keep = () if wanted else [path for path, module in model.named_modules() if not is_dispatched(module)]
        before = take_apart(model, keep)
    state = Apart(model, before)
    try:
        yield state
    except BaseException:
        state.undo()
        raise


def mapping_for(model: Any, mapping: Iterable[Any]) -> list[Any]:
    """Transformers' tables for a model some of whose experts may have been taken apart.

    What merges experts to a tensor that the model has not is left out, and what splits such tensors is added.
    """
    given = list(mapping)
    if not any(isinstance(module, Experts4bit) for module in model.modules()):
        return given
    from halfbyte.models.transformers_split import split_converters

    names = list(model.state_dict())
    needed = [entry for entry in given if not hasattr(entry, "operations") or not is_needless(entry, names)]
    # The first converter that matches is taken, and transformers may have one for the same names, which transposes.
    return [*split_converters(model, given), *needed]
