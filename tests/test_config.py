"""`halfbyte.BitsAndBytesConfig` beside transformers' class of that name: the same arguments, the same behaviour."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import logging
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import halfbyte  # noqa: E402
from halfbyte.config import QUANT_STORAGE_DTYPES, BitsAndBytesConfig, UnknownDTypeError  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig  # noqa: E402

Theirs = transformers.BitsAndBytesConfig
ARGUMENTS = [name for name in inspect.signature(Theirs).parameters if name != "kwargs"]
DTYPE_NAMES = [name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)]
DTYPES = list(dict.fromkeys(getattr(torch, name) for name in DTYPE_NAMES))
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}

FLAGS = [False, True, None, 0, 1, "", "True", [], [1], np.True_, 0.5]
# Every argument's values, good and bad: those that theirs takes and those that it refuses.
VALUES = {
    "load_in_8bit": FLAGS,
    "load_in_4bit": FLAGS,
    "llm_int8_threshold": [6.0, 0.0, -1.5, float("inf"), np.float64(3), 6, True, None, "6.0", np.float32(6)],
    "llm_int8_skip_modules": [None, [], ["lm_head"], ["a", "b.c"], [1], (), ("lm_head",), "lm_head", {"lm_head"}, 0],
    "llm_int8_enable_fp32_cpu_offload": FLAGS,
    "llm_int8_has_fp16_weight": FLAGS,
    "bnb_4bit_compute_dtype": [None, *DTYPE_NAMES, *DTYPES, "", "nn", "no_such", "BFLOAT16", 16, [], np.float16],
    "bnb_4bit_quant_type": ["fp4", "nf4", "NF4", "", "int4", None, 4, ["nf4"]],
    "bnb_4bit_use_double_quant": FLAGS,
    "bnb_4bit_quant_storage": [None, *DTYPE_NAMES, *DTYPES, "", "nn", "no_such", "UINT8", 8, [], np.uint8],
}
# For combinations, in which several values may be bad, and theirs tells of the first. "nn", a name in torch that is no
# dtype, is left out, because theirs finds that after all other errors about dtypes, and ours in its turn.
COMBINED = {
    name: [value for value in values if not (isinstance(value, str) and value == "nn")]
    for name, values in VALUES.items()
}
# A choice of them small enough to multiply out.
FEW = {
    "load_in_8bit": [False, True, 1],
    "load_in_4bit": [False, True, "yes"],
    "llm_int8_threshold": [6.0, 3],
    "llm_int8_skip_modules": [None, ["lm_head"], "lm_head"],
    "llm_int8_has_fp16_weight": [False, True],
    "bnb_4bit_compute_dtype": [None, "bfloat16", torch.float16, "no_such", 3],
    "bnb_4bit_quant_type": ["fp4", "nf4", None],
    "bnb_4bit_use_double_quant": [False, True],
    "bnb_4bit_quant_storage": [None, "int8", torch.bfloat16, "int64", 8],
}


def attempt(function, *args, **kwargs):
    """The function's result or its exception, and which."""
    try:
        return function(*args, **kwargs), None
    except Exception as error:
        return None, error


def assert_same_error(ours: Exception | None, theirs: Exception | None, case: object) -> None:
    """Check that both failed or neither; with the same type; and that our message names what theirs names."""
    if theirs is None:
        assert ours is None, f"{case}: ours raised {ours!r}, theirs accepted"
        return
    assert ours is not None, f"{case}: theirs raised {theirs!r}, ours accepted"
    assert isinstance(ours, type(theirs)), f"{case}: {ours!r} beside {theirs!r}"
    said = str(theirs)
    needed = {name for name in ARGUMENTS if name in said} | set(re.findall(r"'(\w+)'", said))
    needed |= {kind for kind in ("boolean", "float", "list", "string", "torch.dtype") if f"a {kind}" in said}
    missing = {word for word in needed if word not in str(ours)}
    assert not missing, f"{case}: {ours!r} does not name {missing} of {theirs!r}"


