"""Make packed layers recognizable to libraries that look for bitsandbytes' names and classes."""

from __future__ import annotations

import functools
from types import ModuleType

from torch import nn

from halfbyte.integrations._when_imported import when_imported
from halfbyte.integrations.served import has_bitsandbytes


def serve_bitsandbytes(model: nn.Module) -> None:
    """Make the packed layers of a model pass the checks that libraries use to find bitsandbytes' layers."""
    if has_bitsandbytes():
        from halfbyte.integrations.bitsandbytes import promote

        promote(model)
    else:
        from halfbyte import compat

        compat.offer()
    _await_peft()


@functools.cache
def _await_peft() -> None:
    """Let merges say what they cost, and adapters of another base be refused, once PEFT is there."""

    def enter(tuners_utils: ModuleType) -> None:
        from halfbyte.integrations.peft import merging

        merging.enter(tuners_utils)

    def enter_models(peft_model: ModuleType) -> None:
        from halfbyte.integrations.peft import another_base

        another_base.enter(peft_model)

    def enter_transformers(peft: ModuleType) -> None:
        from halfbyte.integrations.peft import another_base

        another_base.enter_transformers(peft)

    when_imported("peft.tuners.tuners_utils", enter)
    when_imported("peft.peft_model", enter_models)
    when_imported("transformers.integrations.peft", enter_transformers)
