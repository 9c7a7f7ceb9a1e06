"""Hot-swapping: the model becomes the one with the other adapter, or nothing changes at all."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_engine import LoraConfig, PeftModel, get_peft_model
from qlora_engine.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    insert_adapter_name,
    pad,
    prepare_model_for_compiled_hotswap,
)
from qlora_engine.lora_layer import LoraLayer

IDS = torch.arange(16).reshape(2, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 32)
        self.lin = nn.Linear(32, 64)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 16, 3, padding=1, groups=2)
        self.head = nn.Linear(64, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.grouped(self.conv(torch.relu(self.lin(self.emb(ids))))))


ALL = ["emb", "lin", "conv", "grouped"]


def config(**kwargs: Any) -> LoraConfig:
    kwargs.setdefault("target_modules", ALL)
    return LoraConfig(**{"r": 4, "lora_alpha": 6, **kwargs})


def make(settings: LoraConfig, seed: int) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(Net(), copy.deepcopy(settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data = noise + parameter.data * ("magnitude" in name)
    return model.eval()


@torch.no_grad()
def run(model: Any) -> Tensor:
    return model(IDS)


def saved(folder: Path, settings: LoraConfig, seed: int) -> tuple[Path, Tensor]:
    """A saved adapter, and the output of the model with it."""
    model = make(settings, seed)
    model.save_pretrained(folder)
    return folder, run(model)


def pieces(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# each: the adapter that is loaded, the one that takes its place
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "same": ({}, {}),
    "smaller rank": ({"r": 6}, {"r": 2}),
    "larger rank": ({"r": 2}, {"r": 6}),
    "other alpha": ({}, {"lora_alpha": 32}),
    "rslora": ({"use_rslora": True}, {"use_rslora": True, "r": 8, "lora_alpha": 3}),
    "rank_pattern": ({"r": 8}, {"r": 8, "rank_pattern": {"lin": 2, "conv": 4}}),
    "alpha_pattern": ({"alpha_pattern": {"lin": 32, "emb": 1}},) * 2,
    "both patterns": (
        {"r": 2, "alpha_pattern": {"lin": 32}},
        {"r": 2, "alpha_pattern": {"lin": 32}, "rank_pattern": {"lin": 8}},
    ),
    "dora": (
        {"use_dora": True, "target_modules": ["emb", "lin", "conv"]},
        {"use_dora": True, "target_modules": ["emb", "lin", "conv"], "r": 2},
    ),
    "lora_bias": ({"lora_bias": True, "target_modules": ["lin", "conv", "grouped"]},) * 2,
    "modules_to_save": ({"modules_to_save": ["head"]}, {"modules_to_save": ["head"], "r": 2}),
    "fewer layers": ({}, {"target_modules": ["lin"]}),
    "fewer dora layers": (
        {"use_dora": True, "target_modules": ["emb", "lin", "conv"]},
        {"use_dora": True, "target_modules": ["lin"]},
    ),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_hotswap_gives_the_other_adapter_and_back(name: str, padded: bool, tmp_path: Path) -> None:
    first, second = (config(**options) for options in PAIRS[name])
    one, output_one = saved(tmp_path / "one", first, 1)
    two, output_two = saved(tmp_path / "two", second, 2)
    model = PeftModel.from_pretrained(Net(), one).eval()
    model.load_state_dict(
        {k: v for k, v in make(first, 1).state_dict().items() if "lora" not in k}, strict=False
    )
    torch.testing.assert_close(run(model), output_one)
    if padded:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        torch.testing.assert_close(run(model), output_one, rtol=1e-5, atol=1e-5)
    parameters = dict(model.named_parameters())
    hotswap_adapter(model, two, "default")
    torch.testing.assert_close(run(model), output_two, rtol=1e-5, atol=1e-5)
    if padded or name not in ("larger rank", "both patterns"):
        assert all(parameters[key] is p for key, p in model.named_parameters())
    if len(PAIRS[name][1].get("target_modules", ALL)) == len(PAIRS[name][0].get("target_modules", ALL)):
        hotswap_adapter(model, one, "default")
        torch.testing.assert_close(run(model), output_one, rtol=1e-5, atol=1e-5)


def test_hotswap_refreshes_the_norms_that_evaluation_keeps(tmp_path: Path) -> None:
    settings = config(use_dora=True, target_modules=["lin"])
    folder, expected = saved(tmp_path, settings, 2)
    model = make(settings, 1)
    run(model)  # keeps the norm
    hotswap_adapter(model, folder, "default")
    torch.testing.assert_close(run(model), expected)


@pytest.mark.parametrize(("old", "new"), [(2, 6), (6, 2), (4, 4)])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_hotswapped_adapter_saves_as_what_it_is(old: int, new: int, use_rslora: bool, tmp_path: Path) -> None:
    options = {"use_rslora": use_rslora}
    two, expected = saved(tmp_path / "two", config(r=new, lora_alpha=9, **options), 2)
    model = make(config(r=old, **options), 1)
    hotswap_adapter(model, two, "default")
    layer = model.base_model.model.conv
    assert (layer.r["default"], layer.lora_alpha["default"]) == (new, 9)
    model.save_pretrained(tmp_path / "again")
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(), tmp_path / "again").eval()
    torch.testing.assert_close(run(again), expected, rtol=1e-5, atol=1e-5)


def test_padding_that_a_config_cannot_describe_is_said(tmp_path: Path) -> None:
    two, expected = saved(tmp_path, config(r=6, rank_pattern={"lin": 2}), 2)
    model = make(config(r=6), 1)
    with pytest.warns(UserWarning, match="no single lora_alpha goes with"):
        hotswap_adapter(model, two, "default")
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-5)


def test_hotswap_of_one_adapter_leaves_others_alone(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, config(), 2)
    model = make(config(), 1)
    model.add_adapter("default2", config(init_lora_weights=False))
    before = {name: p for name, p in pieces(model).items() if "default2" in name}
    hotswap_adapter(model, folder, "default")
    after = pieces(model)
    assert all(torch.equal(after[name], p) for name, p in before.items())


BAD: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({}, {"use_rslora": True}, ValueError, "Configs are incompatible: for use_rslora, False != True"),
    ({}, {"lora_dropout": 0.1}, ValueError, "for lora_dropout"),
    ({}, {"alpha_pattern": {"lin": 2}}, ValueError, "for alpha_pattern"),
    (
        {"target_modules": ["lin"]},
        {"target_modules": ["lin"], "use_dora": True},
        ValueError,
        "for use_dora",
    ),
    ({"target_modules": ["lin"]}, {}, RuntimeError, "unexpected keys found: .*emb.lora_embedding_A.default"),
]


@pytest.mark.parametrize(("first", "second", "error", "message"), BAD)
def test_refusal_changes_nothing(
    first: dict[str, Any], second: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder, _ = saved(tmp_path, config(**second), 2)
    model = make(config(**first), 1)
    before, scaling = pieces(model), model.base_model.model.lin.scaling["default"]
    with pytest.raises(error, match=message):
        hotswap_adapter(model, folder, "default")
    after = pieces(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.base_model.model.lin.scaling["default"] == scaling


def test_unknown_adapter_and_other_types_are_refused(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, config(), 2)
    model = make(config(), 1)
    with pytest.raises(ValueError, match="Adapter other does not exist"):
        hotswap_adapter(model, folder, "other")
    text = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(text.replace('"LORA"', '"IA3"'))
    with pytest.raises(ValueError, match="Incompatible PEFT types found: LORA and IA3"):
        hotswap_adapter(model, folder, "default")


def test_merged_adapter_is_refused_and_another_merged_one_is_not(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, config(target_modules=["lin"]), 2)
    model = make(config(target_modules=["lin"]), 1)
    model.add_adapter("other", config(target_modules=["lin"]))
    model.merge_adapter(["other"])
    hotswap_adapter(model, folder, "default")
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="because it is currently merged into the base weights"):
        hotswap_adapter(model, folder, "default")


def test_shapes_that_differ_in_more_than_the_rank_are_refused() -> None:
    model = make(config(target_modules=["lin"]), 1)
    before = pieces(model)
    state = {
        "base_model.model.lin.lora_A.default.weight": torch.zeros(4, 32),
        "base_model.model.lin.lora_B.default.weight": torch.zeros(63, 4),
    }
    with pytest.raises(
        ValueError, match=r"Incompatible shapes found for LoRA weights .*\(64, 4\) vs \(63, 4\)"
    ):
        hotswap_adapter_from_state_dict(model, state, "default", config())
    assert all(torch.equal(before[name], p) for name, p in pieces(model).items())


def test_prepare_makes_scalings_tensors_and_pads(tmp_path: Path) -> None:
    model = make(config(rank_pattern={"lin": 2}), 1)
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            A, B = layer.get_factors("default")
            assert A.shape[0] == 8
            assert B.shape[1] * getattr(layer.get_base_layer(), "groups", 1) == 8
            assert isinstance(layer.scaling["default"], Tensor)
    assert model.peft_config["default"].r == 8
    assert model.peft_config["default"].rank_pattern == {"lin": 8}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads


def test_prepare_refuses_before_it_changes_anything() -> None:
    for rank, message in [
        (3, "Trying to pad the adapter to the target rank 3, but the original rank is larger"),
        (5, "is not divisible by 2. Please choose a target rank that is divisible by 2"),
    ]:
        model = make(config(r=4), 1)
        before = pieces(model)
        with pytest.raises(ValueError, match=message):
            prepare_model_for_compiled_hotswap(model, target_rank=rank)
        assert all(torch.equal(before[name], p) for name, p in pieces(model).items())
        assert isinstance(model.base_model.model.lin.scaling["default"], float)
    with pytest.raises(ValueError, match="No adapter layers found on the model"):
        prepare_model_for_compiled_hotswap(Net())


def test_prepare_looks_whether_the_model_is_compiled(recwarn: pytest.WarningsRecorder) -> None:
    def compiled() -> Any:
        return torch.compile(make(config(), 1), backend="eager")

    with pytest.raises(ValueError, match=r"\*before\* compiling the model"):
        prepare_model_for_compiled_hotswap(compiled())
    with pytest.warns(UserWarning, match="with a model that is already compiled"):
        prepare_model_for_compiled_hotswap(compiled(), check_compiled="warn")
    recwarn.clear()
    prepare_model_for_compiled_hotswap(compiled(), check_compiled="ignore")
    assert not [w for w in recwarn if "already compiled" in str(w.message)]
    with pytest.raises(
        ValueError, match="check_compiles should be one of 'error', 'warn', or 'ignore', got 'x'"
    ):
        prepare_model_for_compiled_hotswap(compiled(), check_compiled="x")  # type: ignore[arg-type]


def test_compiled_model_is_not_compiled_again(tmp_path: Path) -> None:
    one, output_one = saved(tmp_path / "one", config(r=2, lora_alpha=3), 1)
    two, output_two = saved(tmp_path / "two", config(r=8, lora_alpha=40), 2)
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(Net(), one).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled = torch.compile(model, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(run(compiled), output_one, rtol=1e-5, atol=1e-5)
        hotswap_adapter(compiled, two, "default")
        torch.testing.assert_close(run(compiled), output_two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("m.q.lora_A.weight", "m.q.lora_A.x.weight"),
        ("m.q.lora_B.bias", "m.q.lora_B.x.bias"),
        ("m.e.lora_embedding_A", "m.e.lora_embedding_A.x"),
        ("m.q.lora_magnitude_vector", "m.q.lora_magnitude_vector.x"),
        ("m.head.weight", "m.head.weight"),
    ],
)
def test_insert_adapter_name(key: str, expected: str) -> None:
    assert insert_adapter_name(key, "x") == expected


def test_pad_fills_every_group_at_its_end() -> None:
    factor = torch.arange(1.0, 5.0).reshape(4, 1)
    assert pad(factor, 6, 0, groups=2).flatten().tolist() == [1, 2, 0, 3, 4, 0]
    assert pad(factor, 6, 0).flatten().tolist() == [1, 2, 3, 4, 0, 0]