def assert_same_config(ours: BitsAndBytesConfig, theirs: object, case: object = None) -> None:
    """Check that every method and attribute of the two gives the same."""
    assert type(ours) is BitsAndBytesConfig
    assert ours.to_dict() == theirs.to_dict(), case
    assert list(ours.to_dict()) == list(theirs.to_dict()), case
    assert ours.to_diff_dict() == theirs.to_diff_dict(), case
    assert dict(ours) == dict(theirs), case
    assert repr(ours) == repr(theirs), case
    assert str(ours) == str(theirs), case
    for arguments in ((), (True,), (False,)):
        assert ours.to_json_string(*arguments) == theirs.to_json_string(*arguments), case
    assert ours.is_quantizable() == theirs.is_quantizable(), case
    assert ours.quantization_method() == theirs.quantization_method(), case
    for name in [*ARGUMENTS, "quant_method"]:
        assert getattr(ours, name) == getattr(theirs, name), (case, name)
    assert ours == theirs, case
    assert theirs == ours, case


def assert_same_construction(case: dict[str, object]) -> None:
    ours, our_error = attempt(BitsAndBytesConfig, **case)
    theirs, their_error = attempt(Theirs, **case)
    assert_same_error(our_error, their_error, case)
    if their_error is None:
        assert_same_config(ours, theirs, case)


