"""Layers that a real bitsandbytes takes for its own, and PEFT's 4-bit layers around them."""

import textwrap

import fresh
import pytest

pytest.importorskip("torch")

PARTS = """
import copy, io, pickle, sys, warnings
import torch, halfbyte
from halfbyte.integrations import bitsandbytes as joint
from halfbyte.nn import Linear4bit, LinearNF4, Params4bit

warnings.filterwarnings("ignore")


class Mine(LinearNF4):
    pass


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(LinearNF4(64, 64), Linear4bit(64, 96, quant_type="fp4"), Mine(96, 64)).to("cpu")
"""

OFFERED = """
import importlib.machinery, types
import halfbyte.functional


def offer(name, **names):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(names)
    sys.modules[name] = module
    return module


class Linear8bitLt(torch.nn.Module):
    pass


class Int8Params(torch.nn.Parameter):
    pass


nn = offer("bitsandbytes.nn", Linear4bit=Linear4bit, Params4bit=Params4bit, Linear8bitLt=Linear8bitLt,
           Int8Params=Int8Params)
offer("bitsandbytes", nn=nn, functional=halfbyte.functional, __version__="0.50.2", __halfbyte__=True,
      features={"multi_backend"})
"""


def run(code, parts=PARTS):
    """Run code in a process of its own: what is imported first matters, and classes are joined once."""
    fresh.passes(parts + textwrap.dedent(code))


@pytest.mark.slow
def test_layers_and_weights_are_promoted_in_place():
    pytest.importorskip("bitsandbytes")
    run(
        """
        import bitsandbytes as bnb
        m, x = model(), torch.randn(3, 64)
        y, weights, keys = m(x), [layer.weight for layer in m], list(m.state_dict())
        assert not isinstance(m[0], bnb.nn.Linear4bit)
        joint.promote(m)
        for layer, weight in zip(m, weights):
            assert layer.weight is weight
            assert isinstance(layer, bnb.nn.Linear4bit) and isinstance(layer, Linear4bit)
            assert isinstance(weight, bnb.nn.Params4bit) and isinstance(weight, Params4bit)
            assert type(weight).__name__ == "Params4bit"
            # Nothing of bitsandbytes goes before what torch or this package has.
            order = [cls.__module__.partition(".")[0] for cls in type(layer).__mro__]
            assert order.index("bitsandbytes") > max(i for i, name in enumerate(order) if name in ("torch", "halfbyte"))
        assert isinstance(m[0], bnb.nn.LinearNF4) and not isinstance(m[1], bnb.nn.LinearNF4)
        assert [type(layer).__name__ for layer in m] == ["LinearNF4", "Linear4bit", "Mine"]
        assert torch.equal(m(x), y) and list(m.state_dict()) == keys
        assert joint.linear4bit_class() is type(m[1]) and joint.params4bit_class() is type(weights[0])
        # The way around torch's dispatcher is open to them too.
        from halfbyte.ops.dispatch import PLAIN_TYPES
        assert type(weights[0]) in PLAIN_TYPES
        compiled = torch.compile(m, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), y)
        """
    )


