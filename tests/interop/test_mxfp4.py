"""Checkpoints in MXFP4, which are not packed while they are loaded."""

from __future__ import annotations

import halfbyte
import pytest
from transformers.quantizers.auto import AutoHfQuantizer


def test_an_mxfp4_checkpoint_with_a_4_bit_config_is_refused_with_the_command_that_converts_it() -> None:
    config = halfbyte.BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match=r"quant_method 'mxfp4'.*`halfbyte quantize`, which decodes MXFP4$"):
        AutoHfQuantizer.merge_quantization_configs({"quant_method": "mxfp4"}, config)