def run_python(code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter that finds halfbyte where this one does; return what it prints."""
    paths = [str(Path(halfbyte.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_config_signature_is_theirs():
    def shape(cls):
        return [(p.name, p.kind, p.default) for p in inspect.signature(cls).parameters.values()]

    assert shape(BitsAndBytesConfig) == shape(Theirs)
    assert shape(BitsAndBytesConfig.from_dict) == shape(Theirs.from_dict)
    assert set(ARGUMENTS) == set(VALUES)


def test_config_public_methods_are_theirs():
    theirs = {name for name in dir(Theirs) if not name.startswith("_")}
    ours = {name for name in dir(BitsAndBytesConfig) if not name.startswith("_")}
    assert theirs <= ours


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("base", [{}, NF4, {"load_in_8bit": True}], ids=["none", "nf4", "int8"])
def test_config_one_argument_at_a_time(argument, base):
    refused = 0
    for value in VALUES[argument]:
        assert_same_construction({**base, argument: value})
        refused += attempt(Theirs, **{**base, argument: value})[1] is not None
    assert 0 < refused < len(VALUES[argument]), "the grid must hold good and bad values"


def test_config_product_of_arguments():
    for values in itertools.product(*FEW.values()):
        assert_same_construction(dict(zip(FEW, values, strict=True)))


def test_config_positional_arguments():
    values = (False, True, 5.0, ["x"], True, True, torch.bfloat16, "nf4", True, torch.int8)
    assert_same_config(BitsAndBytesConfig(*values), Theirs(*values))


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={name: st.sampled_from(values) for name, values in COMBINED.items()}
        | {
            "llm_int8_threshold": st.floats(allow_nan=False) | st.integers() | st.text(),
            "bnb_4bit_quant_type": st.text(max_size=5),
        },
    ),
    st.dictionaries(st.sampled_from(["surplus", "quant_method", "_load_in_4bit"]), st.integers()),
)
def test_config_any_arguments(case, surplus):
    assert_same_construction({**case, **surplus})


# Assignments whose result theirs can serialize. It breaks on dtypes given by name after construction; ours takes them.
ASSIGNABLE = {name: values for name, values in VALUES.items() if "dtype" not in name and "storage" not in name}
ASSIGNABLE |= {
    "bnb_4bit_compute_dtype": DTYPES,
    "bnb_4bit_quant_storage": DTYPES,
    "surplus": [1],
    "_load_in_4bit": FLAGS,
}
PAIRS = st.sampled_from(list(ASSIGNABLE)).flatmap(lambda n: st.tuples(st.just(n), st.sampled_from(ASSIGNABLE[n])))
STEPS = st.lists(PAIRS, max_size=4).map(dict)


def assert_same_state(ours, theirs, case):
    """Check what can be compared after any assignment: values may be such that JSON fails."""
    assert ours.to_dict() == theirs.to_dict(), case
    ours_json, our_error = attempt(ours.to_json_string, use_diff=False)
    theirs_json, their_error = attempt(theirs.to_json_string, use_diff=False)
    assert type(our_error) is type(their_error), case
    assert ours_json == theirs_json, case
    assert ours.quantization_method() == theirs.quantization_method(), case
    assert ours.is_quantizable() == theirs.is_quantizable(), case


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([{}, NF4, {"load_in_8bit": True}]), st.lists(STEPS, min_size=1, max_size=3))
def test_config_update_and_assignment(base, steps):
    ours, theirs = BitsAndBytesConfig(**base), Theirs(**base)
    for step in steps:
        our_rest, our_error = attempt(ours.update, **step)
        their_rest, their_error = attempt(theirs.update, **step)
        assert_same_error(our_error, their_error, step)
        assert our_rest == their_rest
        assert_same_state(ours, theirs, step)
        for name, value in step.items():
            if name != "surplus":
                assert_same_error(
                    attempt(setattr, ours, name, value)[1], attempt(setattr, theirs, name, value)[1], step
                )
        assert_same_state(ours, theirs, step)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([{}, NF4, {"load_in_8bit": True}, {"load_in_8bit": 1}]), STEPS, st.booleans())
def test_from_dict(base, extra, return_unused):
    ours, our_error = attempt(BitsAndBytesConfig.from_dict, dict(base), return_unused, **extra)
    theirs, their_error = attempt(Theirs.from_dict, dict(base), return_unused, **extra)
    assert_same_error(our_error, their_error, (base, extra))
    if their_error is not None:
        return
    if return_unused:
        (ours, our_rest), (theirs, their_rest) = ours, theirs
        assert our_rest == their_rest
    assert_same_state(ours, theirs, (base, extra))


@pytest.mark.parametrize("name", ["load_in_4bit", "load_in_8bit"])
def test_config_loading_flags_refuse_each_other_on_assignment(name):
    other = {"load_in_4bit": "load_in_8bit", "load_in_8bit": "load_in_4bit"}[name]
    config = BitsAndBytesConfig(**{other: True})
    with pytest.raises(ValueError, match=r"load_in_4bit and load_in_8bit"):
        setattr(config, name, True)
    with pytest.raises(TypeError, match=rf"{name} must be a boolean.*got 1 \(int\)"):
        setattr(config, name, 1)
    setattr(config, other, False)
    setattr(config, name, True)
    assert config.is_quantizable()


@pytest.mark.parametrize("storage", QUANT_STORAGE_DTYPES)
def test_config_every_storage_dtype_in_every_spelling(storage):
    dtype = getattr(torch, storage)
    for spelling in (storage, f"torch.{storage}", dtype):
        config = BitsAndBytesConfig(**NF4, bnb_4bit_quant_storage=spelling)
        assert config.bnb_4bit_quant_storage is dtype
        assert_same_config(config, Theirs(**NF4, bnb_4bit_quant_storage=dtype))
        assert BitsAndBytesConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("spelling", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_config_dtypes_may_be_named_after_construction(spelling):
    expected = Theirs(bnb_4bit_compute_dtype=torch.bfloat16)
    config = BitsAndBytesConfig()
    config.bnb_4bit_compute_dtype = spelling
    assert_same_config(config, expected)
    assert_same_config(BitsAndBytesConfig.from_dict({}, bnb_4bit_compute_dtype=spelling), expected)
    config.update(bnb_4bit_compute_dtype=None)
    assert config == BitsAndBytesConfig()
    with pytest.raises(UnknownDTypeError, match=r"bnb_4bit_compute_dtype .*'bfloat16'.*got 'bf16'"):
        config.bnb_4bit_compute_dtype = "bf16"
    with pytest.raises(ValueError, match=r"bnb_4bit_quant_storage .*'uint8'.*got 'torch.int64'"):
        config.bnb_4bit_quant_storage = "torch.int64"


def test_config_dtype_names_without_torch_are_torchs():
    """The table used where torch is absent gives each of torch's names the meaning that torch gives it."""
    code = """
import json, sys
from halfbyte import BitsAndBytesConfig
names = json.loads(sys.argv[1])
print(json.dumps({name: BitsAndBytesConfig(bnb_4bit_compute_dtype=name).to_dict()["bnb_4bit_compute_dtype"]
                  for name in names}))
try:
    BitsAndBytesConfig(bnb_4bit_compute_dtype="no_such")
except AttributeError as error:
    assert isinstance(error, ValueError)
    assert "bnb_4bit_compute_dtype" in str(error) and "'no_such'" in str(error)
else:
    raise SystemExit("accepted no_such")
assert "torch" not in sys.modules
"""
    meanings = json.loads(run_python(code, json.dumps(DTYPE_NAMES)))
    assert meanings == {name: str(getattr(torch, name)).removeprefix("torch.") for name in DTYPE_NAMES}


def test_config_unused_kwargs_are_logged_not_refused(caplog):
    with caplog.at_level(logging.INFO, logger="halfbyte"):
        config = BitsAndBytesConfig(**NF4, surplus=1, bnb_4bit_quant_typ="nf4")
    assert_same_config(config, Theirs(**NF4, surplus=1))
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "'surplus', 'bnb_4bit_quant_typ'" in record.getMessage()


def test_json_file(tmp_path):
    for kwargs in ({}, NF4, {"load_in_8bit": True, "llm_int8_skip_modules": ["é"]}):
        BitsAndBytesConfig(**kwargs).to_json_file(tmp_path / "ours.json")
        Theirs(**kwargs).to_json_file(tmp_path / "theirs.json")
        assert (tmp_path / "ours.json").read_bytes() == (tmp_path / "theirs.json").read_bytes()
        read = json.loads((tmp_path / "ours.json").read_text("utf-8"))
        assert BitsAndBytesConfig.from_dict(read) == BitsAndBytesConfig(**kwargs)


def test_config_diff_dict_with_an_attribute_of_the_user():
    config = BitsAndBytesConfig(**NF4)
    config.note = "mine"
    assert config.to_diff_dict()["note"] == "mine"


def test_to_dict_shares_nothing():
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    config.to_dict()["llm_int8_skip_modules"].append("other")
    dict(config)["llm_int8_skip_modules"].append("other")
    assert config.llm_int8_skip_modules == ["lm_head"]


class Derived(BitsAndBytesConfig):
    """A user's own class."""


@pytest.mark.parametrize("cls", [BitsAndBytesConfig, Derived])
def test_config_copies_and_pickles(cls):
    config = cls(**NF4, llm_int8_skip_modules=["lm_head"], bnb_4bit_quant_storage="float16")
    config.note = "mine"
    again = [pickle.loads(pickle.dumps(config, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for made in [copy.copy(config), copy.deepcopy(config), *again]:
        assert type(made) is cls
        assert made == config
        assert made.note == "mine"
        assert made.bnb_4bit_compute_dtype is torch.bfloat16
    assert copy.copy(config).llm_int8_skip_modules is config.llm_int8_skip_modules
    assert copy.deepcopy(config).llm_int8_skip_modules is not config.llm_int8_skip_modules


def test_config_compute_dtype_knows_what_was_not_given():
    name = "bnb_4bit_compute_dtype"
    left = BitsAndBytesConfig(load_in_4bit=True)
    chosen = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    assert left.compute_dtype() is None
    assert chosen.compute_dtype() is torch.float32
    # To everybody else they are the same.
    assert left == chosen
    assert left.to_json_string() == chosen.to_json_string()
    assert left.bnb_4bit_compute_dtype is torch.float32
    assert list(vars(left)) == list(vars(Theirs(load_in_4bit=True)))
    for again in (
        copy.copy(left),
        copy.deepcopy(left),
        pickle.loads(pickle.dumps(left)),
        BitsAndBytesConfig.coerce(left),
    ):
        assert again.compute_dtype() is None
    for again in (copy.deepcopy(chosen), pickle.loads(pickle.dumps(chosen))):
        assert again.compute_dtype() is torch.float32
    assert BitsAndBytesConfig.coerce({"load_in_4bit": True}).compute_dtype() is None
    assert BitsAndBytesConfig.coerce({"load_in_4bit": True, name: None}).compute_dtype() is None
    assert BitsAndBytesConfig.coerce({"load_in_4bit": True, name: "float16"}).compute_dtype() is torch.float16
    # Where it cannot be known, it is what transformers computes in.
    assert BitsAndBytesConfig.coerce(left.to_dict()).compute_dtype() is torch.float32
    assert BitsAndBytesConfig.coerce(Theirs(load_in_4bit=True)).compute_dtype() is torch.float32
    left.bnb_4bit_compute_dtype = "bfloat16"
    chosen.update(bnb_4bit_compute_dtype=None)
    assert left.compute_dtype() is torch.bfloat16
    assert chosen.compute_dtype() is None


def test_config_equality():
    config = BitsAndBytesConfig(**NF4)
    assert config == BitsAndBytesConfig(**{**NF4, "bnb_4bit_compute_dtype": torch.bfloat16})
    assert config == Theirs(**NF4)
    assert Theirs(**NF4) == config
    for name, value in [("bnb_4bit_quant_type", "fp4"), ("bnb_4bit_use_double_quant", True)]:
        assert config != BitsAndBytesConfig(**{**NF4, name: value})
        assert config != Theirs(**{**NF4, name: value})
        assert Theirs(**{**NF4, name: value}) != config
    assert config != config.to_dict()
    assert config != "nf4"
    broken = Theirs(**NF4)
    broken.bnb_4bit_compute_dtype = None
    assert config != broken
    with pytest.raises(TypeError, match="unhashable"):
        hash(config)


def test_coerce():
    config = BitsAndBytesConfig(**NF4)
    assert BitsAndBytesConfig.coerce(config) is config
    assert type(Derived.coerce(config)) is Derived
    for given_value in (Theirs(**NF4), NF4, config.to_dict(), Theirs(**NF4).to_dict(), json.loads(repr(config)[18:])):
        made = BitsAndBytesConfig.coerce(given_value)
        assert type(made) is BitsAndBytesConfig
        assert made == config
    assert BitsAndBytesConfig.coerce({}) == BitsAndBytesConfig()


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, TypeError, "halfbyte or transformers BitsAndBytesConfig, or a dict.*got None"),
        ("nf4", TypeError, "got 'nf4' \\(str\\)"),
        (transformers.EetqConfig(), TypeError, "EetqConfig"),
        (transformers.LlamaConfig(), TypeError, "LlamaConfig"),
        ({"load_in_4bit": 1}, TypeError, "load_in_4bit must be a boolean.*got 1"),
        ({"quant_method": "gptq", "bits": 4}, ValueError, "quant_method must be 'bitsandbytes', got 'gptq'"),
        ({"bnb_4bit_quant_typ": "nf4"}, ValueError, r"\['bnb_4bit_quant_typ'\].*bnb_4bit_quant_type"),
        ({**NF4, "bnb_4bit_quant_type": "nf3"}, ValueError, "bnb_4bit_quant_type.*'fp4', 'nf4', got 'nf3'"),
        (Theirs(**{**NF4, "bnb_4bit_quant_type": "NF4"}), ValueError, "bnb_4bit_quant_type.*'nf4', got 'NF4'"),
        (BitsAndBytesConfig(**NF4, bnb_4bit_quant_storage=torch.int64), ValueError, "storage.*'uint8'.*got 'int64'"),
        ({**NF4, "bnb_4bit_quant_storage": torch.int64}, ValueError, "storage.*'uint8'.*got 'int64'"),
        ({"load_in_8bit": True, "llm_int8_threshold": -0.5}, ValueError, "llm_int8_threshold.*at least 0.0.*got -0.5"),
        ({"load_in_8bit": True, "llm_int8_threshold": math.nan}, ValueError, "llm_int8_threshold.*got nan"),
        ({**NF4, "bnb_4bit_compute_dtype": "bf16"}, ValueError, "bnb_4bit_compute_dtype.*got 'bf16'"),
    ],
)
def test_coerce_refuses(value, error, message):
    with pytest.raises(error, match=message):
        BitsAndBytesConfig.coerce(value)


def test_config_is_an_instance_of_both_classes():
    config = BitsAndBytesConfig(**NF4)
    assert type(config) is BitsAndBytesConfig
    assert isinstance(config, BitsAndBytesConfig)
    assert isinstance(config, Theirs)
    assert not isinstance(config, transformers.GPTQConfig)
    assert not isinstance(Theirs(**NF4), BitsAndBytesConfig)
    assert config.__class__.__name__ == Theirs.__name__
    assert issubclass(config.__class__, BitsAndBytesConfig)
    # Code that makes another config by `config.__class__` gets one of ours.
    assert type(config.__class__(**NF4)) is BitsAndBytesConfig
    assert type(config.__class__.from_dict(config.to_dict())) is BitsAndBytesConfig
    assert config.__class__ is config.__class__
    assert isinstance(Derived(), Theirs)
    assert Derived().__class__.__name__ == "Derived"


@pytest.mark.parametrize("kwargs", [NF4, {"load_in_4bit": True}, {"load_in_8bit": True}])
def test_auto_quantizer_accepts_ours(kwargs):
    ours, theirs = BitsAndBytesConfig(**kwargs), Theirs(**kwargs)
    made = AutoHfQuantizer.from_config(ours, pre_quantized=False)
    assert isinstance(made, type(AutoHfQuantizer.from_config(theirs, pre_quantized=False)))
    assert made.quantization_config is ours
    if kwargs:
        assert AutoHfQuantizer.supports_quant_method(ours.to_dict())
        assert AutoQuantizationConfig.from_dict(ours.to_dict()) == ours
        # Nothing is said where nothing that was given is ignored.
        merged = AutoHfQuantizer.merge_quantization_configs(theirs.to_dict(), ours)
        assert ours == merged
        assert type(merged) is BitsAndBytesConfig
        assert AutoHfQuantizer.merge_quantization_configs(ours, copy.deepcopy(ours)) is ours
        with pytest.warns(UserWarning, match="already has a `quantization_config`"):
            assert AutoHfQuantizer.merge_quantization_configs(ours, theirs) is ours


def test_auto_quantizer_refuses_a_config_that_quantizes_nothing():
    with pytest.raises(ValueError, match="load_in_4bit must be True"):
        AutoHfQuantizer.from_config(BitsAndBytesConfig(), pre_quantized=False)


def test_auto_quantizer_still_refuses_other_methods():
    gptq = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match=r"says quant_method 'gptq'"):
        AutoHfQuantizer.merge_quantization_configs(gptq, BitsAndBytesConfig(**NF4))


