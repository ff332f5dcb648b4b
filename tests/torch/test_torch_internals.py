"""Private names of torch that a release may lack: without any one of them, the operations do what they did."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import fresh
import pytest
from halfbyte.ops import _torch_internals

SOURCE = Path(inspect.getfile(_torch_internals))

# Without one of these nobody knows whether the dispatcher is needed.
QUESTIONS = {
    "torch._C._len_torch_dispatch_stack",
    "torch._C._len_torch_function_stack",
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._get_tracing_state",
    "torch.autograd.forward_ad._current_level",
}


def private_names() -> list[str]:
    """The names that the module asks torch for, in full."""
    found = set()
    for node in ast.walk(ast.parse(SOURCE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            owner, name = node.args[:2]
            assert isinstance(name, ast.Constant)
            found.add(f"{ast.unparse(owner)}.{name.value}")
    private = {name for name in found if name.startswith("torch.") and "._" in name}
    # `torch._C` itself is no question.
    return sorted(name for name in private if not any(other.startswith(f"{name}.") for other in private))


# The module sees torch through this, which has all of torch but one name.
WITHOUT = """
class Without:
    def __init__(self, real, name, hidden):
        self.real, self.name, self.hidden = real, name, hidden

    def __getattr__(self, attribute):
        name = f"{self.name}.{attribute}"
        if name == self.hidden:
            asked.append(name)
            raise AttributeError(name)
        value = getattr(self.real, attribute)
        return Without(value, name, self.hidden) if self.hidden.startswith(f"{name}.") else value


import sys, torch
asked = []
sys.modules["torch"] = Without(torch, "torch", hidden)
import halfbyte.ops._torch_internals
sys.modules["torch"] = torch
"""

OPERATIONS = """
import copy, hashlib, torch
from halfbyte import functional, nn
from halfbyte.ops import dispatch

torch.manual_seed(7)
results = []
weight = torch.randn(64, 96)
x = torch.randn(3, 96)
for nested in (False, True):
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    dense = functional.dequantize_4bit(packed, state)
    results += [packed, dense, functional.dequantize_4bit(packed, state, out=torch.empty_like(dense))]
    results.append(functional.matmul_4bit(x, packed.t(), state))
codes, state = functional.quantize_blockwise(weight)
results += [codes, functional.dequantize_blockwise(codes, state), *functional.int8_vectorwise_quant(weight.half())[:2]]

layer = nn.Linear4bit(96, 64, quant_type="nf4")
layer.load_state_dict({"weight": weight, "bias": torch.arange(64.0)})
layer = copy.deepcopy(layer.to("cpu"))
layer.to(torch.float16), layer.weight.to(torch.empty(0)), layer.weight.to(torch.device("cpu"), non_blocking=True)
layer.bias.data = layer.bias.data.float()
again = nn.Linear4bit(96, 64, quant_type="nf4")
again.load_state_dict(layer.state_dict())
table = nn.Embedding4bit(64, 96, quant_type="nf4")
table.load_state_dict({"weight": weight})
results += [layer(x), again(x), table(torch.tensor([5, 0, 63])), layer.dequantize()]

y = x.clone().requires_grad_()
out = layer(y)
(grad,) = torch.autograd.grad(out.square().sum(), y, create_graph=True)
results += [grad, *torch.autograd.grad(grad.sum(), y)]
with torch.autocast("cpu", torch.bfloat16):
    results.append(layer(x))
with torch.inference_mode():
    results.append(layer(x))
results.append(torch.func.vmap(layer)(x[None]))
digest = hashlib.sha256()
for result in results:
    digest.update(result.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
print(len(results), digest.hexdigest(), dispatch.kernels(x) is None)
"""


@pytest.fixture(scope="module")
def usual() -> str:
    """What the operations give with all names."""
    done = fresh.run(OPERATIONS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" False\n")
    return done.stdout.rpartition(" ")[0]


def test_torch_internals_are_found():
    names = private_names()
    assert set(names) >= QUESTIONS
    assert len(names) >= 12


@pytest.mark.slow
@pytest.mark.parametrize("name", private_names())
def test_torch_internals_missing(name: str, usual: str):
    done = fresh.run(
        f"hidden = {name!r}\n{WITHOUT}\n{OPERATIONS}\nassert asked or hidden.endswith('DisableTorchFunction')"
    )
    assert done.returncode == 0, done.stderr
    found, _, dispatched = done.stdout.rpartition(" ")
    assert found == usual
    assert (dispatched == "True\n") == (name in QUESTIONS)