@pytest.mark.slow
def test_layers_of_8_bits_are_promoted_and_merged():
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    run(
        """
        from halfbyte.nn import Embedding8bit, Int8Params, Linear8bitLt
        from peft import LoraConfig, get_peft_model


        def model():
            torch.manual_seed(0)
            return torch.nn.Sequential(
                Embedding8bit(32, 64), Linear8bitLt(64, 96, has_fp16_weights=False, threshold=6.0)
            ).to("cpu")


        m, x = model(), torch.tensor([[1, 2, 3]])
        y, weights, keys = m(x), [layer.weight for layer in m], list(m.state_dict())
        joint.promote(m)
        import bitsandbytes as bnb
        assert isinstance(m[0], bnb.nn.Embedding8bit) and isinstance(m[1], bnb.nn.Linear8bitLt)
        for layer, weight in zip(m, weights):
            assert layer.weight is weight and isinstance(weight, bnb.nn.Int8Params) and isinstance(weight, Int8Params)
            order = [cls.__module__.partition(".")[0] for cls in type(layer).__mro__]
            assert order.index("bitsandbytes") > max(i for i, name in enumerate(order) if name in ("torch", "halfbyte"))
        assert torch.equal(m(x), y) and list(m.state_dict()) == keys
        assert joint.linear8bit_class() is type(m[1]) and joint.int8params_class() is type(weights[1])
        data = pickle.dumps(m)
        assert b"integrations" not in data and b"bitsandbytes.nn" not in data
        for again in (copy.deepcopy(m), pickle.loads(data)):
            assert torch.equal(again(x), y) and type(again[1]) is type(m[1])
            assert isinstance(again[1].weight, bnb.nn.Int8Params)
        compiled = torch.compile(m, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), y)
        # PEFT's own 8-bit layer, and its merge, which makes weights of bitsandbytes' class.
        m.is_loaded_in_8bit = True
        tuned = get_peft_model(m, LoraConfig(target_modules=["1"], init_lora_weights=False))
        assert type(tuned.base_model.model[1]).__module__ == "peft.tuners.lora.bnb"
        z = tuned(x)
        z.sum().backward()
        assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)
        merged = tuned.merge_and_unload()
        assert type(merged[1]) is type(m[1]) and isinstance(merged[1].weight, Int8Params)
        assert merged[1].weight is not weights[1]
        torch.testing.assert_close(merged(x), z, rtol=0.05, atol=0.05 * z.abs().max().item())
        """
    )


@pytest.mark.slow
def test_copies_and_pickles_stay_joint_and_name_no_joint_class():
    pytest.importorskip("bitsandbytes")
    run(
        """
        import bitsandbytes as bnb
        m, x = model(), torch.randn(3, 64)
        joint.promote(m)
        y = m(x)
        data = pickle.dumps(m[:2])
        assert b"integrations" not in data and b"bitsandbytes.nn" not in data
        file = io.BytesIO()
        torch.save(m[0].weight, file)
        file.seek(0)
        for again in (copy.deepcopy(m[:2]), pickle.loads(data)):
            assert torch.equal(again(x), m[:2](x))
            assert type(again[0]) is type(m[0]) and isinstance(again[1].weight, bnb.nn.Params4bit)
            assert again[0].weight.module is again[0]
        assert type(torch.load(file, weights_only=True)) is type(m[0].weight)
        # The classes themselves are found by name.
        assert pickle.loads(pickle.dumps(type(m[0]))) is type(m[0])
        """
    )


@pytest.mark.slow
def test_pickles_of_joint_layers_are_read_without_bitsandbytes(tmp_path):
    pytest.importorskip("bitsandbytes")
    path = str(tmp_path / "layer.pkl")
    run(
        f"""
        import bitsandbytes
        m = model()[:2]
        joint.promote(m)
        x = torch.ones(2, 64)
        pickle.dump((m, x, m(x)), open({path!r}, "wb"))
        """
    )
    run(
        f"""
        sys.modules["bitsandbytes"] = None
        m, x, y = pickle.load(open({path!r}, "rb"))
        assert type(m[0]) is LinearNF4 and type(m[0].weight) is Params4bit and torch.equal(m(x), y)
        assert joint.linear4bit_class() is Linear4bit and joint.params4bit_class() is Params4bit
        """
    )


