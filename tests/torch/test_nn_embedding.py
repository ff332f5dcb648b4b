"""`Embedding4bit`."""

from __future__ import annotations

import pytest
import torch
import torch_reference as ref
from halfbyte.nn import Embedding4bit, EmbeddingFP4, EmbeddingNF4
from packed_layers import FLOATS, STORAGES, keys_of


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("dim", [64, 65, 1, 128, 96, 200])
def test_embedding(dim, storage):
    for quant_type in ("nf4", "fp4"):
        table = Embedding4bit(30, dim, quant_type=quant_type, quant_storage=storage)
        dense = table.weight.detach().clone()
        table = table.to("cpu")
        assert torch.equal(table.dequantize(), ref.quantize_4bit(dense, quant_type).values)
        for indices in (
            torch.arange(30),
            torch.randint(0, 30, (2, 3, 4)),
            torch.tensor([29, 0, 29], dtype=torch.int32),
            torch.tensor(7),
            torch.empty(0, 3, dtype=torch.long),
            torch.randint(0, 30, (6, 4)).t(),
        ):
            assert torch.equal(table(indices), torch.nn.functional.embedding(indices.long(), table.dequantize()))
        for bad in (30, -1):
            with pytest.raises(IndexError, match=f"indices must be from 0 to 29, got {bad}"):
                table(torch.tensor([0, bad]))
        with pytest.raises(TypeError, match=r"indices: dtype torch.float32"):
            table(torch.tensor([1.0]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_embedding_is_saved_and_loaded(dtype):
    for kind, quant_type in ((EmbeddingNF4, "nf4"), (EmbeddingFP4, "fp4")):
        table = kind(30, 40, dtype=dtype).to("cpu")
        saved = table.state_dict()
        assert saved.keys() == keys_of(quant_type, nested=False, bias=False)
        for other in (kind(30, 40, dtype=dtype), kind(30, 40, dtype=dtype, device="meta")):
            other.load_state_dict(saved, assign=other.weight.is_meta)
            assert torch.equal(other(torch.arange(30)), table(torch.arange(30)))
            assert other(torch.arange(3)).dtype == dtype
        dense = torch.nn.Embedding(30, 40, dtype=dtype)
        table.load_state_dict(dense.state_dict())
        assert torch.equal(table.dequantize(), ref.quantize_4bit(dense.weight, quant_type).values)
