"""LoraConfig: fields, checks, JSON, and what is refused."""

import copy
import json
import pickle
import warnings

import pytest

from qlora_engine import config as config_module
from qlora_engine.config import LoftQConfig, LoraConfig, PeftConfig, PeftType, TaskType, get_peft_config
from qlora_engine.init_configs import CordaConfig, EvaConfig, LoraGAConfig


def test_defaults_are_saved_and_read_back(tmp_path):
    config = LoraConfig()
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["peft_type"] == "LORA"
    assert values["loftq_config"] == {}
    assert "runtime_config" not in values
    assert not (tmp_path / "adapter_config.json.tmp").exists()


def test_lists_become_sets_and_are_written_sorted(tmp_path):
    config = LoraConfig(target_modules=["v", "q", "k"], exclude_modules=["lm_head"])
    assert config.target_modules == {"q", "k", "v"}
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["k", "q", "v"]


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_equal(clone):
    config = LoraConfig(r=4, target_modules=["a"], init_lora_weights="loftq", loftq_config={"loftq_bits": 3})
    assert clone(config).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task_type": "nonsense"}, "Invalid task type: 'nonsense'"),
        ({"target_modules": ".*a", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used"),
        ({"target_modules": ".*a", "layers_pattern": ["b"]}, "`layers_pattern` cannot be used"),
        ({"target_modules": ["a"], "layers_pattern": ["b"]}, "`layers_to_transform` must also be specified"),
        ({"init_lora_weights": "loftq"}, "`loftq_config` must be specified"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 5}}, "loftq_bits=5; allowed"),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"bits": 4}},
            r"unknown field\(s\) in loftq_config: bits",
        ),
        (
            {"lora_bias": True, "init_lora_weights": "gaussian"},
            "only supported with init_lora_weights=True or False",
        ),
        ({"lora_bias": True, "use_dora": True}, "not supported for DoRA"),
        ({"use_dora": True, "megatron_config": {"a": 1}}, "DoRA does not support megatron_core"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**values)


def test_layers_to_transform_zero_is_a_value():
    assert (
        LoraConfig(target_modules=["a"], layers_to_transform=0, layers_pattern="layers").layers_to_transform
        == 0
    )


def test_target_parameters_must_be_a_list():
    with pytest.raises(TypeError, match="`target_parameters` must be a list"):
        LoraConfig(target_parameters="experts.weight")


@pytest.mark.parametrize("name", sorted(config_module.UNSUPPORTED_FIELDS))
def test_unsupported_fields_are_named(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name}="):
        LoraConfig(**{name: {"x": 1}})
    config = LoraConfig()
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    values[name] = {"x": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"{name}="):
        PeftConfig.from_pretrained(tmp_path)


def test_several_unsupported_fields_are_all_listed():
    with pytest.raises(
        ValueError,
        match=r"use_bdlora=1, kasa_config=2|kasa_config=2, use_bdlora=1|use_bdlora=1.*kasa_config=2",
    ):
        LoraConfig(use_bdlora=1, kasa_config=2)


def test_keys_of_a_later_version_are_dropped_with_a_warning(tmp_path):
    config = LoraConfig(r=3)
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "foobar": "baz", "spam": 1}))
    with pytest.warns(
        UserWarning, match=r"Unexpected keyword arguments \['foobar', 'spam'\] for class LoraConfig"
    ):
        assert LoraConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_a_file_that_is_no_adapter_config(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"foo": "bar"}')
    with pytest.raises(TypeError, match=r"missing required keys: \{'peft_type'\}"):
        LoraConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Can.t find .adapter_config\.json"):
        LoraConfig.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "adapter_config.json holds a list, not a JSON object"),
        ("{", "adapter_config.json is not valid JSON"),
        ("\xff", "adapter_config.json is not valid JSON"),
    ],
)
def test_a_file_that_is_no_json_object(tmp_path, text, message):
    (tmp_path / "adapter_config.json").write_text(text, encoding="latin1")
    for read in (LoraConfig.from_pretrained, PeftConfig._get_peft_type):
        with pytest.raises(ValueError, match=message):
            read(tmp_path)


