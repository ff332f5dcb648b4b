"""A whole QLoRA step on a GPU: no waiting for the device, and the same losses from a replayed CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import halfbyte  # noqa: E402
from halfbyte.integrations.peft import fuse, unfuse  # noqa: E402

# PEFT asks a newer transformers so.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

STEPS, BATCH, LENGTH, VOCABULARY = 8, 2, 24, 160


class Training:
    """A tiny Llama with adapters, its optimizer, and batches; everything that a step reads stays where it is."""

    def __init__(self, fused: bool, nested: bool, dtype: torch.dtype) -> None:
        # Attention by products and softmax: the backward of the fused kernels is not the same from run to run.
        config = transformers.LlamaConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=VOCABULARY, max_position_embeddings=128, use_cache=False, attn_implementation="eager",
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM._from_config(config, dtype=dtype)
        how = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": nested,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
        model = halfbyte.quantize_model(model, how, device="cuda", progress=False)
        lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = peft.get_peft_model(model, lora).train()
        assert fuse(self.model).fused == 14
        if not fused:
            unfuse(self.model)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        assert len(self.trained) == 28
        self.optimizer = torch.optim.AdamW(self.trained, lr=5e-3, capturable=True)
        self.start = [parameter.detach().clone() for parameter in self.trained]
        generator = torch.Generator().manual_seed(1)
        self.batches = torch.randint(VOCABULARY, (STEPS, BATCH, LENGTH), generator=generator).cuda()
        # Half of each batch is the same, so that there is something to learn.
        self.batches[1:, :, : LENGTH // 2] = self.batches[0, :, : LENGTH // 2]
        self.tokens = self.batches[0].clone()
        # Without a mask of its own, transformers looks at the positions, and waits for what it sees.
        least = torch.finfo(dtype).min
        self.mask = torch.full((LENGTH, LENGTH), least, dtype=dtype, device="cuda").triu(1).expand(BATCH, 1, -1, -1)

    def step(self) -> Any:
        """Forward, backward, optimizer; the loss, which is not waited for."""
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = self.model(input_ids=self.tokens, attention_mask=self.mask, labels=self.tokens).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def rewind(self) -> None:
        """Adapters and optimizer as before the first step, in the same memory."""
        with torch.no_grad():
            for parameter, value in zip(self.trained, self.start, strict=True):
                parameter.copy_(value)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()

    def losses(self, step: Callable[[], Any]) -> list[float]:
        """Of one step for each batch, from the beginning."""
        self.rewind()
        found = []
        for batch in self.batches:
            self.tokens.copy_(batch)
            found.append(step().clone())
        return torch.stack(found).tolist()


@pytest.fixture(params=[False, True], ids=["modules", "fused"])
def training(request: pytest.FixtureRequest) -> Training:
    return Training(request.param, nested=True, dtype=torch.bfloat16)


def replayed(training: Training) -> Callable[[], Any]:
    """A whole step as a CUDA graph."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            training.step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        loss = training.step()

    def step() -> Any:
        graph.replay()
        return loss

    return step


def test_training_step_as_a_graph_equals_eager_steps(training: Training) -> None:
    eager = training.losses(training.step)
    assert len(set(eager)) == STEPS
    assert eager[-1] < eager[0] - 0.1, eager
    after = [parameter.detach().clone() for parameter in training.trained]
    step = replayed(training)
    for _ in range(2):
        assert training.losses(step) == pytest.approx(eager, rel=1e-3)
        for parameter, value in zip(training.trained, after, strict=True):
            assert float((parameter.detach() - value).norm()) <= 2e-2 * float(value.norm())


def test_training_step_never_waits_for_the_gpu(training: Training, request: pytest.FixtureRequest) -> None:
    # The first step makes the state of the optimizer, and what layers find out once.
    first = training.step()
    request.getfixturevalue("no_waiting")
    second = training.step()
    torch.cuda.set_sync_debug_mode("default")
    assert float(second) < float(first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_training_step_fused_follows_modules(dtype: torch.dtype, nested: bool) -> None:
    modules, fused = (
        training.losses(training.step) for training in (Training(which, nested, dtype) for which in (False, True))
    )
    assert fused == pytest.approx(modules, rel=5e-3)
    assert fused[-1] < fused[0] - 0.1
