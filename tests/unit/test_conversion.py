"""convert_to_lora and save_as_lora: what the new adapter does, and at which rank."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_engine import LoftQConfig, LoraConfig, PeftModel, get_peft_model
from qlora_engine.conversion import convert_to_lora, cutoff_index, save_as_lora
from qlora_engine.lora_layer import LoraLayer

IDS = torch.arange(16).reshape(2, 8)
pytestmark = pytest.mark.filterwarnings("ignore:Converting a PEFT adapter to LoRA")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.emb = nn.Embedding(20, 32)
        self.lin = nn.Linear(32, 64)
        self.gpt = Conv1D(48, 64)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(48, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.conv(self.gpt(torch.relu(self.lin(self.emb(ids))))))


ALL = ["emb", "lin", "gpt", "conv"]


def make(**options: Any) -> Any:
    torch.manual_seed(0)
    options = {"target_modules": list(ALL), "r": 4, "lora_alpha": 10, "init_lora_weights": False, **options}
    model = get_peft_model(Net(), LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "magnitude" in name or "modules_to_save" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
        elif "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    return model.eval()


@torch.no_grad()
def run(model: Any) -> Tensor:
    return model(IDS)


def reload(model: Any, folder: Path) -> Any:
    torch.manual_seed(0)
    return PeftModel.from_pretrained(Net(), folder).eval()


OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"lin": 2}, "alpha_pattern": {"gpt": 3}},
    "regex": {"target_modules": "emb|lin|gpt|conv"},
    "lora_bias": {"lora_bias": True, "target_modules": ["lin", "gpt", "conv"]},
    "modules_to_save": {"modules_to_save": ["head"]},
}


@pytest.mark.parametrize("rank", [4, 5, 8, 1.0])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_enough_rank_gives_the_same_output(options: dict[str, Any], rank: float, tmp_path: Path) -> None:
    model = make(**options)
    save_as_lora(tmp_path, model, rank)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = reload(model, tmp_path)
    torch.testing.assert_close(run(loaded), run(model), rtol=1e-5, atol=1e-5)
    assert all(m.scaling["default"] == 1.0 for m in loaded.modules() if isinstance(m, LoraLayer))


@pytest.mark.parametrize("use_dora", [False, True])
def test_less_rank_is_the_best_approximation(use_dora: bool, tmp_path: Path) -> None:
    model = make(use_dora=use_dora)
    layer = model.base_model.model.lin
    before = layer.base_layer.weight.clone()
    layer.merge()
    delta = layer.base_layer.weight - before
    layer.unmerge()
    save_as_lora(tmp_path, model, 3)
    got = reload(model, tmp_path).base_model.model.lin.get_delta_weight("default")
    S = torch.linalg.svdvals(delta)
    assert torch.linalg.matrix_rank(got, rtol=1e-4) == 3
    assert ((got - delta).norm() / S[3:].norm()).item() == pytest.approx(1.0, rel=1e-3)


def test_a_share_gives_each_layer_its_own_rank() -> None:
    model = make(r=8)
    layer = model.base_model.model.lin
    with torch.no_grad():
        layer.lora_B["default"].weight[:, 1:] = 0
    config, tensors = convert_to_lora(model, 0.9)
    assert config.rank_pattern["lin"] == config.alpha_pattern["lin"] == 1
    assert tensors["base_model.model.lin.lora_A.weight"].shape == (1, 32)
    S = torch.linalg.svdvals(model.base_model.model.gpt.get_delta_weight("default")).square()
    rank = config.rank_pattern["gpt"]
    assert S[:rank].sum() >= 0.9 * S.sum() > S[: rank - 1].sum()


def test_quantised_base_and_half_precision() -> None:
    loftq = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=4)}
    model = make(target_modules=["lin"], use_dora=True, **loftq)
    _, tensors = convert_to_lora(model, 4)
    assert tensors["base_model.model.lin.lora_A.weight"].shape == (4, 32)
    half = get_peft_model(
        Net().half(),
        LoraConfig(target_modules=["lin"], init_lora_weights=False),
        autocast_adapter_dtype=False,
    )
    assert {t.dtype for t in convert_to_lora(half, 2)[1].values()} == {torch.float16}


def test_model_without_a_config(tmp_path: Path) -> None:
    model = make().base_model.model
    expected = run(model)
    del model.peft_config
    config, tensors = convert_to_lora(model, 4)
    assert config.target_modules == set(ALL)
    assert all(key.split(".lora_")[0] in ALL for key in tensors)
    torch.testing.assert_close(run(model), expected)


def test_refusals() -> None:
    model = make()
    for rank, message in [
        (0, "Passing a rank of 0 doesn't make sense"),
        (1.2, "It must be between 0 and 1 but got 1.2"),
        (0.0, "It must be between 0 and 1 but got 0.0"),
        (21, r"The chosen rank 21 is larger than the weight shape \(20\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert_to_lora(model, rank)
    with pytest.raises(TypeError, match="Could not detect any layer that supports LoRA conversion"):
        convert_to_lora(Net(), 2)
    with pytest.raises(ValueError, match="The adapter's config sets bias=lora_only"):
        convert_to_lora(make(bias="lora_only"), 2)


def test_it_warns_and_can_compile_and_show_progress(capsys: pytest.CaptureFixture[str]) -> None:
    model = make(target_modules=["lin"])
    with pytest.warns(UserWarning, match="that is already a LoRA adapter. There is typically no need"):
        _, plain = convert_to_lora(model, 3, progressbar=True)
    assert "Converting to LoRA" in capsys.readouterr().err
    _, compiled = convert_to_lora(copy.deepcopy(model), 3, compile_kwargs={"backend": "eager"})
    for key in plain:
        torch.testing.assert_close(compiled[key], plain[key])


@pytest.mark.parametrize(("share", "count"), [(0.1, 1), (0.6, 1), (0.63, 1), (0.7, 2), (1.0, 3)])
def test_cutoff_index(share: float, count: int) -> None:
    assert cutoff_index(torch.tensor([4.0, 3.0, 0.5]), share) == count
