"""Matching rules of target_modules and the patterns."""

import warnings

import pytest

from qlora_engine.config import LoraConfig
from qlora_engine.targets import (
    NoMatchingPeftModuleError,
    _ExcludedModule,
    check_target_module_exists,
    find_minimal_target_modules,
    get_pattern_key,
    pattern_value,
    plan_targets,
    warn_unmatched_patterns,
)

LLAMA = [
    (name, "linear")
    for i in range(3)
    for name in (
        f"model.layers.{i}.self_attn.q_proj",
        f"model.layers.{i}.self_attn.v_proj",
        f"model.layers.{i}.mlp.up",
    )
]
LLAMA = [("model.embed_tokens", "embedding"), *LLAMA, ("model.norm", "other"), ("lm_head", "linear")]


@pytest.mark.parametrize(
    ("values", "key", "expected"),
    [
        ({"target_modules": ["q"]}, "q", True),
        ({"target_modules": ["q"]}, "a.q", True),
        ({"target_modules": ["q"]}, "a.bq", False),
        ({"target_modules": ["q"]}, "a.q.b", False),
        ({"target_modules": ["a.q"]}, "x.a.q", True),
        ({"target_modules": ["q."]}, "a.qx", False),
        ({"target_modules": r".*\.q"}, "a.q", True),
        ({"target_modules": r"q"}, "a.q", False),
        ({"target_modules": [], "target_parameters": ["w"]}, "a.q", False),
        ({"target_modules": ["q"], "layers_to_transform": [1]}, "m.layers.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": [1]}, "m.layers.0.q", False),
        ({"target_modules": ["q"], "layers_to_transform": []}, "m.layers.0.q", True),
        ({"target_modules": ["q"], "layers_to_transform": 0}, "m.layers.0.q", True),
        ({"target_modules": ["q"], "layers_to_transform": [1]}, "m.layers.1.experts.0.q", True),
        ({"target_modules": ["q"], "layers_to_transform": [0]}, "m.layers.1.experts.0.q", False),
        ({"target_modules": ["q"], "layers_to_transform": [1]}, "m.q", False),
        ({"target_modules": ["m.layers.0.q"], "layers_to_transform": [1]}, "m.layers.0.q", True),
        ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "h"}, "m.h.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["x", "h"]}, "h.1.q", True),
        ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "h"}, "m.layers.1.q", False),
    ],
)
def test_check_target_module_exists(values, key, expected):
    assert bool(check_target_module_exists(LoraConfig(**values), key)) is expected


@pytest.mark.parametrize(
    "values",
    [
        {"exclude_modules": ["q"]},
        {"exclude_modules": r".*\.q"},
        {"modules_to_save": ["a"]},
        {"modules_to_save": ["q"]},
    ],
)
def test_excluded_is_told_from_unmatched(values):
    result = check_target_module_exists(LoraConfig(target_modules=["q"], **values), "a.q")
    assert isinstance(result, _ExcludedModule)
    assert not result


@pytest.mark.parametrize(
    ("keys", "name", "expected"),
    [
        (["lin"], "layers.1.lin", "lin"),
        (["lin"], "layers.1.xlin", "layers.1.xlin"),
        (["layers.1.lin"], "m.layers.1.lin", "layers.1.lin"),
        (["^lin"], "a.lin", "a.lin"),
        ([r"layers\.[01]\.lin"], "m.layers.1.lin", r"layers\.[01]\.lin"),
        (["lin", "layers.1.lin"], "layers.1.lin", "lin"),
    ],
)
def test_get_pattern_key(keys, name, expected):
    assert get_pattern_key(keys, name) == expected


def test_pattern_value_takes_the_first_match_and_warns():
    with pytest.warns(RuntimeWarning, match="2 keys match module 'layers.1.lin'"):
        assert pattern_value({"lin": 4, "layers.1.lin": 8}, "layers.1.lin", 1, field_name="rank_pattern") == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pattern_value({"lin": 4, "layers.1.lin": 4}, "layers.1.lin", 1) == 4
        assert pattern_value({"other": 4}, "layers.1.lin", 1) == 1
        assert pattern_value(None, "layers.1.lin", 1) == 1