@pytest.mark.slow
def test_bitsandbytes_is_not_imported_but_awaited():
    pytest.importorskip("bitsandbytes")
    run(
        """
        m, before = model(), list(sys.meta_path)
        joint.promote(m)
        joint.promote(m)
        assert "bitsandbytes" not in sys.modules and type(m[0]) is LinearNF4
        import bitsandbytes as bnb
        assert all(isinstance(layer, bnb.nn.Linear4bit) for layer in m)
        assert isinstance(m[0].weight, bnb.nn.Params4bit)
        assert sys.meta_path == before
        assert "halfbyte" not in type(bnb.__loader__).__module__ + type(bnb.__spec__.loader).__module__
        """
    )


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [True, False])
def test_a_parameter_of_bitsandbytes_is_adopted(quantized):
    pytest.importorskip("bitsandbytes")
    run(
        f"""
        import bitsandbytes as bnb
        for promoted in (False, True):
            m, dense = model(), torch.randn(64, 64)
            if promoted:
                joint.promote(m)
            theirs = bnb.nn.Params4bit(dense, quant_type="nf4", compress_statistics=True)
            if {quantized}:
                theirs = theirs.to("cpu")
            m[0].weight = theirs
            ours = m[0].weight
            assert isinstance(ours, Params4bit) and isinstance(ours, bnb.nn.Params4bit) is promoted
            assert ours.data_ptr() == theirs.data_ptr() and ours.module is m[0]
            if not {quantized}:
                assert not ours.bnb_quantized
                m[0].to("cpu")
            else:
                read = bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state)
                assert torch.equal(m[0].dequantize(), read)
            assert m[0].quant_state is m[0].weight.quant_state
            x = torch.randn(2, 64)
            error = (m[0](x) - x @ dense.T - m[0].bias).abs().mean() / (x @ dense.T).abs().mean()
            assert error < 0.15
        """
    )


def test_without_bitsandbytes_nothing_happens():
    run(
        """
        sys.modules["bitsandbytes"] = None
        m, before = model(), list(sys.meta_path)
        joint.promote(m)
        assert type(m[0]) is LinearNF4 and type(m[0].weight) is Params4bit and sys.meta_path == before
        """
    )


def test_a_module_that_stands_in_is_not_taken_for_bitsandbytes():
    run(
        """
        m = model()
        joint.promote(m)
        assert not joint.join() and type(m[0]) is LinearNF4 and isinstance(m[0], nn.Linear4bit)
        """,
        PARTS + OFFERED,
    )


PEFT = """
        import peft
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, vocab_size=256, tie_word_embeddings=False)
        m = halfbyte.quantize_model(LlamaForCausalLM(config), progress=False)
        m.is_loaded_in_4bit = True
        joint.promote(m)
        ids = torch.randint(0, 256, (1, 16)).repeat(4, 4)
        m = peft.get_peft_model(m, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear",
                                                   task_type="CAUSAL_LM", **KWARGS))
        layers = [x for x in m.modules() if isinstance(x, peft.tuners.lora.LoraLayer)]
        assert len(layers) == 14 and {type(x) for x in layers} == {peft.tuners.lora.bnb.Linear4bit}
        optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(60):
            loss = m(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 1, losses
        m.eval()
        with torch.no_grad():
            wanted = m(ids).logits.argmax(-1)
            kept = lambda model: (model(ids).logits.argmax(-1) == wanted).float().mean().item()
            m.merge_adapter()
            assert kept(m) >= 0.98, kept(m)
            m.unmerge_adapter()
            assert kept(m) >= 0.98, kept(m)
            m = m.merge_and_unload()
            assert kept(m) >= 0.98, kept(m)
        layer = m.model.layers[0].mlp.up_proj
        assert isinstance(layer, Linear4bit) and isinstance(layer.weight, Params4bit)
        assert layer.weight.module is layer and layer.quant_state is layer.weight.quant_state
"""


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", ["{}", "{'use_dora': True}", "{'init_lora_weights': 'olora'}"])
@pytest.mark.parametrize("way", ["joint", "offered"])
def test_adapters_through_pefts_own_4bit_layers(way, kwargs):
    pytest.importorskip("peft")
    if way == "joint":
        pytest.importorskip("bitsandbytes")
    run(PEFT.replace("KWARGS", kwargs), PARTS + (OFFERED if way == "offered" else ""))