def test_model_config_holds_ours():
    config = transformers.LlamaConfig(num_hidden_layers=1)
    expected = copy.deepcopy(config)
    config.quantization_config, expected.quantization_config = BitsAndBytesConfig(**NF4), Theirs(**NF4)
    assert config.to_dict() == expected.to_dict()
    assert config.to_json_string() == expected.to_json_string()
    assert copy.deepcopy(config).quantization_config == config.quantization_config
    assert pickle.loads(pickle.dumps(config)).quantization_config == config.quantization_config


MODEL = """
import filecmp, json, sys
from pathlib import Path

order, folder = sys.argv[1], Path(sys.argv[2])
CASES = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16",
                bnb_4bit_use_double_quant=True),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16", llm_int8_skip_modules=["lm_head", "q_proj"]),
    "int8": dict(load_in_8bit=True, llm_int8_threshold=4.0),
}
if order == "halfbyte first":
    import halfbyte
    ours = {name: halfbyte.BitsAndBytesConfig(**case) for name, case in CASES.items()}
    assert not {"torch", "transformers"} & set(sys.modules)
    import torch, transformers
else:
    import torch, transformers
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    import halfbyte
    ours = {name: halfbyte.BitsAndBytesConfig(**case) for name, case in CASES.items()}

torch.manual_seed(0)
geometry = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                    num_key_value_heads=2, vocab_size=80)
transformers.LlamaForCausalLM(geometry).to(torch.bfloat16).save_pretrained(folder / "plain")
tokens = torch.arange(12)[None]

def load(path, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(path, device_map="cpu", **kwargs).eval()

for name, case in CASES.items():
    saved = {}
    for side, config in ("ours", ours[name]), ("theirs", transformers.BitsAndBytesConfig(**case)):
        saved[side] = folder / name / side
        model = load(folder / "plain", quantization_config=config)
        assert type(model.config.quantization_config) is type(config)
        model.save_pretrained(saved[side])
    # bitsandbytes' CPU code has other fp4 thresholds than its CUDA code, whose bytes halfbyte makes everywhere, and
    # rounds a few codes of int8 the other way.
    for file in {"fp4": (), "int8": ("config.json",)}.get(name, ("config.json", "model.safetensors")):
        assert filecmp.cmp(saved["ours"] / file, saved["theirs"] / file, shallow=False), (name, file)
    written = json.loads((saved["ours"] / "config.json").read_text())["quantization_config"]
    assert ours[name].to_dict() == transformers.BitsAndBytesConfig(**case).to_dict()
    # A compute dtype that was not given is written as the model's.
    given = {} if name == "int8" else {"bnb_4bit_compute_dtype": "bfloat16"}
    assert written == {**ours[name].to_dict(), **given}
    layer = model.model.layers[0].mlp.up_proj.weight
    assert type(layer).__module__.startswith("bitsandbytes"), type(layer)
    logits = load(saved["theirs"])(tokens).logits
    assert torch.isfinite(logits).all()
    again = load(saved["ours"])(tokens).logits
    torch.testing.assert_close(again, logits, rtol=0.1, atol=0.05)
    served = load(saved["ours"], quantization_config=ours[name])
    layer = served.model.layers[0].mlp.up_proj
    assert type(layer).__module__.startswith("halfbyte"), type(layer)
    torch.testing.assert_close(served(tokens).logits, logits, rtol=0.1, atol=0.05)
print("compared", *CASES)
"""


@pytest.mark.parametrize("order", ["halfbyte first", "transformers first"])
def test_config_model_quantized_saved_and_reloaded(order, tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    assert run_python(MODEL, order, str(tmp_path)).split() == ["compared", "nf4", "fp4", "int8"]