def test_warn_unmatched_patterns():
    config = LoraConfig(rank_pattern={"q": 2, "nothing": 3}, alpha_pattern={"absent": 1})
    with pytest.warns(RuntimeWarning) as caught:
        warn_unmatched_patterns(config, ["a.q"])
    assert ["rank_pattern" in str(w.message) for w in caught] == [True, False]
    assert "['nothing']" in str(caught[0].message)


def test_find_minimal_target_modules():
    targets = [f"d.{i}.{name}" for i in range(30) for name in ("q", "v")]
    assert find_minimal_target_modules(targets, [f"d.{i}.k" for i in range(30)]) == {"q", "v"}
    assert find_minimal_target_modules(["a.b.q"], ["c.b.q"]) == {"a.b.q"}
    assert find_minimal_target_modules(["q", "a.q"], []) == {"q"}
    for targets, others in (("q", []), ([], []), (["q", ""], []), (["q"], ["q"])):
        with pytest.raises(ValueError, match="target_modules"):
            find_minimal_target_modules(targets, others)


def test_plan_targets_all_linear_leaves_the_head_out():
    plan = plan_targets(LoraConfig(target_modules="ALL-linear"), LLAMA, output_layers=["lm_head"])
    assert len(plan.targeted) == 9
    assert "lm_head" in plan.unmatched
    assert plan.target_modules == set(plan.targeted)


def test_plan_targets_condenses_long_lists():
    modules = [(f"layers.{i}.{name}", "linear") for i in range(12) for name in ("q", "v")]
    plan = plan_targets(LoraConfig(target_modules="all-linear"), modules)
    assert plan.target_modules == {"q", "v"}
    assert len(plan.targeted) == 24


def test_plan_targets_uses_the_defaults_of_the_model_type():
    plan = plan_targets(LoraConfig(), LLAMA, model_type="llama")
    assert len(plan.targeted) == 6
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        plan_targets(LoraConfig(), LLAMA, model_type="unheard-of")


def test_plan_targets_does_not_change_the_config():
    config = LoraConfig(target_modules="all-linear")
    plan_targets(config, LLAMA)
    assert config.target_modules == "all-linear"


def test_plan_targets_errors():
    with pytest.raises(ValueError, match=r"module 'model\.norm' is a other"):
        plan_targets(LoraConfig(target_modules=["norm"]), LLAMA)
    with pytest.raises(
        NoMatchingPeftModuleError, match=r"Target modules {'nope'} not found in the base model"
    ):
        plan_targets(LoraConfig(target_modules=["nope"]), LLAMA)
    with pytest.raises(NoMatchingPeftModuleError, match="No `target_modules` passed"):
        plan_targets(LoraConfig(target_modules=[]), LLAMA)
    with pytest.raises(NoMatchingPeftModuleError, match="All modules were excluded"):
        plan_targets(LoraConfig(target_modules=["q_proj"], exclude_modules=".*"), LLAMA)
    with pytest.raises(NoMatchingPeftModuleError, match="No modules were targeted for adaptation"):
        plan_targets(LoraConfig(target_modules=["nope"], exclude_modules=["q_proj"]), LLAMA)
    with pytest.raises(
        NoMatchingPeftModuleError, match=r"'layers_to_transform': \[7\].*'layers_pattern': layers"
    ):
        plan_targets(
            LoraConfig(target_modules=["up"], layers_to_transform=[7], layers_pattern="layers"), LLAMA
        )


def test_an_exclusion_that_excludes_nothing_warns():
    with pytest.warns(UserWarning, match="no modules were excluded"):
        plan_targets(LoraConfig(target_modules=["q_proj"], exclude_modules=["nope"]), LLAMA)
