"""What transformers calls a checkpoint's tensors: its models rename what older files hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def renamed(
    model: PreTrainedModel, names: Iterable[str], mapping: Iterable[Any] | None = None
) -> Iterator[tuple[str, str | None, str | None, Any]]:
    """What transformers calls each tensor of a checkpoint in the model, in the order in which it loads them.

    Args:
        model: The model, on any device.
        names: Of the checkpoint's tensors.
        mapping: transformers' tables for the model, where they are not its own.

    Yields:
        The name; that in the model's state dict, None where the model has no such tensor; and, where the tensor is
        first merged with others or split, the pattern that says so and transformers' converter for it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model) if mapping is None else list(mapping)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    # Only whether a name is there counts; a value of None would mean that it is not.
    parameters: Any = dict.fromkeys(model.state_dict(), True)
    prefix = model.base_model_prefix
    # Sorted as transformers does: some renamings depend on what came before.
    for name in sorted(names, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if key not in parameters and name in parameters:
            key, pattern = rename_source_key(name, [], [], prefix, parameters)
        yield name, key if key in parameters else None, pattern, None if pattern is None else by_pattern[pattern]


def is_needless(converter: Any, names: list[str]) -> bool:
    """Whether a converter makes a tensor that a model has not, of tensors that it has."""
    targets = [plain(target) for target in converter.target_patterns]
    if any(target in name for target in targets for name in names):
        return False
    return any(converter.compiled_sources.search(name) for name in names)


def plain(pattern: str) -> str:
    """The name that a target pattern of transformers' tables stands for."""
    return pattern.replace("\\", "").removeprefix("^").removesuffix("$")