def test_a_type_of_adapter_that_is_no_text_or_missing(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": ["LORA"]}')
    with pytest.raises(KeyError, match=r"peft_type=\['LORA'\] is not supported; supported: LORA"):
        PeftConfig.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is no adapter's config: it has no peft_type"):
        PeftConfig._get_peft_type(tmp_path)


def test_another_method_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    with pytest.raises(KeyError, match="LOHA"):
        PeftConfig.from_pretrained(tmp_path)


def test_runtime_config_on_disk_is_ignored(tmp_path):
    config = LoraConfig()
    config.runtime_config.ephemeral_gpu_offload = True
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    values["runtime_config"] = {"ephemeral_gpu_offload": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="runtime_config"):
        loaded = PeftConfig.from_pretrained(tmp_path)
    assert not loaded.runtime_config.ephemeral_gpu_offload


def test_null_loftq_config_of_old_files():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LoraConfig(loftq_config=None).loftq_config == {}


def test_loftq_config_without_loftq_is_reset_with_a_warning():
    with pytest.warns(UserWarning, match="`loftq_config` specified but will be ignored"):
        assert LoraConfig(loftq_config=LoftQConfig()).loftq_config == {}


@pytest.mark.parametrize(
    "given", [LoftQConfig(loftq_bits=2, block_size=32), {"loftq_bits": 2, "block_size": 32}]
)
def test_loftq_config_becomes_a_dict(given):
    config = LoraConfig(init_lora_weights="loftq", loftq_config=given)
    assert config.loftq_config["loftq_bits"] == 2
    assert LoftQConfig.from_dict(config.loftq_config).spec().format == "nf2"
    json.dumps(config.loftq_config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loftq_bits": 16}, "loftq_bits=16"),
        ({"loftq_iter": 0}, "loftq_iter=0"),
        ({"start": "one"}, "start='one'"),
        ({"scales": "max"}, "scales='max'"),
        ({"svd": "slow"}, "svd='slow'"),
        ({"bits_pattern": {"q": 5}}, r"bits_pattern\['q'\]=5"),
        ({"bits_pattern": {"q": "nf9"}}, "unknown format 'nf9'"),
        ({"format": "nf9"}, "unknown format 'nf9'"),
        ({"block_size": 3}, "block_size 3 is not a power of two"),
    ],
)
def test_loftq_config_checks(values, message):
    with pytest.raises(ValueError, match=message):
        LoftQConfig(**values)


@pytest.mark.parametrize(
    ("config", "pattern", "format_name"),
    [
        (LoftQConfig(loftq_bits=3), None, "nf3"),
        (LoftQConfig(loftq_bits=8), None, "int8"),
        (LoftQConfig(loftq_bits=4, format="fp4"), None, "fp4"),
        (LoftQConfig(format="int4"), 2, "nf2"),
        (LoftQConfig(), "uint3", "uint3"),
    ],
)
def test_loftq_spec(config, pattern, format_name):
    assert config.spec(pattern).format == format_name


@pytest.mark.parametrize(
    ("name", "cls", "values"),
    [
        ("eva_config", EvaConfig, {"rho": 7.5}),
        ("corda_config", CordaConfig, {"corda_method": "kpm"}),
        ("lora_ga_config", LoraGAConfig, {"direction": "ArBr"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*specified but will be ignored")
def test_nested_configs_survive_the_file(name, cls, values, tmp_path):
    config = LoraConfig()
    setattr(config, name, cls(**values))
    config.save_pretrained(tmp_path)
    assert getattr(LoraConfig.from_pretrained(tmp_path), name) == cls(**values)
    with pytest.raises(TypeError, match=cls.__name__):
        LoraConfig(**{name: 3})


def test_eva_gets_its_default_config():
    with pytest.warns(UserWarning, match="Using default EVA config"):
        assert LoraConfig(init_lora_weights="eva").eva_config == EvaConfig()
    with pytest.raises(ValueError, match="rho"):
        EvaConfig(rho=0.5)
    with pytest.raises(ValueError, match="tau"):
        EvaConfig(tau=1.5)


def test_version_is_recorded_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(config_module, "__version__", "0.17.0")
    LoraConfig().save_pretrained(tmp_path)
    monkeypatch.setattr(config_module, "__version__", "9.9.0.dev0")
    assert PeftConfig.from_pretrained(tmp_path).peft_version == "0.17.0"
    monkeypatch.setattr(config_module, "_get_commit_hash", lambda name: None)
    assert LoraConfig().peft_version == "9.9.0.dev0@UNKNOWN"
    monkeypatch.setattr(config_module, "_get_commit_hash", lambda name: "abc")
    assert LoraConfig().peft_version == "9.9.0.dev0@abc"


@pytest.mark.parametrize("task_type", [None, *TaskType])
def test_task_types(task_type):
    assert LoraConfig(task_type=task_type).task_type == task_type


def test_get_peft_config():
    config = get_peft_config({"peft_type": "LORA", "r": 5})
    assert isinstance(config, LoraConfig)
    assert config.peft_type == PeftType.LORA
    assert config.r == 5


def test_auto_mapping_goes_into_the_file(tmp_path):
    LoraConfig().save_pretrained(tmp_path, auto_mapping_dict={"base_model_class": "A", "parent_library": "b"})
    assert PeftConfig.from_pretrained(tmp_path).auto_mapping["base_model_class"] == "A"


def test_saving_onto_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AssertionError, match="should be a directory"):
        LoraConfig().save_pretrained(tmp_path / "file")
