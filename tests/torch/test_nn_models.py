"""Whole models of packed modules: training, compilation, checkpointing, threads."""

from __future__ import annotations

import threading

import pytest
import torch
from compilers import needs_compiler
from halfbyte.nn import LinearNF4, Params4bit
from packed_layers import bytes_of, quantized
from torch.utils.checkpoint import checkpoint


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            layer = LinearNF4(module.in_features, module.out_features, bias=module.bias is not None)
            layer.load_state_dict(module.state_dict())
            model.set_submodule(name, layer)
    return model


@pytest.mark.slow
@needs_compiler
def test_training_step_of_a_compiled_llama():
    """No graph break, sizes that change, and the gradients of the eager step."""
    torch._dynamo.reset()
    model = tiny_llama()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) < len(list(model.parameters()))
    products = []

    def backend(graph, inputs):
        products.append(sum("halfbyte.linear_4bit" in str(node.target) for node in graph.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for batch, length in ((2, 8), (3, 5)):
        tokens = torch.randint(0, 64, (batch, length))
        results = []
        for step in (model, compiled):
            model.zero_grad()
            loss = step(input_ids=tokens, labels=tokens).loss
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in trained)])
        torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
    assert set(products) == {14}


def test_training_reduces_the_loss_and_leaves_the_weights():
    model = tiny_llama()
    packed = {n: bytes_of(p) for n, p in model.named_parameters() if isinstance(p, Params4bit)}
    assert len(packed) == 14
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(0, 64, (4, 16))
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, param in model.named_parameters():
        if name in packed:
            assert torch.equal(bytes_of(param), packed[name])
            assert param.grad is None


def checkpointing(forward, reentrant):
    def run(hidden, **kwargs):
        return checkpoint(lambda hidden: forward(hidden, **kwargs), hidden, use_reentrant=reentrant)

    return run


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_a_model(reentrant):
    model = tiny_llama()
    tokens = torch.randint(0, 64, (2, 8))
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            for layer in model.model.layers:
                layer.forward = checkpointing(layer.forward, reentrant)
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_threads_share_a_module():
    _, layer = quantized(256, 512, dtype=torch.bfloat16)
    inputs = [torch.randn(1 + 3 * i, 512) for i in range(8)]
    expected = [layer(x).detach() for x in inputs]
    failures = []

    def work(i):
        for _ in range(25):
            x = inputs[i].clone().requires_grad_()
            y = layer(x)
            y.sum().backward()
            if not torch.equal(y, expected[i]) or x.grad is None:
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
